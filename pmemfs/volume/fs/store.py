"""The store of a mounted file system: inodes, their logs, frames and transactions, as one object.

    ground         medium, frames, slots, head; whether anything may be written
    lines          sizes and times that change without a transaction
    cache          the inodes in memory
    housekeeping   transactions, and the room that they take
    sealing        what is encrypted of inodes; without keys by default

Many operations of the parts stand here too, as bound methods: a call of such a method costs no more
than a call of the store's own. Invariants:
- an inode that has no name lives as long as anybody holds it. Freeing it earlier would give its
  frames to a second file while the first is open;
- nothing here awaits, so what one call does is atomic to all tasks.
"""

from __future__ import annotations

from contextlib import suppress

from pmemfs.errors import DamagedFileSystem, MemoryFault
from pmemfs.memmap.base import Memmap
from pmemfs.pool import Pool
from pmemfs.volume.fs.commits import Commits
from pmemfs.volume.fs.ground import Ground
from pmemfs.volume.fs.holds import Holds, OwnHolds
from pmemfs.volume.fs.housekeeping import IDLE_TICKS, Housekeeping
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.inodecache import InodeCache
from pmemfs.volume.fs.livelines import LiveLines
from pmemfs.volume.fs.publication import Tables
from pmemfs.volume.fs.reading import is_unnamed, may_read_in_steps
from pmemfs.volume.fs.sealing import Sealing


class Store:
    """The store of one file system."""

    def __init__(
        self, pool: Pool, memmap: Memmap, tables: Tables | None = None,
        holds: Holds | None = None, commits: Commits | None = None,
        sealing: Sealing | None = None,
    ) -> None:  # fmt: skip
        """Mount: as `Ground`. What `holds` says stays held. Raises DamagedFileSystem."""
        self.sealing = sealing or Sealing()
        self.ground = ground = Ground(pool, memmap, tables, commits)
        self.lines = lines = LiveLines(ground, self.sealing.locks)
        self.cache = cache = InodeCache(ground, lines)
        self.housekeeping = Housekeeping(ground, cache)
        self._holds: Holds = OwnHolds() if holds is None else holds
        self.removal_count = 0
        """How many names were taken from inodes here."""

        self.pool, self.medium, self.tables = ground.pool, ground.medium, ground.tables
        self.allocator, self.table, self.busy = ground.allocator, ground.table, ground.busy
        self.times, self.untrimmed = ground.times, ground.untrimmed
        self.refuse, self.refuse_unserved = ground.refuse, ground.refuse_unserved
        self.begin_writing = ground.begin_writing
        self.found_damage = ground.found_damage
        self.become_read_only = ground.become_read_only
        self.size_of, self.set_live_size = lines.size_of, lines.set_live_size
        self.state_of, self.set_written_ns = lines.state_of, lines.set_written_ns
        self.inode, self.read_on = cache.inode, cache.read_on
        self.cached, self.keep = cache.cached, cache.keep
        self.change = self.housekeeping.change

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written: never on this mount, or no more since damage was met."""
        return self.ground.read_only

    # Holds

    def hold(self, number: int, count: int = 1) -> None:
        """Hold an inode: it lives on, whatever becomes of its names."""
        may_read_in_steps.set(False)
        self._holds.add(number, count)

    def drop(self, number: int, count: int = 1) -> None:
        """Drop a hold; an inode without a name is freed with its last hold. Raises OSError."""
        may_read_in_steps.set(False)
        if not self._holds.take(number, count):
            self._free_unnamed(number)

    def will_drop(self, number: int) -> None:
        """As `Volume.will_drop`."""
        self._holds.will_take(number)

    def let_go(self, number: int, count: int | None = None) -> None:
        """Drop holds, by default all, that nobody was told of; the inode is not freed."""
        self._holds.take(number, self._holds.count(number) if count is None else count)

    @property
    def hold_words(self) -> memoryview | None:
        """As `Holds.words`."""
        return self._holds.words

    def note_words(self) -> memoryview | None:
        """As `Holds.note_words`."""
        return self._holds.note_words()

    def is_held(self, number: int) -> bool:
        """Whether anybody holds an inode."""
        return self._holds.count(number) > 0

    def held(self) -> list[int]:
        """The inodes that anybody holds."""
        return [number for number, _ in self._holds.counts()]

    def remove(self, inode: Inode) -> None:
        """Free an inode that has no name and is not held."""
        with self.change(urgent=True) as change:
            change.remove(inode)

    def _free_unnamed(self, number: int) -> None:
        """Free an inode that is not held any more, if it has no name."""
        if not self.read_only and self._is_unnamed(number):
            self.remove(self.inode(number))

    def free_orphan(self, number: int) -> None:
        """Free an inode that a worker could not free, unless it has got a hold since."""
        with suppress(DamagedFileSystem):
            if not self.is_held(number) and self.ground.table.head(number) is not None:
                self._free_unnamed(number)

    def has_unnamed(self) -> bool:
        """Whether anybody holds an inode that has no name."""
        return any(self._is_unnamed(number) for number, _ in self._holds.counts())

    def _is_unnamed(self, number: int) -> bool:
        """Whether an inode has no name."""
        inode = self.cached(number)
        if inode is not None:
            return inode.state.link_count == 0
        # An inode that loses its last name here stays in memory as long as it is held. One that
        # a worker has taken it from may never have been here.
        return self.ground.reserves is not None and is_unnamed(self.medium, self.table, number)

    def stop_writing(self) -> None:
        """Write nothing any more; what has changed is durable with the next fence."""
        ground = self.ground
        self.housekeeping.abandon_compaction()
        self._drain()
        if not ground.read_only:
            for number, _ in self._holds.counts():
                # As at the end: of what was open nothing here knows how it has grown.
                with suppress(MemoryFault):
                    self.lines.write_back(ground.table.slot_offset(number))
        ground.stop_writing()

    def settle(self) -> bool:
        """Free what has left its files; whether something is still in use, but by no pin."""
        self.ground.busy.collect()
        return self.ground.busy.has_unpinned

    def end(self) -> None:
        """The mount ends, and with it all holds: leave the pool clean. Raises OSError."""
        ground, housekeeping = self.ground, self.housekeeping
        if ground.pool.medium.read_only:
            return
        housekeeping.abandon_compaction()
        self._drain()
        for number, count in list(self._holds.counts()):
            self._holds.take(number, count)
            # The fault was reported already, and the other open files are to become durable.
            with suppress(MemoryFault):
                if not ground.read_only:
                    # The data plane may have appended since the last fsync without a word to us.
                    self.lines.write_back(ground.table.slot_offset(number))
                self._free_unnamed(number)
        ground.clock += IDLE_TICKS
        housekeeping.drop_idle()
        ground.busy.free_all()
        ground.medium.fence()
        self.leave_clean()

    def _drain(self) -> None:
        """Take back what workers were given and have not used: nobody owns it."""
        if self.ground.reserves is not None and not self.read_only:
            self.ground.reserves.drain()

    def leave_clean(self) -> None:
        """Say in the head that it is clean, if it is; all else is durable."""
        ground = self.ground
        # In a clean file system frames behind a size are damage, so "clean" must not be said of
        # files that are still mapped ahead.
        has_leaks = ground.may_have_leaks or ground.has_lost_some
        has_leaks |= bool(ground.busy.frame_count or ground.untrimmed)
        if not has_leaks and not ground.damage:
            ground.store_clean(1)
