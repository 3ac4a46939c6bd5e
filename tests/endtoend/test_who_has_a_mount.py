"""A mount that others have too: another mount namespace, a bind mount, who has its files open."""

from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_here, pmemfs_ok, refused, run_command
from kit.mounts import Mounted, PoolMaker, Session, each_engine, may_pass, mounts_at
from kit.namespaces import Run, let_go_of_others, new_namespace, nobody_copies_mounts
from kit.posix import opened
from kit.processes import end_process, is_running, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]


@contextmanager
def mount_namespace_of_its_own(ready: Path) -> Iterator[int]:
    """A process in a mount namespace that begins as a copy of ours, and is private. There is no
    other one that could be named in its place."""
    with nobody_copies_mounts(), new_namespace(let_go_of_others(ready.parent), ready) as pid:
        yield pid


def inside(pid: int, *words: object) -> tuple[str, ...]:
    """A command in the mount namespace of a process."""
    return ("nsenter", "--target", str(pid), "--mount", "--", *map(str, words))


def row_of(pool: Path) -> dict[str, object]:
    """What `pmemfs list` says of a pool."""
    rows = [row for row in json.loads(pmemfs_ok("list", "--json")) if row["pool"] == str(pool)]
    assert len(rows) == 1
    return dict(rows[0])


def test_commands_leave_no_descriptor_of_a_pool_or_a_daemon(pools: PoolMaker) -> None:
    def ours() -> list[str]:
        return sorted(os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())

    # What a first command needs stays, and what earlier tests have left goes at any time.
    pmemfs_ok("list")
    pmemfs_here("list")
    gc.collect()
    before = ours()
    mounted = pools.mount(pools.create(size="16M"))
    with nobody_copies_mounts():
        for words in (["info"], ["pages"], ["stat"], ["umount", "--lazy"]):
            pmemfs_here(*words, mounted.mountpoint)
        pmemfs_here("check", mounted.pool)
    pools.umount(pools.mount(mounted.pool))
    assert ours() == before


