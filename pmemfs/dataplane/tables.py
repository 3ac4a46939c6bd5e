"""The memory that the two planes share, from the side of the control plane: the writer of tables.

The protocol. `layouts` says what lies where; this is who writes what, in which order, and what a
reader may see.

- **Extent tables.** The control plane alone writes them. A table is written whole where no reader
  looks, then its offset is stored into the `table` word of its inode's entry: one aligned word, so
  a reader finds the old table or the new one, whole. A table never changes once published.
- **Grace.** A worker makes its `section` word odd before it looks at any table, and even when it
  holds nothing any more; a full fence stands between the first and the look, and between a
  publication and the look at the sections. So whoever published and then finds each section even,
  or other than it was, knows that nobody can see what was there before: the old table's memory, and
  the pages that only it named, may be used again. Nobody waits for the control plane, ever.
- **Inodes.** A free entry gets its `inode` word first and its `table` word last. An entry whose
  table was withdrawn may be given to another inode after a grace period, since a worker that found
  it by the old number may be about to read its table.
- **Presence.** The control plane alone makes a chunk WHOLE; it makes it HOLEY before it takes
  memory away, and waits a grace period in between. A worker makes WRITTEN of HOLEY: what was looked
  at may have changed.
- **Epochs.** `write_epoch` goes up by one for each attempt to make things durable, by either plane;
  `persisted_epoch` only ever rises. `lost_errno` is set once.
- **Counters** of a worker's slot are its own; everybody else reads them as they come.
- **Faults.** A record is filled at `fault_count` modulo its room; a reader may find one half old.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import Extent, FaultRecord, Header, MemmapPlace, Presence, TableHead
from pmemfs.dataplane.memory import fence, load_word, store_word
from pmemfs.medium.base import Durability
from pmemfs.pfn import PageGeometry
from pmemfs.pool import Pool
from pmemfs.units import align_up

_LINE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Grace:
    """What was under way at some instant: workers, and what their sections were."""

    sections: tuple[tuple[int, int], ...]


class SharedMemory:
    """One memfd with all that the planes share but the pool."""

    def __init__(self, pool: Pool, *, worker_count: int, memmap_place: MemmapPlace) -> None:
        self.geometry: PageGeometry | None = pool.page_geometry if memmap_place else None
        self.section_shift = _section_shift(memmap_place, pool.page_geometry.order)
        self.worker_count = worker_count
        self.areas = layouts.compute_areas(
            worker_count=worker_count,
            pool_bytes=pool.medium.size_bytes,
            page_count=self.geometry.page_count if self.geometry else 0,
            section_shift=self.section_shift,
            memmap_here=memmap_place is MemmapPlace.SHARED,
        )
        self.fd = os.memfd_create("pmemfs-planes", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.areas.total)
        self.memory = memoryview(mmap.mmap(self.fd, self.areas.total))
        header = self._header(pool, memmap_place)
        self.memory[: layouts.HEADER.size_bytes] = layouts.HEADER.pack(header)
        self._arena = Arena(self.areas.tables, layouts.EXTENT_ARENA_BYTES)
        self._entries: dict[int, int] = {}
        self._spare_entries: list[int] = []
        self._retired: list[_Retired] = []

    def close(self) -> None:
        """Let go of the descriptor; the memory lasts while anybody has it mapped."""
        os.close(self.fd)

    def header_word(self, name: str) -> int:
        """A word of the header, as it is now."""
        return load_word(self.memory, layouts.HEADER.offset_of(name))

    def set_header_word(self, name: str, value: int) -> None:
        """Store a word of the header."""
        store_word(self.memory, layouts.HEADER.offset_of(name), value)

    def slot_word(self, worker: int, name: str) -> int:
        """A word of the head of a worker's slot, as it is now."""
        at = self.areas.slots + worker * layouts.SLOT_BYTES
        return load_word(self.memory, at + layouts.SLOT_HEAD.offset_of(name))

    # Tables

    def publish(self, inode: int, size_bytes: int, extents: Sequence[Extent]) -> Grace:
        """Let the data plane serve an inode by these extents from now on.

        `extents` are disjoint and in ascending order. Answers the grace period after which the
        pages may be reused that the table before named. Raises OSError (ENOSPC) where there is no
        room for another table or inode.
        """
        head = TableHead(size_bytes=size_bytes, extent_count=len(extents))
        raw = layouts.TABLE_HEAD.pack(head) + b"".join(map(layouts.EXTENT.pack, extents))
        table = self._arena.take(len(raw))
        self.memory[table : table + len(raw)] = raw
        entry = self._entries.get(inode)
        if entry is None:
            try:
                entry = self._entries[inode] = self._new_entry(inode)
            except OSError:
                self._arena.give_back(table)
                raise
        return self._replace_table(entry, table)

    def withdraw(self, inode: int) -> Grace:
        """Let the data plane forward from now on all that concerns a published inode."""
        entry = self._entries.pop(inode)
        grace = self._replace_table(entry, 0)
        self._retired.append(_Retired(grace, entry=entry))
        return grace

    def last_write_ns(self, inode: int) -> int:
        """When the data plane last wrote to an inode; 0: never. In ns since 1970."""
        entry = self._entries.get(inode)
        if entry is None:
            return 0
        return load_word(self.memory, entry + layouts.INODE_ENTRY.offset_of("last_write_ns"))

    def begin_grace(self) -> Grace:
        """What is under way now; all that begins later sees whatever was stored before."""
        fence()
        words = [self.slot_word(worker, "section") for worker in range(self.worker_count)]
        return Grace(tuple((worker, word) for worker, word in enumerate(words) if word & 1))

    def is_over(self, grace: Grace) -> bool:
        """Whether nothing is under way any more that was when the grace period began."""
        return all(self.slot_word(worker, "section") != word for worker, word in grace.sections)

    # Presence and faults

    def presence(self, chunk: int) -> Presence:
        """What is known of a chunk of the pool."""
        return Presence(self.memory[self.areas.presence + chunk])

    def set_presence(self, chunk: int, presence: Presence) -> None:
        """Say what a chunk is; a grace period must pass before memory is taken away."""
        self.memory[self.areas.presence + chunk] = presence

    def faults(self, since: int) -> list[FaultRecord]:
        """The faults from number `since` on, as far as their records are still there."""
        count = self.header_word("fault_count")
        size = layouts.FAULT_RECORD.size_bytes
        found = []
        for number in range(max(since, count - layouts.FAULT_RECORDS), count):
            at = self.areas.faults + number % layouts.FAULT_RECORDS * size
            found.append(layouts.FAULT_RECORD.unpack(self.memory[at : at + size]))
        return found

    def _header(self, pool: Pool, memmap_place: MemmapPlace) -> Header:
        medium, areas, geometry = pool.medium, self.areas, self.geometry
        in_pool = memmap_place is MemmapPlace.POOL
        return Header(
            worker_count=self.worker_count,
            slots_offset=areas.slots,
            faults_offset=areas.faults,
            inodes_offset=areas.inodes,
            presence_offset=areas.presence,
            sections_offset=areas.sections,
            memmap_place=memmap_place,
            memmap_offset=pool.zones.memmap.offset_bytes if in_pool else areas.memmap,
            page_order=geometry.order if geometry else 0,
            page_count=geometry.page_count if geometry else 0,
            first_pfn=int(geometry.first_pfn) if geometry else 0,
            generation=pool.label.generation,
            pool_bytes=medium.size_bytes,
            durability=list(Durability).index(medium.durability),
            reserved=int(medium.reserved),
            read_only=int(medium.read_only),
            section_shift=self.section_shift,
        )

    def _new_entry(self, inode: int) -> int:
        """The place for an inode: the first free one on the way that `find_inode` goes."""
        self._reclaim()
        size = layouts.INODE_ENTRY.size_bytes
        for step in range(layouts.INODE_ENTRIES):
            entry = self.areas.inodes + (inode + step) % layouts.INODE_ENTRIES * size
            if entry in self._spare_entries:
                self._spare_entries.remove(entry)
            elif load_word(self.memory, entry):
                continue
            store_word(self.memory, entry + layouts.INODE_ENTRY.offset_of("last_write_ns"), 0)
            store_word(self.memory, entry, inode)
            return entry
        raise OSError(errno.ENOSPC, "too many files are open at once")

    def _replace_table(self, entry: int, table: int) -> Grace:
        at = entry + layouts.INODE_ENTRY.offset_of("table")
        before = load_word(self.memory, at)
        store_word(self.memory, at, table)
        grace = self.begin_grace()
        if before:
            self._retired.append(_Retired(grace, table=before))
        self._reclaim()
        return grace

    def _reclaim(self) -> None:
        """Reuse what nobody can see any more."""
        waiting = []
        for retired in self._retired:
            if not self.is_over(retired.grace):
                waiting.append(retired)
            elif retired.table:
                self._arena.give_back(retired.table)
            else:
                self._spare_entries.append(retired.entry)
        self._retired = waiting


