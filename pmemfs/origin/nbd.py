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

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeVarTuple

import trio
from trio.lowlevel import Abort

from pmemfs.errors import NeedsPackage, OriginGone, UnusableOrigin, sentence_of, system_error
from pmemfs.origin import libnbd
from pmemfs.origin.base import MOST_BYTES, Identity, Origin, say_nothing, wake
from pmemfs.origin.libnbd import Handle
from pmemfs.origin.marks import ends_of, mark_of
from pmemfs.origin.naming import NbdName
from pmemfs.origin.vectors import Vectors
from pmemfs.units import MIB

LIBRARY, PACKAGE = "libnbd.so.0", "libnbd0"
CONNECT_SECONDS = 10.0
CONNECTIONS = 4
SECTOR_BYTES = 512
_MOST_UNIT_BYTES = 4096
_RANGE_BYTES = 1024 * MIB
"""Of one trim or zero; a request has 32 bits for it."""
_FULL = 16
"""So many requests of a connection are under way before another one is used; nbdkit carries out so
many of a connection at once."""
_GIVE_WAY_SECONDS = 0.001

_Words = TypeVarTuple("_Words")


class Facts(NamedTuple):
    """What a server says of an export."""

    size_bytes: int
    is_read_only: bool
    can_flush: bool
    can_trim: bool
    can_zero: bool
    can_multi_conn: bool
    least_bytes: int
    """Of a request; 0 where the server doesn't say."""
    most_bytes: int


class Connection:
    """One connection, with two tasks of the system that move its bytes."""

    def __init__(self, handle: Handle, name: str, lost: Callable[[Connection], None]) -> None:
        """Take a handle that is connected over; `lost` is told of its end, unless by `close`."""
        self.facts = Facts(*handle.facts())
        self.handle = handle
        self.is_over = False
        self._lost = lost
        self._name = name
        self._fd = handle.fd
        self._wants_to_write = trio.lowlevel.ParkingLot()
        self._is_idle = trio.Event()
        trio.lowlevel.spawn_system_task(self._read_always)
        trio.lowlevel.spawn_system_task(self._write_always)

    async def carry_out(
        self, begin: Callable[[Vectors, *_Words], None], vectors: Vectors, *words: *_Words
    ) -> None:
        """Begin a command and wait for its answer. Raises OSError, OriginGone.

        Nothing cancels it.
        """
        if self.is_over:
            raise self._gone()
        try:
            begin(vectors, *words)
        except OSError as error:
            self._wake(self.handle.done())
            raise (self._gone() if self.is_over else error) from None
        self.see_what_came()
        if not vectors.is_done:
            vectors.waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_never)
        if vectors.result < 0:
            # The library gives what it can't finish an errno, as if the server had said so. A
            # server says ESHUTDOWN while it ends.
            if vectors.result == -errno.ESHUTDOWN or self.is_over:
                raise self._gone()
            raise system_error(-vectors.result)

    def begin_read(self, vectors: Vectors, offset_bytes: int) -> bool:
        """Begin to read, and wait for nothing; `see_what_came` has to follow. False if it can't."""
        if self.is_over:
            return False
        try:
            self.handle.read(vectors, offset_bytes)
        except OSError:
            return False
        return True

    def see_what_came(self) -> None:
        """What was there to be read was read while commands were begun, and is not announced
        again."""
        self._wake(self.handle.done())
        if self.handle.wants_to_write:
            self._wants_to_write.unpark()

    def hang_up(self, *, is_goodbye: bool = False) -> None:
        """End the connection now; what is under way fails."""
        if self.is_over:
            return
        self.is_over = True
        trio.lowlevel.notify_closing(self._fd)
        self._wants_to_write.unpark_all()
        for vectors in self.handle.close(is_goodbye):
            vectors.result = -errno.ESHUTDOWN
            self._end(vectors)
        self._is_idle.set()
        if not is_goodbye:
            self._lost(self)

    async def close(self) -> None:
        """Wait for what is under way, and leave as a client should."""
        with trio.CancelScope(shield=True):
            while self.handle.under_way:
                self._is_idle = trio.Event()
                await self._is_idle.wait()
        self.hang_up(is_goodbye=True)

    async def _read_always(self) -> None:
        with suppress(trio.ClosedResourceError, OSError):
            while not self.is_over:
                await trio.lowlevel.wait_readable(self._fd)
                if self.handle.wants_to_read:
                    self._wake(self.handle.read_more())
                else:
                    # It sends first. To wait for what is readable already would be a busy loop.
                    await trio.sleep(_GIVE_WAY_SECONDS)

    async def _write_always(self) -> None:
        with suppress(trio.ClosedResourceError, OSError):
            while not self.is_over:
                if not self.handle.wants_to_write:
                    await self._wants_to_write.park()
                    continue
                await trio.lowlevel.wait_writable(self._fd)
                if self.handle.wants_to_write:
                    self._wake(self.handle.write_more())

    def _wake(self, done: list[Vectors]) -> None:
        """Wake those whose commands are done; all of them if the connection has ended."""
        for vectors in done:
            self._end(vectors)
        if self.handle.is_over:
            self.hang_up()
        elif not self.handle.under_way:
            self._is_idle.set()

    def _end(self, vectors: Vectors) -> None:
        vectors.is_done = True
        wake(vectors)

    def _gone(self) -> OriginGone:
        return OriginGone(name=self._name, why="the connection is lost")


