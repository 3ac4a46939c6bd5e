"""What a daemon says of transformations: declared once, for the daemon that answers and for its
clients."""

from __future__ import annotations

from typing import NamedTuple


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
