"""Page structures of the python engine, whose only writer is this process.

With the native engine both planes count, by the atomic operations of `dataplane/pages`. This module
does the same in plain Python, for the engine that has no data plane, and tests compare the two. It
goes two ways through the same records: by `struct` for one page, which is four times as fast as
numpy there, and by numpy for a range. The conformance suite holds these two against each other.
"""

from __future__ import annotations

import struct
import time
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from pmemfs.errors import PageReferences
from pmemfs.media.page import COUNTER_MAX, LAYOUT, Page, PageFlags
from pmemfs.memmap.base import Access
from pmemfs.memmap.records import RecordMemmap
from pmemfs.pfn import PageGeometry

if TYPE_CHECKING:
    from pmemfs.memmap.pieces import Records

_REFCOUNT_AT = LAYOUT.offset_of("refcount")
_HEAD = LAYOUT.head_struct("refcount")
_REFCOUNT = struct.Struct("<I")
_UNPACK = LAYOUT.struct.unpack_from
_PACK = LAYOUT.struct.pack_into
# Plain integers: operations on flags of enum cost more than all else in the path of one page.
_DIRTY = int(PageFlags.DIRTY)
_REFERENCED = int(PageFlags.REFERENCED)
_READ = np.uint16(_REFERENCED)
_WRITTEN = np.uint16(_REFERENCED | _DIRTY)


class CountingMemmap(RecordMemmap):
    """A memmap whose structures only this process writes."""

    def __init__(self, geometry: PageGeometry, generation: int) -> None:
        super().__init__(geometry, generation)
        self._write_epoch = 1
        self._persisted_epoch = 0
        fresh = Page(generation=generation, order=geometry.order)
        self._fresh = np.frombuffer(LAYOUT.pack(fresh), np.uint64)

    @abstractmethod
    def _slices(self, first_page: int, page_count: int) -> list[Records]:
        """The structures of a range as writable arrays, in order."""

    def get_page(
        self, pfn: int, access: Access = Access.PIN, mapping: int = 0, index: int = 0
    ) -> None:
        page = (pfn - self._first_pfn) >> self._order
        if not 0 <= page < self._page_count:
            raise self.geometry.outside(pfn)
        buffer, at = self._locate(page)
        (generation, flags, _, _, refcount, owner, owner_index, private, accessed_ns, reads, writes,
         epoch) = _UNPACK(buffer, at)  # fmt: skip
        # Whatever a structure of another generation holds, it is worth nothing: fill it now.
        if generation != self.generation:
            flags = refcount = owner = owner_index = private = accessed_ns = 0
            reads = writes = epoch = 0
        if refcount == COUNTER_MAX:
            # In bad memory a count is made up, so the fault is the better error.
            self._check_touched()
            raise PageReferences(pfn=pfn, why="its reference count is at the maximum")
        if mapping:
            owner, owner_index = mapping, index
        if access:
            accessed_ns = time.time_ns()
            if access == Access.WRITE:
                # The page counts as dirty until an fsync that begins after this has succeeded.
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
            raise self.geometry.outside(pfn)
        buffer, at = self._locate(page)
        generation, _, _, _, refcount = _HEAD.unpack_from(buffer, at)
        if generation != self.generation or refcount == 0:
            self._check_touched()
            raise PageReferences(pfn=pfn, why="it has no reference to drop")
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
        # First all checks, then all changes, so that an error leaves nothing changed.
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
            # No reference was taken where memory is bad, so give back those that were.
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
                raise PageReferences(pfn=pfn, why="a page of the range has no reference to drop")
        for records in slices:
            refcount = records["refcount"]
            refcount -= 1
        self._check_touched()

    def _put_in_good_memory(self, slices: list[Records]) -> None:
        """If a structure lies in bad memory, drop the references on all others, and raise."""
        if self._has_faulted():
            for records in slices:
                refcount = records["refcount"]
                refcount -= (records["generation"] == self.generation) & (refcount != 0)
            self._check_touched()

    def clean(self, pfn: int, pfn_count: int) -> None:
        """Nothing to do: a page stays dirty until the next fsync, whatever it belongs to then."""

    @property
    def persisted_epoch(self) -> int:
        """All that was written in this epoch or before it is durable."""
        return self._persisted_epoch

    def begin_persist(self) -> int:
        epoch = self._write_epoch
        self._write_epoch += 1
        return epoch

    def end_persist(self, epoch: int) -> None:
        # Two fsyncs may end in either order, and the later epoch covers the earlier.
        self._persisted_epoch = max(self._persisted_epoch, epoch)

    def drop_idle(self, idle_seconds: float) -> int:
        return 0

    def _initialise(self, records: Records) -> None:
        stale = records["generation"] != self.generation
        if stale.any():
            # As words, because numpy copies structured records field by field.
            records.view(np.uint64).reshape(-1, len(self._fresh))[stale] = self._fresh

    def _get_slice(self, records: Records, access: Access) -> None:
        # Each field gets a name first: `records["x"] += 1` would copy the field onto itself.
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
