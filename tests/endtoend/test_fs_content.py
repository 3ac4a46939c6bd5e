"""The content of files in a mounted file system: written, extended, mapped, made holes of."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import pmemfs_ok, run_command
from kit.mounts import Engine, Mounted
from kit.posix import fails_with, fallocate, names, pattern
from kit.processes import wait_until
from pmemfs.fuse.handlers.ranges import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
)

pytestmark = pytest.mark.mount

KIB = 1 << 10
MIB = 1 << 20
_AT_FDCWD = -100
_AT_SYMLINK_FOLLOW = 0x400
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def created(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def blocks(fd: int) -> int:
    """The memory of a file in bytes."""
    return os.fstat(fd).st_blocks * 512


def test_what_was_written_is_read(root: Path) -> None:
    for length in (0, 1, 4095, 4096, 4097, 100_000, 3 * MIB + 5):
        path = root / str(length)
        data = pattern(length)
        path.write_bytes(data)
        assert path.read_bytes() == data
        assert path.stat().st_size == length


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_operations_leaves_what_a_bytearray_would_have(
    root: Path, seed: int
) -> None:
    chance = random.Random(seed)
    expected = bytearray()
    with created(root / "file") as fd, created(root / "file", os.O_RDWR) as other:
        for _ in range(400):
            use = chance.choice((fd, other))
            what = chance.random()
            offset = chance.randrange(len(expected) + 20_000)
            length = int(300_000 ** chance.random())
            if what < 0.45:
                data = chance.randbytes(length)
                assert os.pwrite(use, data, offset) == length
                expected.extend(bytes(max(0, offset + length - len(expected))))
                expected[offset : offset + length] = data
            elif what < 0.85:
                assert os.pread(use, length, offset) == expected[offset : offset + length]
            elif what < 0.93:
                os.ftruncate(use, offset)
                del expected[offset:]
                expected.extend(bytes(offset - len(expected)))
            elif what < 0.97:
                os.fsync(use)
            else:
                assert os.fstat(use).st_size == len(expected)
    assert (root / "file").read_bytes() == expected


def test_appends_of_several_writers_all_arrive_whole(root: Path) -> None:
    path = root / "log"
    path.touch()

    def append(number: int) -> None:
        with created(path, os.O_WRONLY | os.O_APPEND) as fd:
            for line in range(200):
                record = f"{number:02} {line:04} ".encode() + b"x" * (number * 37 + line) + b"\n"
                assert os.write(fd, record) == len(record)

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_bytes().splitlines()
    assert len(lines) == 800
    for number in range(4):
        own = [line for line in lines if line.startswith(f"{number:02} ".encode())]
        assert own == [
            f"{number:02} {line:04} ".encode() + b"x" * (number * 37 + line) for line in range(200)
        ]


def test_a_write_far_behind_the_end_leaves_a_hole_of_zeroes(root: Path) -> None:
    with created(root / "file") as fd:
        os.pwrite(fd, b"start", 0)
        os.pwrite(fd, b"end", 10 * MIB)
        assert os.fstat(fd).st_size == 10 * MIB + 3
        assert blocks(fd) < MIB
        assert os.pread(fd, 100, 0) == b"start" + bytes(95)
        assert os.pread(fd, MIB, 5 * MIB) == bytes(MIB)
        assert os.pread(fd, 100, 10 * MIB - 10) == bytes(10) + b"end"


def test_what_a_truncation_cut_off_does_not_come_back(root: Path) -> None:
    with created(root / "file") as fd:
        for length in (10, 4096, 5000, 2 * MIB + 77):
            os.pwrite(fd, b"\xff" * (length + 10_000), 0)
            os.ftruncate(fd, length)
            assert os.pread(fd, 3 * MIB, 0) == b"\xff" * length
            os.ftruncate(fd, length + 9000)
            assert os.pread(fd, 3 * MIB, 0) == b"\xff" * length + bytes(9000)
            os.ftruncate(fd, length)
            os.pwrite(fd, b"x", length + 9000)
            assert os.pread(fd, 9001, length) == bytes(9000) + b"x"


def test_opening_with_truncation_empties(root: Path) -> None:
    path = root / "file"
    path.write_bytes(b"\xff" * 10_000)
    with created(path, os.O_WRONLY | os.O_TRUNC):
        assert path.stat().st_size == 0
    assert path.read_bytes() == b""


def test_offsets_beyond_any_file_are_refused(root: Path) -> None:
    with created(root / "file") as fd:
        for offset in (1 << 47, (1 << 62), (1 << 63) - 4096):
            with fails_with(errno.EFBIG):
                os.pwrite(fd, b"x", offset)
            with fails_with(errno.EFBIG):
                os.ftruncate(fd, offset)
            assert os.pread(fd, 10, offset) == b""
        assert os.fstat(fd).st_size == 0


def test_a_synchronous_write_is_durable_by_itself(
    file_system: tuple[Engine, Mounted], root: Path
) -> None:
    with created(root / "file", os.O_CREAT | os.O_WRONLY | os.O_DSYNC) as fd:
        for _ in range(3):
            os.write(fd, b"x" * 5000)
    assert (root / "file").stat().st_size == 15_000
    with created(root / "file", os.O_RDWR) as fd:
        os.fsync(fd)
        os.fdatasync(fd)
    directory = os.open(root, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    run_command("sync", "-f", file_system[1].mountpoint)


# fallocate


def test_allocating_gets_memory_and_a_size(native_root: Path) -> None:
    with created(native_root / "file") as fd:
        os.pwrite(fd, b"kept", 0)
        fallocate(fd, KEEP_SIZE, 0, 3 * MIB)
        assert os.fstat(fd).st_size == 4
        assert blocks(fd) >= 3 * MIB
        fallocate(fd, 0, MIB, 3 * MIB)
        assert os.fstat(fd).st_size == 4 * MIB
        assert os.pread(fd, 4 * MIB, 0) == b"kept" + bytes(4 * MIB - 4)
        with fails_with(errno.ENOSPC):
            fallocate(fd, 0, 0, 1 << 40)
        with fails_with(errno.EINVAL):
            fallocate(fd, 0, 0, 0)
        assert os.pread(fd, 4, 0) == b"kept"


def test_punching_gives_memory_back_and_leaves_zeroes(native_root: Path) -> None:
    data = bytearray(pattern(4 * MIB))
    with created(native_root / "file") as fd:
        os.pwrite(fd, data, 0)
        before = blocks(fd)
        for offset, length in ((MIB, MIB), (10, 100), (4000, 10_000), (3 * MIB + 5, 2 * MIB)):
            fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
            end = min(len(data), offset + length)
            data[offset:end] = bytes(end - offset)
            assert os.fstat(fd).st_size == len(data)
        assert os.pread(fd, len(data), 0) == data
        assert blocks(fd) <= before - MIB
        os.pwrite(fd, b"again", MIB + 7)
        data[MIB + 7 : MIB + 12] = b"again"
        assert os.pread(fd, len(data), 0) == data


def test_zeroing_keeps_memory(native_root: Path) -> None:
    data = bytearray(pattern(MIB))
    with created(native_root / "file") as fd:
        os.pwrite(fd, data, 0)
        before = blocks(fd)
        fallocate(fd, ZERO_RANGE, 4097, 100_000)
        data[4097:104_097] = bytes(100_000)
        assert blocks(fd) >= before
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, MIB - 10, 10_000)
        data[MIB - 10 :] = bytes(10)
        assert os.fstat(fd).st_size == MIB
        fallocate(fd, ZERO_RANGE, MIB, 10_000)
        assert os.pread(fd, 2 * MIB, 0) == data + bytes(10_000)


def test_modes_that_the_kernel_does_not_pass_on_are_refused(native_root: Path) -> None:
    with created(native_root / "file") as fd:
        os.pwrite(fd, bytes(MIB), 0)
        for mode in (COLLAPSE_RANGE, INSERT_RANGE):
            with fails_with(errno.EOPNOTSUPP):
                fallocate(fd, mode, 4096, 4096)


def test_posix_fallocate_works_with_each_engine(root: Path) -> None:
    with created(root / "file") as fd:
        # Where the file system can't, the C library writes zeroes.
        os.posix_fallocate(fd, 0, 100_000)
        assert os.pread(fd, 200_000, 0) == bytes(100_000)


# Holes


def test_data_and_holes_are_found(native_root: Path) -> None:
    with created(native_root / "file") as fd:
        os.ftruncate(fd, 16 * MIB)
        os.pwrite(fd, b"x" * 8192, MIB)
        os.pwrite(fd, b"x", 8 * MIB)
        for is_in_use in (False, True):
            if is_in_use:
                # From now on the data plane answers.
                os.pwrite(fd, b"x" * 100_000, 4 * MIB)
                os.fsync(fd)
                os.ftruncate(fd, 16 * MIB)
                assert os.pread(fd, 10, 4 * MIB) == b"x" * 10
            assert os.lseek(fd, 0, os.SEEK_DATA) == MIB
            assert os.lseek(fd, MIB + 5000, os.SEEK_DATA) == MIB + 5000
            assert os.lseek(fd, MIB, os.SEEK_HOLE) <= 2 * MIB
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
            assert os.lseek(fd, 15 * MIB, os.SEEK_HOLE) == 15 * MIB
            with fails_with(errno.ENXIO):
                os.lseek(fd, 15 * MIB, os.SEEK_DATA)
            with fails_with(errno.ENXIO):
                os.lseek(fd, 16 * MIB, os.SEEK_HOLE)


def test_a_copy_of_a_sparse_file_is_sparse(native_root: Path) -> None:
    source, target = native_root / "source", native_root / "target"
    with created(source) as fd:
        os.ftruncate(fd, 64 * MIB)
        os.pwrite(fd, pattern(100_000), 30 * MIB)
    assert run_command("cp", "--sparse=auto", source, target).code == 0
    assert target.stat().st_blocks * 512 < 8 * MIB
    assert run_command("cmp", source, target).code == 0


def test_copying_ranges(root: Path) -> None:
    data = pattern(2 * MIB)
    (root / "source").write_bytes(data)
    with created(root / "source", os.O_RDONLY) as source, created(root / "target") as target:
        assert os.copy_file_range(source, target, 100_000, 5, 7) == 100_000
        assert os.pread(target, MIB, 0) == bytes(7) + data[5:100_005]
        done = 0
        while count := os.copy_file_range(source, target, 10 * MIB, done, done):
            done += count
        assert done == len(data)
    assert (root / "target").read_bytes() == data
    with created(root / "source", os.O_RDWR) as fd:
        assert os.copy_file_range(fd, fd, 1000, 0, MIB) == 1000
        with fails_with(errno.EINVAL):
            os.copy_file_range(fd, fd, 1000, 0, 500)
    assert (root / "source").read_bytes() == data[:MIB] + data[:1000] + data[MIB + 1000 :]


# Memory


def test_a_private_mapping_sees_the_file_and_keeps_its_own_changes(root: Path) -> None:
    path = root / "file"
    path.write_bytes(pattern(MIB))
    with created(path, os.O_RDWR) as fd:
        mapped = mmap.mmap(fd, MIB, mmap.MAP_PRIVATE)
    with mapped:
        assert mapped[:] == pattern(MIB)
        mapped[0:4] = b"mine"
        assert path.read_bytes() == pattern(MIB)


def test_a_shared_mapping_is_the_file(native_root: Path) -> None:
    path = native_root / "file"
    path.write_bytes(pattern(MIB))
    with created(path, os.O_RDWR) as fd, mmap.mmap(fd, MIB, mmap.MAP_SHARED) as mapped:
        mapped[5000:5005] = b"shown"
        mapped.flush()
        assert os.pread(fd, 5, 5000) == b"shown"
        os.pwrite(fd, b"written", 9000)
    expected = bytearray(pattern(MIB))
    expected[5000:5005], expected[9000:9007] = b"shown", b"written"
    assert path.read_bytes() == expected


def test_a_program_on_the_mount_can_be_run(root: Path) -> None:
    path = root / "program"
    path.write_bytes(Path("/bin/true").read_bytes())
    path.chmod(0o755)
    assert run_command(path).code == 0
    script = root / "script"
    script.write_text("#!/bin/sh\necho from the mount\n")
    script.chmod(0o755)
    assert run_command(script).out == "from the mount\n"


# Unnamed files


def test_an_unnamed_file_can_be_given_a_name(native_root: Path) -> None:
    fd = os.open(native_root, os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        assert names(native_root) == set()
        assert os.fstat(fd).st_nlink == 0
        os.write(fd, pattern(200_000))
        named = os.fsencode(native_root / "named")
        # os.link does not follow what it links.
        assert not _libc.linkat(
            _AT_FDCWD, f"/proc/self/fd/{fd}".encode(), _AT_FDCWD, named, _AT_SYMLINK_FOLLOW
        )
        assert os.fstat(fd).st_nlink == 1
    finally:
        os.close(fd)
    assert (native_root / "named").read_bytes() == pattern(200_000)
    assert (native_root / "named").stat().st_mode & 0o777 == 0o640


def test_an_unnamed_file_goes_when_it_is_closed(
    file_system: tuple[Engine, Mounted], native_root: Path
) -> None:
    mountpoint = file_system[1].mountpoint
    before = os.statvfs(mountpoint).f_bfree
    for _ in range(3):
        fd = os.open(native_root, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(fd, bytes(4 * MIB))
        assert os.pread(fd, 4 * MIB, 0) == bytes(4 * MIB)
        os.close(fd)
    assert names(native_root) == set()
    # The kernel doesn't wait for the release of a file that was closed.
    wait_until(lambda: os.statvfs(mountpoint).f_bfree >= before - 16, "the pages are free")


def test_without_unnamed_files_a_user_is_told_so(
    file_system: tuple[Engine, Mounted], root: Path
) -> None:
    if file_system[0].name == "native":
        pytest.skip("the native engine has them")
    with fails_with(errno.EOPNOTSUPP):
        os.open(root, os.O_TMPFILE | os.O_RDWR, 0o600)


# Locks

_TRY_LOCK = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    if sys.argv[2] == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5)
    print("got it")
except BlockingIOError:
    print("busy")
"""


