"""Finds room and keeps it: frees frames and slots that come back, and keeps logs short.

Some of this happens within an operation that would have no room otherwise. Most of it happens
between operations, in steps of some ms. Invariants:
- frames that have left a file wait in `busy` until no reader can see them, and so does a slot.
  Freed earlier, a worker's write could land in another file;
- no operation uses an inode while it is forgotten or compacted: the operation under way says whose
  logs it changes, and nothing is forgotten within one;
- what urgent operations take of the reserve comes back, except for the records that still count.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Set
from contextlib import suppress

from pmemfs.errors import DamagedFileSystem
from pmemfs.volume.fs.commits import Decides
from pmemfs.volume.fs.compaction import Compaction
from pmemfs.volume.fs.entries import Entries
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.ground import Ground, empty_journal
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.inodecache import InodeCache
from pmemfs.volume.fs.log import frames_needed
from pmemfs.volume.fs.transaction import Transaction, Upkeep

IDLE_TICKS = 10
"""How long an inode stays in memory unused, in ticks of the file system's clock."""
_MOST_CACHED = 50_000
_DROPPED_AT_ONCE = 1000
_DISCARDED_AT_ONCE = 20_000


class Housekeeping(Upkeep):
    """Housekeeping for one file system."""

    def __init__(self, ground: Ground, cache: InodeCache) -> None:
        self._ground = ground
        self._cache = cache
        self._idle: list[Inode] = []
        self._leftover: Entries | None = None
        self._long_logs: dict[int, None] = {}
        self._compaction: Compaction | None = None
        self._is_compacting = False
        self._busy_slots: list[tuple[object, int]] = []

    def change(self, *, urgent: bool = False, decides: Decides | None = None) -> Transaction:
        """A transaction. Raises OSError (EROFS)."""
        return Transaction(self._ground, self, urgent=urgent, decides=decides)

    # For transactions

    def take_frames(
        self, frame_count: int, *, goal: int, whole: bool, urgent: bool, under_way: Set[int]
    ) -> list[Run]:
        allocator, busy = self._ground.allocator, self._ground.busy
        try:
            return allocator.allocate(frame_count, goal=goal, whole=whole, urgent=urgent)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            reserves = self._ground.reserves
            has_more = reserves is not None and reserves.drain()
            if not (has_more or urgent or busy.frame_count or self._compaction):
                raise
        # From the cheapest to the dearest: what workers were given and have not used, frames of a
        # new log that does not count yet, frames that are busy no more, frames without inodes, and
        # last the dead records of all logs.
        self.abandon_compaction()
        while busy.collect():
            pass
        if urgent:
            # An urgent operation makes no inode, so no operation has taken a slot of an empty
            # frame.
            self.drop_inode_frames(kept_slots=0)
            for inode in [] if self._is_compacting else list(self._cache.inodes):
                if allocator.free_up_to(frame_count) >= frame_count:
                    break
                    # The operation under way has planned where its records go in its own logs.
                if inode.number not in under_way:
                    self._compact(inode)
                    while busy.collect():
                        pass
        return allocator.allocate(frame_count, goal=goal, whole=whole, urgent=urgent)

    def release(
        self, released: list[tuple[Inode, list[Run]]], removed: list[Inode], frames: list[Run]
    ) -> None:
        ground = self._ground
        for inode, runs in released:
            ground.busy.add(runs, ground.tables.changed(inode.number), inode.number)
        for inode in removed:
            token = ground.tables.gone(inode.number)
            ground.busy.add(inode.runs(), token, inode.number)
            self._cache.forget(inode.number)
            ground.allocator.unhold(inode.number)
            ground.untrimmed.discard(inode.number)
            if token is None:
                ground.table.give_back(inode.slot_offset)
            else:
                # A worker may still be writing, and stores the size and the time of that write in
                # the live line. The slot must not belong to another inode by then.
                self._busy_slots.append((token, inode.slot_offset))
                ground.table.withhold(inode.slot_offset)
        # No worker reads logs, so their frames wait for no grace period. But there may be a great
        # many, and `busy` frees those in steps.
        ground.busy.add(frames, None)

    def was_freed(self, inode: Inode) -> None:
        """A worker has freed an inode, and has what the inode had."""
        ground = self._ground
        ground.tables.gone(inode.number)
        self._cache.forget(inode.number)
        self._cache.compressed.discard(inode.number)
        ground.allocator.unhold(inode.number)
        ground.untrimmed.discard(inode.number)

    def keep_reserve(self, changed: Iterable[Inode]) -> None:
        allocator = self._ground.allocator
        for inode in changed:
            if not inode.log.frames:
                # A log in a slot is as short as a log can be.
                continue
            frames = frames_needed(inode.compacted_slots)
            if frames > allocator.log_frames:
                self._ground.note_log_frames(frames)
            if allocator.is_tight(frames):
                self._compact(inode)

    def _compact(self, inode: Inode) -> None:
        """Write a log anew if that saves frames and there is room for it."""
        is_worth_it = frames_needed(inode.compacted_slots) < len(inode.log.frames)
        if self._is_compacting or not is_worth_it or self._cache.cached(inode.number) is None:
            return
        self._is_compacting = True
        try:
            with suppress(OSError), self.change(urgent=True) as change:
                change.compact(inode)
        finally:
            self._is_compacting = False

    # Long logs

    def wish_compaction(self, inode: Inode) -> None:
        self._long_logs[inode.number] = None

    @property
    def is_compacting(self) -> bool:
        """Whether a long log is being written anew, or about to be."""
        return self._compaction is not None or bool(self._long_logs)

    def compact_some(self) -> bool:
        """Write some of a long log anew; whether there is more to do. Raises OSError."""
        # New frames belong to no log yet, so the search for leaks would take them for leaked.
        if self._ground.read_only or self._ground.may_have_leaks:
            return False
        try:
            if self._compaction is None:
                self._compaction = self._next_compaction()
            elif not self._compaction.is_of_inode_in_memory:
                self.abandon_compaction()
            elif not self._compaction.step():
                self._compaction = None
        except DamagedFileSystem as damage:
            self.abandon_compaction()
            raise self._ground.found_damage(str(damage)) from None
        except OSError as error:
            self.abandon_compaction()
            # The next append to that log asks for the compaction again.
            if error.errno != errno.ENOSPC:
                raise
        return self.is_compacting

    def _next_compaction(self) -> Compaction | None:
        while self._long_logs:
            number = next(iter(self._long_logs))
            del self._long_logs[number]
            inode = self._cache.cached(number)
            if inode is not None and inode.is_mostly_dead:
                return Compaction(self._ground, self._cache, self.change, inode)
        return None

    def abandon_compaction(self, of: Inode | None = None) -> None:
        compaction = self._compaction
        if compaction is None or of not in (None, compaction.inode):
            return
        self._compaction = None
        if not self._ground.read_only:
            compaction.abandon()

    # Slots, and inodes that are not needed

    def collect_slots(self) -> None:
        """Give back the slots of inodes that no worker sees any more."""
        waiting = []
        for token, offset in self._busy_slots:
            if self._ground.tables.is_over(token):
                self._ground.table.give_back(offset)
            else:
                waiting.append((token, offset))
        self._busy_slots = waiting

    def drop_inode_frames(self, **wish: int) -> None:
        """Free frames for inodes that have no inode, where there are many of them; see
        `InodeTable.empty_frames`."""
        ground = self._ground
        frames = ground.table.empty_frames(**wish)
        if not frames:
            return
        # The fence makes the words durable that the journal may still have to redo. An emptied
        # journal can then not bring back a tail in a frame that becomes a file's.
        ground.medium.fence()
        empty_journal(ground.medium, ground.geometry)
        ground.allocator.free(ground.table.drop_frames(frames))

    def drop_idle(self, ticks: int = IDLE_TICKS) -> int:
        """Forget inodes that were not needed for a while; how many.

        Call it only between two operations: an operation under way is using inodes.
        """
        before = len(self._cache)
        self.look_for_idle(ticks)
        while self.drop_some():
            pass
        return before - len(self._cache)

    def look_for_idle(self, ticks: int = IDLE_TICKS) -> None:
        """Find the inodes that were not needed for a while, for `drop_some`."""
        if len(self._cache) > _MOST_CACHED:
            ticks = min(ticks, 1)
        self._idle = [
            inode
            for inode in self._cache.inodes
            if inode.used_at + ticks <= self._ground.clock and inode.state.link_count
        ]

    def drop_some(self) -> bool:
        """Forget some of the idle inodes, as many as take some ms; whether there are more.

        The same rule as for `drop_idle` holds. A very large directory is freed in pieces, too.
        """
        if self._leftover is not None:
            if not self._leftover.discard(_DISCARDED_AT_ONCE):
                self._leftover = None
            return True
        for _ in range(_DROPPED_AT_ONCE):
            inode = self._idle.pop() if self._idle else None
            if inode is None:
                return False
            is_known = self._cache.cached(inode.number) is inode
            if not is_known or inode.used_at == self._ground.clock:
                continue
            if not self._ground.read_only:
                self.keep_reserve([inode])
            self._cache.forget(inode.number)
            if len(inode.entries) > _DISCARDED_AT_ONCE:
                self._leftover = inode.entries
                return True
        return True
