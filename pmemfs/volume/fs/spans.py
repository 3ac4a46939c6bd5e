"""What a range of a file is made of: extents, compressed pieces, and holes.

The extents of an inode know nothing of its pieces: there, a piece is a hole. So whoever needs to
know whether a range reads as zeroes asks here.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge

from pmemfs.ranges import Range
from pmemfs.volume.base import NOT_PLAIN
from pmemfs.volume.fs.extents import MappedExtent
from pmemfs.volume.fs.inode import Inode


def spans_of(inode: Inode, index: int, frame_count: int) -> Iterator[MappedExtent]:
    """The extents, holes (pfn HOLE) and compressed parts (pfn NOT_PLAIN) of a range, in order.

    Compressed pieces that are neighbours are one part.
    """
    for extent in inode.extents.pieces(index, frame_count):
        if extent.pfn >= 0 or not inode.pieces:
            yield extent
            continue
        at, end = extent.index, extent.index + extent.frame_count
        for low, high in compressed_ranges(inode, at, end):
            if at < low:
                yield MappedExtent(at, extent.pfn, low - at)
            yield MappedExtent(low, NOT_PLAIN, high - low)
            at = high
        if at < end:
            yield MappedExtent(at, extent.pfn, end - at)


def frames_from(inode: Inode, index: int) -> Iterator[MappedExtent]:
    """All frames of the pool that a file has from a frame of it on, in order.

    A piece has as many as it takes, as if they were the first of those that it stands for.
    """
    extents = inode.extents.pieces(index, max(0, inode.extents.end - index))
    mapped = (extent for extent in extents if extent.pfn >= 0)
    return merge(mapped, _stored_from(inode, index)) if inode.pieces else mapped


def _stored_from(inode: Inode, index: int) -> Iterator[MappedExtent]:
    for at, piece in inode.pieces_in(index, max(0, inode.end - index)):
        done = max(0, index - at)
        if done < piece.stored_frames:
            yield MappedExtent(at + done, piece.pfn + done, piece.stored_frames - done)


def frame_at(inode: Inode, index: int) -> int:
    """Which frame of the pool `frames_from` has at a frame of a file; -1: none."""
    pfn, _ = inode.extents.find(index)
    for at, piece in inode.pieces_in(index, 1):
        if index - at < piece.stored_frames:
            return piece.pfn + index - at
    return pfn


def compressed_ranges(inode: Inode, start: int, end: int) -> Iterator[Range]:
    """The frames of a range that lie in pieces, in order; neighbours are merged."""
    low = high = start
    for index, piece in inode.pieces_in(start, end - start):
        if index > high:
            if low < high:
                yield low, high
            low = index
        high = min(index + piece.frame_count, end)
    if low < high:
        yield low, high
