"""Decides how much of a hole to map when a write meets it, and where the frames come from.

A write maps what it fills and no more, unless more writes look likely:
- behind the end, mapping ahead doubles the file, up to 64 MiB, and the last close gives the rest
  back. So a file of 256 MiB that is written from its start is extended eight times;
- inside the size, a frame that was mapped ahead and never written can't be told from data later. So
  only a sequence of writes, each of which goes on where the last one ended, maps ahead, and only an
  eighth of what it has filled;
- a file with very many extents gets larger pieces, so that the number stays bounded. Each extent
  costs 64 bytes of log, and time whenever the file is loaded, compacted or published.

Frames are taken where they join what is around the hole in the file. If a chunk (2 MiB) of a large
file has nothing yet, the allocator holds a chunk of the pool for it. The piece goes where it is
aligned alike in the file and in the pool, and later pieces of that chunk find their places free.
"""

from __future__ import annotations

from collections.abc import Iterator

from pmemfs.media.filesystem import CHUNK_FRAMES
from pmemfs.media.inode import SIZE_LIMIT_BYTES
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.allocator import LARGE_FRAMES, Allocator
from pmemfs.volume.fs.extents import MappedExtent, Run
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.transaction import Transaction

_LEAST_AHEAD_FRAMES = 16
_AHEAD_WRITES = 8
_MOST_AHEAD_FRAMES = 16384
_MOST_FILL_AHEAD_FRAMES = 2048
_GRAINS = ((16384, 1), (32768, 4), (65536, 16))
"""With up to so many extents, a hole is filled in pieces of so many frames; beyond, in chunks."""


class Placing:
    """Decides where frames go, for all files of one file system."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator

    def window(
        self, inode: Inode, first: int, end: int, *, size_frames: int, is_append: bool
    ) -> tuple[int, int]:
        """The frames to map, first and end, when a write fills holes from `first` to `end`.

        `size_frames` is the size before the write, in frames. `is_append` says that the write
        starts where the file ends and that the file is not empty.
        """
        if not is_append:
            return self._fill_window(inode, first, end, size_frames)
        pfn, room = inode.extents.find(end)
        if pfn < 0:
            end += self._ahead_of_end(inode, end - first, end, room)
        return first, min(end, (SIZE_LIMIT_BYTES >> PAGE_SHIFT) - 1)

    def place(
        self, change: Transaction, inode: Inode, hole: MappedExtent, size_frames: int
    ) -> Iterator[MappedExtent]:
        """Frames for all of a hole. Raises OSError (ENOSPC)."""
        index, end = hole.index, hole.index + hole.frame_count
        is_large = hole.frame_count >= LARGE_FRAMES or max(index, size_frames - 1) >= CHUNK_FRAMES
        around = inode.extents.around(index)
        while index < end:
            step = min(end - index, CHUNK_FRAMES - index % CHUNK_FRAMES)
            if step == CHUNK_FRAMES:
                step = end - index & -CHUNK_FRAMES
            for run in self._take(change, inode.number, index, step, around, is_large=is_large):
                extent = MappedExtent(index, *run)
                yield extent
                around = [extent, *around[-1:]]
                index += run.frame_count

    def _take(
        self, change: Transaction, owner: int, index: int, frame_count: int,
        around: list[MappedExtent], *, is_large: bool,
    ) -> list[Run]:  # fmt: skip
        """Frames for a range that lies in one chunk of the file, or consists of whole chunks."""
        chunk = index - index % CHUNK_FRAMES
        if frame_count >= CHUNK_FRAMES:
            return change.allocate(frame_count, goal=_beside(around[:1], index), whole=True)
        near = [
            extent for extent in around
            if extent.index < chunk + CHUNK_FRAMES and extent.index + extent.frame_count > chunk
        ]  # fmt: skip
        if near:
            # Rather go on beside a piece in its aligned place, so that the chunk becomes whole.
            near.sort(key=lambda extent: not self._is_aligned(extent))
            return change.allocate(frame_count, goal=_beside(near, index))
        if is_large:
            wish = _beside(around[:1], chunk)
            held = self._allocator.hold(owner, wish, frame_count=frame_count)
            if held is not None:
                return change.allocate(frame_count, goal=held + index - chunk)
        return change.allocate(frame_count, goal=_beside(around[:1], index))

    def _is_aligned(self, extent: MappedExtent) -> bool:
        start = extent.pfn - self._allocator.geometry.first_pfn
        return (start - extent.index) % CHUNK_FRAMES == 0

    def _ahead_of_end(self, inode: Inode, written: int, end: int, room: int) -> int:
        wanted = max(inode.extents.frame_count, _LEAST_AHEAD_FRAMES, _AHEAD_WRITES * written)
        wanted = min(wanted, _MOST_AHEAD_FRAMES)
        ahead = min(self._affordable(wanted), room)
        # Up to the next chunk, so that chunks of the file stay chunks of the pool.
        to_boundary = -(end + ahead) % CHUNK_FRAMES
        if ahead < room and end + ahead > CHUNK_FRAMES:
            ahead = min(ahead + to_boundary, room)
        return ahead

    def _fill_window(self, inode: Inode, first: int, end: int, size_frames: int) -> tuple[int, int]:
        """The window of a write that fills holes, or that leaves a gap between the end and it."""
        is_next = first <= inode.next_fill_frame < end
        if not is_next:
            inode.run_start_frame = first
        grain = _grain(len(inode.extents))
        first -= first % grain
        if end < size_frames:
            wanted = min((end - inode.run_start_frame) // 8 * is_next, _MOST_FILL_AHEAD_FRAMES)
            end = min(end + self._affordable(wanted), size_frames)
            end = min(-(-end // grain) * grain, size_frames)
        inode.next_fill_frame = end
        return first, end

    def _affordable(self, wanted: int) -> int:
        """A number of frames, but no more than an eighth of what is free: others need room too."""
        return min(wanted, self._allocator.free_up_to(8 * wanted) // 8)


def _beside(near: list[MappedExtent], index: int) -> int:
    """The pfn at which a frame would join the first of these extents; 0: anywhere."""
    return max(0, near[0].pfn + index - near[0].index) if near else 0


def _grain(extent_count: int) -> int:
    """In pieces of how many frames to fill the holes of a file with so many extents."""
    return next((grain for most, grain in _GRAINS if extent_count < most), CHUNK_FRAMES)
