"""The control plane's part in names that workers change; see `dataplane/names.pxd`.

    enter, leave     between these this process has the lock of names: whenever its code runs
    serve            hands out what workers take, and frees what they could not
    recover          settles what a dead data plane was about

Invariants:
- nothing of the file system is looked at without the lock, and once it is had, what workers have
  changed is known before anything else;
- workers change names only while that is allowed here (`is_on`): not before everything is ready,
  nor where this process relies on nothing else changing while it waits: when leaks are searched for
  or files are moved, when the pool grows or stops to be written to;
- a request that a worker has carried out is answered from its record when it comes again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import trio

from pmemfs.dataplane import layouts
from pmemfs.dataplane.answers import Answers
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import (
    NAMES_DECISION,
    NAMES_HEAD,
    NAMES_LISTED,
    HandleKind,
    NamesDecision,
)
from pmemfs.dataplane.native import NamesShared, NamesStack, load_word, store_word
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.errors import DamagedFileSystem, sentence_of
from pmemfs.fuse import wire
from pmemfs.fuse.once import RECORDED
from pmemfs.media.inode import TAIL_WORD_AT
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.fs.catchup import CatchUp
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.reserves import Reserves

log = logging.getLogger(__name__)

OPEN_FLAGS = wire.FOPEN_DIRECT_IO | wire.FOPEN_PARALLEL_DIRECT_WRITES | wire.FOPEN_NOFLUSH
"""Of a file that is not cached; see `encode.open_out`."""
_WANTED_HANDLES = 1024
_HANDLES_STEP = 256
_ORPHANS_STEP = 32
_MOST = 3
_STARVED_SECONDS = 1
_PATIENCE_NS = 10 * 10**9
_EXCHANGE_NS = 10**8
"""Frames are not exchanged more often, because all that are free may lie in pieces."""
_BEGUN, _CARRIED_OUT = 1, 2
_FREES = (wire.Opcode.FORGET, wire.Opcode.RELEASE)
"""What a word decides of these is that an inode is gone."""
_HOLDS = (wire.Opcode.LOOKUP, wire.Opcode.OPEN)
"""Of these a decision that is begun says how often the inode was held before."""
_ENDS_IN_LINE = (wire.Opcode.WRITE, wire.Opcode.SETATTR)
"""They store into the live line after their word has decided."""


class SharedNames(trio.abc.Instrument):
    """The names of one mount. What is made of this has the lock, until `leave`."""

    def __init__(
        self, shared: SharedMemory, names: NamesShared, fs: FileSystem, answers: Answers
    ) -> None:  # fmt: skip
        """`fs` was just opened, and its journal carried out. No worker is in a section."""
        self._shared, self._names, self._fs, self._answers = shared, names, fs, answers
        self._store, self._ground = fs.store, fs.store.ground
        self._notes = shared.hold_notes
        self._memory_bytes = 0
        self._log_frames = -1
        self._exchange_at_ns = 0
        self.patience_ns = _PATIENCE_NS
        """For so long a worker may have the lock, before it counts as one that was stopped."""
        self.listed: dict[int, list[int]] = {}
        """What dead workers had counted as looked up for their latest listings, by the numbers of
        these requests."""
        self._is_ready = False
        self._wake = trio.Event()
        self._catch_up = CatchUp(fs.store)
        self.may_change: Callable[[], bool] = lambda: True
        """Whether nothing else of this process forbids workers to change names now."""
        self.kill_plane: Callable[[], None] = lambda: None
        """Called when a worker has the lock for many seconds, as one that was stopped."""
        self.places: OpenPlaces | None = None
        ground = self._ground
        ground.reserves = self._reserves = Reserves(
            ground.medium, ground.allocator, ground.table, names.slots, names.frames
        )
        self._take()
        names.is_on = False
        self._seen = names.changes
        if not any(shared.slot_word(n, "thread_id") for n in range(shared.worker_count)):
            self._settle_all()
        self._set_word("was_woken", 0)
        ground.pinned.note_any = lambda has_any: self._set_word("pins", int(has_any))
        self._set_word("pins", 0)
        self.note_directories(True)

    def open_places(self) -> OpenPlaces:
        """The places of open files, of which workers have some."""
        self.places = OpenPlaces(self._shared.opens, self._names.handles.numbers())
        return self.places

    def set_memory(self, memory_bytes: int) -> None:
        """So much may workers use for what they know; 0: they change no names."""
        self._memory_bytes = memory_bytes
        self._set_word("memory_bytes", memory_bytes)

    def set_hang_timeout(self, seconds: int) -> None:
        """This process is killed if it makes no progress for so long (0: never), so wait less."""
        half_ns = seconds * 10**9 // 2
        self.patience_ns = min(_PATIENCE_NS, half_ns) if seconds else _PATIENCE_NS

    def note_directories(self, notes: bool) -> None:
        """Whether reads of directories are noted as accesses."""
        self._set_word("notes_directories", int(notes))

    def set_unit(self, unit_bytes: int) -> None:
        """In units of so many bytes programs map the pool. Of larger ones than a frame they can map
        a file only if it lies in one piece."""
        self._set_word("in_one_piece", int(unit_bytes > FRAME_BYTES))

    # The lock

    def before_io_wait(self, timeout: float) -> None:
        """As of `trio.abc.Instrument`."""
        self.leave()

    def after_io_wait(self, timeout: float) -> None:
        """As of `trio.abc.Instrument`."""
        self.enter()

    def enter(self) -> None:
        """Take the lock, and know what workers have changed. Raises nothing."""
        names = self._names
        was_dead = self._take()
        try:
            if was_dead:
                self.recover()
            elif names.changes != self._seen:
                self._see_changes()
        except Exception as error:
            self._fail(error)
        if names.has_failed and not self._ground.damage:
            self._store.become_read_only("a worker's commit failed")
        times = self._ground.times
        if names.last_time_ns > times.set_ns:
            times.set_ns = names.last_time_ns
        if self._is_ready and (names.needs_control or self._may_exchange()):
            self._wake.set()

    def _fail(self, error: Exception) -> None:
        """Without what this was about, nothing may be changed any more. An error that got out of
        here would end all turns, and both sides would change what they like."""
        log.exception("names that workers have changed can't be followed", exc_info=error)
        self._store.become_read_only(f"names can't be followed: {sentence_of(error)}")

    def leave(self) -> None:
        """Let workers have the lock. Raises nothing."""
        names, times = self._names, self._ground.times
        if times.set_ns > names.last_time_ns:
            names.last_time_ns = times.set_ns
        if self._log_frames != self._ground.allocator.log_frames:
            self._log_frames = self._ground.allocator.log_frames
            self._set_word("log_frames", self._log_frames)
        is_on = self._is_allowed()
        if is_on != names.is_on:
            try:
                self._switch(is_on)
            except Exception as error:
                names.is_on = False
                self._fail(error)
        self._notes.forget()
        names.free()

    def _take(self) -> bool:
        """Take the lock; whether a worker that has died had it."""
        while True:
            was_dead = self._names.take(self.patience_ns)
            if was_dead is not None:
                return was_dead
            log.error("a worker has the lock of names for %.1f s, and its data plane is killed",
                      self.patience_ns / 10**9)  # fmt: skip
            self.kill_plane()

    def _see_changes(self) -> None:
        names = self._names
        changed = names.changed_since(self._seen)
        self._seen = names.changes
        self._catch_up.with_changes(changed)

    def _is_allowed(self) -> bool:
        ground = self._ground
        return (
            self._is_ready
            and self._memory_bytes > 0
            and not ground.read_only
            and not ground.may_have_leaks
            and not self._fs.moving
            and self.may_change()
        )

    def _switch(self, is_on: bool) -> None:
        if is_on:
            # The pool may have grown, or become clean, since.
            self._ground.begin_writing()
            geometry = self._ground.geometry
            for name, value in (
                ("first_pfn", geometry.first_pfn),
                ("frame_count", geometry.frame_count),
                ("journal_offset", self._ground.journal_offset),
                ("open_flags", OPEN_FLAGS),
            ):
                self._set_word(name, value)
            self._wake.set()
        self._names.is_on = is_on

    # From the beginning to the end

    async def serve(self) -> None:
        """Let workers change names from now on, and hand out what they take."""
        self._is_ready = True
        while True:
            while self._names.is_on and self._keep_some():
                await trio.lowlevel.checkpoint()
            is_starved = self._say_how_low()
            self._set_word("was_woken", 0)
            self._wake = trio.Event()
            # Room that comes back tells nobody.
            with trio.move_on_after(_STARVED_SECONDS if is_starved else float("inf")):
                await self._wake.wait()

    def stop(self) -> None:
        """Let workers change nothing any more. This has the lock from now on."""
        self._is_ready = False
        self.enter()
        self._names.is_on = False
        while not self._ground.read_only and self.free_orphans():
            pass

    def recover(self) -> None:
        """No worker lives, and one may have died in the middle of an operation: carry out what it
        has committed, and note what was carried out."""
        try:
            if not self._ground.read_only:
                self._ground.recover()
        except DamagedFileSystem as damage:
            self._store.become_read_only(str(damage))
        self._settle_all()
        self._see_changes()

    def _keep_some(self) -> bool:
        """Some of what has to be done for workers; whether there is more."""
        has_more = self.free_orphans()
        if self._may_exchange():
            self._exchange_at_ns = time.monotonic_ns() + _EXCHANGE_NS
            self._names.is_scattered = False
            self._reserves.exchange_frames()
        with suppress(OSError):
            has_more |= self._reserves.keep_some()
        return has_more | self._keep_handles()

    def _may_exchange(self) -> bool:
        """Whether it is time to hand out other frames, because these lie in too many pieces."""
        return self._names.is_scattered and time.monotonic_ns() >= self._exchange_at_ns

    def _keep_handles(self) -> bool:
        handles, places = self._names.handles, self.places
        assert places is not None
        missing = _WANTED_HANDLES - handles.count
        if missing > 0:
            handles.push(places.reserve(min(missing, _HANDLES_STEP)))
            return missing > _HANDLES_STEP
        if handles.count > _MOST * _WANTED_HANDLES:
            places.unreserve(handles.pop(_HANDLES_STEP))
            return True
        return False

    def count_removals(self) -> int:
        """How many names workers have taken from inodes."""
        return self._names.removal_count

    def free_orphans(self) -> bool:
        """Free some of what workers could not free; whether there is more."""
        orphans = self._names.orphans
        if self._ground.read_only:
            return False
        for number in orphans.pop(_ORPHANS_STEP):
            # What is damaged is reported where it is met.
            with suppress(OSError):
                self._store.free_orphan(number)
        return orphans.count > 0

    def _say_how_low(self) -> bool:
        """Say with how little on a stack this is to be told; whether less could be handed out than
        is wanted."""
        slots, frames = self._reserves.wanted()
        is_starved = False
        for name, wanted, stack in (
            ("slots_low", slots, self._names.slots),
            ("frames_low", frames, self._names.frames),
            ("handles_low", _WANTED_HANDLES, self._names.handles),
        ):
            is_starved |= stack.count < wanted
            self._set_word(name, min(wanted // 2, stack.count))
        return is_starved and self._names.is_on

    # What a dead data plane was about

    def _settle_all(self) -> None:
        start = self._shared.areas.names + layouts.NAMES_DECISIONS_AT
        memory, size = self._shared.memory, NAMES_DECISION.size_bytes
        for at in range(start, start + self._shared.worker_count * size, size):
            decision = NAMES_DECISION.unpack(bytes(memory[at : at + size]))
            if decision.state in (_BEGUN, _CARRIED_OUT):
                self._settle(decision)
            store_word(memory, at + NAMES_DECISION.offset_of("state"), 0)
        start = self._shared.areas.names + layouts.names_listed_at(self._shared.worker_count)
        size = NAMES_LISTED.size_bytes
        for at in range(start, start + self._shared.worker_count * size, size):
            self._settle_listing(memory[at : at + size])

    def _settle_listing(self, memory: memoryview) -> None:
        """Note what a worker has counted for its latest listing. Whether the kernel has that answer
        shows only when it asks again."""
        listed = NAMES_LISTED.unpack(bytes(memory))
        # So that nothing is taken back twice. If this process dies now, inodes are held too long.
        store_word(memory, NAMES_LISTED.offset_of("number"), 0)
        numbers = memoryview(listed.inodes).cast("Q").tolist()
        count = min(listed.count, len(numbers))
        counts, following = self._store.hold_words, numbers[count] if count < len(numbers) else 0
        assert counts is not None
        if 0 < following < len(counts) and counts[following] == listed.value:
            # It was counted, but that was not noted.
            count += 1
        if listed.number and count:
            self.listed[listed.number] = numbers[:count]

    def _settle(self, decision: NamesDecision) -> None:
        """Note the answer of what was carried out, and take back what was taken for the rest."""
        has_counted = self._has_counted(decision)
        is_half_done = decision.opcode in _ENDS_IN_LINE and decision.state == _BEGUN
        if decision.opcode in _FREES and has_counted:
            # It says so no more once all that the inode had is in the reserves.
            self._ground.has_lost_some = True
        if decision.state == _CARRIED_OUT or (has_counted and not is_half_done):
            answer = decision.answer[: decision.length]
            is_recorded = RECORDED >> decision.opcode & 1
            if is_recorded and decision.number not in self._answers.places:
                self._answers.record(decision.number, decision.opcode, answer, decision.error)
            return
        if has_counted:
            # The live line may not say it yet. The request comes again, and does the same.
            if decision.opcode == wire.Opcode.WRITE:
                slot = decision.offset - TAIL_WORD_AT
                self._store.untrimmed.add(self._ground.table.number_at(slot))
            return
        if decision.handle:
            self._take_handle_back(decision.handle)
        counts = self._store.hold_words
        if decision.opcode in _HOLDS and counts and 0 < decision.inode < len(counts):
            # Nobody has changed it since, because the dead worker had the lock.
            counts[decision.inode] = decision.value
        if decision.slot and self._pool_word(decision.slot + TAIL_WORD_AT) == 0:
            self._store.let_go(decision.inode)
            _put_back(self._names.slots, [decision.slot])
        popped = memoryview(decision.popped).cast("Q")[: decision.popped_count].tolist()
        _put_back(self._names.frames, popped[::-1])

    def _has_counted(self, decision: NamesDecision) -> bool:
        """Whether the word has its value that decides."""
        return decision.offset > 0 and self._pool_word(decision.offset) == decision.value

    def _pool_word(self, offset: int) -> int:
        return int.from_bytes(self._ground.medium.read(offset, 8), "little")

    def _take_handle_back(self, handle: int) -> None:
        """Nobody has been told of a handle that a worker had taken."""
        at = handle % (1 << layouts.OPEN_PLACES_SHIFT) * layouts.OPEN_PLACE.size_bytes
        opens, inode_at = self._shared.opens, layouts.OPEN_PLACE.offset_of("inode")
        inode = load_word(opens, at + inode_at)
        if inode and load_word(opens, at) == handle:
            store_word(opens, at + inode_at, 0)
            kind_at = at + layouts.OPEN_PLACE.offset_of("kind")
            if int.from_bytes(opens[kind_at : kind_at + 4], "little") == HandleKind.FILE:
                # The hold comes before the place.
                self._store.let_go(inode, 1)
            handle += 1 << layouts.OPEN_PLACES_SHIFT
        _put_back(self._names.handles, [handle])

    def _set_word(self, name: str, value: int) -> None:
        at = self._shared.areas.names + NAMES_HEAD.offset_of(name)
        store_word(self._shared.memory, at, value)

    def names_after(self, names: list[bytes], position: int, count: int) -> list[tuple[int, bytes]]:
        """As `NamesAfter`."""
        return self._names.names_after(names, position, count)

    def word(self, name: str) -> int:
        """A word of the head of names."""
        return load_word(self._shared.memory, self._shared.areas.names + NAMES_HEAD.offset_of(name))


def _put_back(stack: NamesStack, numbers: list[int]) -> None:
    """Put back what was taken from a stack, or was about to be: it may be there still."""
    there = set(stack.numbers())
    stack.push([number for number in dict.fromkeys(numbers) if number not in there])
