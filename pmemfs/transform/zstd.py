"""Zstandard: one frame of RFC 8878 for each piece, without a checksum of its own.

The record of a piece has a checksum, which is looked at before anything here runs.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pmemfs.errors import DamagedPiece
from pmemfs.media.transformreport import MOST_LEVELS

if TYPE_CHECKING:
    from zstandard import ZstdCompressor, ZstdDecompressor

MOST_LEVEL = MOST_LEVELS["zstd"]
_LEAST_LEVEL, _USUAL_LEVEL = -7, 3


class _Contexts(threading.local):
    """Contexts of the library, which must not be used by two threads at a time."""

    def __init__(self) -> None:
        self.compressors: dict[int, ZstdCompressor] = {}
        self.decompressor: ZstdDecompressor | None = None


_contexts = _Contexts()


def compress(data: bytes | bytearray | memoryview, level: int) -> bytes:
    """As of `Codec`."""
    compressor = _contexts.compressors.get(level)
    if compressor is None:
        from zstandard import ZstdCompressor

        if len(_contexts.compressors) >= 4:
            # Each has memory of its own, up to megabytes at the high levels.
            _contexts.compressors.clear()
        # A stored level may be anything.
        wanted = max(_LEAST_LEVEL, min(level, MOST_LEVEL)) or _USUAL_LEVEL
        compressor = ZstdCompressor(level=wanted, write_content_size=True)
        _contexts.compressors[level] = compressor
    return compressor.compress(data)


def decompress(data: bytes | bytearray | memoryview, length_bytes: int) -> bytes:
    """As of `Codec`."""
    from zstandard import ZstdDecompressor, ZstdError, get_frame_parameters

    if _contexts.decompressor is None:
        _contexts.decompressor = ZstdDecompressor()
    try:
        # The library allocates what the frame's head claims, so that is looked at first.
        claimed = get_frame_parameters(data).content_size
        if claimed != length_bytes:
            raise DamagedPiece(why=f"it claims to hold {claimed} bytes, not {length_bytes}")
        plain = _contexts.decompressor.decompress(
            data, max_output_size=length_bytes, allow_extra_data=False
        )
    except ZstdError as error:
        raise DamagedPiece(why=str(error)) from None
    if len(plain) != length_bytes:
        raise DamagedPiece(why=f"it holds {len(plain)} bytes, not {length_bytes}")
    return plain
