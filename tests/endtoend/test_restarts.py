"""A mount that is kept outlives its processes: programs notice a pause, and nothing else.

PMEMFS_KILL_ROUNDS in the environment says how often each test kills, instead of 2 times. From 10
on, pgbench is among the programs.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kit import fs_workers
from kit.commands import pmemfs, pmemfs_here, run_command
from kit.keys import add_key, encrypted, states
from kit.killing import BOTH, DAEMON, PLANE, VICTIMS, Kills, Load, mount_kept, processes_of
from kit.mounts import NATIVE, Mounted, PoolMaker, may_pass
from kit.posix import opened
from kit.postgres import is_installed
from kit.processes import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "2"))
MANY_ROUNDS = 10
native = pytest.mark.parametrize("engine", NATIVE, indirect=True, ids=str)


@pytest.fixture(autouse=True)
def many_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keeper gives up, however often a test kills."""
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")


def may_cancel(pools: PoolMaker, victim: str) -> bool:
    """Whether requests may be lost: those that the kernel is handing to a ring that dies."""
    return pools.engine.transport == "uring" and victim != DAEMON


def has_no_leaks(pools: PoolMaker, mounted: Mounted) -> bool:
    """Whether a pool, which must have no errors, has no leaks; if it has, let a mount search."""
    checked = pmemfs("check", mounted.pool)
    assert checked.code == 0, f"{checked.out}\n{checked.err}"
    if "0 leaked" in checked.out or "file system" not in checked.out:
        return True
    again = pools.mount(mounted.pool)
    # It searches a little every second.
    time.sleep(3)
    pools.umount(again)
    return False


def assert_survived(pools: PoolMaker, kills: Kills) -> None:
    """Nothing went wrong, the mount knows of the deaths, and it ends as ever."""
    outcome = kills.load.outcome
    print(kills.summary())
    assert outcome.wrong == []
    kept, victims = kills.mounted.info()["kept"], [it.victim for it in kills.all]
    for whose, victim in (("daemon", DAEMON), ("data_plane", PLANE)):
        died = sum(it in (victim, BOTH) for it in victims)
        assert kept[whose]["times"] == died, f"of the {victim}"
    pools.umount(kills.mounted)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    wait_until(lambda: has_no_leaks(pools, kills.mounted), "the next mounts free what has leaked")


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_programs_in_an_encrypted_directory_notice_a_pause_and_nobody_is_asked_for_the_key(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    may_pass(pools)
    mounted = mount_kept(pools, pools.create("fs0", "256M", "--mode", "fs"), "-o", "allow_other")
    add_key(mounted)
    load = Load(tmp_path, cancels=may_cancel(pools, victim))
    kills = Kills(mounted, load)
    with load.working():
        load.add_file_system(encrypted(mounted))
        for _ in range(ROUNDS):
            kills.kill(victim)
    assert states(mounted) == {"work": True}
    assert_survived(pools, kills)


@native
@pytest.mark.parametrize("victim", VICTIMS if ROUNDS >= MANY_ROUNDS else (BOTH,))
def test_programs_in_a_directory_that_is_compressed_all_the_time_notice_a_pause(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    may_pass(pools)
    pool = pools.create("fs0", "256M", "--mode", "fs")
    mounted = mount_kept(pools, pool, "-o", "allow_other,cold_seconds=1")
    directory = mounted.mountpoint / "archive"
    directory.mkdir()
    pmemfs_here("set", directory, "compression=zstd")
    (directory / "cold").write_bytes(b"words that shrink\n" * 40_000)
    load, is_over = Load(tmp_path, cancels=may_cancel(pools, victim)), threading.Event()

    def compress() -> None:
        while not is_over.wait(0.01):
            # It may find no daemon, or a file that was removed meanwhile.
            pmemfs("rewrite", directory)

    kills = Kills(mounted, load)
    with load.working(), ThreadPoolExecutor(1) as thread:
        load.add_file_system(directory)
        working = thread.submit(compress)
        try:
            for _ in range(ROUNDS):
                kills.kill(victim)
                assert (directory / "cold").read_bytes() == b"words that shrink\n" * 40_000
        finally:
            is_over.set()
        working.result()
    # If a death has kept each command from it, the mount itself compresses what is cold.
    wait_until(lambda: (directory / "cold").stat().st_blocks * 512 < 100_000, "it is compressed")
    assert mounted.info()["compression"]["packed_bytes"]
    assert_survived(pools, kills)


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_programs_in_a_file_system_notice_a_pause(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    may_pass(pools)
    mounted = mount_kept(pools, pools.create("fs0", "256M", "--mode", "fs"), "-o", "allow_other")
    load = Load(tmp_path, cancels=may_cancel(pools, victim))
    kills = Kills(mounted, load)
    with load.working():
        load.add_file_system(mounted.mountpoint)
        if ROUNDS >= MANY_ROUNDS and is_installed() and not load.cancels:
            load.add_postgres(mounted.mountpoint / "postgres")
        for _ in range(ROUNDS):
            kills.kill(victim)
    assert_survived(pools, kills)


@native
def test_programs_on_a_block_device_notice_a_pause(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = mount_kept(pools, pools.create(size="32M"))
    load = Load(tmp_path, cancels=may_cancel(pools, BOTH))
    kills = Kills(mounted, load)
    with load.working():
        load.add("reader", mounted.device, 1)
        load.add_fio(mounted.device, "4m", offset="4m")
        for number in range(ROUNDS):
            kills.kill(VICTIMS[number % len(VICTIMS)])
    assert_survived(pools, kills)


@native
def test_processes_in_the_same_directories_agree_on_what_is_there(
    pools: PoolMaker, tmp_path: Path
) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "256M", "--mode", "fs"))
    kills, root = Kills(mounted, Load(tmp_path)), mounted.mountpoint / "shared"
    # These programs take no call that was cancelled for right.
    victims = VICTIMS if pools.engine.transport == "fd" else (DAEMON,)
    fs_workers.prepare(root)
    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(fs_workers.work, root, ["all"] * 3, 1.5 * ROUNDS, 5)
        while not working.done():
            kills.kill(victims[len(kills.all) % len(victims)])
        outcome = working.result()
    assert outcome.wrong == []
    assert fs_workers.differences(root, outcome) == []
    assert_survived(pools, kills)


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_locks_are_held_across_a_death(pools: PoolMaker, tmp_path: Path, victim: str) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "64M", "--mode", "fs"))
    kills, path = Kills(mounted, Load(tmp_path)), mounted.mountpoint / "locked"
    path.touch()
    with opened(path) as held, opened(path) as other:
        fcntl.flock(held, fcntl.LOCK_EX)
        fcntl.lockf(held, fcntl.LOCK_EX, 10)
        waiting = subprocess.Popen(["flock", path, "true"])
        kills.kill(victim)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process asks for the range: locks of this kind belong to processes.
        code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), 6, 10)"
        asked = run_command(sys.executable, "-c", code, path)
        assert "BlockingIOError" in asked.err
        assert waiting.poll() is None
        fcntl.flock(held, fcntl.LOCK_UN)
        assert waiting.wait(30) == 0
    assert run_command(sys.executable, "-c", code, path).code == 0
    assert_survived(pools, kills)
