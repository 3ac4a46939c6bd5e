"""What a daemon says of transformations: declared once, for the daemon that answers and for its
clients."""

from __future__ import annotations

from typing import NamedTuple

MOST_LEVELS = {"zstd": 22, "lz4": 12}
"""The compressions, and the highest level of each; the lowest is 1."""


class TransformReport(NamedTuple):
    """How a file or directory is transformed, as the daemon says it."""

    compression: str
    """"zstd" or "lz4", with ":LEVEL" if one was asked for; "none"; "unknown" of another program."""
    is_encrypted: bool
    size_bytes: int
    plain_bytes: int
    """What of a file lies plain in the pool, in whole pages; 0 of a directory."""
    packed_bytes: int
    """What of a file lies compressed, as its readers see it."""
    stored_bytes: int
    """What that takes of the pool, in whole pages."""


class RewrittenReport(NamedTuple):
    """What became of a file that was rewritten."""

    before_bytes: int
    """What its content took of the pool before, in whole pages."""
    after_bytes: int
    size_bytes: int
    is_encrypted: bool = False
    """It stays as it is, then."""


class CompressionReport(NamedTuple):
    """What of a mounted file system is compressed, and what the daemon has done of that since it
    began. Bytes are of whole pages."""

    packed_bytes: int
    """What lies compressed of the files that are in memory, as their readers see it."""
    stored_bytes: int
    """What that takes of the pool."""
    compressed_count: int
    """Pieces that were compressed."""
    saved_bytes: int
    """By these, when they were."""
    made_plain_count: int
    """Pieces that were made plain again."""
    decompressed_count: int
    """Reads of a piece that came to the daemon, which had to decompress it."""
    hit_count: int
    """The same, when it had the plain bytes still."""
    kept_bytes: int
    """The plain bytes that are kept now."""
