"""The extents of one file, in memory.

Invariants: extents are disjoint, in ascending order, and as long as they can be: two extents that
are neighbours in the file and in the pool are one. Otherwise each append would add an extent.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from pmemfs.media.filesystem import CHUNK_FRAMES
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT


class MappedExtent(NamedTuple):
    """A run of frames of a file."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name, which nobody needs
    pfn: int
    frame_count: int


class Run(NamedTuple):
    """A run of frames of the pool."""

    pfn: int
    frame_count: int


class ExtentMap:
    """Where the frames of a file lie in the pool; what no extent covers is a hole."""

    __slots__ = ("_counts", "_indexes", "_pfns", "frame_count")

    def __init__(self) -> None:
        self._indexes: list[int] = []
        self._pfns: list[int] = []
        self._counts: list[int] = []
        self.frame_count = 0

    def __len__(self) -> int:
        return len(self._indexes)

    def copy(self) -> ExtentMap:
        """A copy of the extents as they are now."""
        other = ExtentMap()
        other._indexes, other._pfns = self._indexes.copy(), self._pfns.copy()
        other._counts, other.frame_count = self._counts.copy(), self.frame_count
        return other

    def __iter__(self) -> Iterator[MappedExtent]:
        return map(MappedExtent, list(self._indexes), list(self._pfns), list(self._counts))

    @property
    def end(self) -> int:
        """The index behind the last mapped frame."""
        return self._indexes[-1] + self._counts[-1] if self._indexes else 0

    def find(self, index: int) -> tuple[int, int]:
        """What is at a frame: its pfn, or -1 for a hole, and how many frames it goes on. The hole
        behind the last extent has no end."""
        at = bisect_right(self._indexes, index) - 1
        if at >= 0:
            inside = index - self._indexes[at]
            if inside < self._counts[at]:
                return self._pfns[at] + inside, self._counts[at] - inside
        if at + 1 < len(self._indexes):
            return -1, self._indexes[at + 1] - index
        return -1, 1 << 62

    def around(self, index: int) -> list[MappedExtent]:
        """The extents before and behind a frame in a hole, if they exist."""
        at = bisect_right(self._indexes, index)
        return [
            MappedExtent(self._indexes[near], self._pfns[near], self._counts[near])
            for near in (at - 1, at)
            if 0 <= near < len(self._indexes)
        ]

    def pieces(self, index: int, frame_count: int) -> Iterator[MappedExtent]:
        """The extents and holes of a range, in order; a hole has the pfn -1."""
        end = index + frame_count
        while index < end:
            pfn, count = self.find(index)
            count = min(count, end - index)
            yield MappedExtent(index, pfn, count)
            index += count

    def map(self, index: int, pfn: int, frame_count: int) -> list[Run]:
        """Map a range to a run; the runs that it was mapped to before."""
        gone = self.unmap(index, frame_count)
        at = bisect_right(self._indexes, index)
        self.frame_count += frame_count
        if at and self._joins(at - 1, index, pfn):
            at -= 1
            self._counts[at] += frame_count
        else:
            self._indexes.insert(at, index)
            self._pfns.insert(at, pfn)
            self._counts.insert(at, frame_count)
        if at + 1 < len(self._indexes) and self._joins(
            at, self._indexes[at + 1], self._pfns[at + 1]
        ):
            self._counts[at] += self._counts[at + 1]
            self._remove(at + 1, at + 2)
        return gone

    def unmap(self, index: int, frame_count: int) -> list[Run]:
        """Turn a range into a hole; the runs that it was mapped to."""
        end = index + frame_count
        first = bisect_right(self._indexes, index)
        if first and self._indexes[first - 1] + self._counts[first - 1] > index:
            first -= 1
        last = first
        gone: list[Run] = []
        kept: list[MappedExtent] = []
        while last < len(self._indexes) and self._indexes[last] < end:
            start, pfn, count = self._indexes[last], self._pfns[last], self._counts[last]
            low, high = max(start, index), min(start + count, end)
            gone.append(Run(pfn + low - start, high - low))
            if start < low:
                kept.append(MappedExtent(start, pfn, low - start))
            if high < start + count:
                kept.append(MappedExtent(high, pfn + high - start, start + count - high))
            last += 1
        if gone:
            self._indexes[first:last] = [extent.index for extent in kept]
            self._pfns[first:last] = [extent.pfn for extent in kept]
            self._counts[first:last] = [extent.frame_count for extent in kept]
            self.frame_count -= sum(run.frame_count for run in gone)
        return gone

    def aligned_frames(self) -> int:
        """The frames that lie in whole chunks, aligned alike in the file and in the pool."""
        total = 0
        for index, pfn, count in self:
            if (index - pfn) % CHUNK_FRAMES == 0:
                start = -(-index // CHUNK_FRAMES) * CHUNK_FRAMES
                end = (index + count) // CHUNK_FRAMES * CHUNK_FRAMES
                total += max(0, end - start)
        return total

    def _joins(self, at: int, index: int, pfn: int) -> bool:
        count = self._counts[at]
        return self._indexes[at] + count == index and self._pfns[at] + count == pfn

    def _remove(self, first: int, last: int) -> None:
        del self._indexes[first:last], self._pfns[first:last], self._counts[first:last]


def frames_of(size_bytes: int) -> int:
    """The frames that so many bytes touch."""
    return (size_bytes + FRAME_BYTES - 1) >> PAGE_SHIFT
