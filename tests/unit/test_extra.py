"""What pyfuse3 lacks: answers of the kernel's form to requests of any form."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import trio
from fakes import mapped_pool
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pmemfs.fuse.engine import Engine
from pmemfs.fuse.extra import (
    COLLAPSE_RANGE,
    COPY_FILE_RANGE,
    COPY_FILE_RANGE_64,
    FALLOCATE,
    INSERT_RANGE,
    LSEEK,
    PUNCH_HOLE,
    STATX,
    SYNCFS,
    TMPFILE,
    ExtraOperations,
)
from pmemfs.fuse.extra_filesystem import FileSystemExtra
from pmemfs.fuse.openfiles import OpenFiles
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.memmap import open_memmap
from pmemfs.units import KIB, MIB
from pmemfs.volume.filesystem.filesystem import FileSystem
from pmemfs.volume.filesystem.names import NewInode

OPCODES = [FALLOCATE, LSEEK, COPY_FILE_RANGE, SYNCFS, TMPFILE, STATX, COPY_FILE_RANGE_64]
FRAME = 4096


@dataclass
class Served:
    """A file system with one file, and what answers for it."""

    fs: FileSystem
    files: OpenFiles
    extra: ExtraOperations
    ino: int

    def ask(
        self, opcode: int, operation: bytes, ino: int | None = None, unique: int = 7
    ) -> tuple[int, bytes]:
        """The errno and what follows the header."""
        head = struct.pack(
            "<IIQQIIIHH", 40 + len(operation), opcode, unique, ino or self.ino, 5, 6, 1, 0, 0
        )
        reply = trio.run(self.extra.answer, head + operation)
        length, error, replied = struct.unpack_from("<IiQ", reply)
        assert (length, replied) == (len(reply), unique)
        assert error <= 0
        assert not error or length == 16
        return -error, reply[16:]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with mapped_pool(tmp_path_factory.mktemp("pool"), Scheme.NONE, 4 * KIB, 64 * MIB) as pool:
        FileSystem.format(pool)
        memmap = open_memmap(pool)
        fs = FileSystem(pool, memmap)
        files = OpenFiles(fs, Engine(pool.medium, memmap), None, notes_reads=True)
        extra = ExtraOperations(FileSystemExtra(fs, files, cached=False).handlers())
        ino = fs.make(ROOT, b"file", NewInode(mode=stat.S_IFREG | 0o644, uid=1, gid=2))
        fs.hold(ino)
        yield Served(fs, files, extra, ino)


def fallocate_in(mode: int, offset: int, length: int) -> bytes:
    return struct.pack("<QQQII", 1, offset, length, mode, 0)


def fill(served: Served, frame_count: int) -> bytes:
    data = b"".join(bytes([1 + n % 255]) * FRAME for n in range(frame_count))
    served.fs.set_attributes(served.ino, size_bytes=0)
    served.fs.write(served.ino, 0, data)
    return data


def test_taking_a_range_out_and_putting_one_in(served: Served) -> None:
    data = fill(served, 10)
    assert served.ask(FALLOCATE, fallocate_in(COLLAPSE_RANGE, 2 * FRAME, 3 * FRAME)) == (0, b"")
    data = data[: 2 * FRAME] + data[5 * FRAME :]
    assert served.fs.read(served.ino, 0, MIB) == data
    assert served.ask(FALLOCATE, fallocate_in(INSERT_RANGE, FRAME, 2 * FRAME)) == (0, b"")
    data = data[:FRAME] + bytes(2 * FRAME) + data[FRAME:]
    assert bytes(served.fs.read(served.ino, 0, MIB)) == data


@pytest.mark.parametrize(
    "mode", [PUNCH_HOLE, COLLAPSE_RANGE | 1, INSERT_RANGE | 1, 0x04, 0x40, PUNCH_HOLE | 0x11]
)
def test_modes_of_fallocate_that_are_none(served: Served, mode: int) -> None:
    data = fill(served, 4)
    assert served.ask(FALLOCATE, fallocate_in(mode, 0, FRAME))[0] == errno.EOPNOTSUPP
    assert served.fs.read(served.ino, 0, MIB) == data


def test_an_unnamed_file_is_answered_as_the_kernel_wants_it(served: Served) -> None:
    operation = struct.pack("<IIII", os.O_RDWR, stat.S_IFREG | 0o666, 0o027, 0) + b"#1\0"
    error, data = served.ask(TMPFILE, operation, ROOT)
    assert error == 0
    assert len(data) == 128 + 16
    ino, generation = struct.unpack_from("<QQ", data)
    mode, nlink, uid, gid = struct.unpack_from("<IIII", data, 40 + 60)
    fh, open_flags, _ = struct.unpack_from("<QIi", data, 128)
    assert (mode, nlink, uid, gid) == (stat.S_IFREG | 0o640, 0, 5, 6)
    assert generation == served.fs.attributes(ino).generation
    assert open_flags == 1, "direct I/O"
    assert trio.run(served.files.write, fh, 0, b"content") == 7
    served.files.close(fh)
    assert served.fs.attributes(ino).size_bytes == 7, "the kernel still holds it"
    served.fs.drop(ino, 1)
    with pytest.raises(OSError, match="no such inode"):
        served.fs.attributes(ino)


def test_statx_tells_all_that_is_known(served: Served) -> None:
    served.fs.set_attributes(served.ino, atime_ns=-1, mtime_ns=1_500_000_000, size_bytes=5)
    known = served.fs.attributes(served.ino)
    error, data = served.ask(STATX, struct.pack("<IIQII", 0, 0, 0, 0, 0xFFF))
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
        error, data = served.ask(LSEEK, struct.pack("<QQII", 1, offset, whence, 0))
        assert (error, data) == (0, struct.pack("<Q", expected))
    assert served.ask(LSEEK, struct.pack("<QQII", 1, 0, os.SEEK_SET, 0))[0] == errno.EINVAL
    assert served.ask(LSEEK, struct.pack("<QQII", 1, MIB, os.SEEK_DATA, 0))[0] == errno.ENXIO


def test_both_forms_of_a_copy(served: Served) -> None:
    data = fill(served, 4)
    target = served.fs.make(ROOT, b"target", NewInode(mode=stat.S_IFREG | 0o600, uid=0, gid=0))
    served.fs.hold(target)
    operation = struct.pack("<QQQQQQQ", 1, 5, target, 2, 3, 3 * FRAME, 0)
    assert served.ask(COPY_FILE_RANGE, operation) == (0, struct.pack("<II", 3 * FRAME, 0))
    assert served.ask(COPY_FILE_RANGE_64, operation) == (0, struct.pack("<Q", 3 * FRAME))
    assert served.fs.read(target, 0, MIB) == bytes(3) + data[5 : 5 + 3 * FRAME]


def test_what_nobody_knows_is_not_asked_again(served: Served) -> None:
    assert served.ask(4096, b"")[0] == errno.ENOSYS
    assert served.ask(SYNCFS, bytes(8)) == (0, b"")


@pytest.mark.parametrize("opcode", [FALLOCATE, LSEEK, COPY_FILE_RANGE, TMPFILE])
def test_a_request_that_is_too_short_is_refused(served: Served, opcode: int) -> None:
    assert served.ask(opcode, bytes(3))[0] == errno.EINVAL


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
@example(TMPFILE, [1 << 63, 1 << 63], b"", ROOT)
def test_whatever_is_asked_gets_a_reply(
    served: Served, opcode: int, words: list[int], rest: bytes, ino: int | None
) -> None:
    operation = b"".join(word.to_bytes(8, "little") for word in words) + rest
    error, _ = served.ask(opcode, operation, ino)
    assert error not in (errno.EIO, errno.EROFS), "nothing unforeseen, nothing damaged"


def test_a_message_without_a_header_gets_a_reply(served: Served) -> None:
    reply = trio.run(served.extra.answer, b"short")
    assert struct.unpack("<IiQ", reply) == (16, -errno.EINVAL, 0)
