"""The engine of a mount that the data plane serves: what the control plane adds to it.

`SharedEngine` is what the planes have in common, whatever the mount shows. `NativeEngine` is the
device of mode `block`: reads and writes come to it only where the tables did not prove an answer.
Invariants:
- memory is taken away from under a range only after a grace period in which everybody learns that
  there may be holes, so no touch of the mapping meets one unprepared;
- presence is changed under one lock, so what one task finds whole no other has just punched.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from pmemfs.clock import coarse_ns
from pmemfs.dataplane.counters import WorkerCounters, read_counters
from pmemfs.dataplane.layouts import Extent, FaultRecord, Operation
from pmemfs.dataplane.memmap import SharedMemmap
from pmemfs.dataplane.presence import expect_holes, look_again, survey
from pmemfs.dataplane.tables import Grace, SharedMemory
from pmemfs.errors import CannotGrow
from pmemfs.fuse.engine import Engine, PythonEngine
from pmemfs.fuse.statistics import EngineStatistics
from pmemfs.media.zones import Zone
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.units import MIB, format_size
from pmemfs.volume.linear import INODE, LinearVolume

log = logging.getLogger(__name__)

_STEP_BYTES = MIB
_GRACE_POLL_SECONDS = 0.0005
_PAUSE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class _Frames:
    """A range of a volume as the whole frames in it, in the pool, and what is left beside them."""

    head: tuple[int, int]
    pool_offset: int
    length: int
    tail: tuple[int, int]


class SharedEngine(Engine):
    """What a data plane and the control plane serve together: counts, durability, presence."""

    def __init__(
        self, pool: Pool, medium: MappedMedium, memmap: Memmap, shared: SharedMemory
    ) -> None:
        super().__init__(medium, memmap)
        self._share(pool, medium, shared)

    def _share(self, pool: Pool, medium: MappedMedium, shared: SharedMemory) -> None:
        self._pool = pool
        self._mapped = medium
        self._shared = shared
        self._presence_lock = trio.Lock()
        self._faults_seen = 0

    @property
    def _data(self) -> Zone:
        return self._pool.zones.data

    async def make_durable(self) -> None:
        epoch = self._memmap.begin_persist()
        lost = self._shared.header_word("lost_errno")
        if lost:
            raise OSError(lost, "an earlier msync failed")
        try:
            if self._medium.durability is Durability.MSYNC:
                await trio.to_thread.run_sync(self._mapped.sync_all)
            else:
                # In this thread, which wrote what the data plane has not fenced itself.
                self._medium.fence()
        except OSError as error:
            self._shared.set_header_word("lost_errno", error.errno or errno.EIO)
            raise
        self._memmap.end_persist(epoch)

    def note_size(self) -> None:
        self._shared.set_pool_bytes(self._mapped.size_bytes)

    def check_reach(self, size_bytes: int) -> None:
        if size_bytes > self._shared.reach_bytes:
            raise CannotGrow(
                path=self._mapped.name,
                why=f"while it is mounted it can have {format_size(self._shared.reach_bytes)} at "
                "most; unmount it first",
            )

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        try:
            grace = self._shared.pause()
            with trio.move_on_after(_PAUSE_SECONDS) as patience:
                await self._wait_for(grace)
            if patience.cancelled_caught:
                raise CannotGrow(path=self._mapped.name, why="a request that is served never ends")
            yield
        finally:
            self._shared.resume()

    @asynccontextmanager
    async def clearing(self, start_bytes: int, end_bytes: int) -> AsyncIterator[None]:
        async with self._presence_lock:
            if not self._shared.header_word("reserved"):
                # The last chunk of the data may reach into it.
                expect_holes(self._shared, start_bytes, end_bytes)
                await self._grace()
            yield

    @property
    def fault_count(self) -> int:
        return super().fault_count + self._shared.header_word("fault_count")

    def statistics(self) -> EngineStatistics:
        own = self.own_statistics()
        workers = self.counters()

        def total(operation: Operation, name: str) -> int:
            return sum(getattr(worker.operations[operation], name) for worker in workers)

        def succeeded(operation: Operation) -> int:
            return total(operation, "answered") - total(operation, "failed")

        return EngineStatistics(
            reads=own.reads + succeeded(Operation.READ),
            writes=own.writes + succeeded(Operation.WRITE),
            fsyncs=own.fsyncs + total(Operation.FSYNC, "answered"),
            read_bytes=own.read_bytes + total(Operation.READ, "moved_bytes"),
            written_bytes=own.written_bytes + total(Operation.WRITE, "moved_bytes"),
        )

    def counters(self) -> list[WorkerCounters]:
        """What each worker of the data plane has counted."""
        return read_counters(self._shared)

    def new_faults(self) -> list[FaultRecord]:
        """Memory that could not be touched, since this was last asked."""
        found = self._shared.faults(self._faults_seen)
        self._faults_seen += len(found)
        return found

    async def keep_presence(self) -> None:
        """Find out what has become whole since it had holes."""
        async with self._presence_lock:
            await trio.to_thread.run_sync(look_again, self._shared, self._mapped.fileno())

    async def survey_presence(self) -> None:
        """Find out, once after mounting, which parts of a sparse pool have memory."""
        if self._mapped.reserved:
            return
        zone = self._data
        async with self._presence_lock:
            await trio.to_thread.run_sync(
                survey, self._shared, self._mapped.fileno(), zone.offset_bytes, zone.end_bytes
            )

    async def _grace(self) -> None:
        await self._wait_for(self._shared.begin_grace())

    async def _wait_for(self, grace: Grace) -> None:
        # Polled: nobody who serves requests is to be slowed down by telling.
        while not self._shared.is_over(grace):  # noqa: ASYNC110
            await trio.sleep(_GRACE_POLL_SECONDS)


class NativeEngine(SharedEngine, PythonEngine):
    """What the data plane cannot or must not do by itself, for the linear volume."""

    def __init__(
        self,
        pool: Pool,
        medium: MappedMedium,
        memmap: Memmap,
        volume: LinearVolume,
        shared: SharedMemory,
    ) -> None:
        PythonEngine.__init__(self, medium, memmap, volume)
        self._share(pool, medium, shared)

    def publish(self) -> None:
        """Let the data plane serve the volume, as large as it is: one extent."""
        first_pfn = self._data.offset_bytes >> PAGE_SHIFT
        extent = Extent(0, first_pfn, self._volume.size_bytes >> PAGE_SHIFT, 0)
        self._shared.publish(INODE, self._volume.size_bytes, [extent])

    @property
    def last_write_ns(self) -> int:
        return max(super().last_write_ns, self._shared.last_write_ns(INODE))

    def forget_last_write(self) -> None:
        super().forget_last_write()
        self._shared.forget_last_write(INODE)

    async def punch(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a range read as zeroes, and give its whole frames back. Raises OSError."""
        await self._zero(offset_bytes, length_bytes, keep_memory=False)

    async def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Make a range read as zeroes; a pool that is not sparse stays so. Raises OSError."""
        await self._zero(offset_bytes, length_bytes, keep_memory=True)

    async def reserve(self, offset_bytes: int, length_bytes: int) -> None:
        """Get memory behind a range. Raises OSError: ENOSPC, also behind the end."""
        if offset_bytes + length_bytes > self._volume.size_bytes:
            raise OSError(errno.ENOSPC, "the end of the volume")
        start = self._data.offset_bytes + offset_bytes
        await trio.to_thread.run_sync(self._mapped.reserve, start, length_bytes)
        await self.survey_presence()

    async def copy(self, source_bytes: int, target_bytes: int, length_bytes: int) -> int:
        """Copy a range to a disjoint one, as far as both are inside; how much. Raises OSError."""
        if abs(source_bytes - target_bytes) < length_bytes:
            raise OSError(errno.EINVAL, "the ranges overlap")
        done = 0
        while done < length_bytes:
            step = min(_STEP_BYTES, length_bytes - done)
            data = bytes(self.read(source_bytes + done, step))
            if not data:
                break
            done += self.write(target_bytes + done, data)
            if len(data) < step or target_bytes + done >= self._volume.size_bytes:
                break
            await trio.lowlevel.checkpoint()
        return done

    async def _zero(self, offset_bytes: int, length_bytes: int, *, keep_memory: bool) -> None:
        length_bytes = min(length_bytes, self._volume.size_bytes - offset_bytes)
        if length_bytes <= 0:
            return
        frames = self._frames(offset_bytes, length_bytes)
        async with self._presence_lock:
            if frames.length:
                await self._release(frames.pool_offset, frames.length, keep_memory=keep_memory)
        for offset, length in (frames.head, frames.tail):
            if length and not self._is_hole(offset, length):
                self.store(offset, bytes(length))
        self._last_write_ns = coarse_ns()

    async def _release(self, pool_offset: int, length: int, *, keep_memory: bool) -> None:
        was_reserved = self._mapped.reserved
        # A device never has holes, and some can't even be asked.
        may_have_holes = not self._mapped.source.kind.is_device
        if may_have_holes:
            expect_holes(self._shared, pool_offset, pool_offset + length)
            await self._grace()
        try:
            await trio.to_thread.run_sync(self._mapped.punch_hole, pool_offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL):
                raise
            await self._overwrite(pool_offset, length)
        else:
            if keep_memory and was_reserved:
                await trio.to_thread.run_sync(self._mapped.reserve, pool_offset, length)
                self._mapped.reserved = True
        if isinstance(self._memmap, SharedMemmap):
            self._memmap.clean(pool_offset >> PAGE_SHIFT, length >> PAGE_SHIFT)
        if may_have_holes and self._mapped.reserved:
            await trio.to_thread.run_sync(
                survey, self._shared, self._mapped.fileno(), pool_offset, pool_offset + length
            )

    async def _overwrite(self, pool_offset: int, length: int) -> None:
        """Zeroes, for what cannot give memory back."""
        done = 0
        while done < length:
            step = min(_STEP_BYTES, length - done)
            self._medium.store(pool_offset + done, bytes(step))
            self._medium.flush(pool_offset + done, step)
            done += step
            await trio.lowlevel.checkpoint()

    def _is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        return self._medium.is_hole(self._data.offset_bytes + offset_bytes, length_bytes)

    def _frames(self, offset_bytes: int, length_bytes: int) -> _Frames:
        end = offset_bytes + length_bytes
        first = -(-offset_bytes // FRAME_BYTES) * FRAME_BYTES
        last = max(first, end // FRAME_BYTES * FRAME_BYTES)
        if first >= end:
            return _Frames((offset_bytes, length_bytes), 0, 0, (end, 0))
        return _Frames(
            (offset_bytes, first - offset_bytes),
            self._data.offset_bytes + first,
            last - first,
            (last, end - last),
        )
