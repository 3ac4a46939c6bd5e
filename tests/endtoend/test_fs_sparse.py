"""Sparse files in a mounted file system take what they would take on tmpfs, and little more."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.commands import pmemfs_ok, run_command
from kit.mounts import Engine, Mounted
from kit.posix import fails_with, fallocate, opened, pattern
from kit.processes import wait_until
from pmemfs.fuse.handlers.ranges import KEEP_SIZE, ZERO_RANGE

pytestmark = pytest.mark.mount

KIB = 1 << 10
MIB = 1 << 20


def taken(path: Path) -> int:
    """The memory of a file in bytes."""
    return path.stat().st_blocks * 512


def in_strides(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 100 * MIB)
        for at in range(0, 100 * MIB, MIB):
            os.pwrite(fd, pattern(4096, at), at)


def growing_in_strides(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for at in range(0, 100 * MIB, MIB):
            for part in range(3):
                os.pwrite(fd, pattern(4096, at), at + part * 4096)


def pages_at_random(path: Path) -> None:
    chance = random.Random(1)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 64 * MIB)
        for _ in range(600):
            at = chance.randrange(8192) * 8192
            os.pwrite(fd, pattern(8192, at), at)


def half_of_a_torrent(path: Path) -> None:
    places = list(range(0, 32 * MIB, 64 * KIB))
    random.Random(2).shuffle(places)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 32 * MIB)
        for at in places[: len(places) // 2]:
            os.pwrite(fd, pattern(64 * KIB, at), at)


def appended_and_then_longer(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for at in range(0, 5 * MIB, 64 * KIB):
            os.pwrite(fd, pattern(64 * KIB, at), at)
        os.ftruncate(fd, 100 * MIB)
        os.pwrite(fd, b"end", 100 * MIB)


KINDS = [
    in_strides, growing_in_strides, pages_at_random, half_of_a_torrent, appended_and_then_longer,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_a_sparse_file_takes_what_it_would_take_on_tmpfs(
    root: Path, shm: Path, write: Callable[[Path], None]
) -> None:
    ours, theirs = root / "file", shm / "file"
    write(ours)
    write(theirs)
    # Beside it, 64 bytes of a log for each extent, and twice that while it is half dead. What was
    # mapped ahead comes back after the last close, for which no program waits.
    most = taken(theirs) * 17 // 16 + 16 * KIB
    wait_until(lambda: taken(ours) <= most, "what was mapped ahead is given back")
    assert run_command("cmp", ours, theirs).code == 0


@pytest.mark.skipif(not shutil.which("mkfs.ext4"), reason="there is no mkfs.ext4")
def test_a_thin_image_stays_thin(native_root: Path, shm: Path) -> None:
    for path in (native_root / "image", shm / "image"):
        with opened(path, os.O_RDWR | os.O_CREAT) as fd:
            os.ftruncate(fd, 20 << 30)
        result = run_command("mkfs.ext4", "-q", "-F", path)
        assert result.code == 0, result.err
    assert taken(native_root / "image") <= taken(shm / "image") * 5 // 4 + MIB
    assert run_command("fsck.ext4", "-f", "-n", native_root / "image").code == 0


def test_a_hole_is_not_zeroed_but_what_is_mapped_is(native_root: Path) -> None:
    with opened(native_root / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, pattern(MIB), 0)
        os.ftruncate(fd, 64 * MIB)
        for mode in (ZERO_RANGE, ZERO_RANGE | KEEP_SIZE):
            for offset, length in ((2 * MIB, MIB), (0, 2 * MIB), (0, 100 * MIB)):
                with fails_with(95):
                    fallocate(fd, mode, offset, length)
        assert os.pread(fd, MIB, 0) == pattern(MIB)
        fallocate(fd, ZERO_RANGE, 0, MIB)
        assert os.pread(fd, MIB, 0) == bytes(MIB)
        assert taken(native_root / "file") < 2 * MIB
        fallocate(fd, 0, 0, 2 * MIB)
        fallocate(fd, ZERO_RANGE, 0, 2 * MIB)


@pytest.mark.slow
def test_a_torrent_ends_in_few_extents(native_root: Path) -> None:
    places = list(range(0, 32 * MIB, 16 * KIB))
    random.Random(3).shuffle(places)
    with opened(native_root / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 32 * MIB)
        for at in places:
            os.pwrite(fd, pattern(16 * KIB, at), at)
    assert taken(native_root / "file") <= 32 * MIB + 16 * KIB
    extents = json.loads(pmemfs_ok("extents", native_root / "file", "--json"))
    assert len(extents["extents"]) <= 16


@pytest.mark.parametrize(
    ("size", "length", "step", "most"),
    [(0, 160 * MIB, MIB, 12), (200 * MIB, 160 * MIB, MIB, 45), (64 * MIB, 32 * MIB, 4 * KIB, 90)],
    ids=["appended", "in a hole", "pages in a hole"],
)
def test_what_is_written_in_order_is_mapped_ahead(
    file_system: tuple[Engine, Mounted], native_root: Path, size: int, length: int, step: int,
    most: int,
) -> None:  # fmt: skip
    mounted = file_system[1]
    # The last test's files may be about to go.
    wait_until(lambda: os.statvfs(mounted.mountpoint).f_bfree > 60_000, "the pages are free")

    def forwarded() -> int:
        stat = json.loads(pmemfs_ok("stat", mounted.mountpoint, "--json"))
        return int(stat["operations"]["write"]["forwarded"])

    before = forwarded()
    data = bytes(step)
    with opened(native_root / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, size)
        for at in range(0, length, step):
            os.pwrite(fd, data, at)
        assert forwarded() - before <= most
        assert os.fstat(fd).st_blocks * 512 <= length * 9 // 8 + 64 * MIB * (size == 0)
    assert taken(native_root / "file") <= length * 9 // 8 + 16 * KIB


@pytest.mark.slow
def test_a_file_of_many_extents_is_not_published_at_each_write(
    file_system: tuple[Engine, Mounted], native_root: Path
) -> None:
    """The bytes of all tables would be the square of the pages; a count of requests bounds them."""
    places = list(range(0, 32 * MIB, 8 * KIB))
    random.Random(4).shuffle(places)
    with opened(native_root / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 64 * MIB)
        for at in places:
            os.pwrite(fd, pattern(4096, at), at)
        for at in places:
            assert os.pread(fd, 4096, at) == pattern(4096, at)
            assert os.pread(fd, 4096, at + 4096) == bytes(4096)
    assert (native_root / "file").stat().st_size == 64 * MIB
