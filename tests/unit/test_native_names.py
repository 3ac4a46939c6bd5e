"""Names that a worker changes are, in the pool, what the control plane would have made of them.

Each operation is carried out twice: in one file system by a worker, or by a worker and the control
plane in turns, and in another one by the control plane alone. Answers and trees must be the same.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass
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
from pmemfs.fuse import wire
from pmemfs.fuse.encode import entry_out
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.media.log import InodeFlags
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

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

    def operation(self, inode: int) -> bytes:
        """What the kernel sends."""
        if self.opcode is Opcode.CREATE:
            return create_in(self.names[0], flags=self.flags, mode=self.mode, umask=self.umask)
        if self.opcode is Opcode.MKDIR:
            return mkdir_in(self.names[0], mode=self.mode, umask=self.umask)
        if self.opcode is Opcode.RENAME2:
            return rename_in(*self.names, inode, self.flags)
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
        number = walk(native.fs, step.directory)
        native.names.free()
        serve = native.serve if by_worker else native.ask_here
        answered = serve(step.opcode, number, step.operation(number), step.caller)
        number = walk(self.reference.fs, step.directory)
        expected = answer_of(self.door, step.opcode, number, step.operation(number), step.caller)
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
        yield Step(
            opcode, chance.choice(directories), names, flags, chance.choice((0o644, 0o7777, 0)),
            chance.choice((0, 0o22, 0o777)), chance.choice(CALLERS),
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