@each_engine
def test_a_mount_that_another_namespace_has_too_is_unmounted_at_once(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    with mount_namespace_of_its_own(pools.directory / "ready") as pid:
        said = pmemfs_ok("umount", mounted.mountpoint)
        where = f"{mounted.mountpoint} in the mount namespace of process {pid}"
        assert where in said
        assert mounts_at(mounted.mountpoint) == 0
        assert is_running(session.pid)
        row = row_of(mounted.pool)
        assert row["mountpoint"] == str(mounted.mountpoint)
        assert row["namespace_pid"] == pid
        assert row["state"] == f"in the mount namespace of process {pid}"
        assert where in pmemfs_ok("info", mounted.pool)
        refused(pmemfs("umount", mounted.pool), 32, where)
        refused(pmemfs("mount", mounted.pool, mounted.mountpoint), 32, where)
        # In that namespace it is a mount as others are.
        done = run_command(*inside(pid, BIN / "pmemfs", "umount", mounted.pool))
        assert done.code == 0, done.err
    session.assert_ended("clean")


def test_a_mount_of_a_namespace_that_has_ended_ends_with_it(pools: PoolMaker) -> None:
    with mount_namespace_of_its_own(pools.directory / "ready") as pid:
        pool = pools.create(size="16M")
        done = run_command(*inside(pid, BIN / "pmemfs", "mount", pool, pools.mountpoint()))
        assert done.code == 0, done.err
        # Seen from here: it is nowhere here, and detached it is not.
        row = row_of(pool)
        assert "detached" not in str(row["state"])
        assert row["mountpoint"] == str(pools.mountpoint())
        daemon = row["pid"]
        assert isinstance(daemon, int)
        done = run_command(*inside(pid, BIN / "pmemfs", "umount", pool))
        assert done.code == 0, done.err
        wait_until(lambda: not is_running(daemon), "the daemon has ended")


def test_seen_from_another_namespace_a_mount_is_not_detached(pools: PoolMaker) -> None:
    with mount_namespace_of_its_own(pools.directory / "ready") as pid:
        mounted = pools.mount(pools.create(size="16M"))
        done = run_command(*inside(pid, BIN / "pmemfs", "list", "--json"))
        (row,) = (row for row in json.loads(done.out) if row["pool"] == str(mounted.pool))
        assert row["mountpoint"] == str(mounted.mountpoint)
        assert "detached" not in row["state"]


@each_engine
def test_unmounting_one_of_several_directories_says_which_are_left(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    bound = pools.mountpoint("bound")
    part = pools.directory / "part"
    part.touch()
    pools.mountpoints.append(part)
    assert run_command("mount", "--bind", mounted.mountpoint, bound).code == 0
    assert run_command("mount", "--bind", mounted.device, part).code == 0
    session = Session.of(mounted)
    said = pmemfs_ok("umount", bound)
    assert f"still mounted on {mounted.mountpoint} and {part}" in said
    assert f"still mounted on {part}" in pmemfs_ok("umount", mounted.mountpoint)
    assert is_running(session.pid)
    pmemfs_ok("umount", part)
    session.assert_ended("clean")


@each_engine
@pytest.mark.parametrize("way", ["rename", "delete", "replace"])
def test_a_pool_that_gets_another_name_while_it_is_mounted_is_unmounted_clean(
    pools: PoolMaker, way: str
) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    other = pools.directory / "other"
    if way == "delete":
        mounted.pool.unlink()
    else:
        mounted.pool.rename(other)
    if way == "replace":
        mounted.pool.write_bytes(bytes(1 << 20))
    pmemfs_ok("umount", mounted.mountpoint)
    wait_until(lambda: not is_running(session.pid), "the daemon has ended")
    if way != "delete":
        assert json.loads(pmemfs_ok("info", other, "--json"))["pool"]["state"] == "clean"


def test_who_finds_a_pool_in_use_is_told_where_it_is_mounted(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    where = f"{mounted.pool} is in use: mounted on {mounted.mountpoint} by process {mounted.pid}"
    for words, code in ((("check",), 8), (("create", "--force"), 16), (("check", "--repair"), 8)):
        refused(pmemfs(*words, mounted.pool), code, where)


def test_who_keeps_a_mount_busy_is_named_and_the_command_itself_is_not(pools: PoolMaker) -> None:
    there = pools.mount(pools.create(size="16M")).mountpoint
    # The shell is in the mount, and so is the command that it starts.
    done = run_command("sh", "-c", f"cd {there}; echo $$; {BIN}/pmemfs umount {there}; exit $?")
    shell = done.out.strip()
    assert f"target is busy: process {shell} uses it; close it there" in done.err
    assert done.code == 32


@each_engine
def test_what_is_detached_names_those_who_use_it_and_why_it_can_not_be_mounted(
    pools: PoolMaker,
) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    user = subprocess.Popen(["sleep", "600"], cwd=mounted.mountpoint)
    try:
        with nobody_copies_mounts():
            said = pmemfs_ok("umount", "--lazy", mounted.mountpoint)
            assert f"process {user.pid} still uses it" in said
            sentence = refused(pmemfs("mount", mounted.pool, mounted.mountpoint), 32, "detached")
            assert f"process {user.pid}" in sentence
    finally:
        end_process(user.pid, seconds=0)
        user.wait()
    session.assert_ended("clean")


def test_root_is_told_of_what_another_user_has_detached(pools: PoolMaker, user: Run) -> None:
    home = pools.directory / "home"
    pool, mountpoint = home / "pool", home / "mnt"
    for words in (("create", pool, "--size", "16M"), ("mount", pool, mountpoint)):
        if words[0] == "mount":
            assert user("mkdir", mountpoint).code == 0
        done = user(BIN / "pmemfs", *words)
        assert done.code == 0, done.err
    script = (
        f"exec 3<{mountpoint}/pool; {BIN}/pmemfs umount -l {mountpoint} || exit; "
        f"sleep 60 >{home}/none 2>&1 & echo $! >{home}/sleeping"
    )
    done = user("sh", "-c", script)
    assert done.code == 0, done.err
    sleeping = int((home / "sleeping").read_text())
    try:
        row = row_of(pool)
        assert (row["state"], row["owner_uid"]) == ("detached, still in use", 65534)
        refused(pmemfs("umount", pool), 32, "detached, still in use")
        assert "detached, still in use" in pmemfs_ok("info", pool)
    finally:
        end_process(sleeping, seconds=0)


def test_commands_of_another_pid_namespace_wait_for_the_daemon_too(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    listed = run_command("unshare", "--pid", "--fork", BIN / "pmemfs", "list", "--json")
    (row,) = (row for row in json.loads(listed.out) if row["pool"] == str(mounted.pool))
    assert row["pid"] is None
    done = run_command("unshare", "--pid", "--fork", BIN / "pmemfs", "umount", mounted.mountpoint)
    assert (done.code, done.err) == (0, "")
    session.assert_ended("clean")


def test_info_of_a_directory_that_is_no_mount_says_that(pools: PoolMaker) -> None:
    refused(pmemfs("info", pools.directory), 1, f"{pools.directory} is not a pmemfs mount")


def test_a_busy_mount_names_who_keeps_it_so(pools: PoolMaker) -> None:
    mounted: Mounted = pools.mount(pools.create(size="16M"))
    may_pass(pools)
    with opened(mounted.device):
        sentence = refused(pmemfs("umount", mounted.mountpoint), 32, "busy")
    assert f"process {os.getpid()}" in sentence
