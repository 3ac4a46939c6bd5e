"""An export of an NBD server.

Invariants:
- where the server says that connections see each other's writes (multi-conn), several are used;
  otherwise one;
- a connection that is lost takes what was under way with it: OriginGone for each. Nothing touches
  the memory once the library has hung up. The server may carry on a write that it has already
  received, which no client of NBD can prevent; it is done before the next connection is made, as
  far as the server ends the old one first;
- the next call after a loss connects anew. What is there then must not be smaller than what was;
- a write that was answered and not flushed counts as lost with its connection (`losses`): the
  server may have crashed, and a flush of the next one would say nothing of it.

A server has no lock that a client could take, so nothing keeps others away: docs/origins.md.
Source: proto.md of https://github.com/NetworkBlockDevice/nbd, libnbd(3).
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio
from trio.lowlevel import Abort

from pmemfs.errors import OriginGone, UnusableOrigin, sentence_of, system_error
from pmemfs.origin.base import MOST_BYTES, Identity, Origin, say_nothing
from pmemfs.origin.libnbd import (
    DIRECTION_READ,
    DIRECTION_WRITE,
    FLAG_NO_HOLE,
    Facts,
    LibNbd,
)
from pmemfs.origin.marks import ends_of, mark_of
from pmemfs.origin.naming import NbdName
from pmemfs.origin.vectors import Vectors
from pmemfs.units import MIB

CONNECT_SECONDS = 10.0
CONNECTIONS = 4
SECTOR_BYTES = 512
_MOST_UNIT_BYTES = 4096
_RANGE_BYTES = 1024 * MIB
"""Of one trim or zero; a request has 32 bits for it."""
_LOST = -1
_GIVE_WAY_SECONDS = 0.001


@dataclass(slots=True)
class _Command:
    """A command that the server has not answered yet, and the memory that it is about."""

    memory: Vectors | None
    task: trio.lowlevel.Task | None = None
    number: int | None = None
    """Its errno, 0 for success, or _LOST; None as long as it is under way."""

    def end(self, number: int) -> None:
        self.number = number
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)


class Connection:
    """One connection, with two tasks of the system that move its bytes."""

    def __init__(self, library: LibNbd, handle: int, name: str, lost: Callable[[], None]) -> None:
        """Take a handle that is connected over; `lost` is told of its end, unless by `close`."""
        self._lost = lost
        self.facts = library.facts(handle)
        self.is_over = False
        self._library = library
        self._handle = handle
        self._name = name
        self._fd = library.fd(handle)
        self._waiting: dict[int, _Command] = {}
        self._wants_to_write = trio.lowlevel.ParkingLot()
        self._is_idle = trio.Event()
        trio.lowlevel.spawn_system_task(self._read_always)
        trio.lowlevel.spawn_system_task(self._write_always)

    @property
    def under_way(self) -> int:
        """How many commands have no answer yet."""
        return len(self._waiting)

    async def carry_out(
        self, begin: Callable[..., int], *words: int, memory: Vectors | None = None
    ) -> None:
        """Begin a command and wait for its answer. Raises OSError, OriginGone.

        `memory` is kept until it is over, and nothing cancels it.
        """
        if self.is_over:
            raise OriginGone(name=self._name, why="the connection is lost")
        try:
            cookie = begin(self._handle, *words)
        except OSError:
            self._look()
            if self.is_over:
                raise OriginGone(name=self._name, why="the connection is lost") from None
            raise
        command = self._waiting[cookie] = _Command(memory)
        # Whatever is there to be read was read while the command was begun, so what is done by now
        # makes the socket readable no more.
        self._look()
        if not self.is_over and self._library.direction(self._handle) & DIRECTION_WRITE:
            self._wants_to_write.unpark()
        if command.number is None:
            command.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_never)
        if command.number == _LOST:
            raise OriginGone(name=self._name, why="the connection is lost")
        if command.number:
            raise system_error(command.number)

    def hang_up(self) -> None:
        """End the connection now; what is under way fails."""
        if self.is_over:
            return
        self.is_over = True
        trio.lowlevel.notify_closing(self._fd)
        self._wants_to_write.unpark_all()
        self._library.close(self._handle)
        waiting, self._waiting = self._waiting, {}
        for command in waiting.values():
            command.end(_LOST)
        self._is_idle.set()
        self._lost()

    async def close(self) -> None:
        """Wait for what is under way, and leave as a client should."""
        with trio.CancelScope(shield=True):
            while self._waiting:
                self._is_idle = trio.Event()
                await self._is_idle.wait()
        if not self.is_over:
            self._lost = _nothing
            self._library.say_goodbye(self._handle)
            self.hang_up()

    async def _read_always(self) -> None:
        while not self.is_over:
            try:
                await trio.lowlevel.wait_readable(self._fd)
            except (trio.ClosedResourceError, OSError):
                return
            if self.is_over:
                return
            if not self._library.direction(self._handle) & DIRECTION_READ:
                # It sends first. To wait for what is readable already would be a busy loop.
                await trio.sleep(_GIVE_WAY_SECONDS)
                continue
            self._library.notify_read(self._handle)
            self._look()

    async def _write_always(self) -> None:
        while not self.is_over:
            if not self._library.direction(self._handle) & DIRECTION_WRITE:
                await self._wants_to_write.park()
                continue
            try:
                await trio.lowlevel.wait_writable(self._fd)
            except (trio.ClosedResourceError, OSError):
                return
            if self.is_over:
                return
            if self._library.direction(self._handle) & DIRECTION_WRITE:
                self._library.notify_write(self._handle)
                self._look()

    def _look(self) -> None:
        """Wake those whose commands are done; all of them if the connection has ended."""
        is_over = self._library.is_over(self._handle)
        while done := self._library.next_done(self._handle):
            cookie, number = done
            # The library gives what it can't finish an errno, as if the server had said so. A
            # server says ESHUTDOWN while it ends.
            is_lost = number == errno.ESHUTDOWN or (is_over and number)
            self._waiting.pop(cookie).end(_LOST if is_lost else number)
        if is_over:
            self.hang_up()
        elif not self._waiting:
            self._is_idle.set()


class NbdOrigin(Origin):
    """An export, by as many connections as its server takes together."""

    can_cut = True
    can_fence = False

    def __init__(self, name: NbdName, library: LibNbd, facts: Facts, *, read_only: bool) -> None:
        """`open` makes the first connection. Raises UnusableOrigin."""
        self.name = name.text
        self.read_only = read_only
        self._export = name.export
        self._library = library
        self._connections: list[Connection] = []
        self._connecting = trio.Lock()
        self._is_enough = False
        self._written = self._flushed = 0
        self._has_lost = False
        self.size_bytes = facts.size_bytes
        self.block_bytes = max(facts.least_bytes, SECTOR_BYTES)
        self.can_discard = facts.can_trim
        self.zeroes_on_discard = False
        if why := _why_unusable(facts, self.block_bytes, read_only):
            raise UnusableOrigin(name=self.name, why=why)

    @classmethod
    async def open(cls, name: NbdName, *, read_only: bool = False) -> NbdOrigin:
        """Connect. Raises NeedsPackage, OriginGone, UnusableOrigin."""
        library = LibNbd()
        handle = await _connected(library, name.text)
        try:
            found = cls(name, library, library.facts(handle), read_only=read_only)
        except BaseException:
            library.close(handle)
            raise
        found._take(handle)
        return found

    async def identity(self) -> Identity:
        await trio.lowlevel.checkpoint()
        return Identity("nbd", self._export, self.size_bytes)

    async def mark(self) -> bytes:
        return mark_of(await ends_of(self))

    async def read(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        vectors = Vectors(views, True, self.block_bytes)
        self._check(offset_bytes, vectors.length_bytes)
        connection = await self._connection()
        if vectors.count == 1:
            await connection.carry_out(
                self._library.read, vectors.first_address, vectors.length_bytes, offset_bytes,
                memory=vectors,
            )  # fmt: skip
        elif vectors.count:
            # A request has one address, and a request for each piece takes longer than a copy.
            copy = ctypes.create_string_buffer(vectors.length_bytes)
            await connection.carry_out(
                self._library.read, ctypes.addressof(copy), vectors.length_bytes, offset_bytes
            )
            vectors.scatter(ctypes.addressof(copy))

    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        vectors = Vectors(views, False, self.block_bytes)
        self._check_change(offset_bytes, vectors.length_bytes)
        connection = await self._connection()
        if vectors.count == 1:
            await connection.carry_out(
                self._library.write, vectors.first_address, vectors.length_bytes, offset_bytes,
                memory=vectors,
            )  # fmt: skip
        elif vectors.count:
            copy = ctypes.create_string_buffer(vectors.length_bytes)
            vectors.gather(ctypes.addressof(copy))
            await connection.carry_out(
                self._library.write, ctypes.addressof(copy), vectors.length_bytes, offset_bytes
            )
        self._written += 1

    async def flush(self, losses: int | None = None) -> None:
        if losses is None and self._has_lost:
            self._has_lost = False
            raise self._gone_with_writes()
        expected = self.losses if losses is None else losses
        written = self._written
        connection = await self._connection()
        if connection.facts.can_flush:
            await connection.carry_out(self._library.flush)
        if self.losses != expected:
            self._has_lost = False
            raise self._gone_with_writes()
        self._flushed = max(self._flushed, written)

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self._check_change(offset_bytes, length_bytes)
        for start, step in _steps(offset_bytes, length_bytes if self.can_discard else 0):
            await (await self._connection()).carry_out(self._library.trim, step, start)
            self._written += 1

    async def write_zeroes(self, offset_bytes: int, length_bytes: int, *, may_trim: bool) -> None:
        self._check_change(offset_bytes, length_bytes)
        connection = await self._connection()
        if not connection.facts.can_zero:
            await self._store_zeroes(offset_bytes, length_bytes)
            return
        flags = 0 if may_trim else FLAG_NO_HOLE
        for start, step in _steps(offset_bytes, length_bytes):
            await (await self._connection()).carry_out(self._library.zero, step, start, flags)
            self._written += 1

    async def fence(self, say: Callable[[str], None] = say_nothing) -> None:
        await trio.lowlevel.checkpoint()

    async def resize_seen(self) -> int:
        """A server tells the size when one connects, so this connects anew."""
        handle = await _connected(self._library, self.name)
        old, self._connections = self._connections, []
        fresh = self._take(handle)
        self.size_bytes = fresh.facts.size_bytes & -self.block_bytes
        for connection in old:
            await connection.close()
        return self.size_bytes

    async def cut(self) -> None:
        for connection in self._connections:
            connection.hang_up()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        if (offset_bytes | length_bytes) % self.block_bytes:
            raise system_error(errno.EINVAL)
        if offset_bytes + length_bytes > self.size_bytes:
            raise system_error(errno.EINVAL)

    def _check_change(self, offset_bytes: int, length_bytes: int) -> None:
        if self.read_only:
            raise system_error(errno.EROFS)
        self._check(offset_bytes, length_bytes)

    async def _connection(self) -> Connection:
        """The connection with the least to do; a new one while all have something.

        Raises OriginGone if there is none and none can be made.
        """
        best = min(self._connections, key=_load, default=None)
        if best is None or best.is_over:
            async with self._connecting:
                self._connections = [each for each in self._connections if not each.is_over]
                return self._connections[0] if self._connections else await self._connect_again()
        may_be_more = best.under_way and best.facts.can_multi_conn and not self._is_enough
        if may_be_more and not self._connecting.locked():
            async with self._connecting:
                with suppress(OriginGone):
                    return await self._connect_again()
                # A server may take fewer connections than we would like.
                self._is_enough = True
                return await self._connection()
        return best

    async def _connect_again(self) -> Connection:
        handle = await _connected(self._library, self.name)
        size_bytes = self._library.facts(handle).size_bytes
        if size_bytes < self.size_bytes:
            self._library.close(handle)
            why = f"what is there now has {size_bytes} bytes, and it had {self.size_bytes}"
            raise OriginGone(name=self.name, why=why)
        return self._take(handle)

    def _take(self, handle: int) -> Connection:
        connection = Connection(self._library, handle, self.name, self._note_loss)
        self._connections.append(connection)
        self._is_enough = len(self._connections) >= CONNECTIONS
        return connection

    def _note_loss(self) -> None:
        if self._written != self._flushed:
            self.losses += 1
            self._has_lost = True
            self._flushed = self._written

    def _gone_with_writes(self) -> OriginGone:
        why = "the connection was lost, and with it what was written and not flushed yet"
        return OriginGone(name=self.name, why=why)


async def _connected(library: LibNbd, uri: str) -> int:
    """Connect in a thread, which is left to itself if the server doesn't answer in time."""
    given_up = trio.Event()

    def connect() -> int:
        handle = library.connect(uri)
        if given_up.is_set():
            library.close(handle)
        return handle

    with trio.move_on_after(CONNECT_SECONDS):
        try:
            return await trio.to_thread.run_sync(connect, abandon_on_cancel=True)
        except OSError as error:
            raise OriginGone(name=uri, why=sentence_of(error)) from None
        except trio.Cancelled:
            given_up.set()
            raise
    raise OriginGone(name=uri, why=f"its server has not answered for {CONNECT_SECONDS:.0f} s")


def _why_unusable(facts: Facts, block_bytes: int, read_only: bool) -> str:
    if facts.is_read_only and not read_only:
        return "its server gives it for reading only"
    if block_bytes > _MOST_UNIT_BYTES:
        return f"its server takes no requests that are smaller than {block_bytes} bytes"
    if facts.size_bytes % block_bytes or not facts.size_bytes:
        return f"its size of {facts.size_bytes} bytes is not a multiple of {block_bytes}"
    if 0 < facts.most_bytes < MOST_BYTES:
        return f"its server takes no requests that are larger than {facts.most_bytes} bytes"
    return ""


def _steps(offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
    """A range in pieces that a request can say."""
    end_bytes = offset_bytes + length_bytes
    return [(start, min(_RANGE_BYTES, end_bytes - start))
            for start in range(offset_bytes, end_bytes, _RANGE_BYTES)]  # fmt: skip


def _nothing() -> None:
    pass


def _load(connection: Connection) -> tuple[bool, int]:
    return connection.is_over, connection.under_way


def _never(_: object) -> Abort:
    """The library may touch the memory until the command is over, so nothing ends the wait."""
    return Abort.FAILED
