"""Mode `block`: one file, which is the data zone.

`onefile` says how the file behaves. Invariants:
- every vec lies in the data zone, and byte n of the device is byte n of that zone. So no offset can
  reach the label or the page structures;
- a transfer holds references on its pages if the scheme has pages, and a write is flushed at once,
  so that a fence makes it durable;
- memory is taken from under a range only while the onlookers expect holes there. Otherwise a
  worker's store would fill the hole again, or fault;
- what programs have pinned is zeroed in place and keeps its memory: they see the device, and their
  arrays never fault.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import trio

from pmemfs.bio.bio_vec import BioVec
from pmemfs.clock import coarse_ns
from pmemfs.medium.base import Medium
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap.base import Memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT, pfn_to_pfn_t
from pmemfs.pool import Pool
from pmemfs.ranges import without
from pmemfs.units import MIB, align_up
from pmemfs.volume.base import Piece, Room
from pmemfs.volume.onefile import INODE, OneFileVolume, Onlookers
from pmemfs.volume.pageio import PageIO
from pmemfs.volume.pinned import PinnedFrames

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STEP_BYTES = MIB


class DeviceOnlookers(Onlookers):
    """Onlookers of a device. Here nothing looks on; the native engine overrides this."""

    def show(self, first_pfn: int, size_bytes: int) -> None:
        """Let the onlookers serve the device in its present size."""

    @asynccontextmanager
    async def expecting_holes(self, pool_offset: int, length_bytes: int) -> AsyncIterator[None]:
        """While this context lasts, a range may lose its memory and get it back."""
        yield

    async def look_again(self) -> None:
        """Memory has come to where holes were."""


class _Frames(NamedTuple):
    """A range of the device: its whole frames, in the pool, and what lies before and behind."""

    head: tuple[int, int]
    pool_offset: int
    length: int
    tail: tuple[int, int]


class BlockVolume(OneFileVolume):
    """The data zone as a device. `onlookers` stand for the workers of a data plane."""

    def __init__(
        self, pool: Pool, memmap: Memmap, *, uid: int = 0, gid: int = 0, mode: int = 0o600,
        onlookers: DeviceOnlookers | None = None,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._medium: Medium = pool.medium
        self._memmap = memmap
        self._content = PageIO(pool.medium, memmap)
        self._onlookers = onlookers or DeviceOnlookers()
        super().__init__(pool.label, self._onlookers, uid=uid, gid=gid, mode=mode)
        self.pinned = PinnedFrames()
        self._memory_lock = self.pinned.memory_lock = trio.Lock()
        self.read_only = pool.medium.read_only
        self._first_pfn = int(pool.first_data_pfn)
        self.grow()

    # Content

    def bio(self, offset_bytes: int, length_bytes: int) -> list[BioVec]:
        """The frames of a range, as far as it lies in the device; [] if all of it lies behind."""
        length_bytes = min(length_bytes, self.size_bytes - offset_bytes)
        if length_bytes <= 0 or offset_bytes < 0:
            return []
        pfn = self._first_pfn + (offset_bytes >> PAGE_SHIFT)
        return [BioVec(pfn_to_pfn_t(pfn), length_bytes, offset_bytes & (FRAME_BYTES - 1))]

    def read(self, number: int, offset_bytes: int, length_bytes: int) -> bytes | memoryview:
        self._check_device(number)
        vecs = self.bio(offset_bytes, length_bytes)
        parts = [
            self._content.load(INODE, offset_bytes, vec.pool_offset_bytes(), vec.length)
            for vec in vecs
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(
        self, number: int, offset_bytes: int, data: Buffer, *, may_overwrite: bool = True
    ) -> int:
        self._check_writable(number)
        written = self._store(offset_bytes, memoryview(data).cast("B"))
        self._note_write(coarse_ns())
        return written

    def copy(
        self, source: int, source_bytes: int, target: int, target_bytes: int, length_bytes: int,
        *, may_overwrite: bool = True,
    ) -> int:  # fmt: skip
        done = 0
        while done < length_bytes:
            step = min(_STEP_BYTES, length_bytes - done)
            data = bytes(self.read(source, source_bytes + done, step))
            if not data:
                break
            done += self.write(target, target_bytes + done, data)
            if len(data) < step or target_bytes + done >= self.size_bytes:
                break
        return done

    async def allocate(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> None:
        self._check_writable(number)
        if offset_bytes + length_bytes > self.size_bytes:
            raise OSError(errno.ENOSPC, "the end of the device")
        start = self._data_offset + offset_bytes
        await trio.to_thread.run_sync(self._medium.reserve, start, length_bytes)
        await self._onlookers.look_again()

    async def punch(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        await self._zero(number, offset_bytes, length_bytes, keep_memory=False)

    async def zero(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> None:
        await self._zero(number, offset_bytes, length_bytes, keep_memory=True)

    def pieces(self, number: int, offset_bytes: int, length_bytes: int, most: int) -> list[Piece]:
        self._check_device(number)
        inside = offset_bytes & (FRAME_BYTES - 1)
        length = align_up(inside + length_bytes, FRAME_BYTES)
        return [(-inside, self._data_offset + offset_bytes - inside, length)]

    # The whole

    def room(self) -> Room:
        # The device takes all the room that there is.
        return Room(self.size_bytes // FRAME_BYTES, 0, file_count=2)

    def grow(self) -> None:
        self._have_size(self._pool.zones.data.size_bytes)
        self._onlookers.show(self._first_pfn, self.size_bytes)

    def stop_writing(self) -> None:
        self.read_only = True

    def resume_writing(self) -> None:
        self.read_only = self._medium.read_only

    # Parts of the above

    @property
    def _data_offset(self) -> int:
        return self._first_pfn << PAGE_SHIFT

    def _store(self, offset_bytes: int, view: memoryview) -> int:
        vecs = self.bio(offset_bytes, len(view))
        if not vecs:
            raise OSError(errno.ENOSPC, "the end of the device")
        written = 0
        for vec in vecs:
            part = view[written : written + vec.length]
            self._content.store(INODE, offset_bytes + written, vec.pool_offset_bytes(), part)
            written += vec.length
        return written

    async def _zero(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_memory: bool
    ) -> None:
        self._check_writable(number)
        length_bytes = min(length_bytes, self.size_bytes - offset_bytes)
        if length_bytes <= 0:
            return
        frames = self._frames(offset_bytes, length_bytes)
        if frames.length:
            async with self._onlookers.expecting_holes(frames.pool_offset, frames.length):
                await self._release_unpinned(frames.pool_offset, frames.length, keep_memory)
        for offset, length in (frames.head, frames.tail):
            if length and not self._medium.is_hole(self._data_offset + offset, length):
                self._store(offset, memoryview(bytes(length)))
        self._note_write(coarse_ns())

    async def _release_unpinned(self, pool_offset: int, length: int, keep_memory: bool) -> None:
        """Make a range read as zeroes; what programs have pinned keeps its memory."""
        first, end = pool_offset >> PAGE_SHIFT, (pool_offset + length) >> PAGE_SHIFT
        async with self._memory_lock:
            held = self.pinned.held_of(INODE, first, end)
            for start, stop in without([(first, end)], held):
                part = start << PAGE_SHIFT, (stop - start) << PAGE_SHIFT
                await self._release(*part, keep_memory=keep_memory)
            for start, stop in held:
                await self._overwrite(start << PAGE_SHIFT, (stop - start) << PAGE_SHIFT)

    async def _release(self, pool_offset: int, length: int, *, keep_memory: bool) -> None:
        medium = self._medium
        assert isinstance(medium, MappedMedium)
        was_reserved = medium.reserved
        try:
            await trio.to_thread.run_sync(medium.punch_hole, pool_offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL):
                raise
            await self._overwrite(pool_offset, length)
        else:
            if keep_memory and was_reserved:
                await trio.to_thread.run_sync(medium.reserve, pool_offset, length)
                medium.reserved = True
        self._memmap.clean(pool_offset >> PAGE_SHIFT, length >> PAGE_SHIFT)

    async def _overwrite(self, pool_offset: int, length: int) -> None:
        """Store zeroes, where the medium can't give memory back, or a program relies on it."""
        for done in range(0, length, _STEP_BYTES):
            step = min(_STEP_BYTES, length - done)
            self._medium.store(pool_offset + done, bytes(step))
            self._medium.flush(pool_offset + done, step)
            await trio.lowlevel.checkpoint()

    def _frames(self, offset_bytes: int, length_bytes: int) -> _Frames:
        end = offset_bytes + length_bytes
        first = -(-offset_bytes // FRAME_BYTES) * FRAME_BYTES
        last = max(first, end // FRAME_BYTES * FRAME_BYTES)
        if first >= end:
            return _Frames((offset_bytes, length_bytes), 0, 0, (end, 0))
        return _Frames(
            (offset_bytes, first - offset_bytes),
            self._data_offset + first,
            last - first,
            (last, end - last),
        )
