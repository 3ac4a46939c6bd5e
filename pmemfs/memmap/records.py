"""Page structures as records in memory: what is read of them, whichever engine counts in them.

Only `scan`, which shows many of them at once, loads numpy. Loading it takes longer than
the rest of a daemon's start, and as much memory as all of its other code.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pmemfs.media.page import LAYOUT, Page, PageFlags
from pmemfs.memmap.base import Activity, Memmap, Usage
from pmemfs.pfn import PageGeometry, PfnT, page_to_pfn_t, pfn_t_to_page

if TYPE_CHECKING:
    from pmemfs.memmap.pieces import Piece, Records

# Cast to words of 4 or 8 bytes, the memory of structures gives one field of all by a stride.
_WORDS, _LONGS = LAYOUT.size_bytes // 4, LAYOUT.size_bytes // 8
_REFCOUNT_WORD = LAYOUT.offset_of("refcount") // 4
_WRITES_WORD = LAYOUT.offset_of("writes") // 4
_GENERATION_LONG = LAYOUT.offset_of("generation") // 8
_LAST_ACCESS_LONG = LAYOUT.offset_of("last_access_ns") // 8
_DIRTY = int(PageFlags.DIRTY)
_UNPACK = LAYOUT.struct.unpack_from
_LONG = struct.Struct("<Q")
_GENERATION_AT = LAYOUT.offset_of("generation")
_COUNTS = struct.Struct("<QII")
"""The last access, reads and writes, which follow each other."""
_COUNTS_AT = LAYOUT.offset_of("last_access_ns")
_MOST_STRETCHES = 16


def as_records(memory: memoryview) -> Records:
    """Consecutive page structures as an array, over the same memory."""
    import numpy as np

    return np.frombuffer(memory, LAYOUT.dtype)


def live_stretches(states: bytes | bytearray, live: int) -> Iterator[tuple[int, int]]:
    """Short runs of stretches whose state is `live`, in order: the first, and the one behind."""
    start = states.find(live)
    while start >= 0:
        end = start + 1
        while end < len(states) and end - start < _MOST_STRETCHES and states[end] == live:
            end += 1
        yield start, end
        start = states.find(live, end)


class RecordMemmap(Memmap):
    """A memmap whose structures are records in memory."""

    has_pages = True
    geometry: PageGeometry

    def __init__(self, geometry: PageGeometry, generation: int) -> None:
        self.generation = generation
        self._set_geometry(geometry)

    @property
    @abstractmethod
    def persisted_epoch(self) -> int:
        """All that was written in this epoch or before it is durable."""

    @abstractmethod
    def _locate(self, page: int) -> tuple[memoryview, int]:
        """The buffer and the offset in bytes where the structure of `page` can be written."""

    @abstractmethod
    def _existing(self, first_page: int, page_count: int) -> Iterator[tuple[int, memoryview]]:
        """Where structures of a range may be initialised: the first page's index, and the memory of
        some structures, in ascending order. None is made."""

    def _has_faulted(self) -> bool:
        """Whether a structure in bad memory was touched, and no caller has been told yet."""
        return False

    def _check_touched(self) -> None:
        """Raise MemoryFault if `_has_faulted`; called before any method here ends."""

    def are_referenced(self, pfn: int, pfn_count: int) -> bool:
        found = False
        for _, memory in self._existing(*self._page_range(pfn, pfn_count)):
            # Mostly all counts are 0, which is quick to see, and then generations don't matter.
            counts = memory.cast("I")[_REFCOUNT_WORD::_WORDS].tolist()
            if any(counts):
                generations = memory.cast("Q")[_GENERATION_LONG::_LONGS].tolist()
                if (self.generation, True) in zip(generations, map(bool, counts), strict=True):
                    found = True
                    break
        self._check_touched()
        return found

    def count_anew(self, pfn: int, pfn_count: int, reads: int = 0, writes: int = 0) -> None:
        # A data plane that has come too late counts a read here. That does no harm.
        first, count = self._page_range(pfn, pfn_count)
        for page in range(first, first + count):
            buffer, at = self._locate(page)
            # Others are filled by the first reference, and their counts are 0.
            if _LONG.unpack_from(buffer, at + _GENERATION_AT)[0] != self.generation:
                continue
            _COUNTS.pack_into(buffer, at + _COUNTS_AT, 0, reads, writes)
        self._check_touched()

    def page(self, pfn: int) -> Page | None:
        buffer, at = self._locate(self.geometry.pfn_to_page(pfn))
        page = LAYOUT.unpack(buffer[at : at + LAYOUT.size_bytes])
        self._check_touched()
        return page if page.generation == self.generation else None

    def usage(self, pfn: int) -> Usage | None:
        buffer, at = self._locate(self.geometry.pfn_to_page(pfn))
        generation, _, _, _, refcount, _, _, _, accessed_ns, reads, writes, _ = _UNPACK(buffer, at)
        self._check_touched()
        is_current = generation == self.generation
        return Usage(refcount, accessed_ns, reads, writes) if is_current else None

    def activity(self, pfn: int, pfn_count: int) -> Activity:
        is_referenced, newest_ns, write_count = False, 0, 0
        for _, memory in self._existing(*self._page_range(pfn, pfn_count)):
            words, longs = memory.cast("I"), memory.cast("Q")
            for generation, count, accessed_ns, writes in zip(
                longs[_GENERATION_LONG::_LONGS].tolist(), words[_REFCOUNT_WORD::_WORDS].tolist(),
                longs[_LAST_ACCESS_LONG::_LONGS].tolist(), words[_WRITES_WORD::_WORDS].tolist(),
                strict=True,
            ):  # fmt: skip
                if generation == self.generation:
                    is_referenced |= count != 0
                    newest_ns = max(newest_ns, accessed_ns)
                    write_count += writes
        self._check_touched()
        return Activity(is_referenced, newest_ns, write_count)

    def is_dirty(self, page: Page) -> bool:
        """Whether a page holds bytes that no fsync has covered."""
        return bool(page.flags & _DIRTY) and page.write_epoch > self.persisted_epoch

    def pfn_t(self, pfn: int) -> PfnT:
        return page_to_pfn_t(self.geometry.pfn_to_page(pfn), self.geometry)

    def pfn_t_to_page(self, word: int) -> int:
        return pfn_t_to_page(word, self.geometry)

    def scan(
        self, look: Callable[[Piece], None], first_page: int = 0, page_count: int | None = None
    ) -> Iterator[None]:
        from pmemfs.memmap.pieces import PIECE_PAGES, piece_of

        step = PIECE_PAGES * LAYOUT.size_bytes
        wanted = self._page_count - first_page if page_count is None else page_count
        for first, memory in self._existing(first_page, wanted):
            for at in range(0, len(memory), step):
                page, part = first + at // LAYOUT.size_bytes, memory[at : at + step]
                piece = piece_of(page, part, self.generation, self.persisted_epoch)
                # Before anybody else is told of the fault, and before what was read counts.
                self._check_touched()
                if len(piece.pages):
                    look(piece)
                yield

    def _set_geometry(self, geometry: PageGeometry) -> None:
        self.geometry = geometry
        self._first_pfn = int(geometry.first_pfn)
        self._order = geometry.order
        self._page_count = geometry.page_count

    def _page_range(self, pfn: int, pfn_count: int) -> tuple[int, int]:
        """The index of the first page that a range of frames touches, and how many pages."""
        first = self.geometry.pfn_to_page(pfn)
        last = self.geometry.pfn_to_page(pfn + pfn_count - 1)
        return first, last - first + 1
