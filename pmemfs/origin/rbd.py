"""An image of a Ceph cluster.

Invariants:
- the library's own cache is off, because the pool is the cache;
- whoever has the fence has the image's exclusive lock, and no other client watches the image. The
  lock alone is not enough: clients hand it to each other when asked, so a virtual machine that uses
  the image would lose it to us in the middle of its writes;
- a cluster doesn't report that it is away. Its commands wait until it is back, and nothing can end
  them (`can_cut`), so the process has to end while one hangs;
- of a client of ours that is known to be dead nothing has to be waited for: its lock is broken,
  which keeps its late writes out of the image, too;
- our writes leave the image's time of modification alone (`rbd_mtime_update_interval`), so it
  changes when another client writes. What a second cache of ours writes is told by the token that
  each leaves in the metadata of the image before its first change. Not before that: the fence comes
  before the mark is compared, so that nobody writes between the two.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from trio.lowlevel import Abort

from pmemfs.errors import (
    OriginBusy,
    OriginFenced,
    OriginGone,
    UnusableOrigin,
    sentence_of,
    system_error,
)
from pmemfs.origin.base import Identity, Left, Origin, say_nothing, wake
from pmemfs.origin.librbd import (
    FEATURE_EXCLUSIVE_LOCK,
    Cluster,
    Image,
    Watcher,
    load,
)
from pmemfs.origin.marks import mark_of
from pmemfs.origin.naming import RbdName
from pmemfs.origin.vectors import Vectors
from pmemfs.units import GIB

OPEN_SECONDS = 30.0
WATCH_SECONDS = 40.0
"""A client that died without a word is forgotten after 30 s (osd_client_watch_timeout)."""
_LOOK_SECONDS = 0.5
_LIVING_SECONDS = 3.0
"""A client that answers is waited for no longer: one that is just closing the image is gone then.
"""
_ANSWER_SECONDS = 3.0
_RANGE_BYTES = GIB
_WRITER = "pmemfs_writer"
_SETTINGS = {
    "rbd_cache": "false",
    "rbd_mtime_update_interval": "0",
    "rbd_atime_update_interval": "0",
    "client_mount_timeout": "10",
}
_GONE = (errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTUNREACH, errno.ECONNREFUSED)


class RbdOrigin(Origin):
    """An image that is open."""

    block_bytes = 512
    zeroes_on_discard = False
    can_discard = True
    can_cut = False

    def __init__(
        self, name: RbdName, cluster: Cluster, image: Image, facts: _Facts, *, read_only: bool
    ) -> None:
        """Take an open image over. Raises UnusableOrigin."""
        self.name = name.text
        self.read_only = read_only
        self.size_bytes = facts.size_bytes
        self.can_fence = bool(facts.features & FEATURE_EXCLUSIVE_LOCK) and not read_only
        self._spec = name
        self._cluster = cluster
        self._image = image
        self._identity = facts.identity
        self._client = facts.client
        self._commands = image.commands
        self._token = ""
        """To be left before the next change; empty if there is nothing to leave."""
        self._writer = uuid.uuid4().hex
        """The token of this mount, whose daemons have the same one."""
        self._dead: tuple[int, ...] = ()
        """The clients of daemons of this mount that have died, as far as anybody remembers them."""
        self._signing = trio.Lock()
        self._is_idle = trio.Event()
        self._stopping = trio.CancelScope()
        self._has_stopped = trio.Event()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._commands.notify(self._eventfd)
        trio.lowlevel.spawn_system_task(self._reap_always)

    @classmethod
    async def open(
        cls, name: RbdName, *, read_only: bool = False, left: Left | None = None
    ) -> RbdOrigin:
        """Connect and open. Raises NeedsPackage, OriginGone, UnusableOrigin."""
        library = load()
        read_only = read_only or bool(name.snapshot)
        with trio.move_on_after(OPEN_SECONDS):
            # A thread that waits for a cluster which is away is left to itself.
            cluster, image, facts = await trio.to_thread.run_sync(
                _opened, library, name, read_only, abandon_on_cancel=True
            )
            origin = cls(name, cluster, image, facts, read_only=read_only)
            if left and left.data:
                origin._writer, *clients = left.data.decode().split()
                origin._dead = tuple(map(int, clients))
            return origin
        raise OriginGone(name=name.text, why=f"no answer for {OPEN_SECONDS:.0f} s")

    async def identity(self) -> Identity:
        await trio.lowlevel.checkpoint()
        return Identity("rbd", self._identity, self.size_bytes)

    async def mark(self) -> bytes:
        return await trio.to_thread.run_sync(self._find_mark, "", abandon_on_cancel=True)

    async def next_mark(self) -> bytes | None:
        return await trio.to_thread.run_sync(self._find_mark, self._token, abandon_on_cancel=True)

    async def read(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        vectors = Vectors(views, True, self.block_bytes)
        self._check(offset_bytes, vectors.length_bytes)
        self._commands.read(vectors, offset_bytes)
        if await self._carried_out(vectors) != vectors.length_bytes:
            # Somebody has made the image smaller.
            raise system_error(errno.EIO)

    def begin_reads(self, reads: Sequence[tuple[int, Vectors]]) -> int:
        begun = 0
        with suppress(OSError):
            for offset_bytes, vectors in reads:
                self._commands.read(vectors, offset_bytes)
                begun += 1
        return begun

    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        vectors = Vectors(views, False, self.block_bytes)
        self._check_change(offset_bytes, vectors.length_bytes)
        if self._token:
            await self._sign()
        self._commands.write(vectors, offset_bytes)
        await self._carried_out(vectors)

    async def flush(self, losses: int | None = None) -> None:
        vectors = _no_memory()
        self._commands.flush(vectors)
        await self._carried_out(vectors)

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self._check_change(offset_bytes, length_bytes)
        if self._token:
            await self._sign()
        for start, step in _steps(offset_bytes, length_bytes):
            vectors = _no_memory()
            self._commands.discard(vectors, start, step)
            await self._carried_out(vectors)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int, *, may_trim: bool) -> None:
        self._check_change(offset_bytes, length_bytes)
        if self._token:
            await self._sign()
        for start, step in _steps(offset_bytes, length_bytes):
            vectors = _no_memory()
            self._commands.zero(vectors, start, step, may_trim)
            await self._carried_out(vectors)

    async def fence(self, say: Callable[[str], None] = say_nothing) -> None:
        if not self.can_fence:
            if not self.read_only:
                say(f"{self.name} lacks the feature exclusive-lock, so nothing keeps another "
                    f"client from writing to it; 'rbd feature enable {self._spec.spec} "
                    "exclusive-lock' adds it")  # fmt: skip
            await trio.lowlevel.checkpoint()
            return
        if self._dead:
            await trio.to_thread.run_sync(self._shut_out_dead, abandon_on_cancel=True)
        await self._wait_for_watchers(say)
        await self._refuse_locks_by_hand()
        try:
            await trio.to_thread.run_sync(self._image.acquire_lock, abandon_on_cancel=True)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EBUSY):
                raise self._meant(error.errno or errno.EIO) from None
            raise OriginBusy(
                name=self.name, why="another client has its exclusive lock and keeps it"
            ) from None
        # A daemon that has died may have left the token of this mount.
        find = partial(self._image.metadata, _WRITER)
        is_signed = await trio.to_thread.run_sync(find, abandon_on_cancel=True) == self._writer
        self._token = "" if is_signed else self._writer

    def left(self) -> Left:
        if not self.can_fence:
            return Left()
        clients = map(str, (*self._dead, self._client))
        return Left((), " ".join([self._writer, *clients]).encode())

    async def resize_seen(self) -> int:
        size_bytes = await trio.to_thread.run_sync(self._image.size_bytes, abandon_on_cancel=True)
        self.size_bytes = size_bytes & -self.block_bytes
        return self.size_bytes

    async def cut(self) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        while self._commands.under_way:
            self._is_idle = trio.Event()
            await self._is_idle.wait()
        self._stopping.cancel()
        await self._has_stopped.wait()
        await trio.to_thread.run_sync(self._let_go, abandon_on_cancel=True)

    async def _carried_out(self, vectors: Vectors) -> int:
        """Wait for the result of a command. Raises OSError, OriginFenced, OriginGone."""
        if not vectors.is_done:
            vectors.waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_never)
        if vectors.result < 0:
            raise self._meant(-vectors.result)
        return vectors.result

    def _meant(self, number: int) -> Exception:
        if number == errno.ESHUTDOWN:
            why = "the cluster refuses this client, because another one has broken its lock"
            return OriginFenced(name=self.name, why=why)
        if number in _GONE:
            return OriginGone(name=self.name, why=os.strerror(number).lower())
        return system_error(number)

    async def _reap_always(self) -> None:
        with self._stopping:
            while True:
                await trio.lowlevel.wait_readable(self._eventfd)
                os.eventfd_read(self._eventfd)
                while done := self._commands.done():
                    for vectors in done:
                        wake(vectors)
                if not self._commands.under_way:
                    self._is_idle.set()
        self._has_stopped.set()

    async def _wait_for_watchers(self, say: Callable[[str], None]) -> None:
        """Wait until no other client has the image open. Raises OriginBusy."""
        began = trio.current_time()
        silent: set[int] = set()
        while others := await self._others():
            living = await self._living([each for each in others if each.client not in silent])
            seconds = trio.current_time() - began
            if (living and seconds > _LIVING_SECONDS) or seconds > WATCH_SECONDS:
                why = f"{_named(living or others)} it open; 'rbd status {self._spec.spec}' shows it"
                raise OriginBusy(name=self.name, why=why)
            newly = [each for each in others if each not in living and each.client not in silent]
            if newly:
                say(f"no answer from {_names(newly)}, which had {self.name} open; waiting up to "
                    f"{WATCH_SECONDS:.0f} s, because a client that has died is forgotten after "
                    f"30 s")  # fmt: skip
                silent.update(each.client for each in newly)
            await trio.sleep(_LOOK_SECONDS)

    async def _refuse_locks_by_hand(self) -> None:
        """Raise OriginBusy for a lock that librbd would wait for until somebody takes it away."""
        for locker in await trio.to_thread.run_sync(self._image.lockers, abandon_on_cancel=True):
            if locker.is_by_hand:
                remove = f"rbd lock rm {self._spec.spec} '{locker.cookie}' {locker.client}"
                why = f"{locker.client} has a lock of its own on it, {locker.cookie!r}"
                raise OriginBusy(name=self.name, why=f'{why}; "{remove}" takes it away')

    async def _living(self, watchers: list[Watcher]) -> list[Watcher]:
        """Those of some clients that are known to live."""
        if not watchers:
            return []
        answering = await trio.to_thread.run_sync(
            self._cluster.answering, self._image.id(), _ANSWER_SECONDS, abandon_on_cancel=True
        )
        return [each for each in watchers if each.client in answering]

    async def _others(self) -> list[Watcher]:
        found = await trio.to_thread.run_sync(self._image.watchers, abandon_on_cancel=True)
        ours = (*self._dead, self._client)
        return [watcher for watcher in found if watcher.client not in ours]

    def _shut_out_dead(self) -> None:
        """Take the lock from a client of a dead process of ours. Raises OSError, OriginGone."""
        watchers = {each.client: each.address for each in self._image.watchers()}
        # What nobody remembers any more is waited for by nobody.
        self._dead = tuple(client for client in self._dead if client in watchers)
        try:
            owner = self._image.lock_owner()
            if owner and owner in (watchers[client] for client in self._dead):
                self._image.break_lock(owner)
        except OSError as error:
            # Nobody has it any more, or another client, which is waited for.
            if error.errno not in (errno.ENOENT, errno.EBUSY):
                raise self._meant(error.errno or errno.EIO) from None

    async def _sign(self) -> None:
        """Note in the image that this cache changes it from now on."""
        async with self._signing:
            if self._token:
                token = self._token
                try:
                    await trio.to_thread.run_sync(self._image.set_metadata, _WRITER, token)
                except OSError as error:
                    raise self._meant(error.errno or errno.EIO) from None
                self._token = ""

    def _find_mark(self, token: str) -> bytes:
        """The mark as it is, or as it will be once a token was left."""
        # What an open image knows of its time is what it was told when it was opened.
        image = self._cluster.open(self._spec.image, self._spec.snapshot, read_only=True)
        try:
            return mark_of(image.id(), image.modified_ns(), token or image.metadata(_WRITER))
        finally:
            image.close()

    def _let_go(self) -> None:
        with suppress(OSError):
            # An image that was taken away can't be given back.
            self._image.close()
        self._cluster.close()
        os.close(self._eventfd)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of an image when it is opened."""

    size_bytes: int
    features: int
    identity: str
    client: int


