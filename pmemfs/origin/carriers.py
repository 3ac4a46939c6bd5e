"""Two ways to carry transfers of a file or device out without the interpreter's lock.

The ring is the first choice. A task puts its request into the ring and gives way once; whatever
other tasks have put there meanwhile is given to the kernel by the same system call. One task of
the system waits for the ring and wakes the others. Threads do the same where the kernel forbids
rings, which containers often do; they are much slower (docs/origins.md has figures).

Invariant: nothing here can be cancelled once the kernel may have begun. See `base`.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio
from trio.lowlevel import Abort

from pmemfs.errors import system_error
from pmemfs.mountinfo import mount_of_device
from pmemfs.origin.base import wake
from pmemfs.origin.ring import Ring
from pmemfs.origin.vectors import Vectors

_RING_ENTRIES = 512
_THREADS = 64
_AGAIN = (-errno.EAGAIN, -errno.EINTR)


class Carrier(ABC):
    """Reads and writes all of a range, or raises OSError; EIO where the range has no end."""

    word: str
    """What reports call it."""

    @abstractmethod
    async def read(
        self, fd: int, offset_bytes: int, views: Sequence[memoryview], unit: int
    ) -> None:
        """Fill the views from a range; `unit` divides the length of each."""

    def begin_reads(self, fd: int, reads: Sequence[tuple[int, Vectors]]) -> int:
        """As `Origin.begin_reads`."""
        return 0

    @abstractmethod
    async def write(
        self, fd: int, offset_bytes: int, views: Sequence[memoryview], unit: int
    ) -> None:
        """Write the views to a range."""

    @abstractmethod
    async def sync(self, fd: int) -> None:
        """Do an fdatasync(2)."""

    @abstractmethod
    def hold(self, *fds: int) -> None:
        """As `Origin.hold`."""

    @abstractmethod
    async def close(self) -> None:
        """Wait for what is under way."""


def open_carrier(fd: int) -> Carrier:
    """A ring, or threads where the kernel gives none or a ring could hold up this process.

    Before it begins a transfer of a FUSE file, the ring asks the file's server whether it can be
    polled, and waits for the answer.
    """
    mount = mount_of_device(os.fstat(fd).st_dev)
    if mount is not None and mount.fs_type.startswith("fuse"):
        return ThreadCarrier()
    try:
        return RingCarrier(Ring(_RING_ENTRIES))
    except OSError:
        return ThreadCarrier()


class RingCarrier(Carrier):
    """Transfers by one io_uring."""

    word = "io_uring"

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._is_submitting = False
        self._is_idle = trio.Event()
        self._stopping = trio.CancelScope()
        self._has_stopped = trio.Event()
        trio.lowlevel.spawn_system_task(self._reap_always)

    def begin_reads(self, fd: int, reads: Sequence[tuple[int, Vectors]]) -> int:
        begun = 0
        with suppress(OSError):
            # The queue of a ring may be full, and stay full for now.
            for offset_bytes, vectors in reads:
                self._ring.read(fd, vectors, offset_bytes)
                begun += 1
        if not self._ring.submit():
            trio.lowlevel.spawn_system_task(self._submit_all)
        self._reap()
        return begun

    async def read(
        self, fd: int, offset_bytes: int, views: Sequence[memoryview], unit: int
    ) -> None:
        vectors = Vectors(views, True, unit)
        while vectors.count:
            self._ring.read(fd, vectors, offset_bytes)
            offset_bytes += await self._done(vectors)

    async def write(
        self, fd: int, offset_bytes: int, views: Sequence[memoryview], unit: int
    ) -> None:
        vectors = Vectors(views, False, unit)
        while vectors.count:
            self._ring.write(fd, vectors, offset_bytes)
            offset_bytes += await self._done(vectors)

    async def sync(self, fd: int) -> None:
        vectors = Vectors((), False, 1)
        self._ring.sync(fd, vectors)
        await self._carried_out(vectors)
        if vectors.result < 0:
            raise system_error(-vectors.result)

    def hold(self, *fds: int) -> None:
        self._ring.hold(fds)

    async def close(self) -> None:
        with trio.CancelScope(shield=True):
            while self._ring.under_way:
                self._is_idle = trio.Event()
                await self._is_idle.wait()
            # The descriptor must not be closed while the reaper waits for it.
            self._stopping.cancel()
            await self._has_stopped.wait()
        self._ring.close()

    async def _done(self, vectors: Vectors) -> int:
        """How many bytes were transferred of a request that was put into the ring."""
        await self._carried_out(vectors)
        done_bytes = vectors.result
        if done_bytes in _AGAIN:
            return 0
        if done_bytes <= 0:
            # No byte where there should be some: somebody has cut the file off.
            raise system_error(-done_bytes or errno.EIO)
        vectors.advance(done_bytes)
        return done_bytes

    async def _carried_out(self, vectors: Vectors) -> None:
        if not self._is_submitting:
            # The first of a round gives way, and then submits what all have prepared meanwhile.
            self._is_submitting = True
            await trio.lowlevel.cancel_shielded_checkpoint()
            self._is_submitting = False
            await self._submit_all()
            self._reap()
        if not vectors.is_done:
            vectors.waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_never)

    async def _submit_all(self) -> None:
        while not self._ring.submit():
            self._reap()
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def _reap_always(self) -> None:
        with self._stopping:
            while True:
                await trio.lowlevel.wait_readable(self._ring)
                self._reap()
        self._has_stopped.set()

    def _reap(self) -> None:
        for vectors in self._ring.reap():
            wake(vectors)
        if not self._ring.under_way:
            self._is_idle.set()


class ThreadCarrier(Carrier):
    """Transfers by system calls in threads of Python, which let go of its lock meanwhile."""

    word = "threads"

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(_THREADS)

    async def read(
        self, fd: int, offset_bytes: int, views: Sequence[memoryview], unit: int
    ) -> None:
        Vectors(views, True, unit)  # It refuses what no origin takes.
        await trio.to_thread.run_sync(
            _transfer_all, os.preadv, fd, offset_bytes, views, limiter=self._limiter
        )

    async def write(
        self, fd: int, offset_bytes: int, views: Sequence[memoryview], unit: int
    ) -> None:
        Vectors(views, False, unit)
        await trio.to_thread.run_sync(
            _transfer_all, os.pwritev, fd, offset_bytes, views, limiter=self._limiter
        )

    async def sync(self, fd: int) -> None:
        await trio.to_thread.run_sync(os.fdatasync, fd, limiter=self._limiter)

    def hold(self, *fds: int) -> None:
        # A process is not over before its threads' system calls are.
        pass

    async def close(self) -> None:
        with trio.CancelScope(shield=True):
            for _ in range(_THREADS):
                await self._limiter.acquire_on_behalf_of(object())


def _transfer_all(
    transfer: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    offset_bytes: int,
    views: Sequence[memoryview],
) -> None:
    left = list(views)
    while left:
        done_bytes = transfer(fd, left, offset_bytes)
        if done_bytes == 0:
            raise system_error(errno.EIO)
        offset_bytes += done_bytes
        while left and done_bytes >= len(left[0]):
            done_bytes -= len(left.pop(0))
        if done_bytes:
            left[0] = left[0][done_bytes:]


def _never(_: object) -> Abort:
    """The kernel may touch the memory until the request is done, so nothing ends the wait."""
    return Abort.FAILED
