"""The inodes of a mounted file system: loaded when needed, changed in transactions, dropped idle.

Invariants:
- an inode in memory is what its log says; every change goes through a transaction first. The
  exception is the live line;
- an inode that has no name lives as long as anybody holds it;
- nothing here awaits, so what one call does is atomic to all tasks;
- an inode that is being read in steps is not changed meanwhile: whoever wants it reads it to its
  end first, or is told to come again.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Set
from contextlib import suppress
from contextvars import ContextVar

from pmemfs.clock import FileClock, not_before
from pmemfs.errors import DamagedFileSystem, MemoryFault, system_error
from pmemfs.media.filesystem import (
    HEAD,
    HEAD_FRAME,
    JOURNAL_FRAME,
    LEAST_FRAMES,
    Geometry,
    validate_head,
)
from pmemfs.media.inode import LIVE_OFFSET
from pmemfs.media.journal import HEAD as JOURNAL_HEAD
from pmemfs.media.live import LIVE_LINE, size_word
from pmemfs.media.log import InodeFlags
from pmemfs.medium.base import Medium
from pmemfs.memmap.base import Memmap
from pmemfs.pool import Pool
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.busy import BusyPages
from pmemfs.volume.fs.compaction import Compaction
from pmemfs.volume.fs.entries import Entries
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.inode import Inode, State
from pmemfs.volume.fs.log import frames_needed
from pmemfs.volume.fs.metadata import MetadataMedium
from pmemfs.volume.fs.reading import (
    Reading,
    Steps,
    read_accessed,
    read_live,
    reading_inode,
    stored_size,
    unfinished_words,
)
from pmemfs.volume.fs.table import InodeTable
from pmemfs.volume.fs.tables import NoTables, Tables
from pmemfs.volume.fs.transaction import Transaction

log = logging.getLogger(__name__)

_IDLE_TICKS = 10
_MOST_CACHED = 50_000
_ACCESSED_AT = LIVE_LINE.offset_of("accessed_ns")
_CLEAN_AT = HEAD.offset_of("is_clean")
_LOG_FRAMES_AT = HEAD.offset_of("log_frames")
READING_STEPS = 16
"""Frames of a log that are read at once while others wait: some thousand records, some ms."""
_RUNS_A_STEP = 512
_DROPPED_AT_ONCE = 1000
_DISCARDED_AT_ONCE = 20_000

_may_wait: ContextVar[bool] = ContextVar("_may_wait", default=False)


class NotRead(Exception):
    """An operation needs an inode that takes long to read; it has changed nothing yet.

    Read it with `read_on`, and begin again.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class MayWait:
    """In this context an operation raises NotRead, as long as it has changed nothing."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _may_wait.set(True)

    def __exit__(self, *_: object) -> None:
        _may_wait.reset(self._token)


def geometry_of(pool: Pool) -> Geometry:
    """The frames of a pool's data zone."""
    return Geometry(int(pool.first_data_pfn), pool.data_pfn_count)


def empty_journal(medium: Medium, geometry: Geometry) -> None:
    """Let the journal say nothing any more."""
    at = geometry.offset_of(JOURNAL_FRAME)
    medium.store(at, bytes(JOURNAL_HEAD.size_bytes))
    medium.persist(at, JOURNAL_HEAD.size_bytes)


