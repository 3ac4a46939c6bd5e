"""Workers list directories as the control plane does, also in turns with it, and while names come
and go."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.native_names import NativeNames, create_in, inode_of, mkdir_in, native_names, rename_in
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import NAMES_LISTED
from pmemfs.fuse import wire
from pmemfs.fuse.encode import entry_out
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT

PLUS = wire.ENTRY_OUT.size + wire.ATTR.size
HASHED = 1 << 62
WHO_LISTS = ("worker", "control", "both")


@dataclass(frozen=True)
class Shown:
    """An entry of an answer."""

    name: bytes
    ino: int
    type: int
    position: int
    entry: bytes


@pytest.fixture
def native(shm: Path) -> Iterator[NativeNames]:
    with native_names(shm) as made:
        yield made


def read_in(handle: int, position: int, size: int) -> bytes:
    return wire.READ_IN.pack(handle, position, size, 0, 0, 0)


def shown_in(answer: bytes, opcode: Opcode) -> list[Shown]:
    """The entries of an answer."""
    found, at = [], 0
    head = PLUS if opcode == Opcode.READDIRPLUS else 0
    while at < len(answer):
        ino, position, length, kind = wire.DIRENT.unpack_from(answer, at + head)
        start = at + head + wire.DIRENT.size
        name = answer[start : start + length]
        found.append(Shown(name, ino, kind, position, answer[at : at + head]))
        at = start + length + -length % 8
    assert at == len(answer)
    return found


def opened(native: NativeNames, directory: int) -> int:
    """A handle that a worker gives."""
    answered = native.ask(Opcode.OPENDIR, directory, wire.OPEN_IN.pack(0, 0))
    assert answered is not None
    assert answered[0] == 0
    return int(wire.OPEN_OUT.unpack(answered[1])[0])


def some(
    native: NativeNames, directory: int, handle: int, position: int, *,
    opcode: Opcode = Opcode.READDIRPLUS, size: int = 1024, who: str = "worker",
) -> list[Shown]:  # fmt: skip
    """What one request lists."""
    operation = read_in(handle, position, size)
    if who == "worker":
        answered = native.ask(opcode, directory, operation)
        assert answered is not None
    else:
        answered = native.ask_here(opcode, directory, operation)
    assert answered[0] == 0
    assert len(answered[1]) <= size
    return shown_in(answered[1], opcode)


def whole(
    native: NativeNames, directory: int, *, who: str = "worker", seed: int = 1,
    opcode: Opcode = Opcode.READDIRPLUS, size: int = 1024, between: object = None,
) -> list[Shown]:  # fmt: skip
    """All that a listing shows. The first request is a worker's unless `who` is "control"."""
    chance, handle = random.Random(seed), opened(native, directory)
    entries: list[Shown] = []
    position = 0
    while True:
        turn = who if who != "both" else chance.choice(WHO_LISTS[:2]) if position else "worker"
        found = some(native, directory, handle, position, opcode=opcode, size=size, who=turn)
        if not found:
            break
        entries += found
        position = found[-1].position
        if callable(between):
            between()
    native.serve(Opcode.RELEASEDIR, directory, wire.RELEASE_IN.pack(handle, 0, 0, 0))
    return entries


def fill(native: NativeNames, directory: int, count: int) -> dict[bytes, int]:
    """Make names; what they lead to."""
    made = {}
    for number in range(count):
        name = b"name-%d" % number * (1 + number % 7)
        if number % 9 == 4:
            error, answer = native.serve(Opcode.MKDIR, directory, mkdir_in(name))
        else:
            error, answer = native.serve(Opcode.CREATE, directory, create_in(name))
        assert not error
        made[name] = inode_of(answer)
    return made


@pytest.mark.parametrize("who", WHO_LISTS)
@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
@pytest.mark.parametrize("count", [0, 1, 12, 700])
def test_a_listing_shows_every_name_once(
    native: NativeNames, opcode: Opcode, who: str, count: int
) -> None:
    made = fill(native, ROOT, count)
    entries = whole(native, ROOT, who=who, opcode=opcode)
    assert [entry.name for entry in entries[:2]] == [b".", b".."]
    assert [(entry.ino, entry.type) for entry in entries[:2]] == [(ROOT, 4), (ROOT, 4)]
    assert sorted(entry.name for entry in entries[2:]) == sorted(made)
    assert {entry.name: entry.ino for entry in entries[2:]} == made
    for entry in entries[2:]:
        attributes = native.fs.attributes(entry.ino)
        assert entry.type == attributes.mode >> 12
        if opcode == Opcode.READDIRPLUS:
            assert entry.entry == entry_out(attributes)


