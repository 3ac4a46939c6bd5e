"""`pmemfs upgrade`: other processes take a mount over, planned, and no request fails."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kit.caches import cache_of, new_origin
from kit.commands import BIN, pmemfs, pmemfs_ok, refused
from kit.killing import DAEMON, KEPT, Load, processes_of
from kit.mounts import Mounted, PoolMaker, native_only
from kit.pin_clients import PinClient
from kit.posix import opened
from kit.processes import is_running, stop, wait_until
from pmemfs.control.client import RemoteError, call
from pmemfs.control.places import socket_path
from pmemfs.dataplane.layouts import SIGNATURE
from pmemfs.errors import NoAnswer
from pmemfs.logs import JOURNAL, log_file
from pmemfs.media.filesystem import FORMAT_VERSION
from pmemfs.mount.processes import bare_python_words, python_words
from pmemfs.mountinfo import mount_at
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "3"))
OTHER = """
import sys
from pmemfs.daemons import mountd
from pmemfs.fuse import occupying, planes
{change}
mountd.main()
"""
"""The daemon of another version, which differs in something."""
KNOWS = {"memory": SIGNATURE, "label": 99, "fs": FORMAT_VERSION, "cache": 1}


def kept(pools: PoolMaker, *options: str) -> Mounted:
    mounted = pools.mount(pools.create("fs0", "128M", "--mode", "fs"), *(options or KEPT))
    if not options:
        wait_until(lambda: bool(mounted.info()["kept"]["keeper_pid"]), "the keeper is there")
    return mounted


def processes(mounted: Mounted) -> list[int]:
    info = mounted.info()
    return [info["pid"], info["data_plane_pid"], info["kept"]["keeper_pid"]]


def upgraded(mounted: Mounted) -> dict[str, Any]:
    return dict(json.loads(pmemfs_ok("upgrade", mounted.mountpoint, "--json")))


def ask(mounted: Mounted, **params: Any) -> Any:
    """What the daemon says to a program that wants to take the mount over."""
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    words = {
        "daemon": python_words("pmemfs.daemons.mountd"),
        "keeper": bare_python_words("pmemfs.daemons.keeperd"),
        "knows": KNOWS,
    }
    return call(socket_path(mount), "upgrade", **{"timeout_seconds": 60, **words, **params})


@native_only
def test_other_processes_serve_what_is_open(pools: PoolMaker) -> None:
    mounted = kept(pools)
    with (mounted.mountpoint / "file").open("w+b", buffering=0) as file:
        file.write(b"before")
        fcntl.flock(file, fcntl.LOCK_EX)
        before = processes(mounted)
        done = upgraded(mounted)
        assert done["is_whole"]
        now = processes(mounted)
        assert now == [done["pid"], done["data_plane_pid"], done["keeper_pid"]]
        assert not set(before) & set(now)
        for pid in before:
            wait_until(lambda pid=pid: not is_running(pid), "what was replaced has ended")
        file.write(b" and after")
        with (mounted.mountpoint / "file").open("rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (mounted.mountpoint / "file").read_bytes() == b"before and after"
    deaths = mounted.info()["kept"]
    assert [deaths[whose]["times"] for whose in ("daemon", "data_plane", "keeper")] == [0, 0, 0]
    pools.umount(mounted)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert pmemfs("check", mounted.pool).code == 0


@native_only
def test_upgrades_leave_no_process_behind(pools: PoolMaker) -> None:
    mounted = kept(pools)
    for _ in range(2):
        upgraded(mounted)
    # The one that serves, and the one that waits for its end.
    wait_until(
        lambda: list(processes_of(pools.directory).values()).count(DAEMON) == 2,
        "what waited for the end of a daemon of before has ended, too",
    )


@native_only
def test_a_daemon_that_dies_after_an_upgrade_leaves_the_data_plane_as_it_is(
    pools: PoolMaker,
) -> None:
    mounted = kept(pools)
    before = upgraded(mounted)
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: mounted.info()["pid"] != before["pid"], "another daemon serves it")
    wait_until(lambda: not mounted.info()["kept"]["is_upgrading"], "it upgrades nothing")
    assert mounted.data_plane_pid == before["data_plane_pid"]


@native_only
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ('planes._DAEMON = "pmemfs.daemons.absent"', "absent: no such file"),
        ("planes.bare_python_words = lambda _: ['/bin/false']", "operation not permitted"),
        (
            "planes.bare_python_words = lambda _: [sys.executable, '-c', 'exit(\"no such cpu\")']",
            "no such cpu",
        ),
        ('occupying._CALLERS = "pmemfs.daemons.absent"', "absent: no such file"),
        ("mountd.server.listening_again = lambda *_: 1 // 0", "ZeroDivisionError"),
    ],
)
def test_a_version_that_can_not_serve_leaves_the_mount_to_that_of_before(
    pools: PoolMaker, tmp_path: Path, change: str, why: str
) -> None:
    if "occupying" in change and pools.engine.transport != "uring":
        pytest.skip("only rings are occupied")
    mounted = kept(pools)
    (mounted.mountpoint / "file").write_bytes(b"there")
    before = mounted.pid
    other = tmp_path / "other.py"
    other.write_text(OTHER.format(change=change))
    ask(mounted, daemon=[sys.executable, str(other)])
    wait_until(lambda: not is_running(before), "the daemon has ended")
    wait_until(lambda: mounted.info()["kept"]["daemon"]["times"] == 1, "the next one has, too")
    (mounted.mountpoint / "file").write_bytes(b"written")
    assert (mounted.mountpoint / "file").read_bytes() == b"written"
    assert mounted.data_plane_pid
    if not os.path.exists(JOURNAL):
        log = log_file(str(mounted.pool)).read_text()
        assert why in log
        assert "that of before takes it over again" in log
        assert ("Traceback" in log) == ("Error" in why), "only a bug has one"
    assert upgraded(mounted)["is_whole"]
    pools.umount(mounted)
    assert pmemfs("check", mounted.pool).code == 0


@native_only
def test_an_older_kernel_keeps_the_data_plane_that_has_read_requests(
    pools: PoolMaker, tmp_path: Path
) -> None:
    mounted = kept(pools)
    before = processes(mounted)
    other = tmp_path / "other.py"
    other.write_text(OTHER.format(change="from pmemfs.fuse import wire; wire.RESEND_MINOR = 9999"))
    ask(mounted, daemon=[sys.executable, str(other)])
    wait_until(lambda: not is_running(before[0]), "the daemon has ended")
    wait_until(lambda: not mounted.info()["kept"]["is_upgrading"], "the next one has done it")
    assert processes(mounted)[1] == before[1]
    (mounted.mountpoint / "file").write_bytes(b"written")
    assert (mounted.mountpoint / "file").read_bytes() == b"written"
    if not os.path.exists(JOURNAL):
        assert "this kernel, older than 6.9" in log_file(str(mounted.pool)).read_text()


@native_only
def test_what_a_client_has_pinned_stays_pinned(pools: PoolMaker) -> None:
    mounted = kept(pools)
    path = mounted.mountpoint / "file"
    path.write_bytes(b"p" * MIB)
    client = PinClient(mounted.mountpoint)
    pin = client.pin(str(path))
    for _ in range(2):
        upgraded(mounted)
    path.unlink()
    # Where they are taken from, nothing else gets these frames.
    (mounted.mountpoint / "other").write_bytes(b"o" * 100 * MIB)
    assert pin.read(0, MIB) == b"p" * MIB
    assert [len(call_pins(mounted)), mounted.info()["pins"]["pin_count"]] == [1, 1]
    pin.end()
    wait_until(lambda: not mounted.info()["pins"]["pin_count"], "it has ended")
    client.close()


def call_pins(mounted: Mounted) -> list[Any]:
    """All pins that the daemon of now knows."""
    client = PinClient(mounted.mountpoint)
    try:
        return client.pins()
    finally:
        client.close()


@native_only
def test_a_cache_goes_on_with_its_origin(pools: PoolMaker, tmp_path: Path) -> None:
    origin = new_origin(tmp_path / "origin")
    before = origin.read_bytes()
    mounted = pools.mount(cache_of(pools, origin), *KEPT)
    wait_until(lambda: bool(mounted.info()["kept"]["keeper_pid"]), "the keeper is there")
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"w" * 8192, 4096)
        assert upgraded(mounted)["is_whole"]
        os.pwrite(fd, b"v" * 4096, 16384)
        # From the cache and from the origin.
        assert os.pread(fd, 16384, 0) == before[:4096] + b"w" * 8192 + before[12288:16384]
        end = len(before) - 4096
        assert os.pread(fd, 4096, end) == before[end:]
    pmemfs_ok("flush", mounted.mountpoint)
    assert origin.read_bytes()[4096:12288] == b"w" * 8192
    assert origin.read_bytes()[16384:20480] == b"v" * 4096
    pools.umount(mounted)


@native_only
def test_counts_go_on_when_another_daemon_counts(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = pools.mount(cache_of(pools, new_origin(tmp_path / "origin")), *KEPT)

    def counts() -> list[int]:
        said = mounted.info()
        cache = said["cache"]
        return [cache[name] for name in ("misses", "fetched", "inserted")] + [said["io"]["reads"]]

    with opened(mounted.device) as fd:
        os.pread(fd, 64 * 4096, 0)
        before = counts()
        assert before[0]
        daemon = mounted.pid
        os.kill(daemon, signal.SIGKILL)
        wait_until(lambda: mounted.pid != daemon, "another one serves it")
        after_death = counts()
        upgraded(mounted)
        after_upgrade = counts()
        for now, then in ((after_death, before), (after_upgrade, after_death)):
            assert all(map(int.__ge__, now, then)), (now, then)
        os.pread(fd, 64 * 4096, 4 << 20)
        assert counts()[0] > after_upgrade[0]


def test_a_service_is_told_of_the_keeper_before_another_one_ends(
    pools: PoolMaker, tmp_path: Path
) -> None:
    """systemd ends what the main process of a service leaves."""
    pool, mountpoint = pools.create("pmem0", "32M"), pools.mountpoint()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        words = [BIN / "pmemfs", "mount", "--foreground", *KEPT, pool, mountpoint]
        daemon = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        assert notify.recv(100) == b"READY=1"
        keepers = [int(notify.recv(100).removeprefix(b"MAINPID="))]
        mounted = Mounted(pool, mountpoint)
        for _ in range(2):
            keeper = upgraded(mounted)["keeper_pid"]
            assert notify.recv(100) == b"MAINPID=%d" % keeper
            keepers.append(keeper)
        assert len(set(keepers)) == 3
        pools.umount(mounted)
        daemon.wait(30)


@pytest.mark.slow
@native_only
def test_no_program_notices_more_than_a_pause(pools: PoolMaker, tmp_path: Path) -> None:
    mounted = kept(pools)
    load = Load(tmp_path)
    with load.working():
        load.add_file_system(mounted.mountpoint)
        for _ in range(ROUNDS):
            assert upgraded(mounted)["is_whole"]
    assert load.outcome.wrong == []
    pools.umount(mounted)
    assert pmemfs("check", mounted.pool).code == 0


@native_only
def test_a_mount_whose_keeper_was_killed_gets_another_one(pools: PoolMaker) -> None:
    mounted = kept(pools)
    os.kill(mounted.info()["kept"]["keeper_pid"], signal.SIGKILL)
    wait_until(lambda: mounted.info()["kept"]["keeper_pid"] is None, "its daemon has noticed")
    assert upgraded(mounted)["keeper_pid"]
    before = mounted.pid
    os.kill(before, signal.SIGKILL)
    assert os.listdir(mounted.mountpoint) == []
    wait_until(lambda: mounted.info()["pid"] != before, "another daemon serves it")


@native_only
def test_nothing_happens_after_the_command_has_given_up(pools: PoolMaker) -> None:
    mounted = kept(pools)
    before, daemon = processes(mounted), mounted.pid
    stop(daemon)
    try:
        with pytest.raises(NoAnswer):
            ask(mounted, timeout_seconds=0.5)
    finally:
        os.kill(daemon, signal.SIGCONT)
    # What is asked later is carried out, and nothing else is under way.
    with pytest.raises(RemoteError, match="share other memory"):
        ask(mounted, knows={**KNOWS, "memory": 1})
    assert processes(mounted) == before
    if not os.path.exists(JOURNAL):
        # Two who ask are answered in any order.
        said = "the command that asked for it has given up"
        log = log_file(str(mounted.pool))
        wait_until(lambda: said in log.read_text(), "the log says why")


@native_only
def test_the_command_says_that_a_data_plane_which_stands_still_was_not_replaced(
    pools: PoolMaker,
) -> None:
    if pools.engine.transport != "uring":
        pytest.skip("the other transport lets it be killed without any loss")
    mounted = kept(pools)
    before = processes(mounted)
    stop(before[1])
    try:
        said = pmemfs("upgrade", mounted.mountpoint)
        assert said.code == 0
        assert "the data plane is still that of before" in said.err
        now = processes(mounted)
        assert now[1] == before[1]
        assert not {before[0], before[2]} & set(now)
    finally:
        os.kill(before[1], signal.SIGCONT)
    assert upgraded(mounted)["is_whole"]


@native_only
def test_a_mount_without_a_keeper_is_refused(pools: PoolMaker) -> None:
    mounted = kept(pools, "-o", "no_keeper")
    before = mounted.pid
    refused(pmemfs("upgrade", mounted.mountpoint), 1, "cannot upgrade", "it has no keeper")
    assert mounted.pid == before


@native_only
@pytest.mark.parametrize(
    ("what", "version", "why"),
    [
        ("memory", 1, "share other memory"),
        ("label", 0, "does not know format 1 of pools"),
        ("fs", 2, f"stores mode fs in format 2, and this pool has format {FORMAT_VERSION}"),
    ],
)
def test_a_version_that_can_not_go_on_is_refused(
    pools: PoolMaker, what: str, version: int, why: str
) -> None:
    mounted = kept(pools)
    before = processes(mounted)
    with pytest.raises(RemoteError, match=why):
        ask(mounted, knows={**KNOWS, what: version})
    with pytest.raises(RemoteError, match="can't run /nowhere/python"):
        ask(mounted, daemon=["/nowhere/python"])
    with pytest.raises(RemoteError, match="no keeper of that version could be started"):
        ask(mounted, keeper=["/bin/false"])
    for words in ["/bin/true\0"], ["\ud800"]:
        with pytest.raises(RemoteError, match="can't have such a word"):
            ask(mounted, daemon=words)
        with pytest.raises(RemoteError, match="can't have such a word"):
            ask(mounted, keeper=words)
    assert processes(mounted) == before


@native_only
def test_a_new_daemon_that_fails_leaves_the_mount_to_the_version_of_before(
    pools: PoolMaker,
) -> None:
    mounted = kept(pools)
    (mounted.mountpoint / "file").write_bytes(b"there")
    before = mounted.pid
    ask(mounted, daemon=["/bin/false"])
    wait_until(lambda: not is_running(before), "the daemon has ended")
    assert (mounted.mountpoint / "file").read_bytes() == b"there"
    wait_until(lambda: mounted.info()["kept"]["daemon"]["times"] == 1, "its death is known")
    upgraded(mounted)
    assert (mounted.mountpoint / "file").read_bytes() == b"there"


@pytest.mark.slow
@native_only
def test_a_kill_during_an_upgrade_leaves_the_mount_served(
    pools: PoolMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")
    chance, mounted = random.Random(17), kept(pools)
    for number in range(2 * ROUNDS):
        command = [BIN / "pmemfs", "upgrade", mounted.mountpoint]
        upgrading = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        time.sleep(chance.uniform(0.2, 1.5))
        victims = chance.choice([("daemon",), ("data plane",), ("daemon", "data plane")])
        for pid, kind in processes_of(pools.directory).items():
            # Those that stand by as well, which look alike.
            if kind in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        (mounted.mountpoint / f"file{number}").write_bytes(b"there")
        _, said = upgrading.communicate(timeout=120)
        assert "Traceback" not in said
        assert upgrading.returncode == 0 or "is served as before" in said, said
    for number in range(2 * ROUNDS):
        assert (mounted.mountpoint / f"file{number}").read_bytes() == b"there"
    pools.umount(mounted)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert pmemfs("check", mounted.pool).code == 0
