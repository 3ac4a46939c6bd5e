"""A transaction changes any number of inodes, wholly or not at all.

    with housekeeping.change() as change:
        change.append(inode, record, …)
        change.then(lambda: …)          in memory, once it is committed

A transaction writes only where no reader looks: behind the tails of logs, into free slots and into
free frames. A fence makes these bytes durable. Then the commit makes them count: either one aligned
store moves a single tail, or the journal moves several words together. Invariants:
- a single store commits only where a tail advances within one slot or frame. Every other change of
  a log, and every slot that is given to an inode or freed, goes through the journal. Otherwise a
  journal that was carried out long ago could bring back an older word (see `media.journal`);
- until the commit begins, an error leaves everything as it was, in memory too. If the commit itself
  fails, nobody can tell what is stored, so the file system becomes read-only.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Set
from types import TracebackType

from pmemfs.errors import sentence_of
from pmemfs.media import log as media
from pmemfs.media.inode import (
    HEAD_WORD_AT,
    INLINE_OFFSET,
    SLOT_BYTES,
    TAIL_WORD_AT,
    pack_head,
)
from pmemfs.media.journal import pack_journal
from pmemfs.media.live import size_word
from pmemfs.media.log import FRAME_HEAD_BYTES, MOST_SLOTS, NEXT_AT, RECORD_BYTES
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.commits import Decides
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.ground import Ground
from pmemfs.volume.fs.inode import Inode, State
from pmemfs.volume.fs.log import Log, end_of_area, runs_of_frames

_MOST_SLOTS_AT_ONCE = 1000
"""A compacted log that is longer than this takes some ms to write, so it is written in steps."""


class Upkeep(ABC):
    """What a transaction asks of the part that finds frames for it and tidies up after it."""

    @abstractmethod
    def take_frames(
        self, frame_count: int, *, goal: int, whole: bool, urgent: bool, under_way: Set[int]
    ) -> list[Run]:
        """Take free frames, but none from the logs of `under_way`. Raises OSError (ENOSPC)."""

    @abstractmethod
    def release(
        self, released: list[tuple[Inode, list[Run]]], removed: list[Inode], frames: list[Run]
    ) -> None:
        """Take back what a transaction has freed: runs of files, inodes, and frames of logs."""

    @abstractmethod
    def wish_compaction(self, inode: Inode) -> None:
        """Ask for the log of an inode to be written anew, in steps; see `compaction`."""

    @abstractmethod
    def abandon_compaction(self, of: Inode | None = None) -> None:
        """Stop writing a log anew, that of one inode or (None) of any, and keep the old log."""

    @abstractmethod
    def keep_reserve(self, changed: Iterable[Inode]) -> None:
        """A transaction has added to the logs of these inodes; compact them if frames are scarce.

        This gives the reserve back what urgent operations take from it, except for the records that
        still count. Without it, chmod in a loop would use up the reserve of a full pool.
        """


class Transaction:
    """The changes of one operation. An `urgent` one may use the reserve, because it frees more or
    takes nothing in the end. Most operations are carried out by one transaction, which `decides`.

    Raises OSError: ENOSPC if there was no room, and then nothing has happened; EIO if the commit
    failed, and then nothing can be written any more.
    """

    __slots__ = (
        "_allocated", "_announcements", "_decides", "_ground", "_logs", "_made", "_medium",
        "_needs_journal", "_old_frames", "_put", "_records", "_released", "_removed", "_steps",
        "_upkeep", "_urgent", "_words",
    )  # fmt: skip

    def __init__(
        self, ground: Ground, upkeep: Upkeep, *, urgent: bool = False,
        decides: Decides | None = None,
    ) -> None:  # fmt: skip
        self._decides = decides
        self._ground = ground
        self._upkeep = upkeep
        self._medium = ground.medium
        self._put = ground.medium.put
        self._urgent = urgent
        self._records: dict[int, tuple[Inode, list[bytes]]] = {}
        self._words: list[tuple[int, int, int]] = []
        self._needs_journal = False
        self._allocated: list[Run] = []
        self._made: list[Inode] = []
        self._released: list[tuple[Inode, list[Run]]] = []
        self._removed: list[Inode] = []
        self._announcements: list[Callable[[], object]] = []
        self._steps: list[Callable[[], object]] = []
        self._old_frames: list[Run] = []
        self._logs: list[tuple[Inode, Log]] = []

    def __enter__(self) -> Transaction:
        self._ground.begin_writing()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._abort()
        else:
            self._commit()

    def append(self, inode: Inode, *records: bytes) -> None:
        """Add records to the log of an inode."""
        self._records.setdefault(inode.number, (inode, []))[1].extend(records)

    def allocate(
        self, frame_count: int, *, goal: int = 0, whole: bool = False, urgent: bool = False
    ) -> list[Run]:
        """Take free frames; an abort gives them back. Raises OSError (ENOSPC)."""
        runs = self._upkeep.take_frames(
            frame_count, goal=goal, whole=whole, urgent=urgent or self._urgent,
            under_way=self._records.keys() | {inode.number for inode in self._removed},
        )  # fmt: skip
        self._allocated += runs
        return runs

    def adopt(self, run: Run) -> None:
        """Take over frames that the caller has allocated; an abort gives them back."""
        self._allocated.append(run)

    def release(self, inode: Inode, runs: list[Run]) -> None:
        """Take these frames from the inode: they are free once this is committed and nobody holds
        a page of them."""
        if runs:
            self._released.append((inode, runs))

    def announce(self, step: Callable[[], object]) -> None:
        """Do this right before the commit: tell programs what changes, in memory that they share.

        Told after the commit, it would never be told if the daemon died in between.
        """
        self._announcements.append(step)

    def then(self, step: Callable[[], object]) -> None:
        """Do this right after the commit, before any other task can see its outcome."""
        self._steps.append(step)

    def create(self, birth_ns: int, state: State) -> Inode:
        """A new inode, whose slot `fill_slot` has to write. Raises OSError (ENOSPC)."""
        table = self._ground.table
        try:
            slot, generation = table.take()
        except OSError as error:
            reserves = self._ground.reserves
            if error.errno != errno.ENOSPC or reserves is None or not reserves.drain():
                raise
            slot, generation = table.take()
        log = Log(slot + INLINE_OFFSET, slot + INLINE_OFFSET)
        inode = Inode(table.number_at(slot), slot, generation, birth_ns, log, state)
        self._made.append(inode)
        return inode

    def fill_slot(self, inode: Inode) -> None:
        """Write the slot of a new inode, with records of all that the inode is as its log."""
        records = list(inode.records())
        if sum(map(len, records)) <= SLOT_BYTES - INLINE_OFFSET:
            head = _start_of_slot(inode, inode.slot_offset + INLINE_OFFSET)
            new = self._write_slot(inode, records, head)
        else:
            new = self._write_frames(inode, records)
            self._put(inode.slot_offset, _start_of_slot(inode, new.head))
        # The slot was written with a tail of 0, which means "free". So a crash before the journal
        # is durable leaves a free slot, whatever else lies in it.
        self._words.append((inode.slot_offset + TAIL_WORD_AT, 0, new.tail))
        self._needs_journal = True
        inode.log = new

    def remove(self, inode: Inode) -> None:
        """Free an inode and all its frames."""
        self._records.pop(inode.number, None)
        self._ground.tables.rewritten(inode.number)
        self._word(inode.slot_offset + TAIL_WORD_AT, inode.log.tail, 0)
        self._needs_journal = True
        self._removed.append(inode)
        self._old_frames += log_runs(inode.log)

    def compact(self, inode: Inode) -> None:
        """Write the log of an inode anew, without its dead records. Raises OSError (ENOSPC)."""
        self._rewrite(inode, [])

    def _commit(self) -> None:
        try:
            for inode, records in self._records.values():
                self._extend(inode, records)
            # No word may become durable before the records that it leads to: a tail that a crash
            # leaves would then cover garbage, which the next mount takes for damage.
            self._medium.fence()
        except BaseException:
            self._abort()
            raise
        self._announce()
        try:
            self._move_words()
        except OSError as error:
            # The journal or a word may be stored or not: only the next mount can tell. What is in
            # memory may differ from the pool now, so nothing may build on it.
            self._ground.become_read_only(f"a commit failed: {sentence_of(error)}")
            raise
        # From here on the operation is durable. Nothing below may fail halfway, and since nothing
        # awaits, no other task sees some of it without the rest.
        for inode, log in self._logs:
            inode.log = log
        for step in self._steps:
            step()
        # An inode that was just made needs no `touched`: nobody has been told of it yet.
        changed = self._made
        for inode, _ in self._logs:
            self._ground.tables.touched(inode.number, inode.state.reads_count_after_ns)
            changed.append(inode)
        if self._released or self._removed or self._old_frames:
            self._upkeep.release(self._released, self._removed, self._old_frames)
        self._upkeep.keep_reserve(changed)

    def _announce(self) -> None:
        pinned = self._ground.pinned
        for inode, runs in self._released:
            pinned.left(inode.number, runs)
        for inode in self._removed:
            pinned.left(inode.number, inode.runs())
        for step in self._announcements:
            step()

    def _abort(self) -> None:
        # The records that were written lie behind tails that did not move, so they count nowhere.
        # Frames and slots must come back, or they would stay taken although no inode owns them.
        self._ground.allocator.free(self._allocated)
        for inode in self._made:
            self._ground.table.give_back(inode.slot_offset)

    def _move_words(self) -> None:
        words = self._words
        if not words:
            return
        if self._decides is not None:
            self._ground.commits.decides(self._decides, words[0][0], words[0][2])
        if len(words) > 1 or self._needs_journal:
            # The journal is the commit: once it is durable, a crash between any two stores below
            # is mended by the next mount, which stores the remaining words.
            self._put(self._ground.journal_offset, pack_journal(words))
            self._medium.fence()
        for offset, _, new in words:
            self._put(offset, new.to_bytes(8, "little"))
        if len(words) == 1 and not self._needs_journal:
            # Here the one aligned store is the commit.
            self._medium.fence()
        # With a journal the words need no fence of their own. They become durable with the next
        # fence, and every transaction fences before it overwrites the journal.

    def _extend(self, inode: Inode, records: list[bytes]) -> None:
        """Write records behind the tail of a log, or write the whole log anew if that is better."""
        log = inode.log
        is_full = log.tail + sum(map(len, records)) > end_of_area(log.tail, inode.slot_offset)
        if is_full and self._is_rewritten(inode, records):
            return
        append = self._append_to_frames if is_full else self._append_here
        new = append(inode, records)
        self._word(inode.slot_offset + TAIL_WORD_AT, log.tail, new.tail)
        self._logs.append((inode, new))

    def _is_rewritten(self, inode: Inode, records: list[bytes]) -> bool:
        """Write a full log anew, with these records, if that is better; whether it was.

        Raises OSError (ENOSPC) if the log can't be continued in any other way.
        """
        log, is_mostly_dead = inode.log, inode.is_mostly_dead
        if is_mostly_dead and inode.compacted_slots > _MOST_SLOTS_AT_ONCE:
            # Too much for one step: the log gets another frame now, and is written anew later.
            self._upkeep.wish_compaction(inode)
        elif log.is_inline or is_mostly_dead:
            try:
                self._rewrite(inode, records)
                return True
            except OSError:
                # A log in frames can get one more frame. A log in a slot has no room to be linked
                # from, so it can only move.
                if log.is_inline:
                    raise
        return False

    def _append_here(self, inode: Inode, records: list[bytes]) -> Log:
        log = inode.log
        length = self._put_records(inode, log.tail, records)
        count = log.slot_count + length // RECORD_BYTES
        return Log(log.head, log.tail + length, log.frames, count)

    def _append_to_frames(self, inode: Inode, records: list[bytes]) -> Log:
        """Put what fits into the last frame and the rest into new frames, linked to the last."""
        log = inode.log
        room = end_of_area(log.tail, inode.slot_offset) - log.tail
        position = 0
        while position < len(records) and len(records[position]) <= room:
            room -= len(records[position])
            position += 1
        here = records[:position]
        if room:
            here.append(media.pack_padding())
        length = self._put_records(inode, log.tail, here)
        # The new tail may be lower than the old one, or a place where an older log of this inode
        # ended. An old journal entry could then match it by chance, so the journal must take it.
        self._needs_journal = True
        rest = self._write_frames(inode, records[position:])
        # The link is stored into a frame that counts. That is safe: a reader follows it only when
        # the tail is not in this frame, and the tail moves last.
        self._put(log.frames[-1] + NEXT_AT, rest.frames[0].to_bytes(8, "little"))
        count = log.slot_count + length // RECORD_BYTES + rest.slot_count
        return Log(log.head, rest.tail, log.frames + rest.frames, count)

    def replace_log(self, inode: Inode, new: Log) -> None:
        """Give an inode another log, which is written already and says the same."""
        # A log may come back to where it lay before, and then nothing else tells the new one.
        self._ground.tables.rewritten(inode.number)
        self._word(inode.slot_offset + HEAD_WORD_AT, inode.log.head, new.head)
        self._word(inode.slot_offset + TAIL_WORD_AT, inode.log.tail, new.tail)
        self._needs_journal = True
        self._old_frames += log_runs(inode.log)
        self._logs.append((inode, new))

    def _rewrite(self, inode: Inode, records: list[bytes]) -> None:
        """Write a new log: what the inode is, and then these records."""
        everything = [*inode.records(), *records]
        does_fit = sum(map(len, everything)) <= SLOT_BYTES - INLINE_OFFSET
        # A slot can take the new log only while the old one is elsewhere: writing over a log that
        # counts would leave neither after a crash.
        if does_fit and not inode.log.is_inline:
            new = self._write_slot(inode, everything)
        else:
            new = self._write_frames(inode, everything)
        self.replace_log(inode, new)
        # A compaction in steps of this inode would go on copying from the old log.
        self.then(lambda: self._upkeep.abandon_compaction(inode))

    def _write_slot(self, inode: Inode, records: list[bytes], before: bytes = b"") -> Log:
        """Write records into the slot of an inode, behind the bytes `before`."""
        start = inode.slot_offset + INLINE_OFFSET
        length = self._put_records(inode, start, records, before)
        return Log(start, start + length, slot_count=length // RECORD_BYTES)

    def _write_frames(self, inode: Inode, records: list[bytes]) -> Log:
        """Write records into new frames, each linked to the next."""
        contents: list[list[bytes]] = [[]]
        room = MOST_SLOTS * RECORD_BYTES
        for record in records:
            if len(record) > room:
                if room:
                    contents[-1].append(media.pack_padding())
                contents.append([])
                room = MOST_SLOTS * RECORD_BYTES
            contents[-1].append(record)
            room -= len(record)
        frames = [
            (run.pfn + position) << PAGE_SHIFT
            for run in self.allocate(len(contents))
            for position in range(run.frame_count)
        ]
        slot_count = length = 0
        for content, frame, after in zip(contents, frames, [*frames[1:], 0], strict=True):
            head = media.pack_frame_head(inode.number, inode.generation, frame, after)
            length = self._put_records(inode, frame + FRAME_HEAD_BYTES, content, head)
            slot_count += length // RECORD_BYTES
        return Log(frames[0] + FRAME_HEAD_BYTES, frames[-1] + FRAME_HEAD_BYTES + length, frames,
                   slot_count)  # fmt: skip

    def _put_records(
        self, inode: Inode, offset: int, records: list[bytes], before: bytes = b""
    ) -> int:
        """Seal records for the place where they will lie, and store them behind the bytes `before`;
        the length of the records."""
        raw = media.seal(records, inode.number, inode.generation, offset)
        if raw:
            self._put(offset - len(before), before + raw)
        return len(raw)

    def _word(self, offset: int, old: int, new: int) -> None:
        if new != old:
            self._words.append((offset, old, new))


def _start_of_slot(inode: Inode, log_start: int) -> bytes:
    """What stands before the log in a new inode's slot: the head and a live line."""
    head = pack_head(inode.number, inode.generation, inode.birth_ns, log_start, 0)
    if inode.is_file:
        # The slot's former inode has left a line there that would count as damage for this one.
        head += size_word(0, inode.keys_of_line()[0]).to_bytes(8, "little")
    return head.ljust(INLINE_OFFSET, b"\0")


def log_runs(log: Log) -> list[Run]:
    """The frames of a log."""
    return runs_of_frames(log.frames)
