"""Compression of pieces of files: one module for each kind, found by its stored ID.

Invariants:
- what is decompressed may come from anybody, so a length is asked for, and exactly that many bytes
  come back or DamagedPiece is raised. A piece that claims to be larger never allocates more than
  the caller asked for, because the pool of a stranger could exhaust the memory otherwise;
- a library is loaded at first use, because most mounts compress nothing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Protocol, cast

from pmemfs.media.transform import Transformation

Bytes = bytes | bytearray | memoryview


class Codec(Protocol):
    """A kind of compression. A level of 0 is the library's own choice, and one that the library
    does not have is the nearest that it has."""

    MOST_LEVEL: int
    """Levels are 0 to this."""

    def compress(self, data: Bytes, level: int) -> bytes:
        """The compressed bytes. Runs without the interpreter's lock."""

    def decompress(self, data: Bytes, length_bytes: int) -> bytes:
        """The plain bytes, exactly so many. Raises DamagedPiece."""


def codec_of(kind: int) -> Codec | None:
    """The codec with a stored ID; None if this program knows no compression of that ID."""
    module: ModuleType
    if kind == Transformation.ZSTD:
        from pmemfs.transform import zstd as module
    elif kind == Transformation.LZ4:
        from pmemfs.transform import lz4 as module
    else:
        return None
    return cast("Codec", module)
