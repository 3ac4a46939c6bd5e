"""INIT, and what passes between the planes: nothing is changed on the way.

The process of a data plane serves a socket here instead of /dev/fuse: one message a request or
reply, just so.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from kit.data_plane import MAX_WRITE, some_tables
from pmemfs.dataplane.native import run
from pmemfs.fuse import wire
from pmemfs.fuse.handshake import Terms, agree
from pmemfs.fuse.wire import Opcode

ALL = (1 << 64) - 1
TERMS = Terms(max_write=MAX_WRITE, max_background=64, has_files=True, over_uring=False)
BLOCK = Terms(max_write=MAX_WRITE, max_background=64, has_files=False, over_uring=False)
URING = Terms(max_write=MAX_WRITE, max_background=64, has_files=True, over_uring=True)


def init_in(offered: int, major: int = 7, minor: int = 45) -> bytes:
    return wire.INIT_IN.pack(major, minor, 65536, offered & 0xFFFFFFFF, offered >> 32)


@pytest.mark.parametrize(
    ("terms", "more"),
    [
        (BLOCK, 0),
        (TERMS, wire.DONT_MASK | wire.HANDLE_KILLPRIV_V2 | wire.POSIX_ACL | wire.EXPORT_SUPPORT
         | wire.SETXATTR_EXT),
    ],
)  # fmt: skip
def test_umask_privileges_and_lists_are_ours_where_there_are_files(terms: Terms, more: int) -> None:
    always = (
        wire.ASYNC_READ | wire.ATOMIC_O_TRUNC | wire.BIG_WRITES | wire.AUTO_INVAL_DATA
        | wire.DO_READDIRPLUS | wire.READDIRPLUS_AUTO | wire.ASYNC_DIO | wire.PARALLEL_DIROPS
        | wire.MAX_PAGES | wire.INIT_EXT | wire.DIRECT_IO_ALLOW_MMAP
    )  # fmt: skip
    answer, agreed = agree(init_in(ALL), terms)
    flags = agreed.flags
    assert flags == always | more
    assert agreed == (45, flags, MAX_WRITE, 65536, 64)
    fields = wire.INIT_OUT.unpack(answer)
    assert fields == (7, 45, 65536, flags & 0xFFFFFFFF, 64, 48, MAX_WRITE, 1, MAX_WRITE // 4096, 0,
                      flags >> 32)  # fmt: skip


def test_nothing_is_agreed_on_that_the_kernel_does_not_offer() -> None:
    for bit in range(64):
        assert agree(init_in(1 << bit), TERMS)[1].flags in (0, 1 << bit)
    assert agree(init_in(wire.DIRECT_IO_ALLOW_MMAP), TERMS)[1].flags == 0, "flags2 needs INIT_EXT"


def test_an_older_kernel_is_answered_in_its_version() -> None:
    short = init_in(ALL, minor=31)[:16]
    answer, agreed = agree(short, TERMS)
    assert struct.unpack_from("<II", answer) == (7, 31)
    assert agreed.minor == 31
    assert agreed.flags < 1 << 32


@pytest.mark.parametrize(
    ("operation", "terms", "number"),
    [
        (init_in(ALL, major=8), TERMS, errno.EPROTO),
        (init_in(ALL & ~wire.OVER_IO_URING), URING, errno.ENODEV),
    ],
)
def test_what_cannot_be_served_is_refused(operation: bytes, terms: Terms, number: int) -> None:
    with pytest.raises(OSError, match=r"\w") as caught:
        agree(operation, terms)
    assert caught.value.errno == number


def request(opcode: int, unique: int, operation: bytes) -> bytes:
    """fuse_in_header and what follows it."""
    return wire.IN_HEADER.pack(40 + len(operation), opcode, unique, 1, 0, 0, 0, 0) + operation


def reply(unique: int, data: bytes, error: int = 0) -> bytes:
    """fuse_out_header and what follows it."""
    return wire.OUT_HEADER.pack(16 + len(data), -error, unique) + data


class Ends:
    """The ends of the sockets that a data plane has its others of."""

    def __init__(self) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        (self.kernel, _), (self.forward, _), (self.notices, _) = pairs
        self.theirs = [pair[1] for pair in pairs]
        for end in (self.kernel, self.forward, self.notices):
            end.settimeout(20)

    def shake_hands(self) -> None:
        """Let INIT through."""
        self.kernel.send(request(Opcode.INIT, 2, init_in(0)))
        assert self.forward.recv(4096) == request(Opcode.INIT, 2, init_in(0))
        answer = reply(2, agree(init_in(0), TERMS)[0])
        self.forward.send(answer)
        assert self.kernel.recv(4096) == answer


@contextmanager
def data_plane(directory: Path, answered: int = ALL, expected: int = 0) -> Iterator[Ends]:
    """A data plane of one reader, in a process of its own."""
    with some_tables(directory, worker_count=1) as tables:
        tables.shared.set_header_word("answered", answered)
        ends = Ends()

        def serve() -> None:
            fuse_fd, forward_fd, notices_fd = (end.fileno() for end in ends.theirs)
            for end in (ends.kernel, ends.forward, ends.notices):
                end.close()
            os._exit(
                run(fuse_fd, tables.shared.fd, tables.fd, notices_fd, [forward_fd],
                    map_flags=tables.map_flags, max_write=MAX_WRITE,
                    queue_count=0, depth=0, reader_count=1)
            )  # fmt: skip

        process = get_context("fork").Process(target=serve)
        process.start()
        for end in ends.theirs:
            end.close()
        try:
            yield ends
        finally:
            tables.shared.set_header_word("ends", 1)
            for end in (ends.forward, ends.notices, ends.kernel):
                end.close()
            process.join()
        assert process.exitcode == expected


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.OPEN, Opcode.CREATE, Opcode.TMPFILE])
def test_a_request_and_its_reply_pass_as_they_are(shm: Path, opcode: int) -> None:
    with data_plane(shm) as ends:
        ends.shake_hands()
        asked = request(opcode, (1 << 63) - 2, bytes(16) + b"name\0")
        ends.kernel.send(asked)
        assert ends.forward.recv(4096) == asked
        answer = reply((1 << 63) - 2, struct.pack("<QII", 9, wire.FOPEN_DIRECT_IO, 0) * 20)
        ends.forward.send(answer)
        assert ends.kernel.recv(4096) == answer


def test_what_the_table_does_not_have_is_enosys_at_once(shm: Path) -> None:
    known = {Opcode.GETATTR, Opcode.LOOKUP}
    with data_plane(shm, sum(1 << opcode for opcode in known)) as ends:
        ends.shake_hands()
        for opcode in (*Opcode, 0, 63, 64, 65, 4096, 1 << 31):
            if opcode in (Opcode.READ, Opcode.WRITE, Opcode.FLUSH, Opcode.FSYNC, Opcode.SYNCFS,
                          Opcode.INTERRUPT, Opcode.LSEEK, Opcode.FORGET,
                          Opcode.BATCH_FORGET, *known):  # fmt: skip
                continue
            ends.kernel.send(request(opcode, 4, bytes(64)))
            assert ends.kernel.recv(4096) == reply(4, b"", errno.ENOSYS), opcode


def test_an_init_that_is_refused_ends_the_data_plane_with_its_errno(shm: Path) -> None:
    with data_plane(shm, expected=errno.ENODEV) as ends:
        ends.kernel.send(request(Opcode.INIT, 2, init_in(0)))
        ends.forward.recv(4096)
        ends.forward.send(reply(2, b"", errno.ENODEV))
        assert ends.kernel.recv(4096) == reply(2, b"", errno.ENODEV)


def test_notices_are_written_in_order_and_each_is_answered(shm: Path) -> None:
    with data_plane(shm) as ends:
        ends.shake_hands()
        notices = [reply(0, bytes([number]) * 24) for number in range(20)]
        for number, notice in enumerate(notices):
            ends.notices.send(struct.pack("<Q", number) + notice)
        assert [ends.kernel.recv(4096) for _ in notices] == notices
        answers = [struct.unpack("<QQ", ends.notices.recv(4096)) for _ in notices]
        assert answers == [(number, 0) for number in range(20)]
