"""The wire door: answers of the kernel's form to requests of any form."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
import trio
import trio.lowlevel
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kit.data_plane import door_to, shared_files
from kit.doors import replies
from pmemfs.engine.base import Engine
from pmemfs.fuse import forwarded, wire
from pmemfs.fuse.forwarded import ForwardedRequests
from pmemfs.fuse.handlers.ioctls import GET_EXTENDED, GET_FLAGS, SET_EXTENDED, SET_FLAGS
from pmemfs.fuse.handlers.notifications import Notifier
from pmemfs.fuse.handlers.openfiles import Opened, OpenFiles
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.handlers.ranges import COLLAPSE_RANGE, INSERT_RANGE, PUNCH_HOLE
from pmemfs.fuse.unanswered import Unanswered
from pmemfs.fuse.wire import Opcode as Op
from pmemfs.media.inode import ROOT
from pmemfs.media.log import InodeFlags
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem

OPCODES = [
    opcode for opcode in Op
    if opcode not in (Op.INIT, Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT)
]  # fmt: skip
UNKNOWN = (
    Op.GETLK, Op.SETLK, Op.SETLKW, Op.BMAP, Op.POLL, Op.NOTIFY_REPLY,
    Op.SETUPMAPPING, Op.REMOVEMAPPING,
)  # fmt: skip
"""What nobody answers."""
BARE = (
    Op.GETATTR, Op.STATX, Op.SYNCFS, Op.STATFS, Op.DESTROY, Op.ACCESS,
    Op.FLUSH, Op.FSYNCDIR, Op.READLINK, Op.REMOVEXATTR,
)  # fmt: skip
"""What is asked by the number of an inode, whatever follows, or refused for another reason."""
LONGEST = 64 * KIB
FRAME = 4096
TCGETS, BLKGETSIZE64 = 0x5401, 0x80081272


class WatchedEngine(Engine):
    """An engine that counts how often it was asked to make everything durable."""

    times = 0

    async def make_durable(self) -> None:
        self.times += 1
        await super().make_durable()


@dataclass
class Served:
    """A file system with one file, and what answers for it."""

    fs: FileSystem
    files: OpenFiles
    raw: ForwardedRequests
    engine: WatchedEngine
    ino: int
    notifier: Notifier
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1 << 32, 2))

    def ask(
        self, opcode: int, operation: bytes, ino: int | None = None, unique: int = 0
    ) -> tuple[int, bytes]:
        """The errno and what follows the header."""
        unique = unique or next(self.numbers)
        head = struct.pack(
            "<IIQQIIIHH", 40 + len(operation), opcode, unique, ino or self.ino, 5, 6, 1, 0, 0
        )
        (reply,) = self.replies(head + operation)
        length, error, replied = struct.unpack_from("<IiQ", reply)
        assert (length, replied) == (len(reply), unique)
        assert error <= 0
        assert not error or length == 16
        return -error, reply[16:]

    def tell(self, opcode: int, operation: bytes, ino: int) -> None:
        """Say what no reply is due to."""
        head = struct.pack("<IIQQIIIHH", 40 + len(operation), opcode, 9, ino, 5, 6, 1, 0, 0)
        assert self.replies(head + operation) == []

    def replies(self, *messages: bytes) -> list[bytes]:
        """What comes back for messages, until all is answered."""
        return replies(self.raw, *messages, longest_bytes=LONGEST)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with shared_files(tmp_path_factory.mktemp("pool")) as made:
        fs = made.fs
        engine = WatchedEngine(made.medium, made.memmap)
        handlers, door = door_to(fs, engine, made.tables)
        once = made.once
        raw = ForwardedRequests(door, LONGEST, once, Unanswered(once, handlers, []))
        ino = fs.make(ROOT, b"file", NewInode(mode=stat.S_IFREG | 0o644, uid=1, gid=2))
        fs.hold(ino)
        yield Served(fs, handlers.files, raw, engine, ino, handlers.notifier)


def fallocate_in(mode: int, offset: int, length: int) -> bytes:
    return struct.pack("<QQQII", 1, offset, length, mode, 0)


def fill(served: Served, frame_count: int) -> bytes:
    data = b"".join(bytes([1 + n % 255]) * FRAME for n in range(frame_count))
    served.fs.set_attributes(served.ino, size_bytes=0)
    served.fs.write(served.ino, 0, data)
    return data


def test_taking_a_range_out_and_putting_one_in(served: Served) -> None:
    data = fill(served, 10)
    assert served.ask(Op.FALLOCATE, fallocate_in(COLLAPSE_RANGE, 2 * FRAME, 3 * FRAME)) == (
        0,
        b"",
    )
    data = data[: 2 * FRAME] + data[5 * FRAME :]
    assert served.fs.read(served.ino, 0, MIB) == data
    assert served.ask(Op.FALLOCATE, fallocate_in(INSERT_RANGE, FRAME, 2 * FRAME)) == (0, b"")
    data = data[:FRAME] + bytes(2 * FRAME) + data[FRAME:]
    assert bytes(served.fs.read(served.ino, 0, MIB)) == data


TOO_FAR = 1 << 61


def too_much(served: Served, what: str) -> tuple[int, bytes]:
    """A request to change a file that fails, of somebody who may keep no privileges."""
    opened = served.ask(Op.OPEN, struct.pack("<II", os.O_RDWR, 0))[1]
    (handle,) = struct.unpack_from("<Q", opened)
    requests = {
        "allocate": (Op.FALLOCATE, fallocate_in(0, TOO_FAR, FRAME)),
        "copy": (
            Op.COPY_FILE_RANGE,
            struct.pack("<7Q", handle, 0, served.ino, handle, TOO_FAR, FRAME, 0),
        ),
        "write": (
            Op.WRITE,
            wire.WRITE_IN.pack(handle, TOO_FAR, 1, wire.WRITE_KILL_SUIDGID, 0, 0) + b"x",
        ),
        "truncate": (
            Op.SETATTR,
            wire.SETATTR_IN.pack(wire.SETS_SIZE | wire.SETATTR_KILL_SUIDGID, 0, TOO_FAR, *[0] * 10),
        ),
    }
    try:
        return served.ask(*requests[what])
    finally:
        served.ask(Op.RELEASE, struct.pack("<QIIQ", handle, 0, 0, 0))


@pytest.mark.parametrize("what", ["allocate", "copy", "write", "truncate"])
def test_what_fails_after_it_took_privileges_is_answered_when_the_kernel_knows(
    served: Served, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(served, 2)
    served.fs.set_attributes(served.ino, mode=0o4777)
    served.fs.set_xattr(served.ino, b"security.capability", b"c")
    told = []

    async def tell(ino: int) -> None:
        await trio.lowlevel.checkpoint()
        told.append(ino)

    monkeypatch.setattr(served.notifier, "tell", tell)
    assert too_much(served, what) == (errno.EFBIG, b"")
    assert served.fs.find_xattr(served.ino, b"security.capability") is None
    assert set(told) == {served.ino}
    served.fs.set_attributes(served.ino, mode=0o644)


def ioctl_in(command: int, argument: bytes = b"", out_bytes: int = 0, pointer: int = 0) -> bytes:
    return struct.pack("<QIIQII", 1, 0, command, pointer, len(argument), out_bytes) + argument


@pytest.mark.parametrize("command", [0, TCGETS, BLKGETSIZE64, (1 << 32) - 1])
def test_an_ioctl_of_another_kind_of_file_is_refused(served: Served, command: int) -> None:
    for ino in (served.ino, ROOT):
        assert served.ask(Op.IOCTL, ioctl_in(command, bytes(8), 8), ino) == (errno.ENOTTY, b"")


@pytest.fixture
def flagged(served: Served) -> Iterator[int]:
    """A file whose flags may be set."""
    yield served.ino
    served.fs.set_flags(served.ino, InodeFlags(0))


def set_flags(served: Served, bits: int) -> int:
    error, data = served.ask(Op.IOCTL, ioctl_in(SET_FLAGS, struct.pack("<I", bits)))
    assert data == (b"" if error else bytes(16))
    return error


def set_extended(served: Served, *fields: int) -> int:
    argument = struct.pack("<IIIII8x", *fields)
    return served.ask(Op.IOCTL, ioctl_in(SET_EXTENDED, argument))[0]


def flags_of(served: Served) -> tuple[int, int]:
    """As FS_IOC_GETFLAGS and FS_IOC_FSGETXATTR have them."""
    error, data = served.ask(Op.IOCTL, ioctl_in(GET_FLAGS, out_bytes=4))
    assert (error, len(data), data[:16]) == (0, 20, bytes(16))
    error, extended = served.ask(Op.IOCTL, ioctl_in(GET_EXTENDED, out_bytes=28))
    assert (error, len(extended), extended[20:]) == (0, 44, bytes(24))
    return struct.unpack("<I", data[16:])[0], struct.unpack("<I", extended[16:20])[0]


def test_flags_are_answered_as_the_kernel_wants_them(served: Served, flagged: int) -> None:
    same = [(0x10, 0x08), (0x20, 0x10), (0x40, 0x80), (0x80, 0x40), (0xF0, 0xD8), (0, 0)]
    for bits, extended in same:
        served.fs.set_flags(flagged, InodeFlags(0))
        assert set_flags(served, bits) == 0
        assert flags_of(served) == (bits, extended)
        served.fs.set_flags(flagged, InodeFlags(0))
        assert set_extended(served, extended, 0, 5, 0, 0) == 0
        assert flags_of(served) == (bits, extended)
        attributes, mask = struct.unpack_from("<Q40xQ", served.ask(Op.STATX, bytes(24))[1], 32 + 8)
        assert (attributes, mask) == (bits & 0x70, 0x874)


def test_flags_that_cannot_be_kept_are_refused(served: Served, flagged: int) -> None:
    for bit in range(32):
        expected = 0 if 1 << bit & 0xF4 else errno.EOPNOTSUPP
        assert set_flags(served, 1 << bit) == expected, bit
        served.fs.set_flags(flagged, InodeFlags(0))
        expected = 0 if 1 << bit & 0xD8 else errno.EOPNOTSUPP
        assert set_extended(served, 1 << bit, 0, 0, 0, 0) == expected, bit
        served.fs.set_flags(flagged, InodeFlags(0))
    for which in (1, 3, 4):
        fields = [0] * 5
        fields[which] = 4096
        assert set_extended(served, *fields) == errno.EOPNOTSUPP
    assert flags_of(served) == (0, 0)


def test_the_flag_of_compression_is_in_one_numbering_and_stays_as_it_is_in_the_other(
    served: Served, flagged: int
) -> None:
    assert set_flags(served, 0x44) == 0
    assert flags_of(served) == (0x44, 0x80)
    assert struct.unpack_from("<Q", served.ask(Op.STATX, bytes(24))[1], 32 + 8) == (0x44,)
    assert set_extended(served, 0x40, 0, 0, 0, 0) == 0
    assert flags_of(served) == (0x84, 0x40)
    assert set_flags(served, 0x884) == errno.EOPNOTSUPP
    assert set_flags(served, 0x80) == 0
    assert flags_of(served) == (0x80, 0x40)


def test_a_process_that_asks_for_flags_past_the_kernel_gets_no_answer(
    served: Served, flagged: int
) -> None:
    for command, argument in (
        (GET_FLAGS, b""),
        (SET_FLAGS, struct.pack("<I", 0x10)),
        (GET_EXTENDED, b""),
        (SET_EXTENDED, struct.pack("<IIIII8x", 8, 0, 0, 0, 0)),
    ):
        operation = ioctl_in(command, argument, 28, pointer=0x7FFE_1234_5678)
        assert served.ask(Op.IOCTL, operation) == (errno.ENOTTY, b"")
    assert served.fs.attributes(flagged).flags == 0


@pytest.mark.parametrize("length", [0, 3, 5, 27])
def test_flags_of_another_length_are_refused(served: Served, flagged: int, length: int) -> None:
    for command in (SET_FLAGS, SET_EXTENDED):
        assert served.ask(Op.IOCTL, ioctl_in(command, bytes(length)))[0] == errno.EINVAL


@pytest.mark.parametrize(
    "mode", [PUNCH_HOLE, COLLAPSE_RANGE | 1, INSERT_RANGE | 1, 0x04, 0x40, PUNCH_HOLE | 0x11]
)
def test_modes_of_fallocate_that_are_none(served: Served, mode: int) -> None:
    data = fill(served, 4)
    assert served.ask(Op.FALLOCATE, fallocate_in(mode, 0, FRAME))[0] == errno.EOPNOTSUPP
    assert served.fs.read(served.ino, 0, MIB) == data


def test_an_unnamed_file_is_answered_as_the_kernel_wants_it(served: Served) -> None:
    operation = struct.pack("<IIII", os.O_RDWR, stat.S_IFREG | 0o666, 0o027, 0) + b"#1\0"
    error, data = served.ask(Op.TMPFILE, operation, ROOT)
    assert error == 0
    assert len(data) == 128 + 16
    ino, generation = struct.unpack_from("<QQ", data)
    mode, nlink, uid, gid = struct.unpack_from("<IIII", data, 40 + 60)
    fh, open_flags, _ = struct.unpack_from("<QIi", data, 128)
    assert (mode, nlink, uid, gid) == (stat.S_IFREG | 0o640, 0, 5, 6)
    assert generation == served.fs.attributes(ino).generation
    assert open_flags == 1 | 1 << 5 | 1 << 6, "direct I/O, in parallel, with nothing to flush"
    assert served.files.write(None, fh, 0, b"content") == 7
    served.files.close(fh)
    assert served.fs.attributes(ino).size_bytes == 7, "the kernel still holds it"
    served.fs.drop(ino, 1)
    with pytest.raises(OSError, match="no such inode"):
        served.fs.attributes(ino)


def test_statx_tells_all_that_is_known(served: Served) -> None:
    served.fs.set_attributes(served.ino, atime_ns=-1, mtime_ns=1_500_000_000, size_bytes=5)
    known = served.fs.attributes(served.ino)
    error, data = served.ask(Op.STATX, struct.pack("<IIQII", 0, 0, 0, 0, 0xFFF))
    assert (error, len(data)) == (0, 288)
    mask, blksize, _, nlink, uid, gid, mode = struct.unpack_from("<IIQIIIH", data, 32)
    ino, size, blocks = struct.unpack_from("<QQQ", data, 32 + 32)
    times = [seconds * 10**9 + ns for seconds, ns in
             (struct.unpack_from("<qI", data, 32 + 64 + 16 * n) for n in range(4))]  # fmt: skip
    assert (mask, blksize) == (0xFFF, 4096)
    assert (nlink, uid, gid, mode) == (1, 1, 2, stat.S_IFREG | 0o644)
    assert (ino, size, blocks) == (served.ino, 5, known.block_count)
    assert times == [known.atime_ns, known.birth_ns, known.ctime_ns, known.mtime_ns]
    assert times[0] == -1


def test_holes_are_found(served: Served) -> None:
    fill(served, 2)
    served.fs.write(served.ino, 10 * FRAME, b"x")
    for whence, offset, expected in ((os.SEEK_DATA, 3 * FRAME, 10 * FRAME),
                                     (os.SEEK_HOLE, 0, 2 * FRAME)):  # fmt: skip
        error, data = served.ask(Op.LSEEK, struct.pack("<QQII", 1, offset, whence, 0))
        assert (error, data) == (0, struct.pack("<Q", expected))
    assert served.ask(Op.LSEEK, struct.pack("<QQII", 1, 0, os.SEEK_SET, 0))[0] == errno.EINVAL
    assert served.ask(Op.LSEEK, struct.pack("<QQII", 1, MIB, os.SEEK_DATA, 0))[0] == errno.ENXIO


def test_both_forms_of_a_copy(served: Served) -> None:
    data = fill(served, 4)
    target, handle = made(served, b"target")
    opened = served.files.open(Caller(0, 0, 0), served.ino, os.O_RDONLY)
    assert isinstance(opened, Opened)
    source = opened.handle
    operation = struct.pack("<QQQQQQQ", source, 5, target, handle, 3, 3 * FRAME, 0)
    assert served.ask(Op.COPY_FILE_RANGE, operation) == (0, struct.pack("<II", 3 * FRAME, 0))
    assert served.ask(Op.COPY_FILE_RANGE_64, operation) == (0, struct.pack("<Q", 3 * FRAME))
    assert served.fs.read(target, 0, MIB) == bytes(3) + data[5 : 5 + 3 * FRAME]
    served.files.close(source)


def test_what_nobody_knows_is_not_asked_again(served: Served) -> None:
    for opcode in (*UNKNOWN, 0, 7, 63, 4096, (1 << 32) - 1):
        assert served.ask(opcode, bytes(64))[0] == errno.ENOSYS
    assert served.ask(Op.SYNCFS, bytes(8)) == (0, b"")


def made(served: Served, name: bytes, flags: int = os.O_RDWR) -> tuple[int, int]:
    """A new file in the root, open: its number and handle. The kernel holds it once."""
    operation = struct.pack("<IIII", flags, stat.S_IFREG | 0o666, 0o027, 0) + name + b"\0"
    error, data = served.ask(Op.CREATE, operation, ROOT)
    assert (error, len(data)) == (0, 128 + 16)
    (ino,) = struct.unpack_from("<Q", data)
    (handle,) = struct.unpack_from("<Q", data, 128)
    return ino, handle


def write_in(handle: int, offset: int, data: bytes, flags: int = 0) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, len(data), 0, 0, flags, 0) + data


def read_in(handle: int, offset: int, size: int) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)


def test_a_file_from_its_making_to_its_end(served: Served) -> None:
    assert served.ask(Op.LOOKUP, b"life\0", ROOT) == (
        0,
        struct.pack("<QQQ", 0, 0, 3600) + bytes(104),
    )
    ino, handle = made(served, b"life")
    assert served.ask(Op.WRITE, write_in(handle, 0, b"content"), ino) == (
        0,
        struct.pack("<II", 7, 0),
    )
    through = write_in(handle, 7, b"!", os.O_DSYNC)
    assert served.ask(Op.WRITE, through, ino) == (0, struct.pack("<II", 1, 0))
    assert served.ask(Op.READ, read_in(handle, 3, 100), ino) == (0, b"tent!")
    assert served.ask(Op.FSYNC, struct.pack("<QII", handle, 1, 0), ino) == (0, b"")
    assert served.ask(Op.RELEASE, struct.pack("<QIIQ", handle, 0, 0, 0), ino) == (0, b"")
    error, data = served.ask(Op.LOOKUP, b"life\0", ROOT)
    assert (error, struct.unpack_from("<Q", data)[0]) == (0, ino)
    assert struct.unpack_from("<QQQ", data, 40) == (ino, 8, 8), "number, size and blocks"
    error, attributes = served.ask(Op.GETATTR, bytes(16), ino)
    assert (error, attributes[16:]) == (0, data[40:])
    assert attributes[:16] == struct.pack("<QQ", 3600, 0)
    error, opened = served.ask(Op.OPEN, struct.pack("<II", os.O_WRONLY | os.O_TRUNC, 0), ino)
    assert (error, len(opened)) == (0, 16)
    assert served.fs.attributes(ino).size_bytes == 0
    assert served.ask(Op.RELEASE, opened[:8] + bytes(16), ino) == (0, b"")
    assert served.ask(Op.RENAME, struct.pack("<Q", ROOT) + b"life\0death\0", ROOT) == (0, b"")
    no_replace = struct.pack("<QII", ROOT, 1, 0) + b"death\0file\0"
    assert served.ask(Op.RENAME2, no_replace, ROOT) == (errno.EEXIST, b"")
    assert served.ask(Op.UNLINK, b"life\0", ROOT) == (errno.ENOENT, b"")
    assert served.ask(Op.UNLINK, b"death\0", ROOT) == (0, b"")
    assert served.fs.attributes(ino).nlink == 0, "the kernel still holds it"
    served.tell(Op.FORGET, struct.pack("<Q", 1), ino)
    assert served.fs.attributes(ino).nlink == 0, "it was looked up twice"
    served.tell(Op.BATCH_FORGET, struct.pack("<IIQQ", 1, 0, ino, 1), ROOT)
    assert served.ask(Op.GETATTR, bytes(16), ino) == (errno.ESTALE, b"")


def test_what_the_kernel_never_held_is_forgotten_in_silence(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.tell(Op.FORGET, struct.pack("<Q", 5), 1 << 40)
    served.tell(Op.BATCH_FORGET, struct.pack("<IIQQQQ", 2, 0, 1 << 40, 1, 1 << 41, 2), ROOT)
    assert [record.levelname for record in caplog.records] in ([], ["ERROR"] * 3)


@pytest.mark.parametrize(("flags", "times"), [(0, 0), (os.O_DSYNC, 1), (os.O_SYNC, 1)])
def test_a_write_that_is_to_be_durable_is_before_it_is_answered(
    served: Served, flags: int, times: int
) -> None:
    ino, handle = made(served, b"%d" % flags)
    before = served.engine.times
    assert served.ask(Op.WRITE, write_in(handle, 0, b"content", flags), ino)[0] == 0
    assert served.engine.times == before + times


def test_a_new_file_is_not_emptied(served: Served) -> None:
    before = served.fs.attributes(made(served, b"empty", os.O_WRONLY | os.O_TRUNC)[0])
    assert before.ctime_ns == before.birth_ns


def test_a_write_with_less_than_it_says_is_refused(served: Served) -> None:
    ino, handle = made(served, b"short")
    assert served.ask(Op.WRITE, write_in(handle, 0, b"content")[:-1], ino) == (
        errno.EINVAL,
        b"",
    )
    assert served.fs.attributes(ino).size_bytes == 0


def test_requests_that_come_together_are_all_answered(served: Served) -> None:
    heads = [
        struct.pack("<IIQQIIIHH", 56, opcode, unique, ROOT, 5, 6, 1, 0, 0) + bytes(16)
        for unique, opcode in enumerate([Op.GETATTR, Op.SYNCFS] * 100)
    ]
    replies = [struct.unpack_from("<IiQ", reply) for reply in served.replies(*heads)]
    assert sorted(replies, key=lambda reply: reply[2]) == [
        (16 + 104 * (opcode == Op.GETATTR), 0, unique)
        for unique, opcode in enumerate([Op.GETATTR, Op.SYNCFS] * 100)
    ]


def test_each_socket_gets_its_own_answers_until_the_last_one_hangs_up(served: Served) -> None:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]

    async def ask_one_after_the_other() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.raw.serve, [ours for _, ours in pairs])
            for unique, (theirs, _) in enumerate(pairs):
                head = struct.pack("<IIQQIIIHH", 56, Op.GETATTR, unique, ROOT, 5, 6, 1, 0, 0)
                await trio.to_thread.run_sync(theirs.send, head + bytes(16))
                reply = await trio.to_thread.run_sync(theirs.recv, LONGEST)
                assert struct.unpack_from("<IiQ", reply) == (120, 0, unique)
                theirs.close()

    trio.run(ask_one_after_the_other)
    for _, ours in pairs:
        ours.close()


@pytest.mark.parametrize("limit", [0, forwarded.MOST_KEPT_BYTES])
def test_a_peer_that_takes_no_replies_holds_nobody_up(
    served: Served, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarded, "MOST_KEPT_BYTES", limit)
    (lazy, first), (other, second) = (
        socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)
    )
    lazy.setblocking(False)

    def ask(peer: socket.socket, unique: int) -> None:
        peer.send(
            struct.pack("<IIQQIIIHH", 56, Op.GETATTR, unique, ROOT, 5, 6, 1, 0, 0) + bytes(16)
        )

    async def ask_and_take_late() -> None:
        asked = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.raw.serve, [first, second])
            # More than the socket holds of replies, and with no limit more than of requests.
            for _ in range(3000):
                with suppress(BlockingIOError):
                    ask(lazy, asked)
                    asked += 1
                await trio.lowlevel.checkpoint()
            ask(other, 7)
            reply = await trio.to_thread.run_sync(other.recv, LONGEST)
            assert struct.unpack_from("<IiQ", reply) == (120, 0, 7)
            assert limit == 0 or asked == 3000
            for unique in range(asked):
                await trio.lowlevel.wait_readable(lazy)
                assert struct.unpack_from("<IiQ", lazy.recv(LONGEST)) == (120, 0, unique)
            lazy.close()
            other.close()

    trio.run(ask_and_take_late)
    first.close()
    second.close()


@pytest.mark.parametrize("opcode", [op for op in OPCODES if op not in (*BARE, *UNKNOWN)])
def test_a_request_that_is_too_short_is_refused(served: Served, opcode: int) -> None:
    assert served.ask(opcode, b"abc")[0] == errno.EINVAL


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(OPCODES),
    st.lists(
        st.sampled_from([0, 1, 3, FRAME, 1 << 31, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]),
        max_size=7,
    ),
    st.binary(max_size=20),
    st.sampled_from([None, ROOT, 2, 1 << 40, (1 << 64) - 1]),
)
@example(Op.TMPFILE, [1 << 63, 1 << 63], b"", ROOT)
def test_whatever_is_asked_gets_a_reply(
    served: Served, opcode: int, words: list[int], rest: bytes, ino: int | None
) -> None:
    operation = b"".join(word.to_bytes(8, "little") for word in words) + rest
    error, _ = served.ask(opcode, operation, ino)
    assert error not in (errno.EIO, errno.EROFS), "nothing unforeseen, nothing damaged"


def test_a_message_without_a_header_gets_a_reply(served: Served) -> None:
    (reply,) = served.replies(b"short")
    assert struct.unpack("<IiQ", reply) == (16, -errno.EINVAL, 0)


@pytest.mark.parametrize("mode", [0, 0o644, 0xF1A4, 0xFFFFFFFF, 0x51ED])
def test_nothing_is_made_that_is_of_no_type(served: Served, mode: int) -> None:
    made = served.ask(Op.MKNOD, struct.pack("<IIII", mode, 0, 0, 0) + b"odd\0", ROOT)
    assert made == (errno.EINVAL, b"")
    assert b"odd" not in served.fs.names(ROOT)
