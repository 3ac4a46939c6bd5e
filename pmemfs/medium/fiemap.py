"""Which parts of a file have blocks, as its file system says by FS_IOC_FIEMAP.

Unlike SEEK_HOLE, FIEMAP reports blocks that are reserved and not written yet. Unlike st_blocks, it
leaves out the file system's own blocks. Source: Documentation/filesystems/fiemap.rst.
"""

from __future__ import annotations

import fcntl
import struct

_FS_IOC_FIEMAP = 0xC020660B
_FLAG_SYNC = 1
_EXTENT_LAST = 1
_HEADER = struct.Struct("<QQIIII")
_EXTENT = struct.Struct("<QQQ16xI12x")
_EXTENTS_PER_CALL = 512


def has_blocks_everywhere(fd: int, size_bytes: int) -> bool:
    """Whether the first `size_bytes` of a file have no hole.

    Raises OSError (EOPNOTSUPP) if the file system can't tell.
    """
    covered_bytes = 0
    while covered_bytes < size_bytes:
        extents = _extents(fd, covered_bytes, size_bytes - covered_bytes)
        for start, length, flags in extents:
            if start > covered_bytes:
                return False
            covered_bytes = start + length
            if flags & _EXTENT_LAST:
                return covered_bytes >= size_bytes
        if not extents:
            return False
    return True


def _extents(fd: int, start: int, length: int) -> list[tuple[int, int, int]]:
    """(offset in bytes, length in bytes, flags) of the first extents in a range."""
    request = _HEADER.pack(start, length, _FLAG_SYNC, 0, _EXTENTS_PER_CALL, 0)
    buffer = bytearray(request + bytes(_EXTENT.size * _EXTENTS_PER_CALL))
    fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
    count = _HEADER.unpack_from(buffer)[3]
    found = []
    for number in range(count):
        logical, _, extent_length, flags = _EXTENT.unpack_from(
            buffer, _HEADER.size + number * _EXTENT.size
        )
        found.append((logical, extent_length, flags))
    return found
