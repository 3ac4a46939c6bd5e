"""A pool that is mounted a second time elsewhere appears there too, as a block device does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import EACH_ENGINE, Mounted, PoolMaker, Session, mounts_at
from kit.processes import end_process, wait_until
from kit.sources import mounted_tmpfs

pytestmark = [pytest.mark.mount, pytest.mark.slow, *EACH_ENGINE]


def mounted_twice(pools: PoolMaker, *options: object, mode: str = "block") -> list[Mounted]:
    """One pool on two directories."""
    pool = pools.create("pmem0", "16M", "--mode", mode)
    both = [pools.mount(pool, *options, at=name) for name in ("one", "two")]
    assert both[0].pid == both[1].pid
    return both


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_unmounting_either_leaves_the_other(pools: PoolMaker, order: tuple[int, int]) -> None:
    both = mounted_twice(pools)
    first, last = (both[number] for number in order)
    session = Session.of(last)
    first.device.write_bytes(b"one")
    assert run_command("umount", first.mountpoint).code == 0
    with last.device.open("rb") as file:
        assert file.read(3) == b"one"
    # It goes on where its first directory is gone, and shows what it becomes.
    assert last.info()["mountpoint"] == str(last.mountpoint)
    before = last.device.stat().st_size
    pmemfs_ok("resize", last.mountpoint, "--size", "32M")
    assert last.device.stat().st_size > before
    assert run_command("umount", last.mountpoint).code == 0
    session.assert_ended()


def test_info_names_every_place(pools: PoolMaker) -> None:
    both = mounted_twice(pools)
    places = [str(mounted.mountpoint) for mounted in both]
    for target in (both[0].pool, *places):
        assert json.loads(pmemfs_ok("info", target, "--json"))["mountpoints"] == places
        assert ", ".join(places) in pmemfs_ok("info", target)


def test_pmemfs_umount_takes_a_mountpoint_or_all_of_a_pool(pools: PoolMaker) -> None:
    both = mounted_twice(pools, mode="fs")
    session = Session.of(both[0])
    pmemfs_ok("umount", both[1].mountpoint, timeout=30)
    assert (mounts_at(both[0].mountpoint), mounts_at(both[1].mountpoint)) == (1, 0)
    pools.mount(both[0].pool, at="two")
    pmemfs_ok("umount", both[0].pool, timeout=30)
    assert (mounts_at(both[0].mountpoint), mounts_at(both[1].mountpoint)) == (0, 0)
    session.assert_ended()


def test_a_daemon_that_ends_takes_both_away_and_nothing_else(pools: PoolMaker) -> None:
    both = mounted_twice(pools)
    session = Session.of(both[0])
    os.kill(session.pid, signal.SIGTERM)
    session.assert_ended()
    assert (mounts_at(both[0].mountpoint), mounts_at(both[1].mountpoint)) == (0, 0)
    both = [pools.mount(both[0].pool, at=name) for name in ("one", "two")]
    session = Session.of(both[0])
    assert run_command("umount", both[0].mountpoint).code == 0
    with mounted_tmpfs(both[0].mountpoint) as elsewhere:
        (elsewhere / "file").touch()
        os.kill(session.pid, signal.SIGTERM)
        session.assert_ended()
        assert (elsewhere / "file").exists()
        assert mounts_at(both[1].mountpoint) == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [("ro", "ro here"), ("allow_other", "allow_other"), ("mode=640", "mode=640"), ("sync", "sync")],
)
def test_other_options_are_refused_in_one_sentence(
    pools: PoolMaker, options: str, word: str
) -> None:
    mounted = pools.mount(pools.create(size="16M"), "-o", "nosuid")
    other = pools.mountpoint("other")
    result = pmemfs("mount", mounted.pool, other, "-o", f"nosuid,{options}")
    refused(result, 32, "in use", str(mounted.mountpoint), word, "mount --bind")
    assert mounts_at(other) == 0
    # Those which say what holds anyway are no others.
    pmemfs_ok("mount", mounted.pool, other, "-o", "rw,defaults,dev,nosuid")
    assert mounts_at(other) == 1


@pytest.mark.parametrize("mode", ["block", "fs"])
def test_the_options_that_info_shows_are_ones_that_mount_takes(pools: PoolMaker, mode: str) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M", "--mode", mode), "-o", "nosuid,sync")
    options = mounted.info()["options"]
    other = pools.mountpoint("other")
    pmemfs_ok("mount", mounted.pool, other, "-o", options)
    assert mounts_at(other) == 1


def test_two_that_mount_at_once_both_succeed(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    places = [Mounted(pool, pools.mountpoint(name)) for name in ("one", "two", "three")]
    commands = [
        subprocess.Popen([BIN / "pmemfs", "mount", pool, place.mountpoint, *pools.engine.options])
        for place in places
    ]
    try:
        assert [command.wait(60) for command in commands] == [0, 0, 0]
    finally:
        for command in commands:
            end_process(command.pid, seconds=0)
    assert len({place.pid for place in places}) == 1


def test_of_two_that_mount_on_one_directory_at_once_one_is_refused(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    place = pools.mountpoint("one")
    commands = [
        subprocess.Popen([BIN / "pmemfs", "mount", pool, place, *pools.engine.options],
                         stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = [command.communicate(timeout=60)[1] for command in commands]
    assert sorted(command.returncode for command in commands) == [0, 32]
    assert "is mounted there" in "".join(said)
    assert mounts_at(place) == 1


def test_a_second_mount_that_is_interrupted_leaves_the_first_alone(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), at="one")
    other = pools.mountpoint("two")
    for wait in (lambda: None, lambda: wait_until(lambda: mounts_at(other) == 1, "it is there")):
        with subprocess.Popen(
            [BIN / "pmemfs", "mount", mounted.pool, other], stderr=subprocess.DEVNULL
        ) as command:
            wait()
            command.send_signal(signal.SIGTERM)
        assert mounts_at(other) == (command.returncode == 0)
        if command.returncode == 0:
            assert run_command("umount", other).code == 0
    assert mounted.device.exists()


def test_mount_8_and_fstab_mount_a_pool_on_two_directories(
    pools: PoolMaker, tmp_path: Path, helper: None
) -> None:
    pool = pools.create("pmem0", "16M", "--mode", "fs")
    both = [Mounted(pool, pools.mountpoint(name)) for name in ("one", "two")]
    fstab = tmp_path / "fstab"
    lines = [f"{pool} {place.mountpoint} pmemfs noatime 0 0\n" for place in both]
    fstab.write_text("".join(lines))
    for _ in range(2):
        done = run_command("mount", "--fstab", fstab, "--all")
        assert done.code == 0, done.err
        assert [mounts_at(place.mountpoint) for place in both] == [1, 1]
    (both[0].mountpoint / "file").write_bytes(b"both")
    assert (both[1].mountpoint / "file").read_bytes() == b"both"
    other = pools.mountpoint("other")
    done = run_command("mount", "-t", "pmemfs", "-r", pool, other)
    assert done.code == 32
    assert "in use" in done.err
    assert mounts_at(other) == 0
    pmemfs_ok("umount", pool)
