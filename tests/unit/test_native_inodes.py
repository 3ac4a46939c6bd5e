"""A worker answers for inodes as Python does: attributes, handles, holds."""

from __future__ import annotations

import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.same_by_python import Twins, twins
from pmemfs.fuse import wire
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.volume.base import NewInode

NS = 10**9


@pytest.fixture
def both(shm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Twins]:
    with twins(shm, monkeypatch) as made:
        yield made


def setattr_in(**changes: int) -> bytes:
    """fuse_setattr_in."""
    flags = {
        "mode": wire.SETS_MODE, "uid": wire.SETS_UID, "gid": wire.SETS_GID,
        "size": wire.SETS_SIZE, "atime": wire.SETS_ATIME, "mtime": wire.SETS_MTIME,
        "ctime": wire.SETS_CTIME,
    }  # fmt: skip
    valid = changes.pop("also", 0) + sum(flags[name] for name in changes)
    times = [divmod(changes.get(name, 0), NS) for name in ("atime", "mtime", "ctime")]
    return wire.SETATTR_IN.pack(
        valid, 0, changes.get("size", 0), 0, *(seconds for seconds, _ in times),
        *(ns for _, ns in times), changes.get("mode", 0), changes.get("uid", 0),
        changes.get("gid", 0),
    )  # fmt: skip


def test_attributes_are_those_that_python_tells(both: Twins) -> None:
    fs = both.native.fs
    inodes = [
        ROOT,
        fs.make(ROOT, b"directory", NewInode(0o40750, 3, 4)),
        fs.make(ROOT, b"file", NewInode(0o100640, 1, 2)),
        fs.make(ROOT, b"link", NewInode(0o120777, 0, 0, 0, b"some/where")),
        fs.make(ROOT, b"device", NewInode(stat.S_IFCHR | 0o600, 0, 0, os.makedev(3, 4))),
        fs.make(ROOT, b"fifo", NewInode(stat.S_IFIFO | 0o600, 0, 0)),
    ]
    fs.write(inodes[2], 0, b"x" * 9000)
    fs.set_attributes(inodes[1], atime_ns=-(5 * NS) + 7, mtime_ns=-1)
    for number in inodes:
        assert both.ask(Opcode.GETATTR, number, bytes(16))


@pytest.mark.parametrize("time_ns", [-(1 << 63), 1 - (1 << 63), -(1 << 63) + NS, (1 << 63) - 1])
def test_the_earliest_and_latest_times_are_told_as_python_tells_them(
    both: Twins, time_ns: int
) -> None:
    fs = both.native.fs
    number = a_file(both, b"x")
    state = fs.inode(number).state.replaced(
        accessed_ns=time_ns, modified_ns=time_ns, changed_ns=time_ns
    )
    with fs.store.change() as change:
        change.append(fs.inode(number), state.pack())
        change.then(lambda: fs.inode(number).set_state(state))
    assert both.ask(Opcode.GETATTR, number, bytes(16))


def a_file(both: Twins, data: bytes = b"", name: bytes = b"file", mode: int = 0o100640) -> int:
    fs = both.native.fs
    number = fs.make(ROOT, name, NewInode(mode, 1, 2))
    if data:
        fs.write(number, 0, data)
        fs.trim_ahead(number)
    return number


NOW = time.time_ns()
CHANGES = [
    {"mode": 0o100604},
    {"mode": 0o1777},
    {"uid": 7, "also": wire.SETATTR_KILL_SUIDGID},
    {"gid": 8},
    {"uid": 7, "gid": 8, "mode": 0o44},
    {"atime": NOW - 99 * NS + 5},
    {"mtime": NOW - 99 * NS + 5},
    {"atime": 5 * NS + 1, "mtime": -7 * NS + 3},
    {"atime": -1, "mtime": NOW + 10**15},
    {"mtime": NOW + 2 * 10**9},
    {"ctime": 6 * NS},
    {"mtime": 6 * NS, "ctime": 7 * NS},
    {"atime": NOW, "mtime": NOW, "also": wire.SETS_ATIME_NOW | wire.SETS_MTIME_NOW},
]


