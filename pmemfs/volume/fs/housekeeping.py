"""Room, and what it takes to have some: frames and slots that come back, logs that are kept short.

Some of it is done in an operation, because there would be no room else; most of it beside the
operations, in steps of some ms. Invariants:
- what has left a file waits in `busy` until nobody can see it, and a slot as long;
- an inode that is forgotten or compacted is in nobody's hands: the operation under way says whose
  logs it changes, and nothing is forgotten within one;
- what urgent operations take of the reserve comes back, but for what lives.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Set
from contextlib import suppress

from pmemfs.errors import DamagedFileSystem
from pmemfs.volume.fs.compaction import Compaction
from pmemfs.volume.fs.entries import Entries
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.ground import Ground, empty_journal
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.inodecache import InodeCache
from pmemfs.volume.fs.log import frames_needed
from pmemfs.volume.fs.transaction import Transaction, Upkeep

IDLE_TICKS = 10
"""How long, in the file system's clock, an inode stays in memory that nobody needs."""
_MOST_CACHED = 50_000
_DROPPED_AT_ONCE = 1000
_DISCARDED_AT_ONCE = 20_000


class Housekeeping(Upkeep):
    """Keeps house for one file system."""

    def __init__(self, ground: Ground, cache: InodeCache) -> None:
        self._ground = ground
        self._cache = cache
        self._idle: list[Inode] = []
        self._leftover: Entries | None = None
        self._long_logs: dict[int, None] = {}
        self._compaction: Compaction | None = None
        self._is_compacting = False
        self._busy_slots: list[tuple[object, int]] = []

    def change(self, *, urgent: bool = False) -> Transaction:
        """A transaction. Raises OSError (EROFS)."""
        return Transaction(self._ground, self, urgent=urgent)

    # For transactions

    def take_frames(
        self, frame_count: int, *, goal: int, whole: bool, urgent: bool, under_way: Set[int]
    ) -> list[Run]:
        allocator, busy = self._ground.allocator, self._ground.busy
        try:
            return allocator.allocate(frame_count, goal=goal, whole=whole, urgent=urgent)
        except OSError as error:
            may_help = urgent or busy.frame_count or self._compaction
            if error.errno != errno.ENOSPC or not may_help:
                raise
        self.abandon_compaction()
        while busy.collect():
            pass
        if urgent:
            # Nothing urgent makes an inode, so no slot in an empty frame is in anybody's hands.
            self.drop_inode_frames(kept_slots=0)
            for inode in [] if self._is_compacting else list(self._cache.inodes):
                if allocator.free_up_to(frame_count) >= frame_count:
                    break
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
            ground.busy.add(runs, ground.tables.changed(inode.number))
        for inode in removed:
            token = ground.tables.gone(inode.number)
            ground.busy.add(inode.runs(), token)
            self._cache.forget(inode.number)
            ground.allocator.unhold(inode.number)
            ground.untrimmed.discard(inode.number)
            if token is None:
                ground.table.give_back(inode.slot_offset)
            else:
                # A write that is under way may still touch the live line.
                self._busy_slots.append((token, inode.slot_offset))
                ground.table.withhold(inode.slot_offset)
        # Of logs nobody knows but us, so they wait for nobody; but there may be very many.
        ground.busy.add(frames, None)

    def keep_reserve(self, changed: Iterable[Inode]) -> None:
        allocator = self._ground.allocator
        for inode in changed:
            if not inode.log.frames:
                # As short as a log can be.
                continue
            frames = frames_needed(inode.compacted_slots)
            if frames > allocator.log_frames:
                self._ground.note_log_frames(frames)
            if allocator.is_tight(frames):
                self._compact(inode)

    def _compact(self, inode: Inode) -> None:
        """Write a log anew that would take fewer frames so, if there is room for that."""
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
        # The search for leaks does not know what is written here, and nobody's yet.
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
            # Whoever appends to that log wishes it again.
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

    # Slots, and inodes that nobody needs

    def collect_slots(self) -> None:
        """Give back the slots of inodes that nobody sees any more."""
        waiting = []
        for token, offset in self._busy_slots:
            if self._ground.tables.is_over(token):
                self._ground.table.give_back(offset)
            else:
                waiting.append((token, offset))
        self._busy_slots = waiting

    def drop_inode_frames(self, **wish: int) -> None:
        """Free frames of inodes where there are many without any; as `InodeTable.empty_frames`."""
        ground = self._ground
        frames = ground.table.empty_frames(**wish)
        if not frames:
            return
        # The journal is carried out with this fence. What it speaks of is to be no inode any more.
        ground.medium.fence()
        empty_journal(ground.medium, ground.geometry)
        ground.allocator.free(ground.table.drop_frames(frames))

    def drop_idle(self, ticks: int = IDLE_TICKS) -> int:
        """Forget inodes that nobody needed for a while; how many.

        Between two operations only: one under way has inodes in its hands.
        """
        before = len(self._cache)
        self.look_for_idle(ticks)
        while self.drop_some():
            pass
        return before - len(self._cache)

    def look_for_idle(self, ticks: int = IDLE_TICKS) -> None:
        """Find inodes that nobody needed for a while, for `drop_some`."""
        if len(self._cache) > _MOST_CACHED:
            ticks = min(ticks, 1)
        self._idle = [
            inode
            for inode in self._cache.inodes
            if inode.used_at + ticks <= self._ground.clock and inode.state.link_count
        ]

    def drop_some(self) -> bool:
        """Forget some of the idle inodes, as many as take some ms; whether there are more.

        As `drop_idle`. The memory of a very large one is freed in pieces, too.
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
