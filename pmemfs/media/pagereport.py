"""What is told of one page; apart from `page`, for commands that only show it and start at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageReport:
    """What a page structure says at one moment."""

    pfn: int
    mapping: int
    index: int
    refcount: int
    dirty: bool
    reads: int
    writes: int
    last_access_ns: int
