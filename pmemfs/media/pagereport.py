"""What is reported of one page; a module of its own, so that commands that show it start fast."""

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