def _opened(library: Any, name: RbdName, read_only: bool) -> tuple[Cluster, Image, _Facts]:
    """Connect to the cluster and open the image, in a thread."""
    try:
        cluster = Cluster(library, name.user, name.conf, _SETTINGS)
    except OSError as error:
        why = f"its configuration {_conf_of(name)} can't be read: {sentence_of(error)}"
        raise UnusableOrigin(name=name.text, why=why) from None
    try:
        return cluster, *_open_image(cluster, name, read_only)
    except BaseException:
        cluster.close()
        raise


def _conf_of(name: RbdName) -> str:
    return name.conf or os.environ.get("CEPH_CONF", "/etc/ceph/ceph.conf")


def _open_image(cluster: Cluster, name: RbdName, read_only: bool) -> tuple[Image, _Facts]:
    who = f"client.{name.user or 'admin'}"
    absent = f"its configuration {_conf_of(name)} names no monitor, or no keyring of {who}"
    try:
        cluster.connect()
        absent = f"the cluster has no pool {name.pool!r}"
        cluster.enter(name.pool, name.namespace)
        absent = f"there is no such image; 'rbd ls {name.spec.rpartition('/')[0]}' shows what is"
        image = cluster.open(name.image, name.snapshot, read_only=read_only)
    except OSError as error:
        if error.errno in _GONE:
            raise OriginGone(name=name.text, why=sentence_of(error)) from None
        why = f"it can't be opened: {sentence_of(error)}"
        if error.errno == errno.ENOENT:
            why = absent
        elif error.errno in (errno.EACCES, errno.EPERM):
            why = f"the cluster refuses {who}: its key is wrong, or has no right to this"
        raise UnusableOrigin(name=name.text, why=why) from None
    fsid, pool, client = cluster.names
    parts = [fsid, str(pool), name.namespace, image.id(), name.snapshot]
    facts = _Facts(image.size_bytes(), image.features(), "/".join(parts), client)
    if facts.size_bytes % RbdOrigin.block_bytes or not facts.size_bytes:
        image.close()
        raise UnusableOrigin(name=name.text, why=f"its size of {facts.size_bytes} bytes is not a "
                             f"multiple of {RbdOrigin.block_bytes}")  # fmt: skip
    return image, facts


def _named(watchers: list[Watcher]) -> str:
    """Clients, as the subject of a sentence, with its verb."""
    is_one = len({each.client for each in watchers}) == 1
    return f"{_names(watchers)} {'has' if is_one else 'have'}"


def _names(watchers: list[Watcher]) -> str:
    return " and ".join(sorted({f"client {each.client} at {each.address}" for each in watchers}))


def _steps(offset_bytes: int, length_bytes: int) -> list[tuple[int, int]]:
    """A range in pieces that a command can say."""
    end_bytes = offset_bytes + length_bytes
    return [(start, min(_RANGE_BYTES, end_bytes - start))
            for start in range(offset_bytes, end_bytes, _RANGE_BYTES)]  # fmt: skip


def _no_memory() -> Vectors:
    """For a command that is about no memory."""
    return Vectors((), False, 1)


def _never(_: object) -> Abort:
    """The library may touch the memory until the command is over, so nothing ends the wait."""
    return Abort.FAILED
