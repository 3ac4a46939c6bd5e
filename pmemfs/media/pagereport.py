"""What is reported of one page; a module of its own, so that commands that show it start fast."""

from __future__ import annotations

from typing import NamedTuple


class PageReport(NamedTuple):
    """What a page structure says at one moment."""

    pfn: int
    mapping: int
    index: int  # type: ignore[assignment]  # of the page, not the method of tuples
    refcount: int
    dirty: bool
    reads: int
    writes: int
    last_access_ns: int
