"""The memory that the two planes share, from the side of the control plane, which writes its
tables.

`layouts` says what lies where. This is the protocol: who writes what, in which order, and what a
reader may see.

- **Extent tables.** Only the control plane writes them. It writes a table whole where no reader
  looks, and then stores its offset into the `table` word of its inode's entry. That is one aligned
  word, so a reader finds either the old table or the new one, and each of them whole. A table never
  changes once it is published.
- **Grace.** A worker makes its `section` word odd before it looks at any table, and even once it
  uses nothing of the tables any more. A full fence stands between the odd word and the look, and
  another between a publication and the look at the sections. So if the control plane has published
  something, and then finds each section even or changed, no worker can see what was there before.
  The memory of the old table, and the pages that only it named, may then be used again. No worker
  ever waits for the control plane.
- **Inodes.** An inode has its entry in one of two small buckets, so a search for an inode that is
  not published ends soon, whatever was published before. A free entry gets its `inode` word first
  and its `table` word last. A withdrawn entry loses its table first and its number after that. It
  may go to another inode only after a grace period, because a worker that found it by the old
  number may be about to read its table. An entry never moves.
- **Attributes.** The answers to GETATTR of some inodes lie in places that the inodes' numbers
  choose, each under a seqlock (`memory`). Only the control plane writes them. It takes an answer
  away before it answers the request that has changed what the answer says.
- **Sizes.** The size of a device is in its table. The size of a file is in its live line in the
  pool (`media/live`). Workers raise it up to the table's `limit_bytes`, and the control plane sets
  it. The table knows nothing beyond its limit, so the control plane may change a size before or
  after it publishes.
- **Presence.** Only the control plane makes a chunk WHOLE. It makes a chunk HOLEY before it takes
  memory away, with a grace period in between. A worker turns HOLEY into WRITTEN: the chunk may have
  become whole since the control plane looked.
- **Epochs.** `write_epoch` rises by one with each attempt of either plane to make things durable;
  `persisted_epoch` never falls. `lost_errno` is set only once.
- **Caches.** Mode `cache` publishes its one inode with a table without extents, which says the
  size; the blocks are found by their tags in the pool (`cache.pxi`). The words of the header that
  say where are stored before that table. A set's tags change only under its lock, by either plane.
  The control plane makes `cache_writes` or the byte of a group 0 and waits for a grace period: then
  no worker makes a block dirty there.
- **Pauses.** The control plane may set the word `paused` of each slot. A worker looks at it right
  after it has begun a section. If the word is set, the worker ends the section and waits. So after
  a grace period no worker reads anything of the tables or of page structures, and these may move:
  see `growth`. Whatever ends the workers ends the pause, too.
- **Generation.** It changes while all workers are paused, or none lives: then all references on
  pages are gone, those of a killed worker as well. What the control plane holds it takes anew
  before a worker runs.
- **Killed workers** leave their section words odd, references on pages, and maybe the lock of a
  set or of an encrypted page. Once no thread of the data plane lives, the control plane makes the
  words even, frees the locks, and begins a new generation (`SharedEngine.forget_workers`).
- **Encrypted files.** A table names the slot of its file's key. The slot stays as it is until the
  table is withdrawn and a grace period is over. Both planes store into an encrypted page only under
  its lock (`crypt.pxi`).
- **Counters** in a worker's slot are written only by that worker; readers take them as they come.
- **Faults.** A record lies at `fault_count` modulo the number of records; a reader may find one
  that is half written.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple, Self

from pmemfs.dataplane import layouts
from pmemfs.dataplane.answers import Answers
from pmemfs.dataplane.arena import Arena
from pmemfs.dataplane.held import LookupCounts
from pmemfs.dataplane.holdnotes import HoldNotes
from pmemfs.dataplane.layouts import (
    Extent,
    FaultRecord,
    Header,
    KeptAttributes,
    MemmapPlace,
    Presence,
    TableHead,
)
from pmemfs.dataplane.native import (
    NamesShared,
    load_word,
    odd_words,
    store_word,
    write_seqlocked,
)
from pmemfs.errors import ForeignSharedMemory
from pmemfs.media.inode import SIZE_LIMIT_BYTES
from pmemfs.media.layout import replace
from pmemfs.media.live import LIVE_LINE
from pmemfs.medium.base import Durability, Medium
from pmemfs.medium.sparse import data_ranges
from pmemfs.pfn import FRAME_BYTES, PageGeometry

NAME = "pmemfs-planes"
"""The name of the memfd in /proc."""
_LINE_BYTES = 64
_MOST_SHIFT = 64

# Each open and each extension of a file publishes, so these are worked out once.
_SECTION_AT = layouts.SLOT_HEAD.offset_of("section")
_INODE_AT = layouts.INODE_ENTRY.offset_of("inode")
_TABLE_AT = layouts.INODE_ENTRY.offset_of("table")
_CHANGED_AT = layouts.INODE_ENTRY.offset_of("changed_ns")
_LAST_WRITE_AT = layouts.INODE_ENTRY.offset_of("last_write_ns")
_NO_ATTRIBUTES = bytes(8)
_KEPT_BYTES = layouts.KEPT_ATTRIBUTES.size_bytes
_ATTRIBUTES_INODE_AT = layouts.ATTRIBUTES_ENTRY.offset_of("inode")
_ATTRIBUTES_BYTES = layouts.ATTRIBUTES_ENTRY.size_bytes << layouts.ATTRIBUTES_SHIFT

_HEAD_FORMAT = "<QQQII"
assert struct.calcsize(_HEAD_FORMAT) == layouts.TABLE_HEAD.size_bytes
assert {field.type for field in layouts.EXTENT.fields} == {"<u8"}
_head_words = attrgetter(*(field.name for field in layouts.TABLE_HEAD.fields))
_extent_words = attrgetter(*(field.name for field in layouts.EXTENT.fields))


class Grace(NamedTuple):
    """The workers that were in a section at some instant, and their section words then."""

    sections: tuple[tuple[int, int], ...]


class Agreement(NamedTuple):
    """What INIT agreed on. The kernel never says it again."""

    minor: int
    """The version of the protocol; 0 before INIT was answered."""
    flags: int
    max_write: int
    max_readahead: int
    max_background: int


class Published(NamedTuple):
    """A table by which the data plane serves an inode, and where the table lies."""

    inode: int
    offset: int
    head: TableHead

    @property
    def size_bytes(self) -> int:
        """The size of the table, in bytes."""
        return _table_bytes(self.head.extent_count)


class SharedMemory:
    """One memfd with all that the planes share besides the pool.

    Everything that this object knows, it derives from that memory, be it fresh or left by another
    daemon: a daemon that takes a mount over opens what the last one has left. A worker may still
    see what was free there, so that is used only after a grace period. The period is over at once
    if no worker runs.
    """

    def __init__(self, fd: int, *, read_only: bool = False) -> None:
        """The memory of a descriptor, which `close` closes.

        With `read_only` another process may be writing it, and nothing is changed here. Raises
        ForeignSharedMemory if it is not such memory, or is declared by another version.
        """
        size_bytes = os.fstat(fd).st_size
        if size_bytes < layouts.HEADER.size_bytes:
            raise ForeignSharedMemory(why="it is too short")
        protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        self.fd = fd
        self.memory = memoryview(mmap.mmap(fd, size_bytes, prot=protection))
        header = layouts.HEADER.unpack(self.memory[: layouts.HEADER.size_bytes])
        if header.signature != layouts.SIGNATURE:
            raise ForeignSharedMemory(why="another version of pmemfs declares it otherwise")
        _check_header(header, size_bytes)
        self.areas = areas_of(header)
        if self.areas.total != size_bytes:
            raise ForeignSharedMemory(why=f"it has {size_bytes} bytes, not {self.areas.total}")
        self.memmap_place = MemmapPlace(header.memmap_place)
        self.section_shift = header.section_shift
        self.worker_count = header.worker_count
        self.reach_bytes = header.reach_bytes
        """How large the pool may become while this memory lasts: all areas have room for that."""
        self._pool_bytes = header.pool_bytes
        self._read_only = read_only
        self._group_count = layouts.group_count_of(header.cache_set_count)
        self._entries: dict[int, int] = {}
        self._free_entries: list[list[int]] = [[] for _ in range(1 << layouts.INODE_BUCKETS_SHIFT)]
        self._retired: deque[_Retired] = deque()
        self._derive()

    @classmethod
    def create(
        cls, medium: Medium, geometry: PageGeometry, *, generation: int, mount_identity: int,
        memmap_offset_bytes: int, memmap_place: MemmapPlace, worker_count: int,
        has_files: bool = False, cache_set_count: int = 0,
    ) -> Self:  # fmt: skip
        """Fresh memory for a new mount.

        `geometry` and `memmap_offset_bytes` describe the pool's page structures, if `memmap_place`
        says that there are any. `generation` is theirs. No other mount has `mount_identity`.
        With `has_files`, in mode `fs`, workers answer an fsync only of a published inode.
        With `cache_set_count` there is room for what the planes share of so many sets."""
        has_pages = memmap_place is not MemmapPlace.NOWHERE
        is_in_pool = memmap_place is MemmapPlace.POOL
        header = Header(
            signature=layouts.SIGNATURE,
            worker_count=worker_count,
            memmap_place=memmap_place,
            page_order=geometry.order if has_pages else 0,
            page_count=geometry.page_count if has_pages else 0,
            first_pfn=int(geometry.first_pfn) if has_pages else 0,
            generation=generation,
            mount_identity=mount_identity,
            pool_bytes=medium.size_bytes,
            durability=list(Durability).index(medium.durability),
            reserved=int(medium.reserved),
            read_only=int(medium.read_only),
            section_shift=_section_shift(memmap_place, geometry.order),
            has_files=int(has_files),
            reach_bytes=medium.reach_bytes,
            inode_numbers=layouts.inode_numbers(medium.reach_bytes) if has_files else 0,
            cache_set_count=cache_set_count,
        )
        areas = areas_of(header)
        header = replace(
            header,
            slots_offset=areas.slots,
            faults_offset=areas.faults,
            inodes_offset=areas.inodes,
            attributes_offset=areas.attributes,
            presence_offset=areas.presence,
            sections_offset=areas.sections,
            opens_offset=areas.opens,
            counts_offset=areas.counts,
            cache_locks_offset=areas.locks,
            cache_groups_offset=areas.groups,
            page_locks_offset=areas.page_locks,
            names_offset=areas.names if has_files else 0,
            memmap_offset=memmap_offset_bytes if is_in_pool else areas.memmap,
        )
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, areas.total)
        os.pwrite(fd, layouts.HEADER.pack(header), 0)
        return cls(fd)

    def close(self) -> None:
        """Let go of the descriptor. The memory lasts while any process has it mapped."""
        os.close(self.fd)

    def header_word(self, name: str) -> int:
        """A word of the header, as it is now."""
        return load_word(self.memory, layouts.HEADER.offset_of(name))

    def set_header_word(self, name: str, value: int) -> None:
        """Store a word of the header."""
        store_word(self.memory, layouts.HEADER.offset_of(name), value)

    def note_death(self, whose: str, times: int = 1, at_ns: int = 0) -> None:
        """Note that a process of the mount has died, just now or at a time in ns since 1970:
        `plane`, `daemon` or `keeper`."""
        if times:
            self.set_header_word(f"{whose}_deaths", self.header_word(f"{whose}_deaths") + times)
            self.set_header_word(f"{whose}_died_ns", at_ns or time.time_ns())

    def slot_word(self, worker: int, name: str) -> int:
        """A word of the head of a worker's slot, as it is now."""
        return load_word(self.memory, self._slot_offset(worker, name))

    @property
    def header(self) -> Header:
        """All of the header, as it is now."""
        return layouts.HEADER.unpack(self.memory[: layouts.HEADER.size_bytes])

    @property
    def options(self) -> str:
        """The options of the mount, as `MountOptions` writes them."""
        at = self.areas.words
        words = self.memory[at : at + layouts.MOUNT_WORDS.size_bytes]
        return layouts.MOUNT_WORDS.unpack(words).options

    def note_options(self, options: str) -> None:
        """Note with which options the mount is mounted from now on."""
        packed = layouts.MOUNT_WORDS.pack(layouts.MountWords(options))
        self.memory[self.areas.words : self.areas.words + len(packed)] = packed

    @property
    def agreement(self) -> Agreement:
        """What INIT agreed on."""
        return Agreement._make(map(self.header_word, Agreement._fields))

    def agree(self, agreement: Agreement) -> None:
        """Note what INIT agrees on, before INIT is answered."""
        # The word that says whether there is an agreement comes last, so a daemon that dies in
        # between leaves no half of one.
        for name, value in reversed(agreement._asdict().items()):
            self.set_header_word(name, value)

    @property
    def unanswered(self) -> int:
        """Requests that the control plane was given and has not answered, replies on their way
        included. With `uring`, each has an entry of a ring that keeps it until it is answered."""
        replied = self.header_word("replied")
        for worker in range(self.worker_count):
            replied += self.slot_word(worker, "replied")
        return self._handed_over() - replied

    def _handed_over(self) -> int:
        return sum(self.slot_word(worker, "handed_over") for worker in range(self.worker_count))

    @property
    def opens(self) -> memoryview:
        """The memory of open files and directories; see `OpenPlaces`."""
        return self.memory[self.areas.opens : self.areas.counts]

    @property
    def cache_locks(self) -> memoryview:
        """The locks of the sets of a cache; see `CacheLocks`."""
        return self.memory[self.areas.locks : self.areas.groups]

    @property
    def cache_groups(self) -> memoryview:
        """A byte for each group of sets of a cache: 1 if workers may put dirty blocks there."""
        return self.memory[self.areas.groups : self.areas.groups + self._group_count]

    @property
    def lookup_counts(self) -> LookupCounts:
        """How often the kernel has looked each inode up; empty in mode `block`."""
        start, numbers = self.areas.counts, self.header_word("inode_numbers")
        end = start + numbers * layouts.COUNT_BYTES
        return LookupCounts(self.fd, self.memory, start, end, self.hold_notes)

    @property
    def hold_notes(self) -> HoldNotes:
        """What the control plane's request has added to these counts."""
        start = self.areas.answers + layouts.HOLD_NOTES_AT
        return HoldNotes(self.memory[start : start + layouts.HOLD_NOTES_BYTES])

    @property
    def names(self) -> NamesShared | None:
        """What the planes share about names; None in modes without them."""
        return NamesShared(self.memory) if self.header_word("names_offset") else None

    @property
    def answers(self) -> Answers:
        """The answers that the control plane gave last."""
        return Answers(self.fd, self.memory, self.areas.answers)

    def take_back_holds(self) -> None:
        """Undo what the request of a dead control plane has added to lookup counts, if it has no
        answer. Before anybody changes one of these counts."""
        start, numbers = self.areas.counts, self.header_word("inode_numbers")
        counts = self.memory[start : start + numbers * layouts.COUNT_BYTES].cast("Q")
        self.hold_notes.take_back(counts, self.opens, self.answers.places)

    def set_pages(self, geometry: PageGeometry, memmap_offset: int) -> None:
        """Say how many pages have structures, and where: in the pool or in this memory."""
        self.set_header_word("page_count", geometry.page_count)
        self.set_header_word("memmap_offset", memmap_offset)

    def set_pool_bytes(self, size_bytes: int) -> None:
        """Say how large the pool is, before anything in its new part is published."""
        self._pool_bytes = size_bytes
        self.set_header_word("pool_bytes", size_bytes)

    def pause(self) -> Grace:
        """Let no worker begin a section. After the grace period no worker is in one."""
        self._set_paused(1)
        return self.begin_grace()

    def resume(self) -> None:
        """Let workers go on. They see what was stored during the pause."""
        self._set_paused(0)

    def forget_workers(self) -> None:
        """No thread of the data plane lives any more: end what its workers have begun.

        No grace period waits for them from now on, and no lock is theirs. The references that they
        held on pages stay, for a new generation to forget.
        """
        for worker in range(self.worker_count):
            section = self.slot_word(worker, "section")
            self._set_slot_word(worker, "section", section + (section & 1))
            self._set_slot_word(worker, "thread_id", 0)
        self._free_locks(lambda holder: holder < layouts.CONTROL_HOLDER)

    def forget_control(self) -> None:
        """The control plane has died, and this process takes its place: let no worker wait for it.

        Whether workers are paused stays as it is, because page structures may have been about to
        move. The locks of sets are freed by `free_control_locks`, and nobody waits for one of them
        for long.
        """
        # What it has stored of a tag last may not be durable, and nobody has counted what is dirty.
        self.forbid_groups()
        if self.memmap_place is MemmapPlace.SHARED:
            at = self.areas.sections
            states = bytes(self.memory[at : self.areas.tables])
            # Its memory may be there or not, but it says nothing that counts.
            for section in _places_of(states, layouts.SectionState.GOING):
                self.memory[at + section] = layouts.SectionState.ABSENT

    def free_control_locks(self) -> None:
        """Free the locks of sets that the dead control plane had.

        No worker may be in a section that began before `forget_control`: it would take a lock, and
        change tags of which not all are durable.
        """
        self._free_locks(lambda holder: holder >= layouts.CONTROL_HOLDER)

    def forbid_groups(self) -> None:
        """Let no worker make a block of a cache dirty, until its group is allowed again. After a
        grace period none does."""
        groups = self.cache_groups
        groups[:] = bytes(len(groups))

    def _free_locks(self, is_dead: Callable[[int], bool]) -> None:
        """Free the locks of the sets of a cache whose holders are dead."""
        locks = self.cache_locks.cast("Q")
        for number, holder in enumerate(locks.tolist()):
            if holder and is_dead(holder):
                store_word(self.cache_locks, 8 * number, 0)

    # Tables

    def publish(
        self,
        inode: int,
        size_bytes: int,
        extents: Sequence[Extent],
        *,
        live_offset: int = 0,
        limit_bytes: int | None = None,
        key_slot: int = 0,
    ) -> Grace:
        """Let the data plane serve an inode by these extents from now on.

        `extents` are disjoint and in ascending order. `live_offset` is the offset in bytes of the
        inode's live line in the pool, and always the same for an inode. With it, the size is what
        that line says at each request. The data plane may then extend the file up to `limit_bytes`
        (by default `size_bytes`), so the extents must have no hole between the size and there.
        Without it, the inode is a device of a fixed size. `key_slot` is 1 + the slot of its key if
        it is encrypted; that slot must stay filled until the table is withdrawn and its grace
        period is over.

        Returns the grace period after which the pages of the former table may be reused. Raises
        OSError (ENOSPC) if there is no room for another table or inode (see `rivals`), and
        ValueError for what is not possible.
        """
        limit_bytes = size_bytes if limit_bytes is None else limit_bytes
        self._check(inode, size_bytes, live_offset, limit_bytes)
        head = TableHead(size_bytes, limit_bytes, live_offset, len(extents), key_slot)
        table = self._write_table(head, extents)
        entry = self._entries.get(inode)
        if entry is None:
            try:
                entry = self._entries[inode] = self._new_entry(inode)
            except OSError:
                self._arena.give_back(table)
                raise
        return self._replace_table(entry, table)

    def withdraw(self, inode: int) -> Grace:
        """Let the data plane forward all requests for a published inode from now on."""
        entry = self._entries.pop(inode)
        # The table first. If this daemon dies in between, a number without a table is left, which
        # the next daemon clears. A table without a number would serve the entry's next inode.
        table = load_word(self.memory, entry + _TABLE_AT)
        store_word(self.memory, entry + _TABLE_AT, 0)
        store_word(self.memory, entry + _INODE_AT, 0)
        return self._retire([table], [entry])

    def is_published(self, inode: int) -> bool:
        """Whether the data plane serves an inode."""
        return inode in self._entries

    def published(self) -> list[Published]:
        """All tables by which the data plane serves inodes, in the order of their inodes."""
        found = []
        for inode, entry in sorted(self._entries.items()):
            table = load_word(self.memory, entry + _TABLE_AT)
            found.append(Published(inode, table, self._table_head(table)))
        return found

    @property
    def table_bytes(self) -> int:
        """How much memory tables take, including tables that a worker may still see."""
        self._reclaim()
        return self._arena.taken_bytes

    def rivals(self, inode: int) -> list[int]:
        """The published inodes that compete with an inode: one has to go if it finds no entry.

        They are fewer than the entries in its buckets while some entries wait for a grace period.
        """
        entries = {
            self._entry(bucket, way)
            for bucket in layouts.buckets_of(inode)
            for way in range(layouts.INODE_WAYS)
        }
        words = (load_word(self.memory, entry + _INODE_AT) for entry in sorted(entries))
        return [word for word in words if word]

    def last_write_ns(self, inode: int) -> int:
        """When the data plane last wrote to a device, in ns since 1970; 0: never."""
        entry = self._entries.get(inode)
        if entry is None:
            return 0
        return load_word(self.memory, entry + _LAST_WRITE_AT)

    def set_changed_ns(self, inode: int, changed_ns: int) -> None:
        """Say when a published inode last changed other than by a write: a read after it counts."""
        entry = self._entries.get(inode)
        if entry is not None:
            store_word(self.memory, entry + _CHANGED_AT, max(0, changed_ns))

    def forget_last_write(self, inode: int) -> None:
        """Let `last_write_ns` be 0 until the data plane writes to the device again."""
        entry = self._entries.get(inode)
        if entry is not None:
            store_word(self.memory, entry + _LAST_WRITE_AT, 0)

    def begin_grace(self) -> Grace:
        """Note which sections are under way now. Any later section sees what was stored before."""
        at = self.areas.slots + _SECTION_AT
        return Grace(odd_words(self.memory, at, layouts.SLOT_BYTES, self.worker_count))

    def is_over(self, grace: Grace) -> bool:
        """Whether every section has ended that was under way when the grace period began."""
        return all(self.slot_word(worker, "section") != word for worker, word in grace.sections)

    # Attributes

    def publish_attributes(self, inode: int, answer: bytes) -> None:
        """Let the data plane answer GETATTR of an inode; a rival in its place gives way."""
        write_seqlocked(self.memory, self._attributes(inode), inode.to_bytes(8, "little") + answer)

    def withdraw_attributes(self, inode: int) -> None:
        """Let the data plane forward GETATTR of an inode, and of any rival in its place."""
        write_seqlocked(self.memory, self._attributes(inode), _NO_ATTRIBUTES)

    def published_attributes(self) -> dict[int, int]:
        """The inodes whose GETATTR the data plane answers, by place."""
        found = {}
        for entry in self._used_attributes():
            inode = load_word(self.memory, entry + _ATTRIBUTES_INODE_AT)
            if inode:
                place = (entry - self.areas.attributes) // layouts.ATTRIBUTES_ENTRY.size_bytes
                found[place] = inode
        return found

    def kept_attributes(self, inode: int) -> KeptAttributes | None:
        """What was set of an inode that is not stored in a pool; None if nothing was."""
        at = self._kept(inode)
        kept = layouts.KEPT_ATTRIBUTES.unpack(self.memory[at : at + _KEPT_BYTES])
        return kept if kept.inode else None

    def keep_attributes(self, kept: KeptAttributes) -> None:
        """Let what was set of an inode last as long as this memory."""
        at, packed = self._kept(kept.inode), layouts.KEPT_ATTRIBUTES.pack(kept)
        # The inode comes last, because it makes the rest count: a daemon that dies in between has
        # set nothing, or has set some of what the same request will set again.
        self.memory[at + 8 : at + _KEPT_BYTES] = packed[8:]
        store_word(self.memory, at, kept.inode)

    def _kept(self, inode: int) -> int:
        if not 0 < inode < layouts.KEPT_INODES:
            raise ValueError(f"nothing is kept of inode {inode}")
        return self.areas.kept + inode * _KEPT_BYTES

    # Presence and faults

    def presence(self, chunk: int) -> Presence:
        """What is known of a chunk of the pool."""
        return Presence(self.memory[self.areas.presence + chunk])

    def set_presence(self, chunk: int, presence: Presence) -> None:
        """Say what a chunk is. A grace period must pass before its memory is taken away."""
        self.memory[self.areas.presence + chunk] = presence

    def faults(self, since: int) -> list[FaultRecord]:
        """The faults from number `since` on whose records are still there."""
        count = self.header_word("fault_count")
        size = layouts.FAULT_RECORD.size_bytes
        found = []
        for number in range(max(since, count - layouts.FAULT_RECORDS), count):
            at = self.areas.faults + number % layouts.FAULT_RECORDS * size
            found.append(layouts.FAULT_RECORD.unpack(self.memory[at : at + size]))
        return found

    def _derive(self) -> None:
        """Find what is published, which memory that takes, and what is free.

        Raises ForeignSharedMemory if what is there is not possible.
        """
        taken: dict[int, int] = {}
        for entry in self._used_entries():
            inode = load_word(self.memory, entry + _INODE_AT)
            table = load_word(self.memory, entry + _TABLE_AT)
            if inode and table:
                self._entries[inode] = entry
                taken[table] = _table_bytes(self._table_head(table).extent_count)
            elif inode and not self._read_only:
                # The daemon that published or withdrew it was killed in between.
                store_word(self.memory, entry + _INODE_AT, 0)
        try:
            self._arena = Arena(self.areas.tables, layouts.EXTENT_ARENA_BYTES, taken)
        except ValueError as error:
            raise ForeignSharedMemory(why=str(error)) from None
        if not self._read_only:
            for place in self._used_attributes():
                if load_word(self.memory, place) & 1:
                    # The daemon that wrote here was killed in between: there is nothing to read.
                    write_seqlocked(self.memory, place, _NO_ATTRIBUTES)
        used = set(self._entries.values())
        size = layouts.INODE_ENTRY.size_bytes
        last = self.areas.inodes + (layouts.INODE_ENTRIES - 1) * size
        entries = [e for e in range(last, self.areas.inodes - size, -size) if e not in used]
        # What looks free may have been withdrawn just before the last daemon died, so all of it
        # waits for a grace period, like anything that is withdrawn here.
        self._retired.append(_Retired(self.begin_grace(), self._arena.take_all(), entries))
        self._reclaim()

    def _used_attributes(self) -> Iterator[int]:
        """The places that ever had the attributes of an inode."""
        start, size = self.areas.attributes, layouts.ATTRIBUTES_ENTRY.size_bytes
        for data_start, data_end in data_ranges(self.fd, start, start + _ATTRIBUTES_BYTES):
            yield from range(data_start, data_end, size)

    def _used_entries(self) -> Iterator[int]:
        """The entries that were ever used for an inode."""
        start, size = self.areas.inodes, layouts.INODE_ENTRY.size_bytes
        end = start + layouts.INODE_ENTRIES * size
        for data_start, data_end in data_ranges(self.fd, start, end):
            yield from range(data_start, data_end, size)

    def _table_head(self, table: int) -> TableHead:
        end = self.areas.tables + layouts.EXTENT_ARENA_BYTES
        if not self.areas.tables <= table <= end - layouts.TABLE_HEAD.size_bytes:
            raise ForeignSharedMemory(why=f"there is no table at {table}")
        return layouts.TABLE_HEAD.unpack(self.memory[table : table + layouts.TABLE_HEAD.size_bytes])

    def _slot_offset(self, worker: int, name: str) -> int:
        slot = self.areas.slots + worker * layouts.SLOT_BYTES
        return slot + layouts.SLOT_HEAD.offset_of(name)

    def _set_slot_word(self, worker: int, name: str, value: int) -> None:
        store_word(self.memory, self._slot_offset(worker, name), value)

    def _set_paused(self, value: int) -> None:
        for worker in range(self.worker_count):
            self._set_slot_word(worker, "paused", value)

    def _check(self, inode: int, size_bytes: int, live_offset: int, limit_bytes: int) -> None:
        if inode <= 0 or size_bytes < 0 or limit_bytes < size_bytes:
            raise ValueError(f"inode {inode} cannot have {size_bytes} of {limit_bytes} bytes")
        if live_offset == 0 and limit_bytes == size_bytes:
            return
        last_line = self._pool_bytes - LIVE_LINE.size_bytes
        if live_offset % _LINE_BYTES or not 0 < live_offset <= last_line:
            raise ValueError(f"there is no live line at {live_offset}")
        if limit_bytes > SIZE_LIMIT_BYTES:
            raise ValueError(f"no file may have {limit_bytes} bytes")

    def _attributes(self, inode: int) -> int:
        place = layouts.attributes_place_of(inode)
        return self.areas.attributes + place * layouts.ATTRIBUTES_ENTRY.size_bytes

    def _entry(self, bucket: int, way: int) -> int:
        place = bucket * layouts.INODE_WAYS + way
        return self.areas.inodes + place * layouts.INODE_ENTRY.size_bytes

    def _new_entry(self, inode: int) -> int:
        """A place for an inode, in the emptier of its two buckets, so that both are rarely full."""
        free = self._most_free(inode)
        if not free:
            self._reclaim()
            free = self._most_free(inode)
        if not free:
            raise OSError(errno.ENOSPC, "too many files are open at once")
        entry = free.pop()
        store_word(self.memory, entry + _LAST_WRITE_AT, 0)
        # Until the file system says when it changed, any read may be the first after a change.
        store_word(self.memory, entry + _CHANGED_AT, (1 << 63) - 1)
        # The number before the table: a worker that finds the number finds no table yet, and
        # forwards.
        store_word(self.memory, entry + _INODE_AT, inode)
        return entry

    def _most_free(self, inode: int) -> list[int]:
        first, second = layouts.buckets_of(inode)
        return max(self._free_entries[first], self._free_entries[second], key=len)

    def _write_table(self, head: TableHead, extents: Sequence[Extent]) -> int:
        """Write a new table where no worker looks yet."""
        size_bytes = _table_bytes(len(extents))
        try:
            table = self._arena.take(size_bytes)
        except OSError:
            self._reclaim()
            table = self._arena.take(size_bytes)
        words = [word for extent in extents for word in _extent_words(extent)]
        packed = struct.pack(f"{_HEAD_FORMAT}{len(words)}Q", *_head_words(head), *words)
        self.memory[table : table + size_bytes] = packed
        return table

    def _replace_table(self, entry: int, table: int) -> Grace:
        # One aligned store publishes the whole table, which was written before it. `store_word`
        # orders that, and fences before the look at the sections in `begin_grace`.
        before = load_word(self.memory, entry + _TABLE_AT)
        store_word(self.memory, entry + _TABLE_AT, table)
        return self._retire([before], []) if before else self.begin_grace()

    def _retire(self, tables: Sequence[int], entries: Sequence[int]) -> Grace:
        grace = self.begin_grace()
        self._retired.append(_Retired(grace, tables, entries))
        self._reclaim()
        return grace

    def _reclaim(self) -> None:
        """Reuse what no worker can see any more.

        Grace periods end in the order in which they began: a section that holds one up was under
        way, with the same word, when any later one began, so it holds that up, too.
        """
        while self._retired and self.is_over(self._retired[0].grace):
            retired = self._retired.popleft()
            for table in retired.tables:
                self._arena.give_back(table)
            for entry in retired.entries:
                place = (entry - self.areas.inodes) // layouts.INODE_ENTRY.size_bytes
                self._free_entries[place // layouts.INODE_WAYS].append(entry)


def _places_of(states: bytes, wanted: int) -> Iterator[int]:
    at = states.find(wanted)
    while at >= 0:
        yield at
        at = states.find(wanted, at + 1)


class _Retired(NamedTuple):
    """Tables and entries that a worker may still see, and the grace period they wait for."""

    grace: Grace
    tables: Sequence[int]
    entries: Sequence[int]


def _check_header(header: Header, size_bytes: int) -> None:
    """Raise ForeignSharedMemory if areas can't even be computed from a header.

    Any process may have memory of that name, so what stands there may be anything.
    """
    numbers = layouts.inode_numbers(header.reach_bytes) if header.has_files else 0
    possible = {
        "memmap_place": header.memmap_place in list(MemmapPlace),
        "page_order": header.page_order < _MOST_SHIFT,
        "section_shift": header.section_shift < _MOST_SHIFT,
        "worker_count": header.worker_count <= size_bytes // layouts.SLOT_BYTES,
        "pool_bytes": header.pool_bytes <= header.reach_bytes,
        "inode_numbers": header.inode_numbers == numbers,
        "cache_set_count": layouts.may_have_sets(header.reach_bytes, header.cache_set_count),
    }
    wrong = next((name for name, is_possible in possible.items() if not is_possible), None)
    if wrong:
        raise ForeignSharedMemory(why=f"{wrong} can't be {getattr(header, wrong)}")


def areas_of(header: Header) -> layouts.Areas:
    """The areas of memory with this header."""
    place = MemmapPlace(header.memmap_place)
    pages = header.reach_bytes // (FRAME_BYTES << header.page_order) if place else 0
    return layouts.compute_areas(
        worker_count=header.worker_count,
        pool_bytes=header.reach_bytes,
        page_count=pages,
        section_shift=header.section_shift,
        has_files=bool(header.has_files),
        memmap_here=place is MemmapPlace.SHARED,
        cache_set_count=header.cache_set_count,
    )


def _table_bytes(extent_count: int) -> int:
    return layouts.TABLE_HEAD.size_bytes + extent_count * layouts.EXTENT.size_bytes


def _section_shift(place: MemmapPlace, page_order: int) -> int:
    """How many page structures come and go together, as a power of two."""
    if place is MemmapPlace.POOL:
        return layouts.STRETCH_SHIFT
    # 128 MiB of the pool, but no fewer structures than fill a frame of memory.
    return max(layouts.SECTION_SHIFT - page_order, layouts.FRAME_OF_STRUCTURES_SHIFT)
