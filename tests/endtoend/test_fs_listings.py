"""Listings of directories in real mounts, while names come and go and processes die."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from kit.commands import pmemfs_ok
from kit.fs_mounts import create_fs, mount_fs
from kit.mounts import PoolMaker, native_only
from kit.processes import wait_until

pytestmark = pytest.mark.mount

CALLERS = 4


def churn(directory: Path, caller: int, ends: threading.Event) -> None:
    """Make, rename and remove names until that ends."""
    turn = 0
    while not ends.is_set():
        turn += 1
        name = directory / f"passing {caller} {turn % 50}"
        name.touch()
        other = directory / f"renamed {caller} {turn % 7}"
        name.rename(other)
        if turn % 3:
            other.unlink()


def listed(directory: Path) -> list[str]:
    """All names that a listing shows, by requests with attributes and without."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]


@native_only
@pytest.mark.parametrize("dies", ["nobody", "data plane", "daemon"])
def test_what_stays_is_listed_once_while_callers_change_names(pools: PoolMaker, dies: str) -> None:
    mounted = mount_fs(pools, create_fs(pools, "listed", "64M"))
    directory = mounted.mountpoint / "shared"
    directory.mkdir()
    stable = {f"stable {number}" for number in range(1500)}
    for name in stable:
        (directory / name).touch()
    ends = threading.Event()
    callers = [
        threading.Thread(target=churn, args=(directory, caller, ends)) for caller in range(CALLERS)
    ]
    for caller in callers:
        caller.start()
    try:
        for turn in range(12):
            with os.scandir(directory) as entries:
                names = [next(entries).name]
                if dies != "nobody" and turn % 4 == 1:
                    was = mounted.pid, mounted.data_plane_pid
                    pid = was[1] if dies == "data plane" else was[0]
                    os.kill(pid, signal.SIGKILL)
                names += [entry.name for entry in entries]
            seen = [name for name in names if name in stable]
            assert len(seen) == len(stable), stable - set(seen)
            assert set(seen) == stable
            for name in sorted(stable)[turn::100]:
                os.stat(directory / name)
    finally:
        ends.set()
        for caller in callers:
            caller.join()
    wait_until(lambda: set(listed(directory)) >= stable, "it is listed again")
    pools.umount(mounted)
    pmemfs_ok("check", mounted.pool)