@pytest.mark.parametrize("changes", CHANGES, ids=" ".join)
def test_attributes_change_as_python_changes_them(both: Twins, changes: dict[str, int]) -> None:
    fs = both.native.fs
    number = a_file(both, b"x" * 5000)
    directory = fs.make(ROOT, b"directory", NewInode(0o40750, 3, 4))
    for inode in (number, directory):
        assert both.ask(Opcode.SETATTR, inode, setattr_in(**changes))
        # Now that a time of access is in the live line.
        fs.show_accessed(inode)
        assert both.ask(Opcode.SETATTR, inode, setattr_in(**changes))
    fs.write(number, 0, b"later")
    assert both.ask(Opcode.SETATTR, number, setattr_in(**changes))
    assert both.ask(Opcode.GETATTR, number, bytes(16))


def test_a_time_that_was_just_set_is_not_older_than_what_comes_next(both: Twins) -> None:
    number = a_file(both)
    other = a_file(both, name=b"other")
    now = time.time_ns()
    assert both.ask(Opcode.SETATTR, number, setattr_in(mtime=now))
    assert both.native.word("last_time_ns") == now
    assert both.ask(Opcode.SETATTR, other, setattr_in(mode=0o600))


@pytest.mark.parametrize(
    "operation",
    [
        setattr_in(size=3),
        setattr_in(mode=0o6755),
        setattr_in(also=wire.SETATTR_KILL_SUIDGID),
        setattr_in(),
        setattr_in(mode=0o600)[:-1],
        setattr_in(mtime=9223372036 * NS),
    ],
    ids=["a size", "privileges", "takes privileges", "nothing", "too short", "a far time"],
)
def test_changes_that_need_more_are_handed_over(both: Twins, operation: bytes) -> None:
    assert both.ask(Opcode.SETATTR, a_file(both), operation) is None


def test_what_is_not_plain_is_handed_over(both: Twins) -> None:
    fs = both.native.fs
    privileged = a_file(both, name=b"privileged", mode=0o104755)
    attributed = a_file(both, name=b"attributed")
    fs.set_xattr(attributed, b"user.a", b"b")
    link = fs.make(ROOT, b"link", NewInode(0o120777, 0, 0, 0, b"some/where"))
    for number in (privileged, attributed, link):
        assert both.ask(Opcode.SETATTR, number, setattr_in(mtime=5)) is None or number == privileged
        assert both.ask(Opcode.SETATTR, number, setattr_in(mode=0o600)) is None
    assert both.ask(Opcode.OPEN, attributed, open_in()) is None
    assert both.ask(Opcode.OPEN, link, open_in()) is None
    assert both.ask(Opcode.OPEN, ROOT, open_in()) is None
    assert both.ask(Opcode.OPEN, privileged, open_in(os.O_RDWR | os.O_TRUNC)) is None


def open_in(flags: int = os.O_RDWR) -> bytes:
    """fuse_open_in."""
    return wire.OPEN_IN.pack(flags, 0)


def release_in(handle: int, flags: int = os.O_RDWR) -> bytes:
    """fuse_release_in."""
    return wire.RELEASE_IN.pack(handle, flags, 0, 0)


def handle_of(both: Twins, number: int, flags: int = os.O_RDWR, **rest: Caller) -> int:
    """A handle that a worker has given."""
    answered = both.ask(Opcode.OPEN, number, open_in(flags), **rest)
    assert answered is not None
    error, data = answered
    assert error == 0
    return int(struct.unpack_from("<Q", data)[0])


def test_a_handle_holds_its_file_and_says_who_has_opened_it(both: Twins) -> None:
    number, native = a_file(both), both.native
    counts = native.files.shared.lookup_counts
    count, handles = counts.count(number), native.names.handles.count
    handle = handle_of(both, number, os.O_WRONLY | os.O_APPEND, caller=Caller(5, 6, 7))
    at = handle * 64
    place = native.files.shared.opens[at : at + 64]
    assert struct.unpack("<QIIIIIIQQQQ", place) == (
        handle, os.O_WRONLY | os.O_APPEND, 1, 5, 6, 7, 0, 2, number, 1, 0
    )  # fmt: skip
    assert native.names.handles.count == handles - 1
    assert counts.count(number) == count + 1
    assert both.ask(Opcode.RELEASE, number, release_in(handle)) == (0, b"")
    assert counts.count(number) == count
    assert native.names.handles.numbers()[-1] == handle + (1 << 20)
    # The handle stands for nothing now.
    assert both.ask(Opcode.RELEASE, number, release_in(handle)) is None
    again = handle_of(both, number)
    assert again == handle + (1 << 20)
    assert both.ask(Opcode.RELEASE, ROOT, release_in(again)) is None
    assert both.ask(Opcode.RELEASE, number, release_in(again)) == (0, b"")


