"""A full pool: what was just removed can be written again at once.

The kernel tells us only after rm(1) has returned that it forgets a file, and after close(2) has
returned that a removed file is closed.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from kit.mounts import PoolMaker, native_only
from kit.posix import fails_with, opened
from kit.processes import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("engine")]

MIB = 1 << 20
ROUNDS = 60
DATA = os.urandom(MIB)


@pytest.fixture
def full(pools: PoolMaker) -> tuple[Path, int]:
    """The root of a full pool, and how many files of 1 MiB it has."""
    root = pools.mount(pools.create("full", "32M", "--mode", "fs")).mountpoint
    count = 0
    with fails_with(errno.ENOSPC):
        while True:
            write(root / str(count))
            count += 1
    return root, count


def write(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        assert os.write(fd, DATA) == MIB


@native_only
def test_what_is_removed_is_room_at_once(full: tuple[Path, int]) -> None:
    root, count = full
    for number in range(ROUNDS):
        path = root / str(number % count)
        path.unlink()
        write(path)
        # And now a file that somebody has open.
        with opened(path, os.O_RDONLY):
            path.unlink()
        write(path)


@native_only
def test_what_is_replaced_is_room_at_once(full: tuple[Path, int]) -> None:
    root, count = full
    for number in range(1, ROUNDS):
        os.rename(root / str((number - 1) % count), root / str(number % count))
        write(root / str((number - 1) % count))


def test_a_full_pool_says_so_each_time(full: tuple[Path, int]) -> None:
    root, _ = full
    before = os.statvfs(root).f_bfree
    for number in range(ROUNDS):
        with fails_with(errno.ENOSPC):
            write(root / "another")
        if number % 10 == 0:
            (root / "another").unlink()
    (root / "another").unlink()
    # A frame of inodes may stay, for the next ones.
    wait_until(lambda: before - 1 <= os.statvfs(root).f_bfree <= before, "nothing is lost or won")
