"""What is reported of pages; a module of its own, so that commands that show it start fast."""

from __future__ import annotations

from typing import Literal, NamedTuple


class PageOwner(NamedTuple):
    """The inode that a page belonged to when it was last read or written."""

    inode: int
    path: str
    """From the root of the mount, one of its names; "" if none is known."""
    note: Literal["", "unnamed", "gone", "not found"]
    """Why there is no path: the inode has no name, or is no more, or the search took too long."""
    has_left: bool = False
    """Whether the page has left this inode since."""


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
    owner: PageOwner | None = None
    """The inode `mapping`, by its name. Page structures alone don't know it."""


class StructureBytes(NamedTuple):
    """How much memory page structures take that exist now."""

    pool_bytes: int
    """In the pool."""
    dram_bytes: int
    """In the memory of the daemon, which other programs could have."""
