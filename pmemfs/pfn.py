"""Page-frame numbers, and `pfn_t`: a 64-bit word that is a page frame and *may* be a page.

A pfn counts 4 KiB frames from the first byte of the pool, whatever the size of a page, as in the
kernel, where a huge page spans 512 pfns and has one (compound) structure. A `pfn_t` has two lives,
as in Dan Williams' `__pfn_t` patch set of 2015:

- the low PFN_SHIFT bits clear: it is the offset of a page structure, in bytes;
- a low bit set: it is a page-frame number, shifted by PFN_SHIFT, with flags.

So `pfn_t_to_pfn()` always has an answer, and `pfn_t_to_page()` only if a page structure exists.

Invariants: page structures lie on 64-byte boundaries and never at offset 0, so an offset has no low
bit set and no word is 0. A word with a page-frame number always has PFN_DEV set. Without these the
two lives of a word could not be told apart.
"""

from __future__ import annotations

from typing import NewType

from pmemfs.errors import BadGeometry, NoPageStructures, NotInPool

Pfn = NewType("Pfn", int)
PfnT = NewType("PfnT", int)

PAGE_SHIFT = 12
FRAME_BYTES = 1 << PAGE_SHIFT

PFN_SHIFT = 4
PFN_FLAGS_MASK = (1 << PFN_SHIFT) - 1
PFN_DEV = 1 << 0
"""The word is a page-frame number of device memory."""
PFN_MAP = 1 << 1
"""`kmap` has a mapping of it."""

PAGE_STRUCTURE_BYTES = 64


class PageGeometry:
    """Which pfns have a page structure, and at which offset; one structure covers 2**order pfns."""

    __slots__ = ("first_pfn", "memmap_offset_bytes", "order", "page_count")

    def __init__(
        self, first_pfn: Pfn, page_count: int, order: int, memmap_offset_bytes: int
    ) -> None:
        """Raises BadGeometry."""
        if memmap_offset_bytes == 0 or memmap_offset_bytes % PAGE_STRUCTURE_BYTES:
            raise BadGeometry(why="page structures must start on a 64-byte boundary above zero")
        self.first_pfn = first_pfn
        self.page_count = page_count
        self.order = order
        self.memmap_offset_bytes = memmap_offset_bytes

    @property
    def pfn_count(self) -> int:
        """How many frames the page structures cover."""
        return self.page_count << self.order

    def pfn_to_page(self, pfn: int) -> int:
        """The index of the structure that covers `pfn`. Raises NotInPool."""
        frame = pfn - self.first_pfn
        if not 0 <= frame < self.page_count << self.order:
            raise self.outside(pfn)
        return frame >> self.order

    def page_to_pfn(self, page: int) -> Pfn:
        """The first pfn of a page structure. Raises NotInPool."""
        pfn = self.first_pfn + (page << self.order)
        if not 0 <= page < self.page_count:
            raise self.outside(pfn)
        return Pfn(pfn)

    def outside(self, pfn: int) -> NotInPool:
        """The error for a frame that is not data."""
        last = self.first_pfn + self.pfn_count - 1
        return NotInPool(pfn=pfn, first=self.first_pfn, last=last)


def pfn_to_pfn_t(pfn: int, flags: int = PFN_DEV | PFN_MAP) -> PfnT:
    """The word for a page frame, whether or not it has a page structure."""
    return PfnT(pfn << PFN_SHIFT | flags | PFN_DEV)


def page_to_pfn_t(page: int, geometry: PageGeometry) -> PfnT:
    """The word for a page structure, given its index."""
    geometry.page_to_pfn(page)
    return PfnT(geometry.memmap_offset_bytes + page * PAGE_STRUCTURE_BYTES)


def pfn_t_has_page(word: int) -> bool:
    """Whether the word is the offset of a page structure."""
    return word & PFN_FLAGS_MASK == 0


def pfn_t_to_pfn(word: int, geometry: PageGeometry | None = None) -> Pfn:
    """The page frame of a word; a word that points to a page structure needs the geometry."""
    if word & PFN_FLAGS_MASK:
        return Pfn(word >> PFN_SHIFT)
    if geometry is None:
        raise NoPageStructures(what="this word")
    return geometry.page_to_pfn((word - geometry.memmap_offset_bytes) // PAGE_STRUCTURE_BYTES)


def pfn_t_to_page(word: int, geometry: PageGeometry | None) -> int:
    """The index of the page structure that a word points to.

    `geometry` is None if the memmap scheme has no page structures; then this raises
    NoPageStructures.
    """
    if geometry is None:
        raise NoPageStructures(what="pfn_t_to_page")
    return geometry.pfn_to_page(pfn_t_to_pfn(word, geometry))
