"""What a file system tells of its frames; apart from it, for commands that only show that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Space:
    """Where the frames of a file system are."""

    total_frames: int
    free_frames: int
    busy_frames: int
    largest_free_frames: int
    cached_inodes: int
    cached_extents: int
    mapped_frames: int
    """Of files that are in memory."""
    aligned_frames: int
    """Of these, frames in whole chunks, aligned alike in file and pool."""
    log_bytes: int
    """Of logs of inodes in memory."""
    dead_log_bytes: int
