"""Where the bytes of a file lie in its pool."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import NamedTuple

from pmemfs.media.filesystem import CHUNK_FRAMES
from pmemfs.media.transform import StoredPiece
from pmemfs.observe.answers import ExtentReport, FileExtents
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.extents import MappedExtent
from pmemfs.volume.fs.filesystem import FileSystem

EXTENTS_AT_ONCE = 3 << 13
"""So many extents fit into one answer of a daemon, however long their numbers are."""


def file_extents(fs: FileSystem, inode: int, start_bytes: int = 0) -> FileExtents:
    """The extents and pieces of an inode that begin at `start_bytes` or later. Raises OSError."""
    extents: list[MappedExtent | _Piece] = [*fs.extents(inode)]
    pieces = fs.inode(inode).pieces
    if pieces:
        extents += itertools.starmap(_Piece, pieces.items())
        extents.sort(key=lambda extent: extent.index)
    start = -(-start_bytes >> PAGE_SHIFT)
    first = bisect_left(extents, start, key=lambda extent: extent.index)
    shown = extents[first : first + EXTENTS_AT_ONCE]
    return FileExtents(
        inode=inode,
        size_bytes=fs.attributes(inode).size_bytes,
        extents=tuple(map(_report, shown)),
        is_complete=first + len(shown) >= len(extents),
    )


class _Piece(NamedTuple):
    """A compressed piece."""

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    stored: StoredPiece


def _report(extent: MappedExtent | _Piece) -> ExtentReport:
    if isinstance(extent, _Piece):
        index, piece = extent
        return ExtentReport(
            offset_bytes=index << PAGE_SHIFT,
            pfn=piece.pfn,
            length_bytes=piece.frame_count << PAGE_SHIFT,
            is_aligned=False,
            stored_bytes=piece.stored_frames << PAGE_SHIFT,
        )
    numbers = (extent.index, extent.pfn, extent.frame_count)
    return ExtentReport(
        offset_bytes=extent.index << PAGE_SHIFT,
        pfn=extent.pfn,
        length_bytes=extent.frame_count << PAGE_SHIFT,
        is_aligned=not any(number % CHUNK_FRAMES for number in numbers),
    )
