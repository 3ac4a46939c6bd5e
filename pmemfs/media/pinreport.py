"""What a daemon says of pins: declared once, for the daemon that answers and for its clients."""

from __future__ import annotations

from typing import NamedTuple


class PinnedFileReport(NamedTuple):
    """A range of a file that is pinned, as the daemon says it."""

    inode: int
    path: str
    """As its client calls it; "" if it didn't say, or if the file may have another name now."""
    offset_bytes: int
    length_bytes: int


class PinReport(NamedTuple):
    """A pin of any process, as the daemon says it."""

    pin: int
    pid: int
    command: str
    since_ns: int
    """Of the Unix epoch."""
    writable: bool
    is_resting: bool
    """Whether its process is gone, while nobody gets its pages yet."""
    is_stale: bool
    page_count: int
    files: tuple[PinnedFileReport, ...]
