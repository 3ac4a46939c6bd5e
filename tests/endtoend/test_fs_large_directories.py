"""Directories of very many entries in real mounts: what they take, nobody else waits for."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from kit.commands import pmemfs_ok
from kit.fs_mounts import FsMount, create_fs, mount_fs
from kit.large_directories import ROOT, add_names, large_directory, opened, remove_names
from kit.mounts import UNKEPT, PoolMaker, native_only
from kit.processes import wait_until

pytestmark = pytest.mark.mount

COUNT = 600_000


def answered_meanwhile(mounted: FsMount) -> int:
    """How many others are answered while a directory is read that nobody has looked at."""
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
    assert found[0].st_nlink == COUNT
    return answered


@native_only
def test_others_are_answered_while_a_large_directory_is_read(pools: PoolMaker) -> None:
    pool = create_fs(pools, "large", "256M")
    with opened(pool) as fs:
        large_directory(fs, ROOT, b"large", COUNT)
    answered: list[int] = []
    # A caller that gets no processor for so long isn't answered either.
    while len(answered) < 3 and max(answered, default=0) <= 5:
        mounted = mount_fs(pools, pool)
        answered.append(answered_meanwhile(mounted))
        pools.umount(mounted)
    # Who waits for all of it is answered once, or twice.
    assert max(answered) > 5, answered
    pmemfs_ok("check", pool)


@native_only
def test_a_daemon_that_is_killed_while_it_compacts_a_log_loses_no_name(pools: PoolMaker) -> None:
    pool = create_fs(pools, "large", "64M")
    with opened(pool) as fs:
        directory = large_directory(fs, ROOT, b"large", 20_000)
        file = fs.lookup(directory, b"n0")
        for _ in range(2):
            remove_names(fs, directory, range(1, 15_000))
            add_names(fs, directory, file, range(1, 15_000))
    mount = FsMount(pools, "64M", mount_fs(pools, pool, *UNKEPT))
    large = mount.directory / "large"
    here = {f"n{number}" for number in range(20_000)}
    before = os.stat(large).st_size
    for round_ in range(3):
        # Of each frame that is full, the log is looked at; and compacted by and by.
        for number in range(200):
            name = f"new {round_} {number}"
            os.link(large / "n0", large / name)
            here.add(name)
        time.sleep(1.2 + 0.1 * round_)
        mount.restart("kill daemon")
        assert set(os.listdir(large)) == here

    def is_compacted() -> bool:
        if os.stat(large).st_size < before / 2:
            return True
        for _ in range(70):
            os.link(large / "n0", large / "again")
            os.unlink(large / "again")
        return False

    wait_until(is_compacted, "the log has been compacted")
    mount.check()
    assert set(os.listdir(large)) == here
    pools.umount(mount.mounted)


@native_only
def test_names_are_listed_without_reading_their_inodes_but_the_first(pools: PoolMaker) -> None:
    mounted = mount_fs(pools, create_fs(pools, "names", "64M"))
    top = mounted.mountpoint
    make_files(top, 2000)
    pools.umount(mounted)
    again = mount_fs(pools, mounted.pool)
    assert len(os.listdir(again.mountpoint)) == 2000
    # The first answer has attributes, since whoever lists a directory may look at what is in it;
    # the kernel asks for 32 KiB at once.
    assert again.info()["space"]["cached_inodes"] < 300


def make_files(top: Path, count: int) -> None:
    for number in range(count):
        (top / f"{number}").touch()
