"""A request that is given to a daemon twice is carried out once, and answered as it was."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kit.data_plane import SharedFiles, shared_files
from kit.doors import WireWay, replies
from pmemfs.dataplane.answers import LISTINGS_BYTES, Answers, operation_under_way
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.listing import hold_listed
from pmemfs.fuse import wire
from pmemfs.fuse.once import RESENT
from pmemfs.fuse.unanswered import Unanswered
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.units import MIB
from pmemfs.volume.base import NewInode

LONGEST = MIB + 4096


class Daemon:
    """What answers the requests of a mount, over memory that another one may have left."""

    def __init__(self, files: SharedFiles) -> None:
        self.files = files
        self.raw = files.forwarded()

    def successor(self) -> Daemon:
        """Another one, in the place of this one."""
        return Daemon(self.files.again())

    def ask(self, *messages: bytes) -> list[tuple[int, int, bytes]]:
        """The number, the errno and the rest of each answer, in their order."""
        found = []
        for reply in replies(self.raw, *messages, longest_bytes=LONGEST):
            _, error, unique = struct.unpack_from("<IiQ", reply)
            found.append((unique, -error, reply[16:]))
        return found

    def ask_and_die(self, *messages: bytes) -> None:
        """Answer messages, each once nothing happens any more, and die."""
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        async def die() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.raw.serve, [ours])
                for message in messages:
                    theirs.send(message)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                raise Died

        with theirs, ours:
            try:
                trio.run(die)
            except ExceptionGroup as group:
                raise group.exceptions[0] from None


class Died(Exception):
    """The daemon is dead."""


def message(unique: int, opcode: int, operation: bytes, ino: int = ROOT) -> bytes:
    """A request as a worker sends it."""
    return struct.pack(
        "<IIQQIIIHH", 40 + len(operation), opcode, unique, ino, 0, 0, 0, 0, 0
    ) + operation  # fmt: skip


@pytest.fixture
def under_way() -> Iterator[Callable[[tuple[int, int]], object]]:
    """Says which request is carried out: its number and its opcode."""
    before = operation_under_way.get()
    yield operation_under_way.set
    operation_under_way.set(before)


@pytest.fixture
def ring() -> Answers:
    return Answers.of_this_process()


@pytest.fixture
def daemon(shm: Path) -> Iterator[Daemon]:
    with shared_files(shm) as files:
        yield Daemon(files)


MKDIR = wire.MKDIR_IN.pack(0o755, 0) + b"d\0"


@pytest.mark.parametrize("again", [100, 100 | RESENT])
def test_a_request_that_comes_again_is_answered_as_it_was(daemon: Daemon, again: int) -> None:
    ((_, _, made),) = daemon.ask(message(100, Opcode.MKDIR, MKDIR))
    ((_, error, _),) = daemon.ask(message(102, Opcode.MKDIR, MKDIR))
    assert error == errno.EEXIST
    for is_dead in (False, True):
        other = daemon.successor() if is_dead else daemon
        assert other.ask(message(again, Opcode.MKDIR, MKDIR)) == [(again, 0, made)]
        # A failure, too: the caller may have been told of it, though the name is free now.
        other.ask(message(200 + id(other), Opcode.RMDIR, b"d\0"))
        failed = message(102 | again & RESENT, Opcode.MKDIR, MKDIR)
        assert other.ask(failed) == [(102 | again & RESENT, errno.EEXIST, b"")]
        assert other.files.fs.names(ROOT) == []


def test_a_request_that_comes_again_while_it_waits_is_answered_once_in_its_latest_form(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = 0
    files = daemon.raw._door._handlers.files
    change = files.change

    async def slow(*arguments: Any) -> Any:
        nonlocal began
        began += 1
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        return await change(*arguments)

    monkeypatch.setattr(files, "change", slow)
    ino = daemon.files.fs.make(ROOT, b"f", NewInode(0o100600, 0, 0))
    insert = struct.pack("<QQQII", 1, 0, 4096, 0x20, 0)
    daemon.files.fs.write(ino, 0, b"x" * 8192)
    first = message(100, Opcode.FALLOCATE, insert, ino)
    second = message(100 | RESENT, Opcode.FALLOCATE, insert, ino)
    assert daemon.ask(first, second, first, second) == [(100 | RESENT, 0, b"")]
    assert began == 1
    assert daemon.ask(first) == [(100, 0, b"")]
    assert bytes(daemon.files.fs.read(ino, 0, MIB)) == bytes(4096) + b"x" * 8192


def listing_of(daemon: Daemon, count: int) -> bytes:
    """What lists a directory of so many names with attributes."""
    for number in range(count):
        daemon.files.fs.make(ROOT, b"n%d" % number, NewInode(0o100600, 0, 0))
    ((_, _, opened),) = daemon.ask(message(10, Opcode.OPENDIR, wire.OPEN_IN.pack(0, 0)))
    return wire.READ_IN.pack(*struct.unpack_from("<Q", opened), 0, MIB, 0, 0, 0)


@pytest.mark.parametrize("count", [0, 3, 400])
def test_a_listing_that_comes_again_counts_once_and_answers_the_same(
    daemon: Daemon, count: int
) -> None:
    """The kernel may have taken the first answer, so the second one must count the same."""
    asked = listing_of(daemon, count)
    ((_, _, first),) = daemon.ask(message(100, Opcode.READDIRPLUS, asked))
    held = dict(daemon.files.shared.lookup_counts.counts())
    assert sum(held.values()) == count
    if count:
        daemon.files.fs.unlink(ROOT, b"n0")
    for other in (daemon, daemon.successor()):
        again = message(100 | RESENT, Opcode.READDIRPLUS, asked)
        assert other.ask(again) == [(100 | RESENT, 0, first)]
        assert dict(other.files.shared.lookup_counts.counts()) == held


def test_long_answers_take_the_place_of_the_oldest_ones(ring: Answers) -> None:
    most = LISTINGS_BYTES // 3
    answers = {number: os.urandom(most - 1000 * number) for number in range(1, 20)}
    for number, answer in answers.items():
        ring.record(number, Opcode.READDIRPLUS, answer)
        ring.record(100 + number, Opcode.LOOKUP, b"short")
        kept = [number for number in ring.places if number < 100]
        assert number in kept
        assert kept == list(range(kept[0], number + 1))
        assert len(kept) >= min(number, 2)
        for found in kept:
            assert ring.answer_of(ring.find(found)) == answers[found]


@pytest.mark.parametrize("cut_off", range(7))
def test_holds_of_a_listing_that_was_cut_off_are_taken_back(
    daemon: Daemon, under_way: Callable[[tuple[int, int]], object], cut_off: int
) -> None:
    """After each inode: of the next one only the note may be there."""
    asked = listing_of(daemon, 6)
    ((_, _, answer),) = daemon.ask(message(100, Opcode.READDIRPLUS, asked))
    counts = daemon.files.shared.lookup_counts
    before = dict(counts.counts())
    entries = bytearray(answer[-6 * 160 :])
    assert counts.words is not None
    under_way((102, Opcode.READDIRPLUS))
    if cut_off < 6:
        struct.pack_into("<Q", entries, cut_off * 160, 1 << 40)
        with pytest.raises(IndexError):
            hold_listed(counts.words, counts.note_words(), entries, 0)
        counts._notes.note(max(before), before[max(before)])
    else:
        hold_listed(counts.words, counts.note_words(), entries, 0)
    assert sum(counts.count(number) for number in before) == 6 + cut_off
    assert dict(daemon.successor().files.shared.lookup_counts.counts()) == before


def test_counts_that_others_may_have_changed_are_not_taken_back(
    daemon: Daemon, under_way: Callable[[tuple[int, int]], object]
) -> None:
    ino = daemon.files.fs.make(ROOT, b"f", NewInode(0o100600, 0, 0))
    counts = daemon.files.shared.lookup_counts
    under_way((102, Opcode.OPEN))
    counts.add(ino, 2)
    under_way((104, Opcode.RELEASE))
    counts.take(ino, 1)
    assert daemon.successor().files.shared.lookup_counts.count(ino) == 1


def test_what_only_reads_is_done_again(daemon: Daemon) -> None:
    asked = message(100, Opcode.GETATTR, bytes(16))
    assert daemon.ask(asked) == daemon.ask(asked)
    assert daemon.files.shared.answers.places == {}


def test_an_operation_that_waits_for_something_after_it_was_carried_out_is_not_begun_anew(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The daemon dies in the midst of others' operations, long after this one's commit.
    fs = daemon.files.fs
    ino = fs.make(ROOT, b"f", NewInode(0o100777, 0, 0))
    fs.set_xattr(ino, b"security.capability", b"taken from it by what changes it")
    fs.write(ino, 0, b"x" * 8192)
    insert = struct.pack("<QQQII", 1, 0, 4096, 0x20, 0)

    async def tell(_: int) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(daemon.raw._door._handlers.notifier, "tell", lambda ino: tell(ino))
    first = message(100, Opcode.FALLOCATE, insert, ino)
    others = [
        message(102 + 2 * n, Opcode.MKDIR, wire.MKDIR_IN.pack(0o755, 0) + b"d%d\0" % n)
        for n in range(3)
    ]
    with pytest.raises(Died):
        daemon.ask_and_die(first, *others)
    before = fs.names(ROOT)
    second = daemon.successor()
    again = second.ask(*others, first)
    assert sorted(unique for unique, _, _ in again) == [100, 102, 104, 106]
    assert {error for _, error, _ in again} == {0}
    assert second.files.fs.names(ROOT) == before
    assert bytes(second.files.fs.read(ino, 0, MIB)) == bytes(4096) + b"x" * 8192


def test_what_was_published_before_a_death_is_not_believed_after_it(daemon: Daemon) -> None:
    way = WireWay(daemon.raw._door)
    _, handle = way.create(ROOT, b"f", 0o600, os.O_RDWR)
    way.write(handle, 0, bytes(64 * 1024))
    way.getattr(ROOT)
    ino = daemon.files.fs.lookup(ROOT, b"f")
    assert daemon.files.shared.is_published(ino)
    second = daemon.successor()
    assert not second.files.shared.is_published(ino)
    assert second.files.shared.published_attributes() == {}
    # It is worth being published, as it was.
    WireWay(second.raw._door).read(handle, 0, 10)
    assert second.files.shared.is_published(ino)


def test_the_kernel_asks_again_for_what_could_be_written_to(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = WireWay(daemon.raw._door)
    way.create(ROOT, b"f", 0o4777, os.O_RDWR)
    way.create(ROOT, b"g", 0o600, os.O_RDONLY)
    handlers, _ = daemon.files.door()
    told: list[int] = []
    monkeypatch.setattr(handlers.notifier, "tell", told.append)
    opens = OpenPlaces(daemon.files.shared.opens)
    unanswered = Unanswered(daemon.files.once, handlers, opens, daemon.files.fs)
    unanswered.tell_kernel()
    unanswered.tell_kernel()
    assert told == [daemon.files.fs.lookup(ROOT, b"f")]
