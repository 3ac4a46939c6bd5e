"""LZ4: one block for each piece, without a frame around it, because the record has its length."""

from __future__ import annotations

from pmemfs.errors import DamagedPiece
from pmemfs.media.transformreport import MOST_LEVELS

MOST_LEVEL = MOST_LEVELS["lz4"]


def compress(data: bytes | bytearray | memoryview, level: int) -> bytes:
    """As of `Codec`. Levels from 1 on are those of LZ4 HC; 0 is the fast mode."""
    from lz4.block import compress as compress_block  # type: ignore[import-untyped]

    mode, level = "high_compression" if level > 0 else "default", min(level, MOST_LEVEL)
    packed: bytes = compress_block(data, mode=mode, compression=level, store_size=False)
    return packed


def decompress(data: bytes | bytearray | memoryview, length_bytes: int) -> bytes:
    """As of `Codec`."""
    from lz4.block import LZ4BlockError
    from lz4.block import decompress as decompress_block

    try:
        plain: bytes = decompress_block(data, uncompressed_size=length_bytes)
    except (LZ4BlockError, ValueError) as error:
        raise DamagedPiece(why=str(error)) from None
    if len(plain) != length_bytes:
        raise DamagedPiece(why=f"it holds {len(plain)} bytes, not {length_bytes}")
    return plain