class InodeStore:
    """The inodes of one file system."""

    def __init__(self, pool: Pool, memmap: Memmap, tables: Tables | None = None) -> None:
        """Mount: carry out what the journal says, look at the head. Raises DamagedFileSystem."""
        self.pool = pool
        self.medium = MetadataMedium(pool.medium, lambda fault: self.become_read_only(str(fault)))
        self.memmap = memmap
        self.tables = tables or NoTables()
        self.geometry = geometry_of(pool)
        self.read_only = pool.medium.read_only
        self.damage = ""
        if self.geometry.frame_count < LEAST_FRAMES:
            raise DamagedFileSystem(why="the data zone is too small to hold one")
        self._head_offset = self.geometry.offset_of(HEAD_FRAME)
        raw = self.medium.read(self._head_offset, HEAD.size_bytes)
        head = validate_head(raw, pool.label.uuid)
        self.may_have_leaks = head.is_clean != 1
        self._has_written = False
        self.allocator = Allocator(self.medium, self.geometry)
        self.allocator.log_frames = head.log_frames
        self.table = InodeTable(self.medium, self.geometry, self.allocator)
        self.busy = BusyPages(self.allocator, memmap, self.tables)
        self.clock = 0
        self.times = FileClock()
        self.obeys_flags = True
        """Whether flags of inodes forbid anything: a repair must change what is immutable too."""
        self._inodes: dict[int, Inode] = {}
        self._readings: dict[int, Reading] = {}
        self._idle: list[Inode] = []
        self._leftover: Entries | None = None
        self._long_logs: dict[int, None] = {}
        self._compaction: Compaction | None = None
        self._holds: dict[int, int] = {}
        self._busy_slots: list[tuple[object, int]] = []
        self._is_compacting = False
        self.untrimmed: set[int] = set()
        """Files that have got frames since their last close, so perhaps some behind their size."""
        self.table.pending_words = self._recover()

    # Inodes

    def inode(self, number: int) -> Inode:
        """An inode. Raises OSError: ESTALE where there is none, EIO where it is damaged; NotRead.

        A number may come from a file handle that outlasts the inode, or that somebody made up, so
        one that none can have is no damage.
        """
        inode = self._inodes.get(number)
        if inode is None:
            if self.read_on(number, READING_STEPS if _may_wait.get() else None):
                raise NotRead(number)
            inode = self._inodes[number]
        inode.used_at = self.clock
        return inode

    def read_on(self, number: int, steps: int | None = READING_STEPS) -> bool:
        """Read an inode that is not in memory, or read it on; whether there is more to read.

        Raises OSError, as `inode`, and then nothing is read any more.
        """
        if number in self._inodes:
            return False
        reading = self._readings.pop(number, None) or Reading(self._reading(number))
        try:
            if reading.go_on(steps):
                self._readings[number] = reading
                return True
            inode = reading.inode
        except DamagedFileSystem as damage:
            if not self.table.is_possible(number):
                raise system_error(errno.ESTALE) from None
            raise self.found_damage(str(damage)) from None
        if inode is None:
            raise OSError(errno.ESTALE, "no such inode")
        if inode.is_file and not self.read_only and read_live(self.medium, inode)[0] is None:
            self.set_live_size(inode, inode.state.size_bytes)
        self.keep(inode)
        return False

    def read_inode(self, number: int) -> Inode | None:
        """As `reading.read_inode`, for who only looks. Raises DamagedFileSystem.

        Where frames of inodes are among those of a file, too: a write to it would destroy them.
        """
        reading = Reading(self._reading(number))
        reading.go_on()
        return reading.inode

    def _reading(self, number: int) -> Steps:
        inode = yield from reading_inode(self.medium, self.table, number)
        if inode is not None:
            for at, run in enumerate(inode.runs()):
                if self.table.has_inodes(run):
                    raise DamagedFileSystem(why=f"inode {number}: it has frames of inodes")
                if at % _RUNS_A_STEP == _RUNS_A_STEP - 1:
                    yield
        return inode

    def cached(self, number: int) -> Inode | None:
        """An inode if it is in memory."""
        return self._inodes.get(number)

    def keep(self, inode: Inode) -> None:
        """A new inode is in memory from now on."""
        inode.used_at = self.clock
        self._inodes[inode.number] = inode

    @property
    def cached_inodes(self) -> Iterable[Inode]:
        """The inodes in memory."""
        return self._inodes.values()

    def drop_idle(self, ticks: int = _IDLE_TICKS) -> int:
        """Forget inodes that nobody needed for a while; how many.

        Between two operations only: one under way has inodes in its hands.
        """
        before = len(self._inodes)
        self.look_for_idle(ticks)
        while self.drop_some():
            pass
        return before - len(self._inodes)

    def look_for_idle(self, ticks: int = _IDLE_TICKS) -> None:
        """Find inodes that nobody needed for a while, for `drop_some`."""
        if len(self._inodes) > _MOST_CACHED:
            ticks = min(ticks, 1)
        self._idle = [
            inode
            for inode in self._inodes.values()
            if inode.used_at + ticks <= self.clock and inode.state.link_count
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
            if self._inodes.get(inode.number) is not inode or inode.used_at == self.clock:
                continue
            if not self.read_only:
                self.keep_reserve([inode])
            del self._inodes[inode.number]
            if len(inode.entries) > _DISCARDED_AT_ONCE:
                self._leftover = inode.entries
                return True
        return True

    # Holds

    def hold(self, number: int, count: int = 1) -> None:
        """Keep an inode, whatever becomes of its names."""
        _may_wait.set(False)
        self._holds[number] = self._holds.get(number, 0) + count

    def drop(self, number: int, count: int = 1) -> None:
        """Let go of an inode; one without a name is freed with its last hold. Raises OSError."""
        _may_wait.set(False)
        left = self._holds.get(number, 0) - count
        if left > 0:
            self._holds[number] = left
            return
        self._holds.pop(number, None)
        self._free_unnamed(number)

    def _free_unnamed(self, number: int) -> None:
        """Free an inode that nobody holds any more, if it has no name."""
        # One without a name stays in memory as long as it is held.
        inode = self._inodes.get(number)
        if inode is not None and inode.state.link_count == 0 and not self.read_only:
            self.remove(inode)

    def is_held(self, number: int) -> bool:
        """Whether anybody holds an inode."""
        return number in self._holds

    def remove(self, inode: Inode) -> None:
        """Free an inode that has no name and that nobody holds."""
        with self.change(urgent=True) as change:
            change.remove(inode)

    # The live line

    def size_of(self, inode: Inode) -> int:
        """The size of an inode in bytes. Raises OSError (EIO)."""
        try:
            return stored_size(self.medium, inode)
        except DamagedFileSystem as damage:
            raise self.found_damage(str(damage)) from None

    def _live_of(self, inode: Inode) -> tuple[int | None, int]:
        """As `read_live`. Raises OSError (EIO)."""
        try:
            return read_live(self.medium, inode)
        except DamagedFileSystem as damage:
            raise self.found_damage(str(damage)) from None

    def set_live_size(self, inode: Inode, size_bytes: int) -> None:
        """Store a size for all to see; durable with the next fence."""
        word = size_word(size_bytes, inode.keys_of_line()[0])
        self.medium.store(inode.slot_offset + LIVE_OFFSET, word.to_bytes(8, "little"))
        self.medium.flush(inode.slot_offset + LIVE_OFFSET, 8)

    def set_written_ns(self, inode: Inode, now_ns: int) -> None:
        """Store when a file was written to."""
        at = inode.slot_offset + LIVE_OFFSET + 8
        self.medium.store(at, now_ns.to_bytes(8, "little"))
        self.medium.flush(at, 8)

    def forget_written(self, inode: Inode) -> None:
        """Let the time of modification that was logged count, and no write before it."""
        if inode.is_file and self._live_of(inode)[1] >= inode.state.changed_ns:
            self.set_written_ns(inode, 0)
            self.medium.fence()

    def set_accessed_ns(self, inode: Inode, now_ns: int) -> None:
        """Store when an inode was accessed; durable with the next fence. 0: the log has it."""
        at = inode.slot_offset + LIVE_OFFSET + _ACCESSED_AT
        self.medium.store(at, max(0, now_ns).to_bytes(8, "little"))
        self.medium.flush(at, 8)

    def state_of(self, inode: Inode) -> State:
        """The attributes of an inode, as a record would have them now. Raises OSError (EIO)."""
        state = inode.state.replaced()
        state.accessed_ns = read_accessed(self.medium, inode) or state.accessed_ns
        if inode.is_file:
            size_bytes, written_ns = self._live_of(inode)
            if size_bytes is not None:
                state.size_bytes = size_bytes
            # In one tick, the write was the later one: see `forget_written`.
            if 0 < written_ns < 1 << 63 and state.changed_ns <= written_ns:
                state.modified_ns = not_before(written_ns, state.modified_ns)
                state.changed_ns = not_before(written_ns, state.modified_ns)
        return state

    # Changes

    def refuse(self, inode: Inode, flags: InodeFlags) -> None:
        """Raise OSError (EPERM) for an inode that has one of these flags, which forbid a change.

        The kernel can't, since it does not know them for an inode of FUSE.
        """
        if inode.state.flags & flags and self.obeys_flags:
            raise system_error(errno.EPERM)

    def change(self, *, urgent: bool = False) -> Transaction:
        """A transaction. Raises OSError (EROFS)."""
        return Transaction(self, urgent=urgent)

    def begin_writing(self) -> None:
        """Raise OSError (EROFS) where nothing may be written; remember that something was.

        Whoever has begun to write goes on to the end, so nothing raises NotRead after this.
        """
        _may_wait.set(False)
        if self.read_only:
            raise system_error(errno.EROFS)
        if not self._has_written:
            self._store_clean(0)
            self._has_written = True

    def take_frames(
        self, frame_count: int, *, goal: int, whole: bool, urgent: bool, under_way: Set[int]
    ) -> list[Run]:
        """Free frames, not from the logs of `under_way`. Raises OSError (ENOSPC)."""
        try:
            return self.allocator.allocate(frame_count, goal=goal, whole=whole, urgent=urgent)
        except OSError as error:
            may_help = urgent or self.busy.frame_count or self._compaction
            if error.errno != errno.ENOSPC or not may_help:
                raise
        self.abandon_compaction()
        while self.busy.collect():
            pass
        if urgent:
            # Nothing urgent makes an inode, so no slot in an empty frame is in anybody's hands.
            self.drop_inode_frames(kept_slots=0)
            for inode in [] if self._is_compacting else list(self._inodes.values()):
                if self.allocator.free_up_to(frame_count) >= frame_count:
                    break
                if inode.number not in under_way:
                    self._compact(inode)
                    while self.busy.collect():
                        pass
        return self.allocator.allocate(frame_count, goal=goal, whole=whole, urgent=urgent)

    def release(
        self, released: list[tuple[Inode, list[Run]]], removed: list[Inode], frames: list[Run]
    ) -> None:
        """What a transaction has freed."""
        for inode, runs in released:
            self.busy.add(runs, self.tables.changed(inode.number))
        for inode in removed:
            token = self.tables.gone(inode.number)
            self.busy.add(inode.runs(), token)
            self._inodes.pop(inode.number, None)
            self.allocator.unhold(inode.number)
            self.untrimmed.discard(inode.number)
            if token is None:
                self.table.give_back(inode.slot_offset)
            else:
                # A write that is under way may still touch the live line.
                self._busy_slots.append((token, inode.slot_offset))
                self.table.withhold(inode.slot_offset)
        # Of logs nobody knows but us, so they wait for nobody; but there may be very many.
        self.busy.add(frames, None)

    def wish_compaction(self, inode: Inode) -> None:
        """The log of an inode is to be written anew, in steps; see `compaction`."""
        self._long_logs[inode.number] = None

    def compact_some(self) -> bool:
        """Write some of a long log anew; whether there is more to do. Raises OSError."""
        # The search for leaks does not know what is written here, and nobody's yet.
        if self.read_only or self.may_have_leaks:
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
            raise self.found_damage(str(damage)) from None
        except OSError as error:
            self.abandon_compaction()
            # Whoever appends to that log wishes it again.
            if error.errno != errno.ENOSPC:
                raise
        return self._compaction is not None or bool(self._long_logs)

    def _next_compaction(self) -> Compaction | None:
        while self._long_logs:
            number = next(iter(self._long_logs))
            del self._long_logs[number]
            inode = self._inodes.get(number)
            if inode is not None and inode.is_mostly_dead:
                return Compaction(self, inode)
        return None

    def abandon_compaction(self, of: Inode | None = None) -> None:
        """Leave a log as it is that is being written anew, of an inode or of any."""
        compaction = self._compaction
        if compaction is None or of not in (None, compaction.inode):
            return
        self._compaction = None
        if not self.read_only:
            compaction.abandon()

    def keep_reserve(self, changed: Iterable[Inode]) -> None:
        """Something was logged of these: where free frames are few, give back what is dead of it.

        So urgent operations give back what they take of the reserve, but for what lives.
        """
        for inode in changed:
            frames = frames_needed(inode.compacted_slots)
            if frames > self.allocator.log_frames:
                self._note_log_frames(frames)
            if self.allocator.is_tight(frames):
                self._compact(inode)

    def _compact(self, inode: Inode) -> None:
        """Write a log anew that would take fewer frames so, if there is room for that."""
        is_worth_it = frames_needed(inode.compacted_slots) < len(inode.log.frames)
        if self._is_compacting or not is_worth_it or inode.number not in self._inodes:
            return
        self._is_compacting = True
        try:
            with suppress(OSError), self.change(urgent=True) as change:
                change.compact(inode)
        finally:
            self._is_compacting = False

    def _note_log_frames(self, frame_count: int) -> None:
        """Keep room for a log that is longer than any was, after the next mount, too."""
        self.allocator.log_frames = frame_count
        at = self._head_offset + _LOG_FRAMES_AT
        self.medium.store(at, frame_count.to_bytes(8, "little"))
        self.medium.flush(at, 8)

    def collect_slots(self) -> None:
        """Give back the slots of inodes that nobody sees any more."""
        waiting = []
        for token, offset in self._busy_slots:
            if self.tables.is_over(token):
                self.table.give_back(offset)
            else:
                waiting.append((token, offset))
        self._busy_slots = waiting

    def drop_inode_frames(self, **wish: int) -> None:
        """Free frames of inodes where there are many without any; as `InodeTable.empty_frames`."""
        frames = self.table.empty_frames(**wish)
        if not frames:
            return
        # The journal is carried out with this fence. What it speaks of is to be no inode any more.
        self.medium.fence()
        empty_journal(self.medium, self.geometry)
        self.allocator.free(self.table.drop_frames(frames))

    def found_damage(self, why: str) -> OSError:
        """The error for an operation that has met damage, after which nothing is written."""
        self.become_read_only(why)
        return OSError(errno.EIO, why)

    def become_read_only(self, why: str) -> None:
        """Something is damaged, or may be: change nothing any more."""
        if not self.damage:
            log.error("%s; nothing is written any more", why)
            self.damage = why
        self.read_only = True

    def end(self) -> None:
        """Nobody holds anything any more: leave the pool clean. Raises OSError."""
        if self.pool.medium.read_only:
            return
        self.abandon_compaction()
        for number in list(self._holds):
            self._holds.pop(number)
            # A fault has been told, and what else was open is to become durable all the same.
            with suppress(MemoryFault):
                if not self.read_only:
                    # What was open may have grown since its last fsync, and nothing here knows.
                    self.medium.flush(self.table.slot_offset(number) + LIVE_OFFSET, 16)
                self._free_unnamed(number)
        self.clock += _IDLE_TICKS
        self.drop_idle()
        while self.busy.collect():
            pass
        self.medium.fence()
        # In a clean file system, frames behind a size are damage.
        has_leaks = self.may_have_leaks or self.busy.frame_count or self.untrimmed
        if not has_leaks and not self.damage:
            self._store_clean(1)

    def _store_clean(self, is_clean: int) -> None:
        at = self._head_offset + _CLEAN_AT
        self.medium.store(at, is_clean.to_bytes(8, "little"))
        self.medium.persist(at, 8)

    def _recover(self) -> dict[int, int]:
        """Carry out what the journal says that a crash has interrupted.

        Where nothing can be written, what would be. Raises DamagedFileSystem.
        """
        words = unfinished_words(self.medium, self.table)
        if self.read_only or not words:
            return words
        for offset, word in words.items():
            self.medium.store(offset, word.to_bytes(8, "little"))
            self.medium.flush(offset, 8)
        self.medium.fence()
        return {}

    def grow(self) -> None:
        """The pool's zones have become larger."""
        self.geometry = self.table.geometry = geometry_of(self.pool)
        self.allocator.set_geometry(self.geometry)
