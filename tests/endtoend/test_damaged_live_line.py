"""A damaged size in a pool, through the kernel: after an unmount, and after kill -9."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from kit.commands import pmemfs, run_command
from kit.mounts import PoolMaker, Session, each_engine
from kit.posix import fails_with, pattern
from pmemfs.media.inode import LIVE_OFFSET, SLOT_BYTES
from pmemfs.medium.mapped import MappedMedium

pytestmark = pytest.mark.mount

DATA = pattern(160_000)
SIZES = {"closed": len(DATA), "empty": 0, "kept": len(DATA), "growing": len(DATA)}
BITS = {"closed": 33, "empty": 20, "growing": 16}
"""More are tried without a kernel."""


def ended(pools: PoolMaker, how: str) -> tuple[Path, dict[str, int]]:
    """A pool whose mount has ended while one file was open, and the numbers of its files."""
    mounted = pools.mount(pools.create("line0", "64M", "--mode", "fs"))
    top = mounted.mountpoint
    (top / "closed").write_bytes(DATA)
    (top / "empty").touch()
    (top / "kept").write_bytes(DATA)
    if pools.engine.name == "native":
        fallocate_keep_size(top / "kept", 400_000)
    fd = os.open(top / "growing", os.O_WRONLY | os.O_CREAT)
    for start in range(0, len(DATA), 4000):
        os.write(fd, DATA[start : start + 4000])
    numbers = {name: (top / name).stat().st_ino for name in SIZES}
    if how == "umount":
        os.close(fd)
        pools.umount(mounted)
    else:
        Session.of(mounted).kill()
        with suppress(OSError):
            os.close(fd)
    return mounted.pool, numbers


def fallocate_keep_size(path: Path, size: int) -> None:
    """FALLOC_FL_KEEP_SIZE, which Python doesn't have."""
    assert run_command("fallocate", "--keep-size", "--length", size, path).code == 0


@contextmanager
def flipped(pool: Path, number: int, bit: int) -> Iterator[None]:
    """A bit of the size word of an inode is another one for a while."""
    flip(pool, number, bit)
    yield
    flip(pool, number, bit)


def flip(pool: Path, number: int, bit: int) -> None:
    at = number * SLOT_BYTES + LIVE_OFFSET + bit // 8
    with closing(MappedMedium.open(str(pool))) as medium:
        medium.store(at, bytes([medium.read(at, 1)[0] ^ 1 << bit % 8]))


def assert_the_file_is_refused(pools: PoolMaker, pool: Path, name: str) -> None:
    """It answers EIO, nothing is written any more, and all others are served."""
    mounted = pools.mount(pool)
    with fails_with(errno.EIO):
        (mounted.mountpoint / name).read_bytes()
    with fails_with(errno.EROFS):
        (mounted.mountpoint / "more").touch()
    for other, size in SIZES.items():
        if other != name:
            assert (mounted.mountpoint / other).read_bytes() == DATA[:size]
    pools.umount(mounted)


def assert_a_repair_waits_for_force(pool: Path, name: str) -> None:
    result = pmemfs("check", "--repair", pool)
    assert result.code == 4
    assert f"(/{name}): its live line is damaged" in result.out
    assert "only with --force: its size becomes" in result.out


@each_engine
@pytest.mark.parametrize("how", ["umount", "kill -9"])
def test_a_flipped_bit_of_a_size_costs_one_file_and_frees_nothing(
    pools: PoolMaker, how: str
) -> None:
    pool, numbers = ended(pools, how)
    image = pool.read_bytes()
    for name, bit in BITS.items():
        pool.write_bytes(image)
        with flipped(pool, numbers[name], bit):
            assert_the_file_is_refused(pools, pool, name)
            assert_a_repair_waits_for_force(pool, name)
        result = pmemfs("check", pool)
        assert result.code == 0, result.out
    pool.write_bytes(image)
    flip(pool, numbers["closed"], 33)
    assert pmemfs("check", "--repair", "--force", pool).code == 1
    assert pmemfs("check", pool).code == 0
    mounted = pools.mount(pool)
    content = (mounted.mountpoint / "closed").read_bytes()
    assert content[: len(DATA)] == DATA
    assert len(content) == -(-len(DATA) // 4096) * 4096
    for name in SIZES.keys() - {"closed"}:
        assert (mounted.mountpoint / name).read_bytes() == DATA[: SIZES[name]]
