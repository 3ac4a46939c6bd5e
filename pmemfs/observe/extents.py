"""Where the bytes of a file are in its pool."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pmemfs.media.filesystem import CHUNK_FRAMES
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.filesystem.extents import MappedExtent
from pmemfs.volume.filesystem.filesystem import FileSystem


@dataclass(frozen=True, slots=True)
class ExtentReport:
    """A run of page frames of a file."""

    offset_bytes: int
    """In the file."""
    pfn: int
    length_bytes: int
    is_aligned: bool
    """Whether it is all of whole 2 MiB, aligned in the file and in the pool."""


@dataclass(frozen=True, slots=True)
class FileExtents:
    """All extents of a file, those beyond its size included."""

    inode: int
    size_bytes: int
    extents: tuple[ExtentReport, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def file_extents(fs: FileSystem, inode: int) -> FileExtents:
    """The extents of an inode. Raises OSError."""
    return FileExtents(
        inode=inode,
        size_bytes=fs.attributes(inode).size_bytes,
        extents=tuple(map(_report, fs.extents(inode))),
    )


def _report(extent: MappedExtent) -> ExtentReport:
    numbers = (extent.index, extent.pfn, extent.frame_count)
    return ExtentReport(
        offset_bytes=extent.index << PAGE_SHIFT,
        pfn=extent.pfn,
        length_bytes=extent.frame_count << PAGE_SHIFT,
        is_aligned=not any(number % CHUNK_FRAMES for number in numbers),
    )
