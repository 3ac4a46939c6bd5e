"""What an operation on names costs in the control plane, in calls: time is the machine's.

One thread answers for all callers, so what it does for each request is what many callers wait for.
The bounds are a tenth above what it takes: who adds to the path takes something away, or says why
it is worth that.
"""

from __future__ import annotations

import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest

from kit.data_plane import door_to, shared_files
from pmemfs.engine.base import Engine
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Request, WireDoor
from pmemfs.media.inode import ROOT

CALLER = Caller(0, 0, 0)
TIMES = 20
"""Now and then an operation takes a frame more, or writes a log anew; the least counts."""


@dataclass
class Names:
    """A directory that somebody looks at, and the way in to it."""

    door: WireDoor
    directory: int = 0
    numbers: Iterator[int] = field(default_factory=count)

    def new_name(self) -> bytes:
        return b"name-%07d.dat\0" % next(self.numbers)

    def ask(self, opcode: Opcode, operation: bytes, ino: int = 0) -> bytes:
        request = Request(ino or self.directory, CALLER, operation)
        answer = self.door.answer(opcode, request)
        assert answer is None or isinstance(answer, bytes)
        return answer or b""

    def make(self, kind: int) -> tuple[bytes, int]:
        name = self.new_name()
        answer = self.ask(Opcode.MKNOD, struct.pack("<IIII", kind | 0o755, 0, 0, 0) + name)
        return name, struct.unpack_from("<Q", answer)[0]

    def next_operation(self, opcode: Opcode) -> bytes:
        """What to ask for next, after whatever has to be there for it was made."""
        if opcode is Opcode.MKDIR:
            return struct.pack("<II", 0o755, 0o22) + self.new_name()
        if opcode is Opcode.SYMLINK:
            return self.new_name() + b"where it leads\0"
        if opcode is Opcode.LINK:
            return struct.pack("<Q", self.make(stat.S_IFREG)[1]) + self.new_name()
        if opcode is Opcode.LOOKUP:
            return self.new_name()
        name, _ = self.make(stat.S_IFDIR if opcode is Opcode.RMDIR else stat.S_IFREG)
        if opcode is Opcode.RENAME2:
            return struct.pack("<QII", self.directory, 0, 0) + name + self.new_name()
        return name


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Names]:
    with shared_files(tmp_path_factory.mktemp("pool")) as made:
        _, door = door_to(made.fs, Engine(made.medium, made.memmap), made.tables)
        names = Names(door, ROOT)
        _, names.directory = names.make(stat.S_IFDIR)
        names.ask(Opcode.GETATTR, bytes(16))
        yield names


def calls_of(names: Names, opcode: Opcode, operation: bytes) -> int:
    """How many functions of ours one request calls."""
    calls = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        names.ask(opcode, operation)
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize(
    ("opcode", "most"),
    [
        (Opcode.LOOKUP, 20),
        (Opcode.MKDIR, 175),
        (Opcode.RMDIR, 160),
        (Opcode.SYMLINK, 185),
        (Opcode.LINK, 180),
        (Opcode.UNLINK, 160),
        (Opcode.RENAME2, 185),
    ],
)
def test_an_operation_on_names_takes_few_calls(names: Names, opcode: Opcode, most: int) -> None:
    counts = [calls_of(names, opcode, names.next_operation(opcode)) for _ in range(TIMES)]
    assert min(counts) <= most, sorted(counts)
