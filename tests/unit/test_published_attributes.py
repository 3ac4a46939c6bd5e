"""Attributes of directories, as the data plane tells them: as the file system would, or not."""

from __future__ import annotations

import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.data_plane import door_to, shared_files
from pmemfs.dataplane import layouts
from pmemfs.dataplane.native import Responder, write_seqlocked
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.base import Engine
from pmemfs.fuse.encode import attr_out
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.published import PublishedAttributes
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Request, WireDoor
from pmemfs.media.inode import ROOT
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

FILE = NewInode(mode=stat.S_IFREG | 0o644, uid=0, gid=0)
DIRECTORY = NewInode(mode=stat.S_IFDIR | 0o755, uid=0, gid=0)
ASKED = ("forward", 0, b"")
RACES = 200_000


@dataclass
class Served:
    """A file system, what answers for it here, and a worker of the data plane."""

    shared: SharedMemory
    fs: FileSystem
    published: PublishedAttributes
    door: WireDoor
    worker: Responder

    def directory(self, name: bytes, parent: int = ROOT) -> int:
        """A directory that the kernel knows."""
        ino = self.fs.make(parent, name, DIRECTORY)
        self.fs.hold(ino)
        return ino

    def ask_worker(self, ino: int) -> tuple[str, int, bytes]:
        """What the data plane makes of a GETATTR."""
        return self.worker.answer(bytes(16), opcode=Opcode.GETATTR, inode=ino)

    def ask_here(self, opcode: int, ino: int, operation: bytes = bytes(16)) -> bytes:
        """What is answered to a request that is handed over."""
        answer = self.door.answer(opcode, Request(ino, Caller(0, 0, 0), operation))
        assert isinstance(answer, bytes)
        return answer

    def expected(self, ino: int) -> bytes:
        return attr_out(self.fs.attributes(ino))

    def create(self, parent: int, name: bytes) -> None:
        created = self.ask_here(
            Opcode.CREATE, parent, struct.pack("<IIII", 0, 0o644, 0, 0) + name + b"\0"
        )
        (ino,) = struct.unpack_from("<Q", created)
        (handle,) = struct.unpack_from("<Q", created, len(created) - 16)
        self.ask_here(Opcode.RELEASE, ino, struct.pack("<QIIQ", handle, 0, 0, 0))
        self.fs.drop(ino)

    def unlink(self, parent: int, name: bytes) -> None:
        self.ask_here(Opcode.UNLINK, parent, name + b"\0")

    def rename(self, parent: int, old: bytes, target: int, new: bytes) -> None:
        names = old + b"\0" + new + b"\0"
        self.ask_here(Opcode.RENAME2, parent, struct.pack("<QII", target, 0, 0) + names)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with shared_files(tmp_path_factory.mktemp("pool")) as made:
        fs, attributes = made.fs, made.tables.attributes
        engine = Engine(made.medium, made.memmap)
        _, door = door_to(fs, engine, made.tables)
        yield Served(made.shared, fs, attributes, door, made.worker())


def test_once_somebody_has_asked_for_a_directory_the_data_plane_answers(served: Served) -> None:
    ino = served.directory(b"asked")
    assert served.ask_worker(ino) == ASKED
    answer = served.ask_here(Opcode.GETATTR, ino)
    assert answer == served.expected(ino)
    assert served.ask_worker(ino) == ("answer", 0, answer)


@pytest.mark.parametrize("new", [FILE, NewInode(mode=stat.S_IFIFO | 0o600, uid=0, gid=0)])
def test_of_anything_but_directories_it_does_not(served: Served, new: NewInode) -> None:
    ino = served.fs.make(ROOT, b"other", new)
    served.fs.hold(ino)
    served.ask_here(Opcode.GETATTR, ino)
    assert served.ask_worker(ino) == ASKED
    served.unlink(ROOT, b"other")
    served.fs.drop(ino)


def test_names_that_change_are_followed(served: Served) -> None:
    ino, target = served.directory(b"followed"), served.directory(b"target")
    for asked in (ino, target):
        served.ask_here(Opcode.GETATTR, asked)
    seen = {served.ask_worker(ino)}
    for step in (
        lambda: served.create(ino, b"one"),
        lambda: served.ask_here(Opcode.MKDIR, ino, struct.pack("<II", 0o755, 0) + b"sub\0"),
        lambda: served.ask_here(Opcode.RMDIR, ino, b"sub\0"),
        lambda: served.ask_here(Opcode.SYMLINK, ino, b"link\0somewhere\0"),
        lambda: served.unlink(ino, b"link"),
        lambda: served.ask_here(
            Opcode.MKNOD, ino, struct.pack("<IIII", 0o010600, 0, 0, 0) + b"p\0"
        ),
        lambda: served.unlink(ino, b"p"),
        lambda: served.ask_here(
            Opcode.LINK,
            target,
            struct.pack("<Q", served.fs.lookup(ino, b"one")) + b"other\0",
        ),
        lambda: served.unlink(target, b"other"),
        lambda: served.rename(ino, b"one", ino, b"two"),
        lambda: served.rename(ino, b"two", target, b"three"),
        lambda: served.unlink(target, b"three"),
    ):
        step()
        for asked in (ino, target):
            assert served.ask_worker(asked) == ("answer", 0, served.expected(asked))
        seen.add(served.ask_worker(ino))
    assert len(seen) >= 4


