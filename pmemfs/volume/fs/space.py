"""What a file system says of its frames; a module of its own for commands that only show it."""

from __future__ import annotations

from typing import NamedTuple


class Space(NamedTuple):
    """Where the frames of a file system went."""

    total_frames: int
    free_frames: int
    busy_frames: int
    largest_free_frames: int
    cached_inodes: int
    cached_extents: int
    mapped_frames: int
    """Of the files in memory."""
    aligned_frames: int
    """Those of them in whole chunks, aligned alike in the file and in the pool."""
    log_bytes: int
    """Of the logs of inodes in memory."""
    dead_log_bytes: int
