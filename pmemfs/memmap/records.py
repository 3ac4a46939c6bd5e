"""Page structures as records in memory: what the two schemes that have them share.

Two ways through the same records: `struct` for one page, four times as fast there as numpy, and
numpy for a range. The conformance suite holds them against each other.
"""

from __future__ import annotations

import heapq
import struct
import time
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pmemfs.errors import NotInPool, PageReferences
from pmemfs.media.page import COUNTER_MAX, LAYOUT, Page, PageFlags
from pmemfs.memmap.base import Access, Memmap, PageCounts, PageReport
from pmemfs.pfn import PageGeometry, PfnT, page_to_pfn_t, pfn_t_to_page

Records = np.ndarray[tuple[int], np.dtype[np.void]]
"""Consecutive page structures, as an array of media.page.LAYOUT.dtype."""

_REFCOUNT_AT = LAYOUT.offset_of("refcount")
_HEAD = LAYOUT.head_struct("refcount")
_REFCOUNT = struct.Struct("<I")
_UNPACK = LAYOUT.struct.unpack_from
_PACK = LAYOUT.struct.pack_into
# Plain integers: flags of enum are objects, and cost more than all else on the path of one page.
_DIRTY = int(PageFlags.DIRTY)
_REFERENCED = int(PageFlags.REFERENCED)
_READ = np.uint16(_REFERENCED)
_WRITTEN = np.uint16(_REFERENCED | _DIRTY)


