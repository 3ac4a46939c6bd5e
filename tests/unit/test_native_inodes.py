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


@pytest.mark.parametrize("changes", CHANGES, ids=repr)
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
    error, data = native.ask_here(Opcode.OPEN, number, open_in())
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