@pytest.mark.parametrize("kind", ["flock", "fcntl"])
def test_locks_keep_others_out(root: Path, kind: str) -> None:
    path = root / "file"
    path.touch()

    def try_lock() -> str:
        done = subprocess.run([sys.executable, "-c", _TRY_LOCK, path, kind], capture_output=True,
                              text=True, check=True)  # fmt: skip
        return done.stdout.strip()

    with created(path, os.O_RDWR) as fd:
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_EX)
        else:
            fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
        assert try_lock() == "busy"
        if kind == "flock":
            fcntl.flock(fd, fcntl.LOCK_UN)
        else:
            fcntl.lockf(fd, fcntl.LOCK_UN, 10, 0)
        assert try_lock() == "got it"


# The data plane


def test_a_file_that_is_used_is_served_by_the_data_plane(
    file_system: tuple[Engine, Mounted], native_root: Path
) -> None:
    mounted = file_system[1]

    def native_count() -> int:
        operations = json.loads(pmemfs_ok("stat", mounted.mountpoint, "--json"))["operations"]
        return operations["read"]["native"] + operations["write"]["native"]

    with created(native_root / "file") as fd:
        os.pwrite(fd, pattern(MIB), 0)
        before = native_count()
        for at in range(0, MIB, 64 * KIB):
            os.pwrite(fd, pattern(64 * KIB, at), at)
            assert os.pread(fd, 64 * KIB, at) == pattern(64 * KIB, at)
        # A worker counts a request after it has answered it.
        wait_until(lambda: native_count() - before >= 32, "all of them were served there")
        # Changed under its feet, it is served here first, and there again.
        os.ftruncate(fd, MIB - 100)
        before = native_count()
        for _ in range(10):
            os.pread(fd, 4096, 0)
        wait_until(lambda: native_count() - before >= 9, "they were served there again")


@pytest.mark.slow
def test_many_open_files_are_all_served(root: Path) -> None:
    files = []
    try:
        for number in range(300):
            fd = os.open(root / str(number), os.O_RDWR | os.O_CREAT)
            files.append(fd)
            os.pwrite(fd, pattern(70_000, number), 0)
        for _ in range(2):
            for number, fd in enumerate(files):
                assert os.pread(fd, 70_000, 0) == pattern(70_000, number)
                os.pwrite(fd, number.to_bytes(8, "little"), 0)
    finally:
        for fd in files:
            os.close(fd)