def test_a_handle_that_python_has_given_is_left_to_it(both: Twins) -> None:
    number, native = a_file(both), both.native
    _, data = native.ask_here(Opcode.OPEN, number, open_in())
    assert both.ask(Opcode.RELEASE, number, release_in(*struct.unpack_from("<Q", data))) is None


def test_a_file_with_frames_behind_its_size_is_closed_by_python(both: Twins) -> None:
    number, native = a_file(both), both.native
    handle = handle_of(both, number)
    native.fs.write(number, 0, b"x" * 4096)
    native.fs.write(number, 4096, b"x" * 4096)
    assert native.fs.may_have_ahead(number)
    assert both.ask(Opcode.RELEASE, number, release_in(handle)) is None
    native.fs.trim_ahead(number)
    assert both.ask(Opcode.RELEASE, number, release_in(handle)) == (0, b"")


def test_without_handles_opens_are_handed_over(both: Twins) -> None:
    number, names = a_file(both), both.native.names
    names.handles.pop(1 << 12)
    assert both.ask(Opcode.OPEN, number, open_in()) is None


def forget_in(count: int = 1) -> bytes:
    """fuse_forget_in."""
    return wire.FORGET_IN.pack(count)


def forget_many_in(*pairs: tuple[int, int]) -> bytes:
    """fuse_batch_forget_in and what follows."""
    head = wire.BATCH_FORGET_IN.pack(len(pairs))
    return head + b"".join(wire.FORGET_ONE.pack(*pair) for pair in pairs)


def used_frames(both: Twins) -> int:
    """The frames that are used, other than those that workers may take."""
    native = both.native
    fs = native.anew()
    return fs.geometry.frame_count - fs.allocator.free_count() - native.names.frames.count


def unnamed(both: Twins, number: int, name: bytes) -> None:
    """Hold an inode, and remove its name."""
    fs = both.native.fs
    fs.hold(number)
    if fs.attributes(number).mode >> 12 == stat.S_IFDIR >> 12:
        fs.rmdir(ROOT, name)
    else:
        fs.unlink(ROOT, name)


def test_a_hold_that_is_dropped_leaves_an_inode_that_has_a_name(both: Twins) -> None:
    number, native = a_file(both, b"x" * 5000), both.native
    native.fs.hold(number, 5)
    assert both.ask(Opcode.FORGET, number, forget_in(2)) == (0, b"")
    assert native.files.shared.lookup_counts.count(number) == 3
    # More than there are, as a crafted peer may say.
    assert both.ask(Opcode.FORGET, number, forget_in(1 << 63)) == (0, b"")
    assert native.files.shared.lookup_counts.count(number) == 0
    assert native.names.orphans.count == 0


def test_the_last_hold_frees_exactly_what_an_inode_has(both: Twins) -> None:
    native, names = both.native, both.native.names
    before = used_frames(both)
    slots = set(names.slots.numbers())
    number = a_file(both, b"x" * 50_000)
    slot = native.fs.inode(number).slot_offset
    frames = {
        pfn
        for extent in native.fs.extents(number)
        for pfn in range(extent.pfn, extent.pfn + extent.frame_count)
    }
    assert len(frames) == 13
    unnamed(both, number, b"file")
    reserve = names.frames.numbers()
    assert both.ask(Opcode.FORGET, number, forget_in()) == (0, b"")
    assert names.orphans.count == 0
    assert names.frames.numbers() == reserve + sorted(frames, reverse=True)
    assert set(names.slots.numbers()) == slots | {slot}
    assert used_frames(both) == before


def test_a_log_in_frames_is_freed_with_its_inode(both: Twins) -> None:
    native, names = both.native, both.native.names
    number = a_file(both, b"x" * 5000)
    for mode in range(200):
        native.fs.set_attributes(number, mode=mode)
    log = native.fs.inode(number).log
    assert len(log.frames) > 1
    unnamed(both, number, b"file")
    reserve = set(names.frames.numbers())
    frames = {frame >> 12 for frame in native.fs.inode(number).log.frames}
    data = {extent.pfn + at for extent in native.fs.extents(number) for at in range(2)}
    assert both.ask(Opcode.FORGET, number, forget_in()) == (0, b"")
    assert set(names.frames.numbers()) == reserve | frames | data


