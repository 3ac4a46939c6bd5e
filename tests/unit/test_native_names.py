"""Names that a worker changes are, in the pool, what the control plane would have made of them.

Each operation is carried out twice: in one file system by a worker, or by a worker and the control
plane in turns, and in another one by the control plane alone. Answers and trees must be the same.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from kit.data_plane import SharedFiles, shared_files
from kit.native_names import (
    ROOT_USER,
    Answered,
    NativeNames,
    answer_of,
    create_in,
    inode_of,
    mkdir_in,
    native_names,
    rename_in,
)
from pmemfs.clock import coarse_ns
from pmemfs.dataplane.counters import read_counters
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import Operation
from pmemfs.fuse import wire
from pmemfs.fuse.encode import attr_out, entry_out
from pmemfs.fuse.handlers import acl
from pmemfs.fuse.handlers.privileges import CAPABILITIES, Caller
from pmemfs.fuse.once import RESENT
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.media.log import InodeFlags
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

FILE = NewInode(mode=stat.S_IFREG | 0o644, uid=0, gid=0)
DIRECTORY = NewInode(mode=stat.S_IFDIR | 0o755, uid=0, gid=0)
CALLERS = (ROOT_USER, Caller(1000, 1000, 5), Caller(1000, 50, 6))
NAMES = (b"a", b"b", b"c", b"n" * 37, b"n" * 38, b"long" * 25, b"l" * 255)
ODD_NAMES = (b".", b"..", b"", b"a/b", b"l" * 256)
ENTRY_BYTES = wire.ENTRY_OUT.size + wire.ATTR.size
Tree = dict[bytes, tuple[object, ...]]


@pytest.fixture
def native(shm: Path) -> Iterator[NativeNames]:
    (shm / "native").mkdir()
    with native_names(shm / "native") as made:
        yield made


@pytest.fixture
def reference(shm: Path) -> Iterator[SharedFiles]:
    (shm / "reference").mkdir()
    with shared_files(shm / "reference") as made:
        yield made


def shape(answered: Answered) -> tuple[object, ...]:
    """An answer without the number of an inode, times and a handle."""
    error, data = answered
    if len(data) < ENTRY_BYTES:
        return error, data
    node, _, *valid = wire.ENTRY_OUT.unpack_from(data)
    ino, size, blocks, *rest = wire.ATTR.unpack_from(data, wire.ENTRY_OUT.size)
    assert ino == node
    opened = data[ENTRY_BYTES:]
    if opened:
        opened = opened[8:]
    return error, bool(node), valid, size, blocks, rest[6:], opened


def tree_of(fs: FileSystem, number: int = ROOT, path: bytes = b"") -> Tree:
    """All that can be seen, without numbers of inodes and times."""
    a = fs.attributes(number)
    tree: Tree = {path: (a.mode, a.nlink, a.uid, a.gid, a.rdev, a.size_bytes, a.block_count,
                         a.flags)}  # fmt: skip
    for name, entry in sorted(fs.inode(number).entries.items()) if stat.S_ISDIR(a.mode) else ():
        tree |= tree_of(fs, entry.inode, path + b"/" + name)
    return tree


@dataclass
class Step:
    """An operation in a directory that is given by its path."""

    opcode: Opcode
    directory: bytes
    names: tuple[bytes, ...]
    flags: int = 0
    mode: int = 0o644
    umask: int = 0
    caller: Caller = ROOT_USER
    to: bytes = b""

    def operation(self, inode: int, target: int) -> bytes:
        """What the kernel sends."""
        if self.opcode is Opcode.CREATE:
            return create_in(self.names[0], flags=self.flags, mode=self.mode, umask=self.umask)
        if self.opcode is Opcode.MKDIR:
            return mkdir_in(self.names[0], mode=self.mode, umask=self.umask)
        if self.opcode is Opcode.RENAME2:
            return rename_in(*self.names, target, self.flags)
        return self.names[0] + b"\0"


def walk(fs: FileSystem, path: bytes) -> int:
    """The inode of a path."""
    number = ROOT
    for name in path.split(b"/")[1:]:
        number = fs.lookup(number, name)
    return number


class Both:
    """The same file system twice."""

    def __init__(self, native: NativeNames, reference: SharedFiles) -> None:
        self.native, self.reference = native, reference
        self.door = reference.door()[1]
        self.steps: list[Step] = []

    def prepare(self) -> None:
        """Directories of all kinds."""
        group, no_dump = (
            NewInode(mode=stat.S_IFDIR | mode, uid=0, gid=7) for mode in (0o2775, 0o755)
        )
        self.native.names.take()
        for fs in (self.native.fs, self.reference.fs):
            fs.make(ROOT, b"d", DIRECTORY)
            fs.make(ROOT, b"group", group)
            number = fs.make(ROOT, b"flags", no_dump)
            fs.set_flags(number, InodeFlags.NO_DUMP | InodeFlags.NO_ACCESS_TIME)
            number = fs.make(ROOT, b"fixed", DIRECTORY)
            fs.make(number, b"a", DIRECTORY)
            fs.set_flags(number, InodeFlags.IMMUTABLE)
            number = fs.make(ROOT, b"mixed", DIRECTORY)
            fs.make(number, b"a", NewInode(stat.S_IFLNK | 0o777, 0, 0, target=b"over/there"))
            fs.make(number, b"b", NewInode(stat.S_IFIFO | 0o600, 0, 0))
            fs.link(fs.make(number, b"c", NewInode(stat.S_IFREG | 0o600, 0, 0)), number, b"n" * 37)
            inode = fs.make(number, b"n" * 38, NewInode(stat.S_IFREG | 0o600, 0, 0))
            fs.set_xattr(inode, b"user.some", b"value")
        self.native.names.free()

    def do(self, step: Step, *, by_worker: bool = True) -> Answered:
        """Carry a step out on both sides, and see that they agree."""
        self.steps.append(step)
        native = self.native
        native.names.take()
        native.catch_up()
        places = [walk(native.fs, path) for path in (step.directory, step.to)]
        native.names.free()
        serve = native.serve if by_worker else native.ask_here
        answered = serve(step.opcode, places[0], step.operation(*places), step.caller)
        places = [walk(self.reference.fs, path) for path in (step.directory, step.to)]
        expected = answer_of(
            self.door, step.opcode, places[0], step.operation(*places), step.caller
        )  # fmt: skip
        assert shape(answered) == shape(expected), step
        anew = native.anew()
        if len(answered[1]) >= ENTRY_BYTES and inode_of(answered[1]):
            attributes = anew.attributes(inode_of(answered[1]))
            assert answered[1][:ENTRY_BYTES] == entry_out(attributes), step
        return answered

    def compare(self) -> None:
        """See that both are the same, as they are stored and in memory."""
        native = self.native
        expected = tree_of(self.reference.fs)
        assert tree_of(native.anew()) == expected
        native.names.take()
        native.catch_up()
        assert tree_of(native.fs) == expected
        native.names.free()


@pytest.fixture
def both(native: NativeNames, reference: SharedFiles) -> Both:
    return Both(native, reference)


def steps_of(chance: random.Random) -> Iterator[Step]:
    """Steps in a few directories, with a few names, so that they meet each other."""
    directories = (
        b"",
        b"/d",
        b"/d",
        b"/d/a",
        b"/group",
        b"/flags",
        b"/fixed",
        b"/mixed",
        b"/group/b",
    )
    opcodes = (Opcode.LOOKUP, Opcode.CREATE, Opcode.CREATE, Opcode.MKDIR, Opcode.UNLINK,
               Opcode.RMDIR, Opcode.RENAME2, Opcode.RENAME2)  # fmt: skip
    while True:
        opcode = chance.choice(opcodes)
        count = 2 if opcode is Opcode.RENAME2 else 1
        names = tuple(
            chance.choice(ODD_NAMES if chance.random() < 0.03 else NAMES) for _ in range(count)
        )
        flags = 0
        if opcode is Opcode.RENAME2:
            flags = chance.choice((0, 0, 0, 1, 2))
        elif opcode is Opcode.CREATE:
            flags = chance.choice((0, os.O_EXCL, os.O_TRUNC | os.O_WRONLY, os.O_RDWR))
        directory = chance.choice(directories)
        yield Step(
            opcode, directory, names, flags, chance.choice((0o644, 0o7777, 0)),
            chance.choice((0, 0o22, 0o777)), chance.choice(CALLERS),
            chance.choice((directory, chance.choice(directories))),
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [1, 0.5])
def test_what_a_worker_does_is_what_the_control_plane_does(
    both: Both, seed: int, share: float
) -> None:
    chance = random.Random(seed)
    both.prepare()
    for count, step in enumerate(itertools.islice(steps_of(chance), 250)):
        try:
            both.do(step, by_worker=chance.random() < share)
        except FileNotFoundError:
            continue
        if count % 10 == 0:
            both.compare()
    both.compare()
    assert both.native.answered > 60


def make_directory(native: NativeNames, name: bytes = b"d") -> int:
    """A directory whose log has room, with a file `f` in it."""
    native.names.take()
    number = native.fs.make(ROOT, name, DIRECTORY)
    native.names.free()
    assert native.ask(Opcode.CREATE, number, create_in(b"f")) is not None
    return number


def test_each_operation_is_carried_out_by_a_worker(native: NativeNames) -> None:
    number, other = make_directory(native), make_directory(native, b"other")
    for opcode, operation in (
        (Opcode.LOOKUP, b"f\0"),
        (Opcode.LOOKUP, b"nobody\0"),
        (Opcode.MKDIR, mkdir_in(b"g")),
        (Opcode.RENAME, wire.RENAME_IN.pack(number) + b"f\0h\0"),
        (Opcode.RENAME2, rename_in(b"g", b"i", number, 1)),
        (Opcode.RENAME, wire.RENAME_IN.pack(other) + b"h\0h\0"),
        (Opcode.RENAME2, rename_in(b"i", b"i", other, 1)),
    ):
        answered = native.ask(opcode, number, operation)
        assert answered is not None, opcode
        assert answered[0] == 0, opcode
    assert sorted(native.anew().names(other)) == [b"f", b"h", b"i"]
    for opcode, operation in ((Opcode.UNLINK, b"h\0"), (Opcode.RMDIR, b"i\0")):
        assert native.ask(opcode, other, operation) == (0, b"")
    assert native.anew().names(number) == []


@pytest.mark.parametrize(
    ("opcode", "operation", "expected"),
    [
        (Opcode.CREATE, create_in(b"f", flags=os.O_EXCL), errno.EEXIST),
        (Opcode.CREATE, create_in(b"f"), errno.ESTALE),
        (Opcode.MKDIR, mkdir_in(b"f"), errno.EEXIST),
        (Opcode.UNLINK, b"nobody\0", errno.ENOENT),
        (Opcode.UNLINK, b"s\0", errno.EISDIR),
        (Opcode.RMDIR, b"f\0", errno.ENOTDIR),
        (Opcode.RMDIR, b"s\0", errno.ENOTEMPTY),
        (Opcode.RENAME2, (b"nobody", b"f", 0), errno.ENOENT),
        (Opcode.RENAME2, (b"f", b"s", 1), errno.EEXIST),
        (Opcode.RENAME2, (b"f", b"f", 1), errno.EEXIST),
        (Opcode.RENAME2, (b"f", b"s", 0), errno.EISDIR),
        (Opcode.RENAME2, (b"s", b"f", 0), errno.ENOTDIR),
    ],
)
def test_what_is_refused_is_refused_by_a_worker(
    native: NativeNames, opcode: Opcode, operation: bytes | tuple[bytes, bytes, int], expected: int
) -> None:
    number = make_directory(native)
    inside = native.ask(Opcode.MKDIR, number, mkdir_in(b"s"))
    assert inside is not None
    native.ask(Opcode.CREATE, inode_of(inside[1]), create_in(b"x"))
    if isinstance(operation, tuple):
        operation = rename_in(*operation[:2], number, operation[2])
    before = native.files.medium.read(0, native.files.medium.size_bytes)
    before = bytes(before)
    assert native.ask(opcode, number, operation) == (expected, b"")
    assert bytes(native.files.medium.read(0, len(before))) == before
    # So it is refused again, if nobody hears the answer.
    assert (native.decision.state, native.decision.error) == (2, expected)


HANDED_OVER = (
    (Opcode.LOOKUP, b".\0"),
    (Opcode.LOOKUP, b"..\0"),
    (Opcode.LOOKUP, b"n" * 256 + b"\0"),
    (Opcode.LOOKUP, b"no zero"),
    (Opcode.LOOKUP, b"f\0more\0"),
    (Opcode.LOOKUP, b""),
    (Opcode.CREATE, create_in(b"a/b")),
    (Opcode.CREATE, create_in(b"")),
    (Opcode.CREATE, bytes(8)),
    (Opcode.UNLINK, b"linked\0"),
    (Opcode.RENAME2, rename_in(b"f", b"g", 0, 2)),
    (Opcode.RENAME2, rename_in(b"f", b"g", ROOT, 2)),
    (Opcode.RENAME2, rename_in(b"linked", b"g", ROOT)),
    (Opcode.RENAME2, rename_in(b"f", b"g", 1 << 40)),
    (Opcode.GETXATTR, wire.GETXATTR_IN.pack(0) + b"other.name\0"),
    (Opcode.GETXATTR, wire.GETXATTR_IN.pack(0) + b"security.\0"),
    (Opcode.GETXATTR, wire.GETXATTR_IN.pack(0) + b"system.posix_acl_accesses\0"),
    (Opcode.GETXATTR, wire.GETXATTR_IN.pack(0)),
    (Opcode.MKNOD, wire.MKNOD_IN.pack(0o100644, 0, 0) + b"new\0"),
)


def is_untouched(native: NativeNames, ask: Callable[[], Answered | None]) -> bool:
    """Whether a request is handed over, and has left nothing anywhere."""

    def everything() -> tuple[object, ...]:
        names, size = native.names, native.files.medium.size_bytes
        return (
            bytes(native.files.medium.read(0, size)), native.decision.state,
            names.slots.numbers(), names.handles.numbers(), names.frames.numbers(),
            list(native.files.shared.lookup_counts.counts()),
            [place.handle for place in OpenPlaces(native.files.shared.opens)],
        )  # fmt: skip

    before = everything()
    assert ask() is None
    after = everything()
    # What was taken and given back has left an older decision none.
    return before[0] == after[0] and after[1] != 1 and before[2:] == after[2:]


@pytest.mark.parametrize(("opcode", "operation"), HANDED_OVER)
def test_what_is_unusual_is_handed_over(
    native: NativeNames, opcode: Opcode, operation: bytes
) -> None:
    number = make_directory(native)
    native.names.take()
    native.catch_up()
    native.fs.set_xattr(native.fs.make(number, b"linked", FILE), b"user.some", b"value")
    native.names.free()
    if opcode is Opcode.RENAME2 and operation[:8] == bytes(8):
        operation = number.to_bytes(8, "little") + operation[8:]
    assert is_untouched(native, lambda: native.ask(opcode, number, operation))


def test_a_directory_is_moved_by_a_worker_but_not_into_itself(native: NativeNames) -> None:
    outer = make_directory(native)
    made = native.ask(Opcode.MKDIR, outer, mkdir_in(b"middle"))
    assert made is not None
    middle = inode_of(made[1])
    made = native.ask(Opcode.MKDIR, middle, mkdir_in(b"inner"))
    assert made is not None
    inner = inode_of(made[1])
    for target in (middle, inner):
        into_itself = rename_in(b"middle", b"m", target)
        assert is_untouched(
            native, lambda asked=into_itself: native.ask(Opcode.RENAME2, outer, asked)
        )  # type: ignore[misc]
    assert native.ask(Opcode.RENAME2, middle, rename_in(b"inner", b"i", ROOT)) == (0, b"")
    assert native.ask(Opcode.RENAME2, ROOT, rename_in(b"d", b"d", inner)) == (0, b"")
    # What was above is below now.
    asked = rename_in(b"i", b"i", middle)
    assert is_untouched(native, lambda: native.ask(Opcode.RENAME2, ROOT, asked))
    assert native.ask_here(Opcode.RENAME2, ROOT, asked) == (errno.EINVAL, b"")
    assert walk(native.anew(), b"/i/d/middle") == middle
    native.names.take()
    native.catch_up()
    assert native.fs.attributes(inner).nlink == 3
    native.names.free()


@pytest.mark.parametrize("name", [CAPABILITIES, acl.ACCESS, acl.DEFAULT])
def test_an_attribute_that_nothing_has_is_looked_for_by_a_worker(
    native: NativeNames, name: bytes
) -> None:
    number = make_directory(native)
    operation = wire.GETXATTR_IN.pack(0) + name + b"\0"
    assert native.ask(Opcode.GETXATTR, number, operation) == (errno.ENODATA, b"")
    native.names.take()
    native.catch_up()
    native.fs.set_xattr(number, name, b"value")
    native.names.free()
    assert native.ask(Opcode.GETXATTR, number, operation) is None


def test_what_was_given_to_somebody_before_is_handed_over(native: NativeNames) -> None:
    number = make_directory(native)
    for rest in ({"unique": RESENT | 4}, {"is_left": True}):
        for opcode, operation in (
            (Opcode.LOOKUP, b"f\0"),
            (Opcode.CREATE, create_in(b"new")),
            (Opcode.UNLINK, b"f\0"),
        ):
            assert is_untouched(native, partial(native.ask, opcode, number, operation, **rest))


def test_without_the_lock_nothing_is_done(native: NativeNames) -> None:
    number = make_directory(native)
    ask = partial(native.worker.answer, b"f\0", opcode=Opcode.UNLINK, inode=number)
    native.names.take()
    assert ask()[0] == "forward"
    native.names.free()
    # Another worker has it.
    native.set_word("holder", 2)
    assert ask()[0] == "forward"
    assert native.word("holder") == 2
    assert native.word("busy") == 2
    native.set_word("holder", 0)
    for word, value in (("on", 0), ("failed", 1), ("pins", 1)):
        native.set_word(word, value)
        assert ask()[0] == "forward"
        native.set_word(word, 1 - value)
    assert ask()[0] == "answer"


@pytest.mark.parametrize("stack", ["slots", "handles", "frames"])
def test_without_a_reserve_an_operation_is_handed_over(native: NativeNames, stack: str) -> None:
    number = make_directory(native)
    # Its slot is full then, so that the next name takes a frame.
    for name in (b"1", b"2", b"3"):
        assert native.ask(Opcode.CREATE, number, create_in(name)) is not None
    reserve = getattr(native.names, stack)
    taken = reserve.pop(reserve.count)[::-1]
    assert is_untouched(native, lambda: native.ask(Opcode.CREATE, number, create_in(b"new")))
    reserve.push(taken)
    assert native.ask(Opcode.CREATE, number, create_in(b"new")) is not None


def test_a_slot_that_is_not_free_is_taken_by_nobody(native: NativeNames) -> None:
    number = make_directory(native)
    count = native.names.slots.count
    native.names.slots.push([native.fs.store.ground.table.slot_offset(number)])
    made = native.ask(Opcode.CREATE, number, create_in(b"new"))
    assert made is not None
    assert inode_of(made[1]) != number
    assert native.names.slots.count == count - 1


def test_memory_that_faults_costs_the_operation_alone(native: NativeNames) -> None:
    number = make_directory(native)
    behind = native.files.medium.size_bytes
    native.names.slots.push([behind])
    assert native.ask(Opcode.CREATE, number, create_in(b"new")) is None
    assert native.names.slots.pop(1) == [behind]
    assert native.ask(Opcode.CREATE, number, create_in(b"new")) is not None


def test_after_a_commit_that_failed_nobody_changes_anything(native: NativeNames) -> None:
    number = make_directory(native)
    journal = native.word("journal_offset")
    native.set_word("journal_offset", native.files.medium.size_bytes)
    assert native.ask(Opcode.CREATE, number, create_in(b"new")) == (errno.EIO, b"")
    assert native.names.has_failed
    native.set_word("journal_offset", journal)
    assert native.ask(Opcode.UNLINK, number, b"f\0") is None
    assert native.anew().names(number) == [b"f"]


def test_attributes_that_are_published_are_withdrawn_before_they_change(
    native: NativeNames,
) -> None:
    number = make_directory(native)
    published = native.files.tables.attributes
    for opcode, operation in (
        (Opcode.CREATE, create_in(b"new")),
        (Opcode.RENAME2, rename_in(b"f", b"g", number)),
        (Opcode.UNLINK, b"g\0"),
    ):
        published.publish(native.anew().attributes(number))
        assert native.ask(opcode, number, operation) is not None
        answered = native.ask(Opcode.GETATTR, number, bytes(16))
        assert answered == (0, attr_out(native.anew().attributes(number)))
        assert number not in native.files.shared.published_attributes().values()


def test_times_are_those_of_the_kernel_and_never_before_one_that_was_set(
    native: NativeNames,
) -> None:
    number = make_directory(native)
    before = coarse_ns()
    made = native.ask(Opcode.CREATE, number, create_in(b"new"))
    assert made is not None
    a = native.anew().attributes(inode_of(made[1]))
    assert before <= a.birth_ns <= coarse_ns()
    assert a.atime_ns == a.mtime_ns == a.ctime_ns == a.birth_ns
    directory = native.anew().attributes(number)
    assert directory.mtime_ns == directory.ctime_ns == a.birth_ns
    # Somebody has set a finer time.
    ahead = coarse_ns() + 5_000_000
    native.set_word("last_time_ns", ahead)
    assert native.ask(Opcode.UNLINK, number, b"new\0") is not None
    assert native.anew().attributes(number).mtime_ns >= ahead
    # A clock that was set back counts.
    native.set_word("last_time_ns", time.time_ns() + 10**12)
    assert native.ask(Opcode.CREATE, number, create_in(b"later")) is not None
    assert native.anew().attributes(number).mtime_ns < time.time_ns() + 10**9


def test_a_directory_of_thousands_needs_the_control_plane_for_its_longest_log_alone(
    native: NativeNames,
) -> None:
    number = make_directory(native)
    names = [b"%d" % at for at in range(900)]
    for name in names:
        assert native.ask(Opcode.CREATE, number, create_in(name)) is not None
    assert native.anew().names(number) == [b"f", *names]
    native.more_log_frames = 0
    native.names.take()
    native.tell_log_frames()
    native.names.free()
    assert native.ask(Opcode.CREATE, number, create_in(b"one more")) is None
    assert native.ask(Opcode.UNLINK, number, b"7\0") is not None


def test_what_needs_no_answer_counts_as_done_by_the_worker(native: NativeNames) -> None:
    number = make_directory(native)

    def counted() -> tuple[int, int]:
        other = read_counters(native.files.shared)[0].operations[Operation.OTHER]
        return other.answered, other.forwarded

    answered, forwarded = counted()
    forget = wire.FORGET_IN.pack(1)
    assert native.worker.answer(forget, opcode=Opcode.FORGET, inode=number)[0] == "drop"
    assert counted() == (answered + 1, forwarded)
    with_no_lock = native.names.take()
    assert not with_no_lock
    assert native.worker.answer(forget, opcode=Opcode.FORGET, inode=number)[0] == "forward"
    native.names.free()
    assert counted() == (answered + 1, forwarded + 1)
