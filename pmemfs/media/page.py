"""The page structure: what is known about one page while the pool is mounted.

Invariants:
- it is not persistent: a structure with another generation than the pool's counts as uninitialised,
  whatever it holds, and is filled at the first touch;
- a page is dirty if its flag DIRTY is set *and* its write epoch is later than the last persisted
  epoch. So one fsync cleans any number of pages without touching them.
"""

from __future__ import annotations

from enum import IntFlag

from pmemfs.media.layout import Layout, stored, structure
from pmemfs.pfn import PAGE_STRUCTURE_BYTES


class PageFlags(IntFlag):
    """Flags of a page, named after the kernel's."""

    DIRTY = 1 << 0
    """Written to; the invariants say when that still counts."""
    REFERENCED = 1 << 1
    """Read or written since it was initialised."""


@structure
class Page:
    """One page structure."""

    generation: int = stored("<u8", "of the mount that filled it; any other: uninitialised")
    flags: int = stored("<u2", "1 dirty, 2 referenced")
    order: int = stored("u1", "the page is 2^order frames of 4 KiB")
    reserved: int = stored("u1", "zero")
    refcount: int = stored("<u4", "transfers and pins that hold the page now")
    mapping: int = stored("<u8", "the inode that the page belongs to; 0: no inode")
    index: int = stored("<u8", "the page's number within that inode", unit="pages")
    private: int = stored("<u8", "free for the inode that `mapping` names")
    last_access_ns: int = stored("<u8", "of a transfer; 0: never", unit="ns since 1970")
    reads: int = stored("<u4", "transfers out of the page; stays at its maximum")
    writes: int = stored("<u4", "transfers into the page; stays at its maximum")
    write_epoch: int = stored("<u8", "of the last write; epochs are counted by fsync")


LAYOUT = Layout(Page, PAGE_STRUCTURE_BYTES)
COUNTER_MAX = 0xFFFF_FFFF