@dataclass(frozen=True, slots=True)
class _Retired:
    """A table or an entry that a worker may still see."""

    grace: Grace
    table: int = 0
    entry: int = 0


class Arena:
    """Memory for tables, in lines of 64 bytes, given out by the first fit."""

    def __init__(self, start: int, size_bytes: int) -> None:
        self._free = [(start, size_bytes)]
        self._taken: dict[int, int] = {}

    def take(self, size_bytes: int) -> int:
        """The offset of a free range. Raises OSError (ENOSPC)."""
        wanted = align_up(size_bytes, _LINE_BYTES)
        for position, (start, room) in enumerate(self._free):
            if room >= wanted:
                rest = [(start + wanted, room - wanted)] if room > wanted else []
                self._free[position : position + 1] = rest
                self._taken[start] = wanted
                return start
        raise OSError(errno.ENOSPC, "the extent tables are full")

    def give_back(self, start: int) -> None:
        """Free a range that was taken."""
        ranges = sorted([*self._free, (start, self._taken.pop(start))])
        self._free = ranges[:1]
        for begin, size in ranges[1:]:
            last, last_size = self._free[-1]
            if last + last_size == begin:
                self._free[-1] = (last, last_size + size)
            else:
                self._free.append((begin, size))


def _section_shift(place: MemmapPlace, page_order: int) -> int:
    """How many page structures come and go together, as a power of two."""
    if place is MemmapPlace.POOL:
        return layouts.STRETCH_SHIFT
    # 128 MiB of the pool, but no less structures than fill a frame of memory.
    return max(layouts.SECTION_SHIFT - page_order, layouts.FRAME_OF_STRUCTURES_SHIFT)
