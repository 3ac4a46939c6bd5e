"""Scheme `on-demand`: structures in DRAM, in sections that are made when a page first needs one.

This is Linus Torvalds' answer. A section covers 128 MiB of the pool, as in the kernel's memory
hotplug, or one page if a page is larger. Invariants: a section with a reference or a dirty page is
never dropped, because the next fsync or the holder needs it. Dropping a section forgets the
counters of its pages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from pmemfs.media.page import PageFlags
from pmemfs.media.pagereport import StructureBytes
from pmemfs.media.zones import Zone
from pmemfs.memmap.counting import CountingMemmap
from pmemfs.memmap.records import as_records
from pmemfs.pfn import PAGE_SHIFT, PAGE_STRUCTURE_BYTES, PageGeometry
from pmemfs.units import MIB

if TYPE_CHECKING:
    from pmemfs.memmap.pieces import Records

SECTION_BYTES = 128 * MIB


class OnDemandMemmap(CountingMemmap):
    """Page structures in sections of DRAM."""

    def __init__(self, geometry: PageGeometry, generation: int) -> None:
        super().__init__(geometry, generation)
        page_bytes = 1 << (PAGE_SHIFT + geometry.order)
        self._pages_per_section = max(1, SECTION_BYTES // page_bytes)
        self._sections: dict[int, tuple[memoryview, Records]] = {}

    @property
    def section_count(self) -> int:
        """How many sections exist now."""
        return len(self._sections)

    def prepare_move(self, zone: Zone) -> None:
        """Nothing to do: structures stay where they are."""

    def move(self, geometry: PageGeometry, zone: Zone, stale: Sequence[tuple[int, int]]) -> None:
        last = (min(self._page_count, geometry.page_count) - 1) // self._pages_per_section
        kept = {section: found for section, found in self._sections.items() if section <= last}
        self._set_geometry(geometry)
        self._sections = kept
        if last in kept:
            # The last section may be longer now: it was cut off at the end of the pool.
            before = kept[last][0]
            after, _ = self._make(last)
            size = min(len(before), len(after))
            after[:size] = before[:size]

    def drop_idle(self, idle_seconds: float) -> int:
        deadline_ns = time.time_ns() - int(idle_seconds * 1e9)
        idle = [
            section
            for section, (_, records) in self._sections.items()
            if not records["refcount"].any()
            and not self._has_dirty(records)
            and int(records["last_access_ns"].max()) <= deadline_ns
        ]
        return sum(len(self._sections.pop(section)[1]) for section in idle)

    def _has_dirty(self, records: Records) -> bool:
        # Structures of a section are of this generation, or zero.
        is_flagged = (records["flags"] & PageFlags.DIRTY) != 0
        return bool((is_flagged & (records["write_epoch"] > self.persisted_epoch)).any())

    def _locate(self, page: int) -> tuple[memoryview, int]:
        section, position = divmod(page, self._pages_per_section)
        found = self._sections.get(section) or self._make(section)
        return found[0], position * PAGE_STRUCTURE_BYTES

    def _slices(self, first_page: int, page_count: int) -> list[Records]:
        slices = []
        while page_count:
            section, position = divmod(first_page, self._pages_per_section)
            found = self._sections.get(section) or self._make(section)
            part = found[1][position : position + page_count]
            slices.append(part)
            first_page += len(part)
            page_count -= len(part)
        return slices

    def _existing(self, first_page: int, page_count: int) -> Iterator[tuple[int, memoryview]]:
        end, pages = first_page + page_count, self._pages_per_section
        # A snapshot, because sections come and go between two pieces.
        found = sorted(self._sections.items(), key=itemgetter(0))
        for section, (memory, _) in found:
            start = section * pages
            first, last = max(start, first_page), min(start + pages, end)
            if first < last:
                at, behind = first - start, last - start
                yield first, memory[at * PAGE_STRUCTURE_BYTES : behind * PAGE_STRUCTURE_BYTES]

    def memory(self) -> StructureBytes:
        sizes = (len(memory) for memory, _ in self._sections.values())
        return StructureBytes(pool_bytes=0, dram_bytes=sum(sizes))

    def _make(self, section: int) -> tuple[memoryview, Records]:
        first_page = section * self._pages_per_section
        page_count = min(self._pages_per_section, self._page_count - first_page)
        buffer = memoryview(bytearray(page_count * PAGE_STRUCTURE_BYTES))
        made = (buffer, as_records(buffer))
        self._sections[section] = made
        return made