def test_what_is_listed_is_held_once_for_each_time(native: NativeNames) -> None:
    made = fill(native, ROOT, 200)
    store = native.fs.store
    words = store.hold_words
    assert words is not None
    before = {number: words[number] for number in made.values()}
    whole(native, ROOT, opcode=Opcode.READDIR)
    assert {number: words[number] for number in made.values()} == before
    whole(native, ROOT)
    whole(native, ROOT, who="both")
    assert {number: words[number] - 2 for number in made.values()} == before
    assert not words[ROOT] or words[ROOT] == 1


def test_a_listing_goes_on_at_any_position(native: NativeNames) -> None:
    fill(native, ROOT, 90)
    handle = opened(native, ROOT)
    entries = whole(native, ROOT, size=65536)
    for number, entry in enumerate(entries):
        for who in ("worker", "control"):
            if who == "control" and entry.position < HASHED:
                continue
            rest: list[Shown] = []
            position = entry.position
            while found := some(native, ROOT, handle, position, size=65536, who=who,
                                opcode=Opcode.READDIR):  # fmt: skip
                rest += found
                position = found[-1].position
            assert [r.name for r in rest] == [e.name for e in entries[number + 1 :]]


@pytest.mark.parametrize("who", WHO_LISTS)
def test_a_name_that_stays_is_listed_once_while_others_come_and_go(
    native: NativeNames, who: str
) -> None:
    stable = set(fill(native, ROOT, 150))
    chance = random.Random(who)
    others: list[bytes] = []
    replaced = sorted(stable)[:20]

    def churn() -> None:
        for _ in range(12):
            if others and chance.random() < 0.5:
                name = others.pop(chance.randrange(len(others)))
                assert native.serve(Opcode.UNLINK, ROOT, name + b"\0")[0] == 0
            name = b"other-%d" % chance.randrange(10**9)
            assert native.serve(Opcode.CREATE, ROOT, create_in(name))[0] == 0
            if chance.random() < 0.3:
                onto = chance.choice(replaced)
                known = native.serve(Opcode.LOOKUP, ROOT, onto + b"\0")[1]
                if struct.unpack_from("<I", known, 100)[0] >> 12 == 4:
                    onto = name + b"-moved"
                    others.append(onto)
                assert native.serve(Opcode.RENAME2, ROOT, rename_in(name, onto, ROOT))[0] == 0
            else:
                others.append(name)

    for seed in range(4):
        entries = whole(native, ROOT, who=who, seed=seed, between=churn, size=700)
        names = [entry.name for entry in entries]
        if who != "control":
            assert len(names) == len(set(names))
        for name in stable:
            assert names.count(name) == 1, name


def test_a_listing_goes_on_after_the_workers_died(native: NativeNames) -> None:
    fill(native, ROOT, 200)
    handle = opened(native, ROOT)
    entries = some(native, ROOT, handle, 0)
    position = entries[-1].position
    native.worker = native.files.worker()
    while found := some(native, ROOT, handle, position):
        entries += found
        position = found[-1].position
    assert sorted(e.name for e in entries) == sorted(e.name for e in whole(native, ROOT))


def test_handles_of_workers_are_closed_by_whoever_is_asked(native: NativeNames) -> None:
    close = [wire.RELEASE_IN.pack(opened(native, ROOT), 0, 0, 0) for _ in range(2)]
    assert native.ask(Opcode.RELEASEDIR, ROOT, close[0]) == (0, b"")
    # It stands for nothing any more.
    assert native.ask(Opcode.RELEASEDIR, ROOT, close[0]) is None
    assert native.ask_here(Opcode.RELEASEDIR, ROOT, close[0])[0] == errno.EBADF
    assert native.ask_here(Opcode.RELEASEDIR, ROOT, close[1]) == (0, b"")
    assert native.ask_here(Opcode.RELEASEDIR, ROOT, close[1])[0] == errno.EBADF


def test_a_directory_that_the_control_plane_has_opened_is_listed_too(native: NativeNames) -> None:
    fill(native, ROOT, 20)
    error, answer = native.ask_here(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0))
    assert not error
    (handle, _) = wire.OPEN_OUT.unpack(answer)
    assert len(some(native, ROOT, handle, 0, size=65536)) == 22


def test_a_handle_lists_only_its_directory(native: NativeNames) -> None:
    handle = opened(native, ROOT)
    other = inode_of(native.serve(Opcode.MKDIR, ROOT, mkdir_in(b"other"))[1])
    for asked, inode in ((handle, other), (handle + 1, ROOT), (0, ROOT)):
        assert native.ask(Opcode.READDIR, inode, read_in(asked, 0, 4096)) is None


