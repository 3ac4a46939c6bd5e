"""Scheme `pmem`: every page has a structure, in a hidden zone of the pool itself.

This is Ingo Molnar's answer. Invariants:
- a stretch of structures is touched only after `_reserve`, which gets memory for it in a sparse
  pool. So a touch fails only if memory is bad, and only pages that are used cost anything;
- a stretch that was not reserved in this mount holds no structure of this generation, so scans skip
  it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pmemfs.media.pagereport import StructureBytes
from pmemfs.media.zones import Zone
from pmemfs.medium.base import Medium
from pmemfs.memmap.counting import CountingMemmap
from pmemfs.memmap.moving import live_runs, move_zone, prepare_places
from pmemfs.memmap.records import as_records, live_stretches
from pmemfs.pfn import PAGE_STRUCTURE_BYTES, PageGeometry

if TYPE_CHECKING:
    from pmemfs.memmap.pieces import Records

_STRETCH_SHIFT = 10
"""Structures are reserved 1024 at a time: 64 KiB, which serve 4 MiB of data in 4 KiB pages."""


class PmemMemmap(CountingMemmap):
    """Page structures in the memmap zone."""

    def __init__(self, geometry: PageGeometry, generation: int, medium: Medium, zone: Zone) -> None:
        super().__init__(geometry, generation)
        self._medium = medium
        self._set_zone(zone)
        # One byte for each stretch. The kernel gives zeroes of this size without touching them.
        self._reserved = bytearray((self._page_count >> _STRETCH_SHIFT) + 1)

    def _has_faulted(self) -> bool:
        return self._medium.has_faulted()

    def _check_touched(self) -> None:
        self._medium.check_touched()

    def prepare_move(self, zone: Zone) -> None:
        prepare_places(self._medium, live_runs(self._reserved, 1, _STRETCH_SHIFT), zone)

    def move(self, geometry: PageGeometry, zone: Zone, stale: Sequence[tuple[int, int]]) -> None:
        kept = min(self._page_count, geometry.page_count)
        runs = live_runs(self._reserved, 1, _STRETCH_SHIFT)
        move_zone(self._medium, runs, kept, self._zone, zone, stale)
        self._set_geometry(geometry)
        self._set_zone(zone)
        wanted = (geometry.page_count >> _STRETCH_SHIFT) + 1
        self._reserved = self._reserved[:wanted].ljust(wanted, b"\0")

    def _locate(self, page: int) -> tuple[memoryview, int]:
        if not self._reserved[page >> _STRETCH_SHIFT]:
            self._reserve(page >> _STRETCH_SHIFT)
        return self._buffer, page * PAGE_STRUCTURE_BYTES

    def _slices(self, first_page: int, page_count: int) -> list[Records]:
        last_stretch = (first_page + page_count - 1) >> _STRETCH_SHIFT
        for stretch in range(first_page >> _STRETCH_SHIFT, last_stretch + 1):
            if not self._reserved[stretch]:
                self._reserve(stretch)
        return [self._records[first_page : first_page + page_count]]

    def _existing(self, first_page: int, page_count: int) -> Iterator[tuple[int, memoryview]]:
        end = first_page + page_count
        base, last = first_page >> _STRETCH_SHIFT, (end - 1) >> _STRETCH_SHIFT
        for start, behind in live_stretches(self._reserved[base : last + 1], 1):
            first = max((base + start) << _STRETCH_SHIFT, first_page)
            yield first, self._memory(first, min((base + behind) << _STRETCH_SHIFT, end))

    def memory(self) -> StructureBytes:
        stretch_bytes = PAGE_STRUCTURE_BYTES << _STRETCH_SHIFT
        touched_bytes = self._reserved.count(1) * stretch_bytes
        return StructureBytes(min(touched_bytes, self._zone.size_bytes), dram_bytes=0)

    def _memory(self, first_page: int, end_page: int) -> memoryview:
        return self._buffer[first_page * PAGE_STRUCTURE_BYTES : end_page * PAGE_STRUCTURE_BYTES]

    def _set_zone(self, zone: Zone) -> None:
        self._zone = zone
        self._buffer = self._medium.view(zone.offset_bytes, zone.size_bytes)
        self._records = as_records(self._buffer)

    def _reserve(self, stretch: int) -> None:
        start = (stretch << _STRETCH_SHIFT) * PAGE_STRUCTURE_BYTES
        length = min(PAGE_STRUCTURE_BYTES << _STRETCH_SHIFT, self._zone.size_bytes - start)
        self._medium.reserve(self._zone.offset_bytes + start, length)
        self._reserved[stretch] = 1
