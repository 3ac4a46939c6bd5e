"""Directories of very many entries in real mounts: what they take, nobody else waits for."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

import pytest
from conftest import PoolMaker, native_only, pmemfs_ok
from fs_mounts import create_fs, mount_fs
from large import ROOT, large_directory, opened

pytestmark = pytest.mark.mount

COUNT = 150_000


@native_only
def test_others_are_answered_while_a_large_directory_is_read(pools: PoolMaker) -> None:
    pool = create_fs(pools, "large", "128M")
    with opened(pool) as fs:
        large_directory(fs, ROOT, b"large", COUNT)
    mounted = mount_fs(pools, pool)
    top = mounted.mountpoint
    found: list[os.stat_result] = []
    reader = threading.Thread(target=lambda: found.append(os.stat(top / "large" / "n777")))
    reader.start()
    answered = 0
    for number in itertools.count():
        assert not os.path.exists(top / f"none {number}")
        if not reader.is_alive():
            break
        answered += 1
    reader.join()
    print(f"{answered} others were answered meanwhile")
    assert found[0].st_nlink == COUNT
    # Who waits for all of it is answered once, or twice.
    assert answered > 20
    pools.umount(mounted)
    pmemfs_ok("check", pool)


@pytest.mark.xfail(strict=True, reason="a listing is READDIRPLUS always: pyfuse3 has no other")
@pytest.mark.usefixtures("engine")
def test_names_are_listed_without_reading_their_inodes(pools: PoolMaker) -> None:
    mounted = mount_fs(pools, create_fs(pools, "names", "64M"))
    top = mounted.mountpoint
    make_files(top, 2000)
    pools.umount(mounted)
    again = mount_fs(pools, mounted.pool)
    assert len(os.listdir(again.mountpoint)) == 2000
    info = json.loads(pmemfs_ok("info", again.mountpoint, "--json"))
    assert info["mount"]["space"]["cached_inodes"] < 100


def make_files(top: Path, count: int) -> None:
    for number in range(count):
        (top / f"{number}").touch()