def test_what_nobody_has_asked_for_is_not_published_by_a_change(served: Served) -> None:
    ino = served.directory(b"unseen")
    served.create(ino, b"file")
    assert served.ask_worker(ino) == ASKED


def test_of_two_with_one_place_the_one_asked_for_last_is_told(served: Served) -> None:
    attributes, first = served.published, 0x1000
    place = layouts.attributes_place_of(first)
    second = next(
        ino for ino in range(first + 1, 1 << 20) if layouts.attributes_place_of(ino) == place
    )
    like = {ino: served.fs.attributes(ROOT)._replace(ino=ino) for ino in (first, second)}
    answers = {ino: attr_out(attributes) for ino, attributes in like.items()}
    for asked, other in ((first, second), (second, first)):
        attributes.publish(like[asked])
        assert attributes.is_wanted(asked)
        assert not attributes.is_wanted(other)
        assert served.ask_worker(asked) == ("answer", 0, answers[asked])
        assert served.ask_worker(other) == ASKED
    attributes.withdraw(first)
    assert served.ask_worker(second) == ("answer", 0, answers[second])
    attributes.withdraw(second)
    assert served.ask_worker(second) == ASKED


STEPS = st.sampled_from(
    ["create", "unlink", "rename", "mkdir", "rmdir", "link", "chmod", "xattr", "read", "times",
     "busy", "idle", "ask", "ask", "ask"]
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(STEPS, st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_what_it_tells_is_always_so(served: Served, steps: list[tuple[str, int, int]]) -> None:
    fs = served.fs
    top = served.directory(b"top")
    inos = [served.directory(b"d%d" % number, top) for number in range(4)]
    for step, one, other in steps:
        ino, second, name = inos[one], inos[other], b"name-%d" % other
        try:
            if step == "create":
                served.create(ino, name)
            elif step == "unlink":
                served.unlink(ino, name)
            elif step == "rename":
                served.rename(ino, name, second, b"name-%d" % one)
            elif step == "mkdir":
                fs.make(ino, name, DIRECTORY)
            elif step == "rmdir":
                fs.rmdir(ino, name)
            elif step == "link":
                fs.link(fs.lookup(ino, name), second, b"linked")
            elif step == "chmod":
                fs.set_attributes(ino, mode=0o700 + other)
            elif step == "xattr":
                fs.set_xattr(ino, b"user.some", b"x" * (1 + 100 * other))
            elif step == "read":
                fs.note_read(ino)
            elif step == "times":
                fs.set_attributes(ino, atime_ns=other, mtime_ns=one)
            elif step == "busy":
                # Until its log has been written anew.
                for number in range(40):
                    served.create(ino, b"many-%d" % number)
                    served.unlink(ino, b"many-%d" % number)
            elif step == "idle":
                for _ in range(20):
                    fs.tidy()
            else:
                assert served.ask_here(Opcode.GETATTR, ino) == served.expected(ino)
        except OSError:
            pass
        for asked in (top, *inos):
            assert served.ask_worker(asked) in (ASKED, ("answer", 0, served.expected(asked)))
    _remove(served, ROOT, b"top")


def _remove(served: Served, parent: int, name: bytes) -> None:
    """A directory and all in it, which nobody tells anything of any more."""
    fs = served.fs
    ino = fs.lookup(parent, name)
    for entry in list(fs.inode(ino).entries):
        if stat.S_ISDIR(fs.attributes(fs.lookup(ino, entry)).mode):
            _remove(served, ino, entry)
        else:
            fs.unlink(ino, entry)
    fs.rmdir(parent, name)
    if fs.store.is_held(ino):
        assert served.ask_worker(ino) in (ASKED, ("answer", 0, served.expected(ino)))
        fs.drop(ino)
    assert served.ask_worker(ino) == ASKED


def test_a_reader_never_sees_two_answers_mixed(served: Served) -> None:
    ino = 0x7777
    answers = [bytes([letter]) * 104 for letter in b"ab"]

    def write() -> None:
        while True:
            for answer in answers:
                served.shared.publish_attributes(ino, answer)

    # Forked, for the descriptors: both map the same memory.
    writing = get_context("fork").Process(target=write)
    writing.start()
    try:
        while served.ask_worker(ino) == ASKED:
            pass
        deadline, found = time.monotonic() + 60, set()
        # The writer may stand still for as long as that many times take.
        while len(found) < 2 and time.monotonic() < deadline:
            found |= {served.ask_worker(ino) for _ in range(RACES)}
    finally:
        writing.kill()
        writing.join()
        served.shared.withdraw_attributes(ino)
    assert found <= {ASKED, *(("answer", 0, answer) for answer in answers)}
    assert len(found) >= 2


@pytest.mark.parametrize(("offset", "length"), [(4, 8), (0, 7), (0, 64), (64, 8), (2**63, 8)])
def test_what_does_not_fit_is_not_written(offset: int, length: int) -> None:
    memory = bytearray(64)
    with pytest.raises((IndexError, OverflowError)):
        write_seqlocked(memory, offset, bytes(length))
    assert not any(memory)


@pytest.mark.parametrize("before", [0, 1])
def test_a_sequence_is_odd_only_while_somebody_writes(before: int) -> None:
    memory = bytearray(24)
    # One that was being written to when its writer was killed.
    memory[8] = before
    for times in range(1, 4):
        write_seqlocked(memory, 8, times.to_bytes(8, "little"))
        assert struct.unpack("<QQQ", memory) == (0, 2 * times, times)
