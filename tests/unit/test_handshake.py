"""What a data plane changes in passing: INIT, and the replies that open files.

Its process serves a socket here instead of /dev/fuse: one message a request or reply, just so.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from kit.data_plane import MAX_WRITE, TMPFILE, some_tables
from pmemfs.dataplane.native import run

INIT, OPEN, CREATE, GETATTR = 26, 14, 35, 3
DONT_MASK, PARALLEL_DIROPS = 1 << 6, 1 << 18
HANDLE_KILLPRIV_V2 = 1 << 28
FOPEN_DIRECT_IO, FOPEN_NOFLUSH, FOPEN_PARALLEL_DIRECT_WRITES = 1 << 0, 1 << 5, 1 << 6
ENTRY_OUT_BYTES = 128


def request(opcode: int, unique: int, operation: bytes) -> bytes:
    """fuse_in_header and what follows it."""
    return struct.pack("<IIQQIIII", 40 + len(operation), opcode, unique, 1, 0, 0, 0, 0) + operation


def reply(unique: int, data: bytes) -> bytes:
    """fuse_out_header and what follows it."""
    return struct.pack("<IiQ", 16 + len(data), 0, unique) + data


def unique_of(message: bytes) -> int:
    return int(struct.unpack_from("<Q", message, 8)[0])


class Ends:
    """The ends of the sockets that a data plane has its others of."""

    def __init__(self) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        (self.kernel, _), (self.forward, _), (self.raw, _) = pairs
        self.theirs = [pair[1] for pair in pairs]
        for end in (self.kernel, self.forward, self.raw):
            end.settimeout(20)

    def shake_hands(self, offered: int) -> int:
        """Offer flags to the data plane, agree to none behind it, and see what it agrees to."""
        self.kernel.send(request(INIT, 2, struct.pack("<IIII", 7, 45, 65536, offered) + bytes(48)))
        assert unique_of(self.forward.recv(4096)) == 2
        self.forward.send(reply(2, struct.pack("<IIII", 7, 38, 65536, 0) + bytes(48)))
        agreed = self.kernel.recv(4096)
        return int(struct.unpack_from("<I", agreed, 16 + 12)[0])


@contextmanager
def data_plane(directory: Path, *, has_files: bool) -> Iterator[Ends]:
    """A data plane of one reader, in a process of its own."""
    with some_tables(directory, worker_count=1) as tables:
        ends = Ends()

        def serve() -> None:
            fuse_fd, forward_fd, raw_fd = (end.fileno() for end in ends.theirs)
            for end in (ends.kernel, ends.forward, ends.raw):
                end.close()
            os._exit(
                run(fuse_fd, tables.shared.fd, tables.fd, forward_fd, [raw_fd],
                    map_flags=tables.map_flags, max_write=MAX_WRITE, max_background=64,
                    queue_count=0, depth=0, reader_count=1, has_files=has_files)
            )  # fmt: skip

        process = get_context("fork").Process(target=serve)
        process.start()
        for end in ends.theirs:
            end.close()
        try:
            yield ends
        finally:
            tables.shared.set_header_word("ends", 1)
            for end in (ends.forward, ends.raw, ends.kernel):
                end.close()
            process.join()
        assert process.exitcode == 0


@pytest.mark.parametrize(
    ("wanted", "offered", "agreed"),
    [
        (True, DONT_MASK | HANDLE_KILLPRIV_V2, DONT_MASK | HANDLE_KILLPRIV_V2),
        (True, DONT_MASK, DONT_MASK),
        (True, 0, 0),
        (False, DONT_MASK | HANDLE_KILLPRIV_V2, 0),
    ],
)
def test_umask_and_privileges_are_the_control_planes_where_there_are_files_and_the_kernel_offers_it(
    shm: Path, wanted: bool, offered: int, agreed: int
) -> None:
    with data_plane(shm, has_files=wanted) as ends:
        assert ends.shake_hands(offered) & (DONT_MASK | HANDLE_KILLPRIV_V2) == agreed


@pytest.mark.parametrize("offered", [0, PARALLEL_DIROPS])
def test_one_look_up_in_a_directory_need_not_wait_for_another(shm: Path, offered: int) -> None:
    with data_plane(shm, has_files=True) as ends:
        assert ends.shake_hands(offered) & PARALLEL_DIROPS == offered


@pytest.mark.parametrize(
    ("opcode", "skipped", "who"),
    [
        (OPEN, 0, lambda ends: ends.forward),
        (CREATE, ENTRY_OUT_BYTES, lambda ends: ends.forward),
        (TMPFILE, ENTRY_OUT_BYTES, lambda ends: ends.raw),
    ],
)
def test_files_are_opened_for_parallel_direct_writes_however_they_are_opened(
    shm: Path, opcode: int, skipped: int, who: Callable[[Ends], socket.socket]
) -> None:
    more = FOPEN_NOFLUSH | FOPEN_PARALLEL_DIRECT_WRITES
    with data_plane(shm, has_files=True) as ends:
        ends.shake_hands(0)
        for flags, opened in ((FOPEN_DIRECT_IO, FOPEN_DIRECT_IO | more), (0, 0)):
            ends.kernel.send(request(opcode, 4, bytes(16) + b"name\0"))
            asked = who(ends).recv(4096)
            data = bytes(skipped) + struct.pack("<QII", 9, flags, 0)
            who(ends).send(reply(unique_of(asked), data))
            answer = ends.kernel.recv(4096)
            assert unique_of(answer) == 4
            assert answer[16:] == bytes(skipped) + struct.pack("<QII", 9, opened, 0)


def test_no_other_reply_is_changed(shm: Path) -> None:
    with data_plane(shm, has_files=True) as ends:
        ends.shake_hands(0)
        ends.kernel.send(request(GETATTR, 6, bytes(16)))
        asked = ends.forward.recv(4096)
        assert unique_of(asked) == 6
        data = struct.pack("<QII", 9, FOPEN_DIRECT_IO, 0) * 20
        ends.forward.send(reply(6, data))
        assert ends.kernel.recv(4096) == reply(6, data)