class RecordMemmap(Memmap):
    """A memmap whose structures are records in memory, wherever that is."""

    has_pages = True
    geometry: PageGeometry

    def __init__(self, geometry: PageGeometry, generation: int) -> None:
        self.generation = generation
        self._set_geometry(geometry)
        self._write_epoch = 1
        self._persisted_epoch = 0
        fresh = Page(generation=generation, order=geometry.order)
        self._fresh = np.frombuffer(LAYOUT.pack(fresh), np.uint64)

    @abstractmethod
    def _locate(self, page: int) -> tuple[memoryview, int]:
        """The buffer and the offset in bytes where the structure of `page` can be written."""

    @abstractmethod
    def _slices(self, first_page: int, page_count: int) -> list[Records]:
        """The structures of a range as writable arrays, in order."""

    @abstractmethod
    def _existing(self, first_page: int, page_count: int) -> Iterator[Records]:
        """The structures of a range as far as they exist; none is made."""

    @abstractmethod
    def _touched(self) -> Iterator[tuple[int, Records]]:
        """Every stretch that may hold initialised structures, with the index of its first page."""

    def _has_faulted(self) -> bool:
        """Whether a structure was touched that lies in bad memory; nobody has been told yet."""
        return False

    def _check_touched(self) -> None:
        """Raise MemoryFault where `_has_faulted`: to be called before any method here ends."""

    def get_page(
        self, pfn: int, access: Access = Access.PIN, mapping: int = 0, index: int = 0
    ) -> None:
        page = (pfn - self._first_pfn) >> self._order
        if not 0 <= page < self._page_count:
            raise NotInPool(pfn=pfn)
        buffer, at = self._locate(page)
        (generation, flags, _, _, refcount, owner, owner_index, private, accessed_ns, reads, writes,
         epoch) = _UNPACK(buffer, at)  # fmt: skip
        if generation != self.generation:
            flags = refcount = owner = owner_index = private = accessed_ns = 0
            reads = writes = epoch = 0
        if refcount == COUNTER_MAX:
            self._check_touched()
            raise PageReferences(pfn=pfn, why="its reference count is at the maximum")
        if mapping:
            owner, owner_index = mapping, index
        if access:
            accessed_ns = time.time_ns()
            if access == Access.WRITE:
                flags |= _REFERENCED | _DIRTY
                epoch = self._write_epoch
                writes += writes != COUNTER_MAX
            else:
                flags |= _REFERENCED
                reads += reads != COUNTER_MAX
        _PACK(buffer, at, self.generation, flags, self._order, 0, refcount + 1, owner, owner_index,
              private, accessed_ns, reads, writes, epoch)  # fmt: skip
        self._check_touched()

    def put_page(self, pfn: int) -> None:
        page = (pfn - self._first_pfn) >> self._order
        if not 0 <= page < self._page_count:
            raise NotInPool(pfn=pfn)
        buffer, at = self._locate(page)
        generation, _, _, _, refcount = _HEAD.unpack_from(buffer, at)
        if generation != self.generation or refcount == 0:
            self._check_touched()
            raise PageReferences(pfn=pfn, why="nobody holds a reference")
        _REFCOUNT.pack_into(buffer, at + _REFCOUNT_AT, refcount - 1)
        self._check_touched()

    def get_pages(
        self,
        pfn: int,
        pfn_count: int,
        access: Access = Access.PIN,
        mapping: int = 0,
        index: int = 0,
    ) -> None:
        if pfn_count == 1:
            self.get_page(pfn, access, mapping, index)
            return
        first, count = self._page_range(pfn, pfn_count)
        slices = self._slices(first, count)
        for records in slices:
            self._initialise(records)
            if records["refcount"].max() == COUNTER_MAX:
                self._check_touched()
                raise PageReferences(pfn=pfn, why="a reference count is at the maximum")
        for records in slices:
            self._get_slice(records, access)
            if mapping:
                records["mapping"] = mapping
                records["index"] = np.arange(index, index + len(records), dtype=np.uint64)
                index += len(records)
        if self._has_faulted():
            for records in slices:
                refcount = records["refcount"]
                refcount -= 1
            self._check_touched()

    def put_pages(self, pfn: int, pfn_count: int) -> None:
        if pfn_count == 1:
            self.put_page(pfn)
            return
        first, count = self._page_range(pfn, pfn_count)
        slices = self._slices(first, count)
        for records in slices:
            is_current = (records["generation"] == self.generation).all()
            if not is_current or records["refcount"].min() == 0:
                self._put_in_good_memory(slices)
                raise PageReferences(pfn=pfn, why="nobody holds a reference on all of the range")
        for records in slices:
            refcount = records["refcount"]
            refcount -= 1
        self._check_touched()

    def _put_in_good_memory(self, slices: list[Records]) -> None:
        """Where a structure lies in bad memory, drop the references on all others, and say so."""
        if self._has_faulted():
            for records in slices:
                refcount = records["refcount"]
                refcount -= (records["generation"] == self.generation) & (refcount != 0)
            self._check_touched()

    def are_referenced(self, pfn: int, pfn_count: int) -> bool:
        found = False
        for records in self._existing(*self._page_range(pfn, pfn_count)):
            held = records["refcount"] != 0
            if held.any() and bool((held & (records["generation"] == self.generation)).any()):
                found = True
                break
        self._check_touched()
        return found

    def clean(self, pfn: int, pfn_count: int) -> None:
        """Nothing to do: what is dirty is so until the next fsync, whoever will have the page."""

    def page(self, pfn: int) -> Page | None:
        buffer, at = self._locate(self.geometry.pfn_to_page(pfn))
        page = LAYOUT.unpack(buffer[at : at + LAYOUT.size_bytes])
        self._check_touched()
        return page if page.generation == self.generation else None

    @property
    def persisted_epoch(self) -> int:
        """What was written in this epoch or before is durable."""
        return self._persisted_epoch

    def is_dirty(self, page: Page) -> bool:
        """Whether a page holds something that no fsync has covered."""
        return bool(page.flags & _DIRTY) and page.write_epoch > self.persisted_epoch

    def pfn_t(self, pfn: int) -> PfnT:
        return page_to_pfn_t(self.geometry.pfn_to_page(pfn), self.geometry)

    def pfn_t_to_page(self, word: int) -> int:
        return pfn_t_to_page(word, self.geometry)

    def begin_persist(self) -> int:
        epoch = self._write_epoch
        self._write_epoch += 1
        return epoch

    def end_persist(self, epoch: int) -> None:
        # Two fsyncs may end in either order; the later epoch covers the earlier.
        self._persisted_epoch = max(self._persisted_epoch, epoch)

    def counts(self) -> PageCounts:
        initialised = dirty = referenced = in_use = 0
        for _, records in self._touched():
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
        best: list[tuple[int, int, PageReport]] = []
        for first_page, records in self._touched():
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

    def drop_idle(self, idle_seconds: float) -> int:
        return 0

    def _set_geometry(self, geometry: PageGeometry) -> None:
        self.geometry = geometry
        self._first_pfn = int(geometry.first_pfn)
        self._order = geometry.order
        self._page_count = geometry.page_count

    def _page_range(self, pfn: int, pfn_count: int) -> tuple[int, int]:
        """Index of the first page and count of pages that a range of frames touches."""
        first = self.geometry.pfn_to_page(pfn)
        last = self.geometry.pfn_to_page(pfn + pfn_count - 1)
        return first, last - first + 1

    def _initialise(self, records: Records) -> None:
        stale = records["generation"] != self.generation
        if stale.any():
            # As words, since numpy copies structured records field by field.
            records.view(np.uint64).reshape(-1, len(self._fresh))[stale] = self._fresh

    def _get_slice(self, records: Records, access: Access) -> None:
        # Each field is bound to a name: `records["x"] += 1` would copy the field onto itself.
        if access:
            is_write = access == Access.WRITE
            flags = records["flags"]
            flags |= _WRITTEN if is_write else _READ
            counter = records["writes" if is_write else "reads"]
            counter += 1 if counter.max() != COUNTER_MAX else counter != COUNTER_MAX
            records["last_access_ns"] = time.time_ns()
            if is_write:
                records["write_epoch"] = self._write_epoch
        refcount = records["refcount"]
        refcount += 1

    def _dirty(self, current: Records) -> npt.NDArray[np.bool_]:
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
