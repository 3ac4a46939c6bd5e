"""Page structures as records in memory: what is read of them, whichever engine counts in them.

Only a request for all pages at once (`counts`, `hottest`) loads numpy. Loading it takes longer than
the rest of a daemon's start, and as much memory as all of its other code.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pmemfs.media.page import LAYOUT, Page, PageFlags
from pmemfs.media.pagereport import PageReport
from pmemfs.memmap.base import Memmap, PageCounts
from pmemfs.pfn import PageGeometry, PfnT, page_to_pfn_t, pfn_t_to_page

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Records = np.ndarray[tuple[int], np.dtype[np.void]]
    """Consecutive page structures, as an array of media.page.LAYOUT.dtype."""

# Cast to words of 4 or 8 bytes, the memory of structures gives one field of all by a stride.
_WORDS, _LONGS = LAYOUT.size_bytes // 4, LAYOUT.size_bytes // 8
_REFCOUNT_WORD = LAYOUT.offset_of("refcount") // 4
_GENERATION_LONG = LAYOUT.offset_of("generation") // 8
_DIRTY = int(PageFlags.DIRTY)
_REFERENCED = int(PageFlags.REFERENCED)


def as_records(memory: memoryview) -> Records:
    """Consecutive page structures as an array, over the same memory."""
    import numpy as np

    return np.frombuffer(memory, LAYOUT.dtype)


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
    def _existing(self, first_page: int, page_count: int) -> Iterator[memoryview]:
        """The memory of those structures of a range that exist; none is made."""

    @abstractmethod
    def _touched(self) -> Iterator[tuple[int, memoryview]]:
        """Each stretch that may hold initialised structures, with its first page's index."""

    def _has_faulted(self) -> bool:
        """Whether a structure in bad memory was touched, and no caller has been told yet."""
        return False

    def _check_touched(self) -> None:
        """Raise MemoryFault if `_has_faulted`; called before any method here ends."""

    def are_referenced(self, pfn: int, pfn_count: int) -> bool:
        found = False
        for memory in self._existing(*self._page_range(pfn, pfn_count)):
            # Mostly all counts are 0, which is quick to see, and then generations don't matter.
            counts = memory.cast("I")[_REFCOUNT_WORD::_WORDS].tolist()
            if any(counts):
                generations = memory.cast("Q")[_GENERATION_LONG::_LONGS].tolist()
                if (self.generation, True) in zip(generations, map(bool, counts), strict=True):
                    found = True
                    break
        self._check_touched()
        return found

    def page(self, pfn: int) -> Page | None:
        buffer, at = self._locate(self.geometry.pfn_to_page(pfn))
        page = LAYOUT.unpack(buffer[at : at + LAYOUT.size_bytes])
        self._check_touched()
        return page if page.generation == self.generation else None

    def is_dirty(self, page: Page) -> bool:
        """Whether a page holds bytes that no fsync has covered."""
        return bool(page.flags & _DIRTY) and page.write_epoch > self.persisted_epoch

    def pfn_t(self, pfn: int) -> PfnT:
        return page_to_pfn_t(self.geometry.pfn_to_page(pfn), self.geometry)

    def pfn_t_to_page(self, word: int) -> int:
        return pfn_t_to_page(word, self.geometry)

    def counts(self) -> PageCounts:
        import numpy as np

        initialised = dirty = referenced = in_use = 0
        for _, memory in self._touched():
            records = as_records(memory)
            current = records[records["generation"] == self.generation]
            initialised += len(current)
            dirty += int(np.count_nonzero(self._dirty(current)))
            referenced += int(np.count_nonzero(current["flags"] & np.uint16(_REFERENCED)))
            in_use += int(np.count_nonzero(current["refcount"]))
        self._check_touched()
        return PageCounts(
            total=self._page_count,
            uninitialised=self._page_count - initialised,
            clean=initialised - dirty,
            dirty=dirty,
            referenced=referenced,
            in_use=in_use,
        )

    def hottest(self, count: int) -> list[PageReport]:
        import numpy as np

        best: list[tuple[int, int, PageReport]] = []
        for first_page, memory in self._touched():
            records = as_records(memory)
            current = records["generation"] == self.generation
            heat = (records["reads"].astype(np.int64) + records["writes"]) * current
            for position in np.argsort(-heat, kind="stable")[:count]:
                if heat[position]:
                    page = first_page + int(position)
                    report = self._report(page, records[position : position + 1])
                    best.append((int(heat[position]), -page, report))
            best = heapq.nlargest(count, best)
        self._check_touched()
        return [report for _, _, report in best]

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

    def _dirty(self, current: Records) -> npt.NDArray[np.bool_]:
        import numpy as np

        is_flagged = (current["flags"] & np.uint16(_DIRTY)) != 0
        return np.asarray(is_flagged & (current["write_epoch"] > self.persisted_epoch))

    def _report(self, page: int, record: Records) -> PageReport:
        return PageReport(
            pfn=int(self.geometry.page_to_pfn(page)),
            mapping=int(record["mapping"][0]),
            index=int(record["index"][0]),
            refcount=int(record["refcount"][0]),
            dirty=bool(self._dirty(record)[0]),
            reads=int(record["reads"][0]),
            writes=int(record["writes"][0]),
            last_access_ns=int(record["last_access_ns"][0]),
        )
