"""Page structures that the control plane shares with the data plane.

Invariants:
- both planes change the words of a page only by the atomic operations of `pages.pxi`, because they
  do so at the same time;
- scans read the words as they are, so a page that changes meanwhile counts in its old state or its
  new one;
- a section is dropped only if no page of it was touched between two calls of `drop_idle` with a
  grace period in between. Otherwise a worker could touch memory that is just being given back.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pmemfs.dataplane.layouts import MemmapPlace, SectionState
from pmemfs.dataplane.native import PageAccountant
from pmemfs.dataplane.tables import Grace, SharedMemory
from pmemfs.errors import PageReferences, system_error
from pmemfs.media.page import LAYOUT, PageFlags
from pmemfs.media.zones import Zone
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Access
from pmemfs.memmap.moving import live_runs, move_zone, prepare_places
from pmemfs.memmap.records import RecordMemmap, live_stretches
from pmemfs.pfn import PAGE_STRUCTURE_BYTES, PageGeometry

if TYPE_CHECKING:
    from pmemfs.media.pagereport import StructureBytes

_LIVE, _DROPPING = (bytes([state]) for state in (SectionState.LIVE, SectionState.DROPPING))
_HALVES, _WORDS, _LONGS = (PAGE_STRUCTURE_BYTES // size for size in (2, 4, 8))
_FLAGS_HALF = LAYOUT.offset_of("flags") // 2
_REFCOUNT_WORD = LAYOUT.offset_of("refcount") // 4
_LAST_ACCESS_LONG = LAYOUT.offset_of("last_access_ns") // 8
_EPOCH_LONG = LAYOUT.offset_of("write_epoch") // 8


class SharedMemmap(RecordMemmap):
    """Page structures in the pool, or in the shared memory in sections that come and go."""

    def __init__(
        self,
        medium: MappedMedium,
        shared: SharedMemory,
        geometry: PageGeometry,
        generation: int,
        zone: Zone,
    ) -> None:
        super().__init__(geometry, generation)
        self._shared = shared
        self._is_droppable = shared.memmap_place is MemmapPlace.SHARED
        self._medium = medium
        self._section_pages = 1 << shared.section_shift
        must_reserve = not self._is_droppable and not shared.header_word("reserved")
        self._reserving_fd = medium.fileno() if must_reserve else -1
        self._find_structures(zone)
        self._dropping: tuple[Grace, list[int]] | None = None

    def _find_structures(self, zone: Zone) -> None:
        shared, size_bytes = self._shared, self._page_count * PAGE_STRUCTURE_BYTES
        if self._is_droppable:
            memory, start = shared.memory, shared.areas.memmap
        else:
            memory, start = self._medium.view(0, self._medium.size_bytes), zone.offset_bytes
        self._zone = zone
        self._buffer = memory[start : start + size_bytes]
        section_count = (self._page_count >> shared.section_shift) + 1
        at = shared.areas.sections
        self._sections = shared.memory[at : at + section_count]
        shared.set_pages(self.geometry, start)
        self._accountant = PageAccountant(shared.memory, memory, self._sections, self._reserving_fd)

    def _has_faulted(self) -> bool:
        return self._medium.has_faulted()

    def _check_touched(self) -> None:
        self._medium.check_touched()

    def prepare_move(self, zone: Zone) -> None:
        if not self._is_droppable:
            prepare_places(self._medium, self._live_runs(), zone)

    def _live_runs(self) -> list[tuple[int, int]]:
        return live_runs(self._sections, SectionState.LIVE, self._shared.section_shift)

    def move(self, geometry: PageGeometry, zone: Zone, stale: Sequence[tuple[int, int]]) -> None:
        """As `Memmap.move`. In the scheme `pmem` no worker may be in a section meanwhile."""
        if not self._is_droppable:
            kept = min(self._page_count, geometry.page_count)
            move_zone(self._medium, self._live_runs(), kept, self._zone, zone, stale)
        self._set_geometry(geometry)
        self._find_structures(zone)

    def renew(self, generation: int) -> None:
        """Count structures of this generation only, from now on: no page has references, or says
        anything. The label must have the generation, and no worker may be in a section.

        Who holds pages goes on holding them only if he takes new references before anything else
        runs.
        """
        if self._is_droppable:
            # Whoever died while he dropped some of them has left sections that are GOING.
            self._dropping = None
            self._accountant.drop_all(self._shared.fd)
        self._shared.set_header_word("generation", generation)
        self.generation = generation

    @property
    def persisted_epoch(self) -> int:
        return self._shared.header_word("persisted_epoch")

    def get_page(
        self, pfn: int, access: Access = Access.PIN, mapping: int = 0, index: int = 0
    ) -> None:
        self.get_pages(pfn, 1, access, mapping, index)

    def put_page(self, pfn: int) -> None:
        self.put_pages(pfn, 1)

    def get_pages(
        self,
        pfn: int,
        pfn_count: int,
        access: Access = Access.PIN,
        mapping: int = 0,
        index: int = 0,
    ) -> None:
        self._page_range(pfn, pfn_count)
        error = self._accountant.get(pfn, pfn_count, access, mapping, index, time.time_ns())
        if self._has_faulted():
            if not error:
                self._accountant.put(pfn, pfn_count)
            self._check_touched()
        if error == errno.EOVERFLOW:
            raise PageReferences(pfn=pfn, why="a reference count is at the maximum")
        self._check(error)

    def put_pages(self, pfn: int, pfn_count: int) -> None:
        first, count = self._page_range(pfn, pfn_count)
        is_put = self._accountant.put(pfn, pfn_count)
        if self._has_faulted():
            if not is_put:
                for page in range(first, first + count):
                    self._accountant.put(self.geometry.page_to_pfn(page), 1)
            self._check_touched()
        if not is_put:
            raise PageReferences(pfn=pfn, why="a page of the range has no reference to drop")

    def clean(self, pfn: int, pfn_count: int) -> None:
        """The content of a range is gone, so no page that lies whole in it is dirty any more."""
        self._page_range(pfn, pfn_count)
        self._accountant.clean(pfn, pfn_count)
        self._check_touched()

    def begin_persist(self) -> int:
        return self._accountant.begin_persist()

    def end_persist(self, epoch: int) -> None:
        self._accountant.end_persist(epoch)

    def drop_idle(self, idle_seconds: float) -> int:
        """Drop the sections that the last call found idle, as the invariants say; find others."""
        if not self._is_droppable:
            return 0
        dropped = 0
        deadline_ns = time.time_ns() - int(idle_seconds * 1e9)
        if self._dropping is not None:
            grace, sections = self._dropping
            if not self._shared.is_over(grace):
                return 0
            for section in sections:
                is_idle = self._is_idle(section, deadline_ns)
                if self._accountant.end_drop(section, is_idle, self._shared.fd):
                    dropped += len(self._section(section)) // PAGE_STRUCTURE_BYTES
        idle = [
            section
            for section in self._live_sections()
            if self._is_idle(section, deadline_ns) and self._accountant.begin_drop(section)
        ]
        self._dropping = (self._shared.begin_grace(), idle) if idle else None
        return dropped

    def _is_idle(self, section: int, deadline_ns: int) -> bool:
        # Structures in the shared memory are of this generation, or zero.
        memory = self._section(section)
        longs = memory.cast("Q")
        return (
            max(longs[_LAST_ACCESS_LONG::_LONGS].tolist()) <= deadline_ns
            and not any(memory.cast("I")[_REFCOUNT_WORD::_WORDS].tolist())
            and not any(
                epoch > self.persisted_epoch and flags & PageFlags.DIRTY
                for epoch, flags in zip(
                    longs[_EPOCH_LONG::_LONGS].tolist(),
                    memory.cast("H")[_FLAGS_HALF::_HALVES].tolist(),
                    strict=True,
                )
            )
        )

    def _section(self, section: int) -> memoryview:
        start = section * self._section_pages
        return self._memory(start, start + self._section_pages)

    def _memory(self, first_page: int, end_page: int) -> memoryview:
        return self._buffer[first_page * PAGE_STRUCTURE_BYTES : end_page * PAGE_STRUCTURE_BYTES]

    def memory(self) -> StructureBytes:
        from pmemfs.media.pagereport import StructureBytes

        states = bytes(self._sections)
        live = states.count(SectionState.LIVE) + states.count(SectionState.DROPPING)
        live_bytes = min(live * self._section_pages * PAGE_STRUCTURE_BYTES, len(self._buffer))
        in_pool = 0 if self._is_droppable else live_bytes
        return StructureBytes(pool_bytes=in_pool, dram_bytes=live_bytes - in_pool)

    def _live_sections(self) -> Iterator[int]:
        states = bytes(self._sections)
        for state in (SectionState.LIVE, SectionState.DROPPING):
            section = states.find(state)
            while section >= 0:
                yield section
                section = states.find(state, section + 1)

    def _locate(self, page: int) -> tuple[memoryview, int]:
        self._enter(page, 1)
        return self._buffer, page * PAGE_STRUCTURE_BYTES

    def _existing(self, first_page: int, page_count: int) -> Iterator[tuple[int, memoryview]]:
        end, size = first_page + page_count, self._section_pages
        base, last = first_page // size, (end - 1) // size
        states = bytes(self._sections[base : last + 1]).replace(_DROPPING, _LIVE)
        for start, behind in live_stretches(states, SectionState.LIVE):
            first = max((base + start) * size, first_page)
            yield first, self._memory(first, min((base + behind) * size, end))

    def _enter(self, page: int, page_count: int) -> None:
        self._check(self._accountant.enter(page, page_count))

    def _check(self, error: int) -> None:
        if error:
            self._medium.note_shortage(error)
            raise system_error(error)
