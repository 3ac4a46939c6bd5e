"""What a mount costs does not grow with the pool."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from kit.commands import pmemfs_ok
from kit.forked import fresh_starts
from kit.mounts import Mounted, PoolMaker
from kit.posix import opened
from kit.processes import private_bytes
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

SMALL, LARGE = "1G", "16T"


@pytest.fixture(autouse=True)
def _starts() -> Iterator[None]:
    # A daemon that shares its modules with a test's process has less memory of its own.
    with fresh_starts():
        yield


def timed_mount(pools: PoolMaker, mounted: Mounted) -> float:
    """Mount and unmount; the seconds that the mount took."""
    start = time.monotonic()
    pools.mount(mounted.pool)
    seconds = time.monotonic() - start
    pools.umount(mounted)
    return seconds


@pytest.mark.parametrize("scheme", ["pmem"])
def test_mounting_16_tib_takes_as_long_as_mounting_1_gib(pools: PoolMaker, scheme: str) -> None:
    mounts = {
        size: Mounted(
            pools.create(size, size, "--sparse", "--scheme", scheme), pools.mountpoint(f"of-{size}")
        )
        for size in (SMALL, LARGE)
    }
    ratios = []
    seconds: dict[str, list[float]] = {size: [] for size in mounts}
    for _ in range(5):
        for _ in range(5):
            for size, mounted in mounts.items():
                seconds[size].append(timed_mount(pools, mounted))
        # The shortest: whatever else the machine does makes a mount longer, and none shorter.
        ratios.append(min(seconds[LARGE]) / min(seconds[SMALL]))
        if ratios[-1] <= 1.2:
            return
    pytest.fail(f"16 TiB took {ratios} times as long as 1 GiB")


@pytest.mark.parametrize("scheme", ["pmem", "on-demand"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_daemon_takes_little_memory_after_io_all_over_the_pool(
    pools: PoolMaker, scheme: str, size: str
) -> None:
    mounted = pools.mount(pools.create("pmem0", size, "--sparse", "--scheme", scheme))
    device_bytes = mounted.device.stat().st_size
    assert device_bytes > (15 << 40 if size == LARGE else 900 * MIB)
    with opened(mounted.device) as fd:
        for step in range(16):
            offset = (device_bytes // 16 * step + 12345) & -4096
            os.pwrite(fd, b"x" * 8192, offset)
            assert os.pread(fd, 8192, offset) == b"x" * 8192
            assert os.pread(fd, MIB, offset + 2 * MIB) == bytes(MIB)
        os.fsync(fd)
    counts = mounted.pages()["counts"]
    assert counts["total"] == device_bytes // 4096
    assert counts["clean"] >= 32
    assert private_bytes(mounted.pid, mounted.pool) < 150 * MIB
    # The pool itself took memory where it was used, and nowhere else.
    assert mounted.pool.stat().st_blocks * 512 < 64 * MIB
    assert "sparse" in pmemfs_ok("info", mounted.pool)
