"""The daemon beside workers that change names: whose turn it is, and what a dead worker leaves."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from kit.data_plane import SharedFiles, door_to, shared_files
from kit.fs_tree import DIRECTORY, FILE
from kit.native_names import create_in
from pmemfs.dataplane import layouts
from pmemfs.dataplane.answers import AnswerState, operation_under_way
from pmemfs.dataplane.layouts import NAMES_DECISION, NAMES_HEAD, NamesDecision
from pmemfs.dataplane.native import NamesShared, Responder, store_word
from pmemfs.fuse import wire
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.sharednames import SharedNames
from pmemfs.fuse.unanswered import Unanswered
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT, TAIL_WORD_AT
from pmemfs.units import MIB
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.pinned import Held

USER = Caller(0, 0, 0)
NUMBER = 4711


class Daemon:
    """A daemon, and a worker beside it."""

    def __init__(self, files: SharedFiles) -> None:
        self.files, self.fs = files, files.fs
        shared = files.shared.names
        assert shared is not None
        self.shared: NamesShared = shared
        self.names = SharedNames(files.shared, shared, files.fs, files.once.answers)
        self.names.set_memory(MIB)
        self.handlers: Handlers = door_to(
            files.fs, files.engine(), files.tables, shared=files.shared
        )[0]
        places = self.names.open_places()
        self.handlers.files._places = self.handlers.directories._places = places
        self.worker: Responder = files.worker()

    def begin(self) -> None:
        """Let workers change names, as soon as this process waits."""
        while self.fs.search_on():
            pass
        self.names._is_ready = True
        self.names.leave()
        self.names.enter()
        while self.names._keep_some():
            pass
        self.names._say_how_low()

    def ask(self, opcode: Opcode, inode: int, operation: bytes, payload: bytes = b"") -> bytes:
        """What the worker answers while this process waits."""
        self.names.leave()
        verdict, error, data = self.worker.answer(
            operation, opcode=opcode, inode=inode, payload=payload
        )
        self.names.enter()
        assert (verdict, error) == ("answer", 0)
        return data

    def killed_before(
        self, step: int, operation: bytes, opcode: Opcode, inode: int, unique: int,
        payload: bytes = b"",
    ) -> bool:  # fmt: skip
        """Have a worker killed in an operation, and recover; whether it has that many steps."""
        self.names.leave()
        child = os.fork()
        if not child:
            worker = self.files.worker()
            worker.record(killed_before=step)
            worker.answer(operation, opcode=opcode, inode=inode, unique=unique, payload=payload)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        # The dead worker's lock.
        self.set_word("holder", 0)
        self.names.enter()
        self.names.recover()
        return status != 0

    def create(self, name: bytes) -> tuple[int, int]:
        """A file that a worker makes: its inode and handle."""
        data = self.ask(Opcode.CREATE, ROOT, create_in(name))
        return int(struct.unpack_from("<Q", data)[0]), int(
            struct.unpack_from("<Q", data, wire.ENTRY_OUT.size + wire.ATTR.size)[0]
        )

    def is_on(self) -> bool:
        """Whether workers may change names while this process waits."""
        self.names.leave()
        is_on = self.shared.is_on
        self.names.enter()
        return is_on

    def set_word(self, name: str, value: int) -> None:
        """Store a word of the head."""
        at = self.files.shared.areas.names + NAMES_HEAD.offset_of(name)
        store_word(self.files.shared.memory, at, value)

    def decide(self, **words: object) -> None:
        """A worker has died with this decision."""
        at = self.files.shared.areas.names + layouts.NAMES_DECISIONS_AT
        blank = NAMES_DECISION.unpack(bytes(NAMES_DECISION.size_bytes))
        fields = {field.name: getattr(blank, field.name) for field in NAMES_DECISION.fields}
        decision = NamesDecision(**{**fields, **words})
        raw = NAMES_DECISION.pack(decision)
        self.files.shared.memory[at : at + len(raw)] = raw


@pytest.fixture
def daemon(shm: Path) -> Iterator[Daemon]:
    with shared_files(shm) as files:
        daemon = Daemon(files)
        daemon.begin()
        yield daemon


def test_the_daemon_has_the_lock_until_it_waits(daemon: Daemon) -> None:
    assert daemon.shared.is_mine
    verdict, *_ = daemon.worker.answer(create_in(b"new"), opcode=Opcode.CREATE, inode=ROOT)
    assert verdict == "forward"
    number, _ = daemon.create(b"new")
    assert daemon.shared.is_mine
    assert daemon.fs.lookup(ROOT, b"new") == number


def test_the_lock_is_free_whenever_no_task_can_run(daemon: Daemon) -> None:
    daemon.fs.names(ROOT)

    def create() -> str:
        verdict, *_ = daemon.worker.answer(create_in(b"new"), opcode=Opcode.CREATE, inode=ROOT)
        return verdict

    async def main() -> None:
        trio.lowlevel.add_instrument(daemon.names)
        assert await trio.to_thread.run_sync(create) == "answer"
        assert daemon.shared.is_mine
        assert daemon.fs.names(ROOT) == [b"new"]

    trio.run(main)


@pytest.mark.parametrize("why", ["leaks", "moving", "read-only", "damage", "busy", "memory"])
def test_workers_change_nothing_while_something_forbids_it(daemon: Daemon, why: str) -> None:
    assert daemon.is_on()
    ground = daemon.fs.store.ground
    if why == "leaks":
        ground.may_have_leaks = True
    elif why == "moving":
        daemon.fs.moving.add(7)
    elif why == "read-only":
        daemon.fs.stop_writing()
    elif why == "damage":
        daemon.fs.store.become_read_only("a test")
    elif why == "busy":
        daemon.names.may_change = lambda: False
    else:
        daemon.names.set_memory(0)
    assert not daemon.is_on()
    ground.may_have_leaks = False
    daemon.fs.moving.clear()
    daemon.names.may_change = lambda: True
    daemon.names.set_memory(MIB)
    ground.resume_writing()
    assert daemon.is_on() == (why != "damage")


def test_after_a_failed_commit_nothing_is_written_any_more(daemon: Daemon) -> None:
    daemon.set_word("failed", 1)
    daemon.names.leave()
    daemon.names.enter()
    assert daemon.fs.read_only
    assert not daemon.is_on()


def test_workers_are_told_of_pins(daemon: Daemon) -> None:
    class Holder:
        is_stale = False
        who = "a test"

        def become_stale(self) -> None: ...

        def was_renamed(self) -> None: ...

    held = Held(Holder(), 7, [(1, 2)])
    assert daemon.names.word("pins") == 0
    daemon.fs.pinned.add(held)
    assert daemon.names.word("pins") == 1
    daemon.fs.pinned.remove(held)
    assert daemon.names.word("pins") == 0


def test_a_handle_that_a_worker_gave_out_serves_here_too(daemon: Daemon) -> None:
    number, handle = daemon.create(b"new")
    files = daemon.handlers.files
    assert files.write(USER, handle, 0, b"hello") == 5
    assert bytes(files.read(handle, 0, 9)) == b"hello"  # type: ignore[arg-type]
    # From now on it is this process's to close.
    verdict, *_ = daemon.worker.answer(
        wire.RELEASE_IN.pack(handle, 0, 0, 0), opcode=Opcode.RELEASE, inode=number
    )
    assert verdict == "forward"
    held = daemon.fs.store._holds.count(number)
    files.close(handle)
    assert daemon.fs.store._holds.count(number) == held - 1
    with pytest.raises(OSError, match="Bad file"):
        files.close(handle)


def test_a_file_that_only_a_worker_has_open_is_known_as_written_to(daemon: Daemon) -> None:
    files = daemon.handlers.files
    assert not files.has_writers
    data = daemon.ask(Opcode.CREATE, ROOT, create_in(b"new", flags=1))
    assert len(data) > 100
    assert files.has_writers


def test_handles_that_workers_may_take_are_not_given_out(daemon: Daemon) -> None:
    reserved = set(daemon.shared.handles.numbers())
    assert len(reserved) > 100
    found = daemon.names.open_places()
    taken = {found.take(1, 7, 0, 0, 0, 0) for _ in range(2000)}
    assert not {handle % (1 << layouts.OPEN_PLACES_SHIFT) for handle in taken} & reserved


def test_what_is_handed_out_comes_back_before_the_pool_is_said_to_be_clean(daemon: Daemon) -> None:
    daemon.create(b"new")
    assert daemon.shared.frames.count > 0
    assert daemon.shared.slots.count > 0
    free = daemon.fs.room().free_frames
    daemon.names.stop()
    daemon.fs.stop_writing()
    assert daemon.shared.frames.count == daemon.shared.slots.count == 0
    assert daemon.fs.room().free_frames == free
    daemon.fs.leave_clean()
    daemon.files.medium.read_only = True
    assert check_filesystem(daemon.files.pool).problems == []


def test_a_full_pool_has_nothing_in_reserve(daemon: Daemon) -> None:
    fs = daemon.fs
    number = fs.make(ROOT, b"large", FILE)
    at = 0
    with suppress(OSError):
        while True:
            fs.write(number, at, bytes(MIB))
            at += MIB
    with suppress(OSError):
        while True:
            fs.write(number, at, bytes(4096))
            at += 4096
    assert daemon.shared.frames.count == 0
    assert fs.room().free_frames == fs.room().reserved_frames
    assert daemon.names._keep_some() is False
    assert daemon.shared.frames.count == 0
    # It can be emptied.
    fs.unlink(ROOT, b"large")
    fs.settle()
    while daemon.names._keep_some():
        pass
    assert daemon.shared.frames.count > 0


def test_a_worker_does_not_wait_to_wake_a_daemon_that_has_not_read_on(daemon: Daemon) -> None:
    # It would wait with the lock, or in a section, for which the daemon may be waiting itself.
    daemon.set_word("slots_low", 1 << 20)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        worker = daemon.files.worker(forward_fd=theirs.fileno())

        def create(name: bytes) -> bool:
            daemon.set_word("was_woken", 0)
            daemon.names.leave()
            verdict, *_ = worker.answer(create_in(name), opcode=Opcode.CREATE, inode=ROOT)
            daemon.names.enter()
            assert verdict == "answer"
            return bool(daemon.names.word("was_woken"))

        assert create(b"a")
        assert ours.recv(4096)
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                theirs.send(bytes(4096))
        theirs.setblocking(True)
        assert not create(b"b")


def test_frames_in_too_many_pieces_are_exchanged_for_some_side_by_side(daemon: Daemon) -> None:
    number, handle = daemon.create(b"file")
    taken = sorted(daemon.shared.frames.pop(1 << 20))
    # As where every other file of one frame was removed.
    daemon.shared.frames.push(taken[::2])

    def write() -> str:
        daemon.names.leave()
        head = wire.WRITE_IN.pack(handle, 0, 16 * 4096, 0, 0, os.O_RDWR)
        verdict, *_ = daemon.worker.answer(
            head, opcode=Opcode.WRITE, inode=number, payload=b"x" * 16 * 4096
        )
        daemon.names.enter()
        return str(verdict)

    assert write() == "forward"
    assert daemon.names._wake.is_set()
    daemon.fs.allocator.free(Run(pfn, 1) for pfn in taken[1::2])
    while daemon.names._keep_some():
        pass
    assert write() == "answer"
    assert not daemon.shared.is_scattered
    (extent,) = daemon.fs.store.inode(number).extents.pieces(0, 16)
    assert extent[2] == 16
    # All that is free may lie in pieces, so this is not done again at once.
    daemon.set_word("scattered", 1)
    before = daemon.shared.frames.numbers()
    daemon.names._keep_some()
    assert daemon.shared.frames.numbers()[: len(before)] == before
    assert daemon.shared.is_scattered


def test_orphans_are_freed(daemon: Daemon) -> None:
    fs = daemon.fs
    numbers = []
    for at in range(50):
        number = fs.make(ROOT, b"%d" % at, FILE)
        fs.hold(number)
        fs.unlink(ROOT, b"%d" % at)
        fs.store.let_go(number)
        numbers.append(number)
    kept = fs.make(ROOT, b"named", FILE)
    daemon.shared.orphans.push([*numbers, kept, 1 << 40])
    while daemon.names._keep_some():
        pass
    assert not [number for number in numbers if fs.store.table.head(number)]
    assert fs.lookup(ROOT, b"named") == kept


def test_what_a_worker_counts_is_not_taken_back_with_what_the_daemon_counted(
    daemon: Daemon,
) -> None:
    number, _ = daemon.create(b"new")
    before = operation_under_way.get()
    operation_under_way.set((NUMBER, Opcode.OPEN))
    daemon.fs.hold(number)
    operation_under_way.set(before)
    count = daemon.files.shared.lookup_counts.count(number)
    daemon.names.leave()
    verdict, *_ = daemon.worker.answer(b"new\0", opcode=Opcode.LOOKUP, inode=ROOT)
    assert verdict == "answer"
    # The daemon dies now.
    daemon.files.shared.take_back_holds()
    assert daemon.files.shared.lookup_counts.count(number) == count + 1
    daemon.names.enter()


# What a dead worker has left


def test_a_request_that_was_carried_out_is_answered_from_its_record(daemon: Daemon) -> None:
    daemon.decide(number=NUMBER, state=2, opcode=Opcode.LOOKUP, length=5, answer=b"hello")
    daemon.names.recover()
    record = daemon.files.once.find(NUMBER)
    assert record.state == AnswerState.ANSWERED
    assert record.answer[: record.length] == b"hello"
    # Once is enough: by now the number may be another request's.
    daemon.files.once.answered.clear()
    daemon.names.recover()
    assert NUMBER not in daemon.files.once.answered


@pytest.mark.parametrize("has_counted", [True, False])
def test_the_word_decides_what_became_of_a_request(daemon: Daemon, has_counted: bool) -> None:
    inode = daemon.fs.inode(ROOT)
    value = inode.log.tail + (0 if has_counted else 64)
    daemon.decide(
        number=NUMBER, state=1, opcode=Opcode.MKDIR, offset=inode.slot_offset + TAIL_WORD_AT,
        value=value,
    )  # fmt: skip
    daemon.names.recover()
    assert (NUMBER in daemon.files.once.answered) == has_counted


@pytest.mark.parametrize("is_on_stack", [True, False])
def test_what_was_taken_in_vain_comes_back_once(daemon: Daemon, is_on_stack: bool) -> None:
    shared = daemon.shared
    before = [sorted(stack.numbers()) for stack in (shared.slots, shared.frames, shared.handles)]
    [slot], frames, [handle] = shared.slots.pop(1), shared.frames.pop(3), shared.handles.pop(1)
    if is_on_stack:
        # It died between the note and the pop.
        shared.slots.push([slot])
        shared.frames.push(frames[::-1])
        shared.handles.push([handle])
    number = slot // 512
    daemon.fs.store.hold(number)
    daemon.decide(
        number=NUMBER, state=1, opcode=Opcode.CREATE, slot=slot, inode=number, handle=handle,
        popped_count=3, popped=struct.pack("<16Q", *frames, *[0] * 13),
    )  # fmt: skip
    daemon.names.recover()
    assert before == [
        sorted(stack.numbers()) for stack in (shared.slots, shared.frames, shared.handles)
    ]
    assert shared.frames.pop(3) == frames
    assert not daemon.fs.store.is_held(number)
    assert NUMBER not in daemon.files.once.answered


def test_frames_come_back_once_at_whatever_step_their_worker_is_killed(daemon: Daemon) -> None:
    number, handle = daemon.create(b"new")
    frames = daemon.shared.frames
    # Those that lie side by side lie below others.
    frames.push(frames.pop(9)[::2])
    before = frames.numbers()
    operation = wire.WRITE_IN.pack(handle, 0, 3 * 4096, 0, 0, os.O_RDWR)
    step, has_written = 0, False
    while not has_written:
        step += 1
        frames.pop(frames.count)
        frames.push(before)
        assert daemon.killed_before(
            step, operation, Opcode.WRITE, number, NUMBER + 2 * step, b"x" * 3 * 4096
        )
        extents = daemon.fs.extents(number)
        has_written = bool(extents)
        owned = [pfn for each in extents for pfn in range(each.pfn, each.pfn + each.frame_count)]
        assert sorted([*frames.numbers(), *owned]) == sorted(before), f"step {step}"
    assert [each.frame_count for each in extents] == [3]
    assert step > 10


@pytest.mark.parametrize("opcode", [Opcode.LOOKUP, Opcode.OPEN])
def test_a_hold_counts_once_at_whatever_step_its_worker_is_killed(
    daemon: Daemon, opcode: Opcode
) -> None:
    number, _ = daemon.create(b"new")
    counts = daemon.files.shared.lookup_counts
    inode, operation = {
        Opcode.LOOKUP: (ROOT, b"new\0"),
        Opcode.OPEN: (number, wire.OPEN_IN.pack(0, 0)),
    }[opcode]
    before, handles = counts.count(number), daemon.shared.handles.count
    outcomes: list[bool | None] = []
    while not outcomes or outcomes[-1] is not None:
        unique = NUMBER + 2 * len(outcomes)
        is_killed = daemon.killed_before(len(outcomes) + 1, operation, opcode, inode, unique)
        is_answered = unique in daemon.files.once.answered
        before += is_answered
        handles -= is_answered and opcode == Opcode.OPEN
        assert counts.count(number) == before, f"step {len(outcomes) + 1}"
        assert daemon.shared.handles.count == handles
        outcomes.append(is_answered if is_killed else None)
    # The last step is behind the one that decides.
    assert outcomes[-3:] == [False, True, None]
    assert len(outcomes) >= 5


def test_the_journal_of_a_dead_worker_is_carried_out(daemon: Daemon) -> None:
    fs = daemon.fs
    directory = fs.make(ROOT, b"directory", DIRECTORY)
    daemon.names.leave()
    daemon.worker.answer(create_in(b"new"), opcode=Opcode.CREATE, inode=directory)
    # As if its words had not come to be stored.
    daemon.shared.take()
    journal = bytes(fs.medium.read(fs.store.ground.journal_offset, 4096))
    count = int.from_bytes(journal[4:8], "little")
    for at in range(16, 16 + 24 * count, 24):
        offset, old, _ = struct.unpack_from("<QQQ", journal, at)
        fs.medium.store(offset, old.to_bytes(8, "little"))
    assert count == 2
    fs.store.cache.forget(directory)
    assert fs.names(directory) == []
    daemon.names.recover()
    assert fs.names(directory) == [b"new"]


@pytest.mark.parametrize("opcode", [Opcode.WRITE, Opcode.SETATTR])
def test_what_has_not_come_to_its_live_line_is_done_again(daemon: Daemon, opcode: Opcode) -> None:
    number = daemon.fs.make(ROOT, b"file", FILE)
    frames = daemon.shared.frames.pop(2)
    daemon.fs.write(number, 0, b"x" * 5000)
    inode = daemon.fs.inode(number)
    daemon.decide(
        number=NUMBER, state=1, opcode=opcode, offset=inode.slot_offset + TAIL_WORD_AT,
        value=inode.log.tail, popped_count=2, popped=struct.pack("<16Q", *frames, *[0] * 14),
    )  # fmt: skip
    daemon.names.recover()
    # It has no answer, and its frames are the file's.
    assert NUMBER not in daemon.files.once.answered
    assert not {*frames} & {*daemon.shared.frames.numbers()}
    assert (number in daemon.fs.untrimmed) or opcode is Opcode.SETATTR


def test_a_free_that_was_cut_off_is_searched_for(daemon: Daemon) -> None:
    slot = daemon.shared.slots.numbers()[0]
    assert not daemon.fs.store.ground.has_lost_some
    for offset in (0, slot + TAIL_WORD_AT):
        daemon.decide(number=NUMBER, state=2, opcode=Opcode.FORGET, offset=offset, value=0)
        daemon.names.recover()
        assert daemon.fs.store.ground.has_lost_some == bool(offset)


def test_a_free_that_came_to_its_end_says_so(daemon: Daemon) -> None:
    number, handle = daemon.create(b"file")
    daemon.names.leave()
    worker = daemon.worker
    release = wire.RELEASE_IN.pack(handle, 0, 0, 0)
    assert worker.answer(release, opcode=Opcode.RELEASE, inode=number)[0] == "answer"
    assert worker.answer(b"file\0", opcode=Opcode.UNLINK, inode=ROOT)[0] == "answer"
    slots = daemon.shared.slots.count
    assert worker.answer(wire.FORGET_IN.pack(1), opcode=Opcode.FORGET, inode=number)[0] == "drop"
    daemon.names.enter()
    assert daemon.shared.slots.count == slots + 1
    daemon.names.recover()
    assert not daemon.fs.store.ground.has_lost_some


def test_what_can_not_be_followed_ends_all_changes_and_no_turn(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(daemon.names, "_see_changes", fail)
    daemon.create(b"new")
    assert daemon.fs.read_only
    assert daemon.shared.is_mine
    assert not daemon.is_on()


def test_the_end_frees_what_workers_could_not(daemon: Daemon) -> None:
    fs = daemon.fs
    number = fs.make(ROOT, b"new", FILE)
    fs.hold(number)
    fs.unlink(ROOT, b"new")
    fs.store.let_go(number)
    daemon.shared.orphans.push([number])
    daemon.names.stop()
    assert fs.store.table.head(number) is None


@pytest.mark.parametrize("is_noted", [True, False])
def test_what_a_cut_off_listing_has_counted_is_taken_back_once_it_comes_again(
    daemon: Daemon, is_noted: bool
) -> None:
    numbers = [daemon.create(b"listed %d" % number)[0] for number in range(4)]
    (handle,) = struct.unpack_from("<Q", daemon.ask(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0)))
    words = daemon.fs.store.hold_words
    assert words is not None
    before = [words[number] for number in numbers]
    daemon.ask(Opcode.READDIRPLUS, ROOT, wire.READ_IN.pack(handle, 0, 4096, 0, 0, 0))
    assert [words[number] - 1 for number in numbers] == before
    shared = daemon.files.shared
    at = shared.areas.names + layouts.names_listed_at(shared.worker_count)
    request = int.from_bytes(shared.memory[at : at + 8], "little")
    if not is_noted:
        # Killed before it had noted the last one.
        store_word(shared.memory, at + layouts.NAMES_LISTED.offset_of("count"), 3)
    daemon.names.recover()
    # The kernel may have the answer.
    assert [words[number] - 1 for number in numbers] == before
    unanswered = Unanswered(
        daemon.files.once, daemon.handlers, daemon.names.open_places(), daemon.fs,
        names=daemon.names,
    )  # fmt: skip
    unanswered.take_back(request)
    assert [words[number] for number in numbers] == before
    daemon.names.recover()
    assert not daemon.names.listed


def test_the_handle_of_a_directory_that_nobody_was_told_of_holds_nothing(daemon: Daemon) -> None:
    daemon.fs.hold(ROOT)
    words = daemon.fs.store.hold_words
    assert words is not None
    before = words[ROOT]
    (handle,) = struct.unpack_from("<Q", daemon.ask(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0)))
    daemon.decide(number=NUMBER, state=1, opcode=int(Opcode.OPENDIR), handle=handle)
    daemon.names.recover()
    assert words[ROOT] == before
    assert handle + (1 << layouts.OPEN_PLACES_SHIFT) in daemon.shared.handles.numbers()