class NbdOrigin(Origin):
    """An export, by as many connections as its server takes together."""

    can_cut = True
    can_fence = False

    def __init__(self, name: NbdName, facts: Facts, *, read_only: bool) -> None:
        """`open` makes the first connection. Raises UnusableOrigin."""
        self.name = name.text
        self.read_only = read_only
        self._export = name.export
        self._connections: list[Connection] = []
        """Those that live."""
        self._leaving: list[Connection] = []
        """Those that answer what is under way, and get nothing new."""
        self._connecting = trio.Lock()
        self._most = CONNECTIONS if facts.can_multi_conn else 1
        self._begun = self._ended = self._flushed = 0
        """Changes, by what is known of them. One counts as unflushed from its beginning: its answer
        and the end of its connection may come together, and then the end is noted first."""
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
        if not libnbd.load(LIBRARY):
            raise NeedsPackage(what="an NBD origin", package=PACKAGE,
                               remedy="scripts/install-origins installs it")  # fmt: skip
        handle = await _connected(name.text)
        try:
            found = cls(name, Facts(*handle.facts()), read_only=read_only)
        except BaseException:
            handle.close(True)
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
        connection = self._live() or await self._connection()
        await connection.carry_out(connection.handle.read, vectors, offset_bytes)

    def begin_reads(self, reads: Sequence[tuple[int, Vectors]]) -> int:
        used: dict[Connection, None] = {}
        begun = 0
        for offset_bytes, vectors in reads:
            connection = self._live()
            if connection is None:
                # One more has to be made first. Whoever can wait does it.
                break
            used[connection] = None
            if not connection.begin_read(vectors, offset_bytes):
                break
            begun += 1
        for connection in used:
            connection.see_what_came()
        return begun

    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        vectors = Vectors(views, False, self.block_bytes)
        self._check_change(offset_bytes, vectors.length_bytes)
        connection = self._live() or await self._connection()
        with self._changing():
            await connection.carry_out(connection.handle.write, vectors, offset_bytes)

    async def flush(self, losses: int | None = None) -> None:
        if losses is None and self._has_lost:
            self._has_lost = False
            raise self._gone_with_writes()
        expected = self.losses if losses is None else losses
        # What is under way may be answered before the flush and not be covered by it.
        covered = self._begun if self._begun == self._ended else self._flushed
        connection = self._live() or await self._connection()
        if connection.facts.can_flush:
            await connection.carry_out(connection.handle.flush, _no_memory())
        if self.losses != expected:
            self._has_lost = False
            raise self._gone_with_writes()
        self._flushed = max(self._flushed, covered)

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self._check_change(offset_bytes, length_bytes)
        for start, step in _steps(offset_bytes, length_bytes if self.can_discard else 0):
            connection = self._live() or await self._connection()
            with self._changing():
                await connection.carry_out(connection.handle.trim, _no_memory(), start, step)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int, *, may_trim: bool) -> None:
        self._check_change(offset_bytes, length_bytes)
        connection = self._live() or await self._connection()
        if not connection.facts.can_zero:
            await self._store_zeroes(offset_bytes, length_bytes)
            return
        for start, step in _steps(offset_bytes, length_bytes):
            connection = self._live() or await self._connection()
            with self._changing():
                await connection.carry_out(
                    connection.handle.zero, _no_memory(), start, step, may_trim
                )

    async def fence(self, say: Callable[[str], None] = say_nothing) -> None:
        await trio.lowlevel.checkpoint()

    async def resize_seen(self) -> int:
        """A server tells the size when one connects, so this connects anew."""
        handle = await _connected(self.name)
        old, self._connections = self._connections, []
        self.size_bytes = self._take(handle).facts.size_bytes & -self.block_bytes
        self._leaving += old
        for connection in old:
            await connection.close()
            self._leaving.remove(connection)
        return self.size_bytes

    async def cut(self) -> None:
        for connection in (*self._connections, *self._leaving):
            connection.hang_up()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        for connection in list(self._connections):
            await connection.close()
        self._connections.clear()

    def _live(self) -> Connection | None:
        """A connection to use now; None if one has to be made first."""
        if connection := self._with_room():
            return connection
        if len(self._connections) < self._most and not self._connecting.locked():
            return None
        return min(self._connections, key=_load, default=None)

    def _with_room(self) -> Connection | None:
        """The first ones are filled first: answers that come together are taken together."""
        for connection in self._connections:
            if connection.handle.under_way < _FULL:
                return connection
        return None

    async def _connection(self) -> Connection:
        """A connection that may have been made for it. Raises OriginGone if none can be made."""
        async with self._connecting:
            if connection := self._with_room():
                return connection
            if not self._connections:
                return await self._connect_again()
            with suppress(OriginGone):
                return await self._connect_again()
            if self._connections:
                # A server may take fewer connections than we would like.
                self._most = len(self._connections)
                return self._connections[0]
            return await self._connect_again()

    async def _connect_again(self) -> Connection:
        handle = await _connected(self.name)
        size_bytes = Facts(*handle.facts()).size_bytes
        if size_bytes < self.size_bytes:
            handle.close(True)
            why = f"what is there now has {size_bytes} bytes, and it had {self.size_bytes}"
            raise OriginGone(name=self.name, why=why)
        return self._take(handle)

    def _take(self, handle: Handle) -> Connection:
        connection = Connection(handle, self.name, self._note_loss)
        self._connections.append(connection)
        return connection

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Within this a change is under way."""
        self._begun += 1
        try:
            yield
        finally:
            self._ended += 1

    def _note_loss(self, connection: Connection) -> None:
        with suppress(ValueError):
            self._connections.remove(connection)
        if self._begun != self._flushed:
            self.losses += 1
            self._has_lost = True
            self._flushed = self._begun

    def _gone_with_writes(self) -> OriginGone:
        why = "the connection was lost, and with it what was written and not flushed yet"
        return OriginGone(name=self.name, why=why)


async def _connected(uri: str) -> Handle:
    """Connect in a thread, which is left to itself if the server doesn't answer in time."""
    with trio.move_on_after(CONNECT_SECONDS):
        try:
            return await trio.to_thread.run_sync(Handle, uri, abandon_on_cancel=True)
        except OSError as error:
            raise OriginGone(name=uri, why=sentence_of(error)) from None
    raise OriginGone(name=uri, why=f"its server has not answered for {CONNECT_SECONDS:.0f} s")


def _no_memory() -> Vectors:
    """For a command that is about no memory."""
    return Vectors((), False, 1)


def _why_unusable(facts: Facts, block_bytes: int, read_only: bool) -> str:
    if facts.is_read_only and not read_only:
        return "its server gives it for reading only, which serves the policy read-only alone"
    if block_bytes > _MOST_UNIT_BYTES:
        return f"its server takes no requests that are smaller than {block_bytes} bytes"
    if not facts.size_bytes:
        return "it is empty"
    if facts.size_bytes % block_bytes:
        return f"its size of {facts.size_bytes} bytes is not a multiple of {block_bytes}"
    if 0 < facts.most_bytes < MOST_BYTES:
        return f"its server takes no requests that are larger than {facts.most_bytes} bytes"
    return ""


def _steps(offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
    """A range in pieces that a request can say."""
    end_bytes = offset_bytes + length_bytes
    return [(start, min(_RANGE_BYTES, end_bytes - start))
            for start in range(offset_bytes, end_bytes, _RANGE_BYTES)]  # fmt: skip


def _load(connection: Connection) -> int:
    return connection.handle.under_way


def _never(_: object) -> Abort:
    """The library may touch the memory until the command is over, so nothing ends the wait."""
    return Abort.FAILED