def test_a_removed_directory_that_is_open_is_listed_as_ever(native: NativeNames) -> None:
    gone = inode_of(native.serve(Opcode.MKDIR, ROOT, mkdir_in(b"gone"))[1])
    handle = opened(native, gone)
    assert native.serve(Opcode.RMDIR, ROOT, b"gone\0")[0] == 0
    error, answer = native.serve(Opcode.READDIRPLUS, gone, read_in(handle, 0, 4096))
    assert not error
    assert [entry.name for entry in shown_in(answer, Opcode.READDIRPLUS)] == [b".", b".."]


def test_an_entry_that_workers_know_nothing_of_ends_the_answer_before_it(
    native: NativeNames,
) -> None:
    made = fill(native, ROOT, 120)
    odd = [name for number, name in enumerate(made) if number % 10 == 3]
    native.names.take()
    for name in odd:
        native.fs.set_xattr(made[name], b"user.odd", b"1")
    native.names.free()
    handle, position = opened(native, ROOT), 0
    names: list[bytes] = []
    handed_over = 0
    while True:
        operation = read_in(handle, position, 4096)
        before = native.forwarded
        error, answer = native.serve(Opcode.READDIRPLUS, ROOT, operation)
        assert not error
        if native.forwarded > before:
            handed_over += 1
            first = shown_in(answer, Opcode.READDIRPLUS)[0]
            assert first.name in odd
        if not answer:
            break
        names += [entry.name for entry in shown_in(answer, Opcode.READDIRPLUS)]
        position = shown_in(answer, Opcode.READDIRPLUS)[-1].position
    assert handed_over
    assert sorted(names[2:]) == sorted(made)


def test_no_first_answer_has_the_dots_alone_where_there_is_more(native: NativeNames) -> None:
    # Overlayfs looks at no other one.
    inode = inode_of(native.serve(Opcode.MKDIR, ROOT, mkdir_in(b"odd"))[1])
    native.names.take()
    native.fs.set_xattr(inode, b"trusted.odd", b"1")
    native.names.free()
    operation = read_in(opened(native, ROOT), 0, 4096)
    assert native.ask(Opcode.READDIRPLUS, ROOT, operation) is None
    _, answer = native.serve(Opcode.READDIRPLUS, ROOT, operation)
    assert [entry.name for entry in shown_in(answer, Opcode.READDIRPLUS)] == [b".", b"..", b"odd"]


@pytest.mark.parametrize("flags", [0, os.O_NOATIME])
def test_a_listing_is_an_access(native: NativeNames, flags: int) -> None:
    native.files.shared.set_header_word("access_times", 2)
    fill(native, ROOT, 3)
    _, answer = native.serve(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(flags, 0))
    (handle, _) = wire.OPEN_OUT.unpack(answer)
    before = native.fs.attributes(ROOT).atime_ns
    native.set_word("last_time_ns", before + 10**9)
    native.set_word("notes_directories", 0)
    some(native, ROOT, handle, 0)
    assert native.fs.attributes(ROOT).atime_ns == before
    native.set_word("notes_directories", 1)
    some(native, ROOT, handle, 0)
    after = native.fs.attributes(ROOT).atime_ns
    assert after == before if flags else after > before


def test_an_answer_notes_all_that_it_counts(native: NativeNames) -> None:
    made = fill(native, ROOT, 400)
    handle = opened(native, ROOT)
    entries = some(native, ROOT, handle, 0, size=131072)
    listed = noted(native)
    inodes = struct.unpack("<252Q", listed.inodes)
    assert inodes[: listed.count] == tuple(entry.ino for entry in entries[2:])
    # More than can be noted comes in the next answer.
    assert 2 < len(entries) < len(made)


def noted(native: NativeNames) -> layouts.NamesListed:
    """What the worker has noted of its latest listing."""
    shared = native.files.shared
    at = shared.header_word("names_offset") + layouts.names_listed_at(shared.worker_count)
    return NAMES_LISTED.unpack(bytes(shared.memory[at : at + NAMES_LISTED.size_bytes]))


def test_a_worker_that_is_killed_has_noted_what_it_has_counted(native: NativeNames) -> None:
    made = fill(native, ROOT, 40)
    handle = opened(native, ROOT)
    words = native.fs.store.hold_words
    assert words is not None
    before = {number: words[number] for number in made.values()}
    # Each entry has three steps.
    for step in (1, 2, 3, 4, 59, 60, 61):
        child = os.fork()
        if not child:
            worker = native.files.worker()
            worker.record(killed_before=step)
            worker.answer(read_in(handle, 0, 16384), opcode=Opcode.READDIRPLUS, inode=ROOT,
                          unique=2 * step)  # fmt: skip
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        listed = noted(native)
        assert listed.number == 2 * step
        numbers = list(struct.unpack("<252Q", listed.inodes))
        count = listed.count
        if numbers[count] and words[numbers[count]] == listed.value:
            count += 1
        for number in numbers[:count]:
            words[number] -= 1
        assert {number: words[number] for number in made.values()} == before
        native.set_word("holder", 0)
