"""A request that is given to a daemon twice is carried out once, and answered as it was."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kit.data_plane import SharedFiles, shared_files
from pmemfs.fuse import wire
from pmemfs.fuse.once import RESENT
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
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, ours:
            for message in messages:
                theirs.send(message)
            theirs.shutdown(socket.SHUT_WR)
            trio.run(self.raw.serve, [ours])
            ours.shutdown(socket.SHUT_WR)
            replies = iter(lambda: theirs.recv(LONGEST), b"")
            found = []
            for reply in replies:
                _, error, unique = struct.unpack_from("<IiQ", reply)
                found.append((unique, -error, reply[16:]))
            return found


def message(unique: int, opcode: int, operation: bytes, ino: int = ROOT) -> bytes:
    """A request as a worker sends it."""
    return struct.pack(
        "<IIQQIIIHH", 40 + len(operation), opcode, unique, ino, 0, 0, 0, 0, 0
    ) + operation  # fmt: skip


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


def test_what_only_reads_is_done_again(daemon: Daemon) -> None:
    asked = message(100, Opcode.GETATTR, bytes(16))
    assert daemon.ask(asked) == daemon.ask(asked)
    assert daemon.files.shared.answers.places == {}
