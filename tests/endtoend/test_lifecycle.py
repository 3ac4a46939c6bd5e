"""How a mount begins and ends: nothing is left behind, whoever ends it and however."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import Mounted, PoolMaker, Session, abort_connection, each_engine, mounts_at
from kit.namespaces import nobody_copies_mounts
from kit.posix import opened
from kit.processes import end_process, is_running, stopped, wait_until
from pmemfs.control import REQUEST_LIMIT_BYTES
from pmemfs.logs import JOURNAL
from pmemfs.mountinfo import mount_at

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("engine")]


MNT_DETACH = 2


def abort(mounted: Mounted) -> None:
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    abort_connection(mount)


def command(*words: str) -> Callable[[Mounted], None]:
    """A way to end a mount: a program, with the mountpoint behind its words."""

    def run(mounted: Mounted) -> None:
        done = run_command(*words, mounted.mountpoint)
        assert done.code == 0, done.err

    return run


def send(number: signal.Signals) -> Callable[[Mounted], None]:
    """A way to end a mount: a signal to the daemon."""
    return lambda mounted: os.kill(mounted.pid, number)


WAYS_TO_END = {
    "pmemfs umount": command(str(BIN / "pmemfs"), "umount"),
    "pmemfs umount of the pool": lambda mounted: pmemfs_ok("umount", mounted.pool),
    "umount": command("umount"),
    "umount --lazy": command("umount", "--lazy"),
    "fusermount3 -u": command("fusermount3", "-u"),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "abort": abort,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS_TO_END))
def test_every_way_to_end_a_mount_leaves_nothing_and_a_clean_pool(
    pools: PoolMaker, way: str
) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    assert session.pool_state() == "dirty"
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"kept", 0)
    WAYS_TO_END[way](mounted)
    session.assert_ended("clean")
    assert mounts_at(mounted.mountpoint) == 0
    assert os.listdir(mounted.mountpoint) == []
    with opened(pools.mount(mounted.pool).device) as fd:
        assert os.pread(fd, 4, 0) == b"kept"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["SIGTERM", "abort", "umount --lazy"])
def test_a_mount_that_ends_under_load_ends_clean(pools: PoolMaker, way: str) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    script = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "print('open', flush=True)\n"
        "while True:\n"
        "    os.pwrite(fd, b'load' * 16384, 1 << 20)\n"
        "    os.pread(fd, 65536, 1 << 20)\n"
    )
    command = [sys.executable, "-c", script, mounted.device]
    loads = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(3)
    ]
    try:
        for load in loads:
            assert load.stdout is not None
            assert load.stdout.readline() == b"open\n"
        wait_until(lambda: mounted.info()["io"]["writes"] > 100, "there is load")
        WAYS_TO_END[way](mounted)
        if way == "umount --lazy":
            # It goes on serving whoever has it open.
            assert mounts_at(mounted.mountpoint) == 0
            time.sleep(0.3)
            assert is_running(session.pid)
            assert all(load.poll() is None for load in loads)
            for load in loads:
                load.kill()
        for load in loads:
            assert load.wait(timeout=60) != 0
    finally:
        for load in loads:
            load.kill()
            load.wait()
    session.assert_ended("clean")
    with opened(pools.mount(mounted.pool).device) as fd:
        assert os.pread(fd, 8, 1 << 20) == b"loadload"


@pytest.mark.slow
@each_engine
def test_two_pools_of_one_name_have_a_log_each_that_info_names(pools: PoolMaker) -> None:
    if os.path.exists(JOURNAL):
        pytest.skip("the log is in the journal")
    (pools.directory / "other").mkdir()
    both = [pools.mount(pools.create(name, "16M"), at=name.replace("/", "-"))
            for name in ("pmem0", "other/pmem0")]  # fmt: skip
    logs = [Path(mounted.info()["log"]) for mounted in both]
    for mounted, log in zip(both, logs, strict=True):
        assert str(mounted.mountpoint) in log.read_text()
        assert str(log) in pmemfs_ok("info", mounted.mountpoint)
    assert logs[0] != logs[1]


@pytest.mark.slow
@each_engine
def test_mount_returns_when_the_mount_answers(pools: PoolMaker) -> None:
    for name in ("one", "two", "three"):
        mounted = pools.mount(pools.create(name, "16M"))
        assert mounted.device.stat().st_size > 0
        assert mounted.info()["mountpoint"] == str(mounted.mountpoint)
        pools.umount(mounted)
        # And umount when the daemon has ended: all can be done at once again.
        assert pmemfs("check", mounted.pool).code == 0


@pytest.mark.slow
@each_engine
def test_a_mount_directly_after_umount_8_succeeds(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    for _ in range(5):
        with nobody_copies_mounts():
            assert run_command("umount", mounted.mountpoint).code == 0
            pools.mount(mounted.pool)
    assert mounted.info()["pool"]["mount_count"] == 6


@pytest.mark.slow
@each_engine
def test_a_mount_waits_for_a_daemon_that_is_ending(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    with nobody_copies_mounts(), ThreadPoolExecutor(1) as thread:
        with stopped(session.pid):
            # umount(8) would ask the daemon before it detaches.
            assert ctypes.CDLL(None).umount2(os.fsencode(mounted.mountpoint), MNT_DETACH) == 0
            mounting = thread.submit(pools.mount, mounted.pool)
            time.sleep(1.5)
            assert not mounting.done()
        mounting.result()
    assert mounted.pid != session.pid


@pytest.mark.quick
def test_a_busy_mount_is_not_unmounted_but_lazily(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    with opened(mounted.device) as fd:
        refused(pmemfs("umount", mounted.mountpoint), 32, str(mounted.mountpoint), "busy")
        assert mounted.pid == session.pid
        pmemfs_ok("umount", "--lazy", mounted.mountpoint)
        assert mounts_at(mounted.mountpoint) == 0
        assert os.pwrite(fd, b"still served", 0) == 12
        assert is_running(session.pid)
    session.assert_ended("clean")


def rows_of(pool: Path) -> list[tuple[str, str]]:
    """Where `pmemfs list` says that a pool is, and in what state."""
    rows = json.loads(pmemfs_ok("list", "--json"))
    return [(row["mountpoint"], row["state"]) for row in rows if row["pool"] == str(pool)]


@each_engine
def test_what_is_detached_and_still_used_is_said_so(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session, detached = Session.of(mounted), "detached, still in use"
    with opened(mounted.device):
        pmemfs_ok("umount", "--lazy", mounted.mountpoint)
        # Until then it is also where a new mount namespace of another test has a copy.
        wait_until(lambda: rows_of(mounted.pool) == [("", detached)], "it is nowhere any more")
        assert detached in pmemfs_ok("list")
        said = json.loads(pmemfs_ok("info", mounted.pool, "--json"))
        assert (said["is_detached"], said["pid"]) == (True, session.pid)
        assert detached in pmemfs_ok("info", mounted.pool)
        for name, code in (("pages", 1), ("stat", 1), ("umount", 32)):
            refused(pmemfs(name, mounted.pool), code, str(mounted.pool), detached)
    session.assert_ended("clean")
    assert rows_of(mounted.pool) == []
    assert json.loads(pmemfs_ok("info", mounted.pool, "--json"))["pool"]["state"] == "clean"


@each_engine
def test_a_pool_that_is_not_mounted_is_said_to_be_just_that(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    for name, code in (("pages", 1), ("stat", 1), ("umount", 32)):
        sentence = refused(pmemfs(name, pool), code)
        assert sentence.startswith(f"pmemfs: {pool} is not mounted; ")
        refused(pmemfs(name, pools.directory), code, "is not a pmemfs mount")


def stays(mounted: Mounted) -> bool:
    """Whether a mount in the foreground may end without that being a failure to mount. It answers
    before: as soon as the first of its workers runs."""
    kept = mounted.info()["kept"]
    return kept is None or kept["keeper_pid"] is not None


@contextmanager
def in_the_foreground(pools: PoolMaker) -> Iterator[tuple[Mounted, subprocess.Popen[str]]]:
    """A mount whose daemon is a child of ours that answers; what it logs is in its `stderr`."""
    mounted = Mounted(pools.create(size="16M"), pools.mountpoint())
    daemon = subprocess.Popen(
        [BIN / "pmemfs", "mount", "--foreground", *pools.engine.options, mounted.pool,
         mounted.mountpoint], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: mount_at(str(mounted.mountpoint)) is not None, "it is mounted")
        wait_until(mounted.device.exists, "it answers")
        wait_until(lambda: stays(mounted), "it stays")
        yield mounted, daemon
    finally:
        end_process(daemon.pid, seconds=0)


@each_engine
def test_a_mount_in_the_foreground_stays_logs_and_ends_on_sigterm(pools: PoolMaker) -> None:
    with in_the_foreground(pools) as (mounted, daemon):
        session = Session.of(mounted)
        assert session.pid == daemon.pid
        daemon.send_signal(signal.SIGTERM)
        _, log = daemon.communicate(timeout=60)
    assert daemon.returncode == 0
    assert "mounting on" in log
    assert "ending on SIGTERM" in log
    assert "Traceback" not in log
    session.assert_ended("clean")


@pytest.mark.parametrize("way", ["SIGTERM", "umount", "umount --lazy", "abort"])
@each_engine
def test_the_log_in_the_foreground_has_nothing_but_ours(pools: PoolMaker, way: str) -> None:
    with in_the_foreground(pools) as (mounted, daemon):
        session = Session.of(mounted)
        WAYS_TO_END[way](mounted)
        _, log = daemon.communicate(timeout=60)
    assert daemon.returncode == 0
    lines = log.splitlines()
    assert lines
    assert [line for line in lines if not line.startswith("pmemfs: ")] == []
    session.assert_ended("clean")


@each_engine
def test_a_mount_in_the_foreground_that_fails_says_why(pools: PoolMaker) -> None:
    path = pools.directory / "none"
    path.write_bytes(bytes(1 << 20))
    result = pmemfs("mount", "--foreground", path, pools.mountpoint())
    assert result.code == 32
    assert f"pmemfs create {path}" in result.err


def test_signals_that_come_while_a_mount_is_ending_leave_it_a_clean_end(pools: PoolMaker) -> None:
    for _ in range(5):
        mounted = pools.mount(pools.create("pmem0", "16M", "--force"))
        session = Session.of(mounted)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 3:
            with suppress(ProcessLookupError):
                os.kill(session.pid, number)
        session.assert_ended("clean")


@each_engine
def test_a_mount_that_fails_leaves_the_state_of_the_pool_as_it_was(pools: PoolMaker) -> None:
    for state in ("clean", "dirty"):
        pool = pools.create(state, "16M")
        if state == "dirty":
            Session.of(pools.mount(pool)).kill()
            pmemfs_ok("umount", pool)
        words = [sys.executable, "-m", "pmemfs.daemons.mountd", pool, pools.directory / "nowhere"]
        assert run_command(*words).code == 32
        assert json.loads(pmemfs_ok("info", pool, "--json"))["pool"]["state"] == state


@pytest.mark.slow
@each_engine
def test_a_dead_mount_is_listed_and_answered_for_in_a_sentence(pools: PoolMaker) -> None:
    alive = pools.mount(pools.create("alive", "16M"))
    dead = pools.mount(pools.create("dead", "16M", "--scheme", "on-demand"))
    session = Session.of(dead)
    session.kill()

    listed = {mount["pool"]: mount for mount in json.loads(pmemfs_ok("list", "--json"))}
    assert listed[str(alive.pool)]["state"] == "mounted"
    assert listed[str(alive.pool)]["pid"] == alive.pid
    assert listed[str(alive.pool)]["engine"] == pools.engine.name
    assert listed[str(dead.pool)]["state"] == "its daemon died"
    assert "pid" not in listed[str(dead.pool)]
    lines = {line.split()[1]: line for line in pmemfs_ok("list").splitlines()}
    assert lines[str(dead.pool)].endswith("its daemon died")
    assert lines[str(alive.pool)].endswith("mounted")

    for name in ("info", "pages"):
        for target in (dead.mountpoint, dead.pool):
            said = refused(pmemfs(name, target), 1, "does not answer: it has died")
            assert f"'pmemfs umount {dead.mountpoint}'" in said
    # The dead mount can be taken away as a living one, and its pool be looked at.
    pmemfs_ok("umount", dead.mountpoint)
    assert mounts_at(dead.mountpoint) == 0
    assert json.loads(pmemfs_ok("info", dead.pool, "--json"))["pool"]["state"] == "dirty"
    assert "state" in pmemfs_ok("info", dead.pool)
    assert alive.device.exists()


@pytest.mark.quick
@each_engine
def test_info_of_a_mount_tells_its_daemon_and_its_pool(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"), "-o", "allow_other,mode=640")
    session = Session.of(mounted)
    with opened(mounted.device) as fd:
        os.pwrite(fd, bytes(8192), 0)
        os.pread(fd, 4096, 0)
        os.fsync(fd)
    # A worker counts a request after it has answered it.
    wait_until(lambda: mounted.info()["io"]["fsyncs"] == 1, "the last request is counted")
    status = mounted.info()
    assert status == mounted.info() | {"uptime_seconds": status["uptime_seconds"]}
    assert status["pid"] == session.pid
    assert status["device"] == session.device
    assert status["engine"] == pools.engine.name
    assert not status["read_only"]
    assert "allow_other" in status["options"]
    assert "mode=640" in status["options"]
    io = {"reads": 1, "writes": 1, "fsyncs": 1, "read_bytes": 4096, "written_bytes": 8192}
    assert status["io"] == io
    assert status["pool"]["state"] == "dirty"
    assert status["pool"]["mount_count"] == 1
    text = pmemfs_ok("info", mounted.pool)
    assert str(mounted.mountpoint) in text
    assert str(session.pid) in text


@each_engine
def test_a_stopped_daemon_is_answered_for_and_not_waited_for_forever(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    with stopped(session.pid):
        # A mount of it elsewhere doesn't have to ask it.
        other = pools.mountpoint("other")
        refused(pmemfs("mount", mounted.pool, other), 32, "in use", str(session.pid))
        # Nor has taking it away.
        pmemfs_ok("umount", "--lazy", mounted.mountpoint, timeout=60)
        assert mounts_at(mounted.mountpoint) == 0
    session.assert_ended("clean")


def test_garbage_on_the_control_socket_harms_nobody(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    session = Session.of(mounted)
    requests = (
        b"\n", b"{}\n", b"[]\n", b"null\n", b'{"method": []}\n', b'{"method": "stop"}\n',
        b'{"method": "pages", "params": {"hottest": "x"}}\n', b'{"method": "pages"}\n',
        b'{"method": "pages", "params": {"hottest": -1}}\n',
        b'{"method": "info", "params": {"x": 1}}\n', b'{"method": "info", "params": 3}\n',
        b"\xff\xfe\n", b"[" * 30000 + b"\n",
    )  # fmt: skip
    for request in requests:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(session.socket))
            client.sendall(request)
            with client.makefile("rb") as lines:
                answer = json.loads(lines.readline())
            assert len({"error", "result"} & answer.keys()) == 1, request
    # A line without an end, and clients that go away before they are answered.
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(session.socket))
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(b"x" * 2 * REQUEST_LIMIT_BYTES)
            assert client.recv(1) == b""
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(session.socket))
            client.sendall(b'{"method": "info"}\n' * 20)
    assert mounted.pid == session.pid
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(str(session.socket))
        pools.umount(mounted)
        session.assert_ended()