def test_directories_and_links_are_freed_as_well(both: Twins) -> None:
    fs, names = both.native.fs, both.native.names
    directory = fs.make(ROOT, b"directory", NewInode(0o40750, 3, 4))
    link = fs.make(ROOT, b"link", NewInode(0o120777, 0, 0, 0, b"some/where" * 100))
    for number, name in ((directory, b"directory"), (link, b"link")):
        unnamed(both, number, name)
        slot_count = names.slots.count
        assert both.ask(Opcode.FORGET, number, forget_in()) == (0, b"")
        assert (names.slots.count, names.orphans.count) == (slot_count + 1, 0)


def test_the_last_handle_frees_a_file_that_was_forgotten_before(both: Twins) -> None:
    number, native = a_file(both, b"x" * 5000), both.native
    handle = handle_of(both, number)
    unnamed(both, number, b"file")
    assert both.ask(Opcode.FORGET, number, forget_in()) == (0, b"")
    slot_count = native.names.slots.count
    assert both.ask(Opcode.RELEASE, number, release_in(handle)) == (0, b"")
    assert native.names.slots.count == slot_count + 1


def test_what_a_worker_cannot_free_is_left_to_python(both: Twins) -> None:
    native, names = both.native, both.native.names
    fs = native.fs
    attributed = a_file(both, name=b"attributed")
    fs.set_xattr(attributed, b"user.a", b"b")
    large = a_file(both, b"x" * 65 * 4096, name=b"large")
    published = a_file(both, b"x" * 5000, name=b"published")
    native.files.tables.publish(published, 5000, [], live_offset=fs.live_line(published),
                                limit_bytes=5000)  # fmt: skip
    numbers = [attributed, large, published]
    for number, name in zip(numbers, (b"attributed", b"large", b"published"), strict=True):
        unnamed(both, number, name)
        native.catch_up()
        if number == published:
            native.files.tables.publish(published, 5000, [], live_offset=fs.live_line(published),
                                        limit_bytes=5000)  # fmt: skip
        verdict = native.worker.answer(forget_in(), opcode=Opcode.FORGET, inode=number)
        assert verdict == ("drop", 0, b"")
        assert fs.store.table.head(number) is not None
    assert names.orphans.numbers() == numbers
    for number in names.orphans.pop(9):
        fs.store.free_orphan(number)
        assert fs.store.table.head(number) is None


def test_what_programs_have_pinned_is_left_to_python(both: Twins) -> None:
    number, native = a_file(both, b"x" * 5000), both.native
    unnamed(both, number, b"file")
    native.set_word("pins", 1)
    assert native.worker.answer(forget_in(), opcode=Opcode.FORGET, inode=number)[0] == "drop"
    assert native.names.orphans.numbers() == [number]


def test_many_are_forgotten_with_one_request(both: Twins) -> None:
    native = both.native
    numbers = [a_file(both, b"x" * 5000, name=b"%d" % at) for at in range(20)]
    for at, number in enumerate(numbers):
        native.fs.hold(number, 3)
        if at % 2:
            unnamed(both, number, b"%d" % at)
    pairs = [(number, 3 + at % 2) for at, number in enumerate(numbers)]
    assert both.ask(Opcode.BATCH_FORGET, 0, forget_many_in(*pairs)) == (0, b"")
    assert native.names.orphans.count == 0
    assert not any(native.files.shared.lookup_counts.count(number) for number in numbers)


def test_what_could_not_be_forgotten_is_handed_over(both: Twins) -> None:
    """Once there is no room for orphans, the request asks for the rest of them."""
    native = both.native
    fs, counts = native.fs, native.files.shared.lookup_counts
    numbers = []
    for at in range(6):
        numbers.append(a_file(both, name=b"%d" % at))
        fs.set_xattr(numbers[-1], b"user.a", b"b")
        fs.hold(numbers[-1], 2)
    native.names.orphans.push(range(1, 4094))
    operation = forget_many_in(*((number, 2) for number in numbers))
    verdict = native.worker.answer(operation, opcode=Opcode.BATCH_FORGET, inode=0)
    assert verdict == ("forward", 0, b"")
    assert [counts.count(number) for number in numbers] == [0, 0, 0, 2, 2, 2]
    # A worker sends what begins in the middle of the third of these.
    left = operation[8 + 3 * 16 - 8 :]
    assert left == forget_many_in(*((number, 2) for number in numbers[3:]))
