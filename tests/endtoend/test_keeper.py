"""A mount with a keeper: what a user is told of it, and that it ends as any other mount does."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused, run_command
from kit.killing import DAEMON, KEPT, processes_of
from kit.mounts import (
    NATIVE,
    Engine,
    Mounted,
    PoolMaker,
    Session,
    abort_connection,
    each_engine,
    mounts_at,
    native_only,
)
from kit.namespaces import nobody_copies_mounts
from kit.posix import opened
from kit.processes import is_running, stop, wait_until
from pmemfs.control.prepared import daemon_words
from pmemfs.logs import JOURNAL, log_file
from pmemfs.mountinfo import mount_at
from pmemfs.units import KIB

pytestmark = [pytest.mark.mount]


HANGS = ("-o", "keeper,hang_timeout=3")


def kept_of(mounted: Mounted) -> dict[str, Any]:
    """What `info` says of the keeper and of deaths."""
    return dict(mounted.info()["kept"])


def log_of(mounted: Mounted) -> str:
    return log_file(str(mounted.pool)).read_text()


def abort(mounted: Mounted) -> None:
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    abort_connection(mount)


WAYS: dict[str, Callable[[Mounted], object]] = {
    "SIGTERM": lambda mounted: os.kill(mounted.pid, signal.SIGTERM),
    "umount": lambda mounted: run_command("umount", mounted.mountpoint),
    "pmemfs umount": lambda mounted: pmemfs("umount", mounted.mountpoint),
    "lazy umount": lambda mounted: run_command("umount", "--lazy", mounted.mountpoint),
    "abort": abort,
}


@pytest.mark.slow
@native_only
@pytest.mark.parametrize("kept", ["keeper", "no_keeper"])
def test_a_data_plane_that_stands_still_does_not_keep_a_signal_from_ending_the_mount(
    pools: PoolMaker, kept: str
) -> None:
    mounted = pools.mount(pools.create("fs0", "64M", "--mode", "fs"), "-o", kept)
    (mounted.mountpoint / "file").write_bytes(b"there")
    session = Session.of(mounted)
    stop(mounted.data_plane_pid)
    os.kill(mounted.pid, signal.SIGTERM)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    session.assert_ended()
    assert pmemfs("check", mounted.pool).code == 0
    assert "clean" in pmemfs_ok("info", mounted.pool)
    pools.mount(mounted.pool)
    assert (mounted.mountpoint / "file").read_bytes() == b"there"


@native_only
@pytest.mark.parametrize("way", WAYS)
def test_whatever_ends_a_mount_ends_its_keeper_and_leaves_the_pool_clean(
    pools: PoolMaker, way: str
) -> None:
    mounted = pools.mount(pools.create("fs0", "64M", "--mode", "fs"), *KEPT)
    (mounted.mountpoint / "file").write_bytes(b"there")
    session, keeper = Session.of(mounted), kept_of(mounted)["keeper_pid"]
    WAYS[way](mounted)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    # One that has closed everything is not found there any more.
    wait_until(lambda: not is_running(keeper), "so has its keeper")
    session.assert_ended()
    pools.mount(mounted.pool)
    assert (mounted.mountpoint / "file").read_bytes() == b"there"


@native_only
def test_after_umount_another_process_has_the_pool_at_once(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), *KEPT)
    kept_of(mounted)
    for _ in range(5):
        with nobody_copies_mounts():
            pmemfs_ok("umount", mounted.mountpoint)
            checked = pmemfs("check", mounted.pool)
        assert checked.code == 0, checked
        pools.mount(mounted.pool, *KEPT)


@each_engine
def test_info_tells_of_the_keeper(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create(size="16M"), "-o", "no_keeper")
    assert mounted.info()["kept"] is None
    said = pmemfs("info", mounted.mountpoint).out
    assert "none: the mount ends with each of its processes" in said
    pools.umount(mounted)
    if engine.name == "python":
        words = ("mount", mounted.pool, mounted.mountpoint, *engine.options, *KEPT)
        refused(pmemfs(*words), 2, "ends with its daemon")
        return
    mounted = pools.mount(mounted.pool, *KEPT)
    kept = kept_of(mounted)
    never = {"times": 0, "last": "never"}
    assert kept["daemon"] == kept["data_plane"] == kept["keeper"] == never
    assert f"pid {kept['keeper_pid']}; " in pmemfs("info", mounted.mountpoint).out
    assert "ECANCELED" in kept["promise"], "that is what uring promises"


@native_only
def test_a_mount_outlives_its_daemon_as_soon_as_its_command_has_ended(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    for _ in range(5):
        mounted = pools.mount(pool)
        # Asked for its number, the daemon would answer only after it has a keeper.
        (daemon,) = (pid for pid, kind in processes_of(pools.directory).items() if kind == DAEMON)
        os.kill(daemon, signal.SIGKILL)
        assert mounted.device.stat().st_size
        pools.umount(mounted)


@native_only
def test_who_mounts_a_pool_again_gets_the_keeper_that_there_is(pools: PoolMaker) -> None:
    words = ("-o", "keeper,no_standby,hang_timeout=600")
    mounted = pools.mount(pools.create(size="16M"), *words)
    other = pools.mountpoint("other")
    pmemfs_ok("mount", mounted.pool, other)
    assert mounts_at(other) == 1
    asked = pmemfs("mount", mounted.pool, pools.mountpoint("third"), "-o", "keeper,hang_timeout=7")
    refused(asked, 32, "in use", "hang_timeout=7 here")


def test_processes_have_no_numbers_in_another_pid_namespace(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), *KEPT)
    kept_of(mounted)
    elsewhere = ("unshare", "--pid", "--fork", BIN / "pmemfs", "info", mounted.mountpoint)
    assert json.loads(run_command(*elsewhere, "--json").out)["kept"]["keeper_pid"] == 0
    (line,) = (x for x in run_command(*elsewhere).out.splitlines() if x.startswith("keeper"))
    assert "pid of another pid namespace; " in line


@native_only
def test_a_mount_whose_keeper_was_killed_goes_on_and_ends_in_order(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), *KEPT)
    keeper = kept_of(mounted)["keeper_pid"]
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: mounted.info()["kept"]["keeper_pid"] is None, "the daemon has noticed")
    kept = mounted.info()["kept"]
    assert kept["keeper"]["times"] == 1
    assert "gone; died once at " in pmemfs("info", mounted.mountpoint).out
    if not os.path.exists(JOURNAL):
        assert f"the keeper (pid {keeper}) is gone" in log_of(mounted)
    session = Session.of(mounted)
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"x" * 4096, 0)
    pools.umount(mounted)
    session.assert_ended()


@native_only
@pytest.mark.parametrize("victim", ["daemon", "data plane"])
def test_a_death_before_the_mount_is_to_stay_ends_it(pools: PoolMaker, victim: str) -> None:
    pool, mountpoint = pools.create(size="16M"), pools.mountpoint()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(30)
    options = f"keeper,transport={pools.engine.transport}"
    words = daemon_words([str(pool), str(mountpoint), "-o", options])
    daemon = subprocess.Popen(
        [*words, "--starter-fd", str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    # Who lets go of this mount in a namespace of another test would be another process of it.
    with nobody_copies_mounts(), ours:
        theirs.close()
        assert "ready" in json.loads(ours.recv(64 * KIB))
        # It would stay if the command said so now.
        processes = {kind: pid for pid, kind in processes_of(pools.directory).items()}
        assert set(processes) == {"daemon", "data plane"}, "nobody keeps it yet"
        # A process that stands by looks like a daemon.
        os.kill(daemon.pid if victim == "daemon" else processes[victim], signal.SIGKILL)
        daemon.wait(60)
    wait_until(lambda: not processes_of(pools.directory), "nothing is left")
    if victim == "data plane":
        assert mount_at(str(mountpoint)) is None
        assert "clean" in pmemfs("info", pool).out
    pools.mount(pool)


FD = pytest.mark.parametrize("engine", NATIVE[1:], indirect=True, ids=str)
"""The transport by which no request is lost."""


@FD
@pytest.mark.usefixtures("engine")
def test_what_is_open_stays_open_when_the_data_plane_is_killed(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("fs0", "64M", "--mode", "fs"), *KEPT)
    kept_of(mounted)
    with (mounted.mountpoint / "file").open("w+b", buffering=0) as file:
        file.write(b"before")
        fcntl.flock(file, fcntl.LOCK_EX)
        planes = {mounted.data_plane_pid}
        for number in range(3):
            os.kill(mounted.data_plane_pid, signal.SIGKILL)
            file.write(str(number).encode())
            planes.add(mounted.data_plane_pid)
        assert len(planes) == 4
        with (mounted.mountpoint / "file").open("rb") as other:
            assert other.read() == b"before012"
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert mounted.info()["kept"]["data_plane"]["times"] == 3


@FD
@pytest.mark.usefixtures("engine")
def test_a_data_plane_that_dies_again_and_again_is_given_up(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), *KEPT)
    session, keeper = Session.of(mounted), kept_of(mounted)["keeper_pid"]
    for _ in range(5):
        os.kill(mounted.data_plane_pid, signal.SIGKILL)
        with opened(mounted.device) as fd:
            assert os.pread(fd, 1, 0) == b"\0"
    os.kill(mounted.data_plane_pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    wait_until(lambda: not is_running(keeper), "so has its keeper")
    assert not session.is_mounted
    if not os.path.exists(JOURNAL):
        assert "the data plane has died 6 times within a minute" in log_of(mounted)


@FD
@pytest.mark.usefixtures("engine")
def test_a_data_plane_that_stands_still_is_killed_and_started_again(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), *HANGS)
    kept_of(mounted)
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"x" * 4096, 0)
        plane = mounted.data_plane_pid
        stop(plane)
        # Nobody ends it but the daemon.
        assert os.pread(fd, 4096, 0) == b"x" * 4096
    assert mounted.data_plane_pid != plane
    assert mounted.info()["kept"]["data_plane"]["times"] == 1
    said = pmemfs("info", mounted.mountpoint).out
    assert "; died once at 20" in said
    if not os.path.exists(JOURNAL):
        log = log_of(mounted)
        assert "no progress was made for 3 s by" in log
        assert f"of the data plane (pid {plane}): it is killed" in log
        assert f"(pid {plane}) has died: it was ended by signal SIGKILL; it is started again" in log


@native_only
def test_a_daemon_that_stands_still_is_killed_and_another_one_serves(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("fs0", "64M", "--mode", "fs"), *HANGS)
    kept_of(mounted)
    daemon = mounted.pid
    stop(daemon)
    # Only a daemon can make a file, and nobody ends this one but the keeper.
    (mounted.mountpoint / "file").write_bytes(b"there")
    assert mounted.pid != daemon
    assert (mounted.mountpoint / "file").read_bytes() == b"there"
    assert mounted.info()["kept"]["daemon"]["times"] == 1
    if not os.path.exists(JOURNAL):
        assert f"the daemon (pid {daemon}) has said nothing for 3 s, and is killed" in log_of(
            mounted
        )
