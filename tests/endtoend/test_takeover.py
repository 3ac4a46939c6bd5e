"""The daemon of a mount is killed, and its successor goes on with all that programs have of it."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs_here, run_command
from kit.killing import children, mount_kept, open_files
from kit.mounts import NATIVE_ONLY, Mounted, PoolMaker, Session
from kit.posix import opened
from kit.processes import is_running, wait_until
from pmemfs.control.standby import NAME
from pmemfs.errors import PmemfsError
from pmemfs.logs import log_file
from pmemfs.medium.holders import holders_of

pytestmark = [pytest.mark.mount, pytest.mark.slow, *NATIVE_ONLY]

MANY_INODES = 2000
MANY_FILES = 200


def die(mounted: Mounted, *, both: bool = False) -> None:
    """Kill the daemon, or both processes, and wait for successors."""
    pid = mounted.pid
    victims = [mounted.data_plane_pid] if both else []
    for victim in (*victims, pid):
        os.kill(victim, 9)
    wait_for_successor(mounted, {pid, *victims})


def wait_for_successor(mounted: Mounted, dead: set[int]) -> None:
    def is_served() -> bool:
        with suppress(OSError, PmemfsError, AssertionError):
            info = mounted.info()
            return not dead & {info["pid"], info["data_plane_pid"]}
        return False

    wait_until(is_served, "a successor answers")


def mount(pools: PoolMaker, mode: str, *options: object, size: str = "64M") -> Mounted:
    return mount_kept(pools, pools.create("pmem0", size, "--mode", mode), *options)


def end(pools: PoolMaker, mounted: Mounted) -> None:
    """Unmount, and look whether all is well."""
    session = Session.of(mounted)
    pools.umount(mounted)
    session.assert_ended()
    check(mounted)


def check(mounted: Mounted) -> None:
    # Its mount has ended; its processes may take a moment more.
    wait_until(lambda: not holders_of(str(mounted.pool)), "nobody has the pool open")
    said = pmemfs_here("check", mounted.pool)
    assert "no errors" in said
    if "file system" in said:
        assert " 0 leaked" in said


def remount(mounted: Mounted, words: str) -> None:
    pmemfs_here("mount", "-o", f"remount,{words}", mounted.mountpoint)


def said_in_log(mounted: Mounted) -> str:
    return log_file(str(mounted.pool)).read_text()


def test_open_files_go_on_with_names_and_without(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs")
    top = mounted.mountpoint
    with ExitStack() as files:
        named = files.enter_context(opened(top / "named", os.O_RDWR | os.O_CREAT))
        gone = files.enter_context(opened(top / "gone", os.O_RDWR | os.O_CREAT))
        directory = files.enter_context(opened(top, os.O_RDONLY | os.O_DIRECTORY))
        for fd in (named, gone):
            os.pwrite(fd, b"acknowledged" * 1000, 0)
        (top / "gone").unlink()
        for both in (False, True):
            die(mounted, both=both)
            for fd in (named, gone):
                assert os.pread(fd, 24000, 0) == b"acknowledged" * 1000
                assert os.pwrite(fd, b"more", 12000) == 4
                os.ftruncate(fd, 12000)
            assert os.fstat(gone).st_nlink == 0
            assert os.listdir(directory) == ["named"]
    end(pools, mounted)


def test_what_was_forgotten_is_freed_by_the_successor(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs")
    before = os.statvfs(mounted.mountpoint)
    with opened(mounted.mountpoint / "gone", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, bytes(1 << 20), 0)
        (mounted.mountpoint / "gone").unlink()
        die(mounted)
        assert os.statvfs(mounted.mountpoint).f_bfree < before.f_bfree - 200

    def is_free() -> bool:
        now = os.statvfs(mounted.mountpoint)
        return now.f_bfree >= before.f_bfree - 2 and now.f_ffree >= before.f_ffree - 2

    wait_until(is_free, "its frames and its inode are free")
    end(pools, mounted)


def test_many_known_inodes_and_open_files_are_still_there(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs", size="256M")
    top = mounted.mountpoint
    names = [top / f"{number % 10}" / f"{number}" for number in range(MANY_INODES)]
    for directory in range(10):
        (top / str(directory)).mkdir()
    for number, name in enumerate(names):
        name.write_bytes(b"%d" % number)
    inodes = [name.stat().st_ino for name in names]
    with ExitStack() as files:
        some = [files.enter_context(opened(name, os.O_RDWR)) for name in names[:MANY_FILES]]
        die(mounted)
        for number, fd in enumerate(some):
            assert os.pread(fd, 20, 0) == b"%d" % number
        assert [name.stat().st_ino for name in names] == inodes
        assert sorted(os.listdir(top / "3")) == sorted(str(n) for n in range(3, MANY_INODES, 10))
    end(pools, mounted)


HOLD = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
{lock}
print("locked", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("lock", "try_lock"),
    [("fcntl.flock(fd, fcntl.LOCK_EX)", fcntl.flock),
     ("fcntl.lockf(fd, fcntl.LOCK_EX)", fcntl.lockf)],
    ids=["flock", "fcntl"],
)  # fmt: skip
def test_locks_are_held_across_a_death(pools: PoolMaker, lock: str, try_lock: object) -> None:
    mounted = mount(pools, "fs")
    path = mounted.mountpoint / "locked"
    path.touch()
    words = [sys.executable, "-c", HOLD.format(lock=lock), path]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        die(mounted)
        with opened(path, os.O_RDWR) as fd:
            with pytest.raises(BlockingIOError):
                try_lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[operator]
            holder.communicate(b"\n")
            try_lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[operator]
    end(pools, mounted)


def test_remounted_options_hold_after_a_death(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs")
    path = mounted.mountpoint / "f"
    path.write_bytes(b"before")
    remount(mounted, "ro,noatime")
    die(mounted)
    assert {"ro", "noatime"} <= set(mounted.info()["options"].split(","))
    with pytest.raises(OSError, match="Read-only"):
        path.write_bytes(b"after")
    assert path.read_bytes() == b"before"
    assert Session.of(mounted).pool_state() == "clean"
    remount(mounted, "rw")
    path.write_bytes(b"after")
    die(mounted)
    path.write_bytes(b"after that")
    assert path.read_bytes() == b"after that"
    end(pools, mounted)


def test_a_mount_that_is_only_read_goes_on(pools: PoolMaker) -> None:
    pool = pools.create("pmem0", "64M", "--mode", "fs")
    first = pools.mount(pool)
    (first.mountpoint / "f").write_bytes(b"content")
    pools.umount(first)
    image = pool.read_bytes()
    mounted = mount_kept(pools, pool, "-o", "ro")
    with opened(mounted.mountpoint / "f", os.O_RDONLY) as fd:
        die(mounted)
        assert os.pread(fd, 7, 0) == b"content"
        with pytest.raises(OSError, match="Read-only"):
            (mounted.mountpoint / "f").write_bytes(b"other")
    pools.umount(mounted)
    assert pool.read_bytes() == image


def test_the_device_of_mode_block_keeps_what_was_set_of_it(pools: PoolMaker) -> None:
    mounted = mount(pools, "block")
    os.chmod(mounted.device, 0o640)
    os.utime(mounted.device, ns=(5, 7))
    with opened(mounted.device, os.O_RDWR) as fd:
        os.pwrite(fd, b"acknowledged", 4096)
        os.chmod(mounted.device, 0o600)
        for both in (False, True):
            die(mounted, both=both)
            status = mounted.device.stat()
            assert stat.S_IMODE(status.st_mode) == 0o600
            assert os.pread(fd, 12, 4096) == b"acknowledged"
            os.fsync(fd)
    end(pools, mounted)


def test_a_full_pool_goes_on(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs", size="16M")
    path = mounted.mountpoint / "large"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        at = 0
        with suppress(OSError):
            while True:
                at += os.pwrite(fd, b"x" * 65536, at)
        die(mounted)
        with pytest.raises(OSError, match="No space"):
            os.pwrite(fd, b"y" * 65536, at)
        assert os.pread(fd, 10, 0) == b"x" * 10
        path.unlink()
        die(mounted)
        assert os.pread(fd, 10, at - 10) == b"x" * 10
    wait_until(lambda: os.statvfs(mounted.mountpoint).f_bfree > at // 4096, "its frames are free")
    path.write_bytes(b"z" * at)
    end(pools, mounted)


def test_a_mount_that_is_unmounted_while_nobody_serves_it_ends_clean(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs")
    (mounted.mountpoint / "f").write_bytes(b"content")
    session = Session.of(mounted)
    os.kill(session.pid, 9)
    assert run_command("umount", mounted.mountpoint).code == 0
    wait_until(lambda: session.pool_state() == "clean", "the successor has ended")
    wait_until(lambda: not is_running(session.pid), "it is gone")
    again = pools.mount(mounted.pool)
    assert (again.mountpoint / "f").read_bytes() == b"content"
    pools.umount(again)
    check(mounted)


def test_a_mount_that_is_killed_while_it_ends_has_ended(pools: PoolMaker) -> None:
    """A signal may come before the daemon has begun to end, and then it was in vain."""
    for delay in (0.0, 0.003, 0.01, 0.03, 0.1):
        is_new = delay == 0.0
        mounted = mount(pools, "fs") if is_new else mount_kept(pools, pools.directory / "pmem0")
        (mounted.mountpoint / "f").write_bytes(b"content")
        session = Session.of(mounted)
        os.kill(session.pid, 15)
        time.sleep(delay)
        with suppress(ProcessLookupError):
            os.kill(session.pid, 9)

        wait_until(partial(has_ended_or_goes_on, mounted, session), "it ends, or goes on")
        try:
            if session.is_mounted:
                pools.umount(mounted)
        except (AssertionError, PmemfsError):
            # The successor may have known of the signal, and end it just now.
            wait_until(partial(has_ended, session), "it has ended")
        check(mounted)


def has_ended(session: Session) -> bool:
    return not session.is_mounted and session.pool_state() == "clean"


def has_ended_or_goes_on(mounted: Mounted, before: Session) -> bool:
    return has_ended(before) or pid_of_server(mounted) not in (before.pid, None)


def pid_of_server(mounted: Mounted) -> int | None:
    """The daemon; None while none answers, such as of a mount that ends just now."""
    with suppress(OSError, PmemfsError, AssertionError):
        return mounted.pid
    return None


def test_a_signal_ends_the_mount_also_while_it_is_taken_over(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs")
    for delay in (0.01, 0.02, 0.04, 0.08):
        session, standby = Session.of(mounted), standby_of(mounted)
        assert standby is not None
        os.kill(session.pid, 9)
        time.sleep(delay)
        os.kill(standby, 15)
        wait_until(partial(has_ended_or_goes_on, mounted, session), "it ends, or goes on")
        if session.is_mounted:
            # It has come before that process was more than one that waits, or ends it just now.
            assert pid_of_server(mounted) in (standby, None)
            with suppress(ProcessLookupError):
                os.kill(standby, 15)
        wait_until(lambda: not is_running(standby), "it has ended")  # noqa: B023
        check(mounted)
        assert not session.is_mounted
        mounted = mount_kept(pools, mounted.pool)
    end(pools, mounted)


# The standby


def standby_of(mounted: Mounted) -> int | None:
    """The process that waits: a child of the daemon with nothing but a socket. It has just been
    forked, maybe, and so it is waited for until it waits."""
    info = mounted.info()
    for pid in children(info["pid"]):
        with suppress(OSError):
            if pid not in (info["data_plane_pid"], info["kept"]["keeper_pid"]):
                wait_until(lambda: comm_of(pid) == NAME, "it waits")  # noqa: B023
                return pid
    return None


def comm_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_process_that_waits_takes_over_and_another_one_waits_then(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs")
    seen = set()
    for _ in range(3):
        standby = standby_of(mounted)
        assert standby is not None
        assert standby not in seen
        seen.add(standby)
        assert comm_of(standby) == NAME != comm_of(mounted.pid)
        kinds = {name.partition(":")[0] for name in open_files(standby)}
        assert kinds == {"/dev/null", "socket"}
        die(mounted)
        assert mounted.pid == standby
    last = standby_of(mounted)
    assert last is not None
    end(pools, mounted)
    wait_until(lambda: not is_running(last), "the one that waits has ended with the mount")


def test_without_a_process_that_waits_a_new_one_is_started(pools: PoolMaker) -> None:
    mounted = mount(pools, "fs")
    standby = standby_of(mounted)
    assert standby is not None
    os.kill(standby, 9)
    die(mounted)
    assert mounted.pid != standby
    end(pools, mounted)
    mounted = mount_kept(pools, mounted.pool, "-o", "no_standby")
    assert standby_of(mounted) is None
    die(mounted)
    assert standby_of(mounted) is None
    end(pools, mounted)


def test_the_process_that_waits_ends_by_no_signal_and_when_nobody_can_call_it(
    pools: PoolMaker,
) -> None:
    mounted = mount(pools, "fs")
    standby = standby_of(mounted)
    assert standby is not None
    for number in (1, 2, 15):
        os.kill(standby, number)
    time.sleep(0.1)
    assert is_running(standby)
    keeper, daemon = mounted.info()["kept"]["keeper_pid"], mounted.pid
    os.kill(keeper, 9)
    (mounted.mountpoint / "f").write_bytes(b"content")
    os.kill(daemon, 9)
    wait_until(lambda: not is_running(standby), "it has ended")


def test_a_service_lasts_as_long_as_its_keeper_and_logs_where_it_did(
    pools: PoolMaker, tmp_path: Path
) -> None:
    """systemd ends a service with its main process, which is the daemon until it says otherwise."""
    pool, mountpoint = pools.create("pmem0", "32M", "--mode", "fs"), pools.mountpoint()
    said = tmp_path / "stderr"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, said.open("wb") as stderr:
        notify.bind(str(tmp_path / "notify"))
        notify.settimeout(30)
        words = [BIN / "pmemfs", "mount", "--foreground", "-o", "keeper", *pools.engine.options]
        daemon = subprocess.Popen(
            [*words, pool, mountpoint],
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}, stderr=stderr,
        )  # fmt: skip
        assert notify.recv(100) == b"READY=1"
        keeper = int(notify.recv(100).removeprefix(b"MAINPID="))
        mounted = Mounted(pool, mountpoint)
        assert mounted.info()["kept"]["keeper_pid"] == keeper
        daemon.kill()
        daemon.wait()
        wait_for_successor(mounted, {daemon.pid})
        assert "taking over" in said.read_text()
        # As systemd ends it: every process of the service, and none of them twice.
        successor = mounted.pid
        os.kill(keeper, signal.SIGTERM)
        os.kill(successor, signal.SIGTERM)
        wait_until(lambda: not is_running(keeper), "the keeper has ended")
        notify.setblocking(False)
        with pytest.raises(BlockingIOError):
            notify.recv(100)
    assert "unmounted, clean" in said.read_text()
    check(mounted)


# Under way


@pytest.mark.parametrize("delay", [0.1, 0.2])
@pytest.mark.parametrize("mode", ["fs", "block"])
def test_a_growth_that_is_under_way_is_whole_or_not_at_all(
    pools: PoolMaker, mode: str, delay: float
) -> None:
    mounted = mount(pools, mode, size="32M")
    path = mounted.mountpoint / "f" if mode == "fs" else mounted.device
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"before" * 10000, 0)
        words = [sys.executable, "-m", "pmemfs", "resize", mounted.mountpoint, "--size", "256M"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as resizing:
            # The command takes most of this time for its own start.
            time.sleep(delay)
            die(mounted)
            resizing.communicate()
        grown = mounted.info()["pool"]["size_bytes"]
        assert grown in (32 << 20, 256 << 20)
        if resizing.returncode == 0:
            assert grown == 256 << 20
        pmemfs_here("resize", mounted.mountpoint, "--size", "256M")
        assert os.pread(fd, 60000, 0) == b"before" * 10000
        if mode == "block":
            size = os.fstat(fd).st_size
            assert size > 200 << 20
            assert not os.pread(fd, 1 << 20, size - (1 << 20)).strip(b"\0")
        os.pwrite(fd, b"after", 100 << 20)
        die(mounted)
        assert os.pread(fd, 5, 100 << 20) == b"after"
    end(pools, mounted)


SCHEMES = [
    ("--scheme", "on-demand"),
    ("--scheme", "none"),
    ("--page-size", "2M"),
    ("--scheme", "on-demand", "--page-size", "2M", "--sparse"),
    ("--sparse",),
]


@pytest.mark.parametrize("words", SCHEMES, ids=lambda words: "".join(words))
def test_every_kind_of_pool_goes_on(pools: PoolMaker, words: tuple[str, ...]) -> None:
    pool = pools.create("pmem0", "256M", "--mode", "fs", *words)
    mounted = mount_kept(pools, pool)
    path = mounted.mountpoint / "f"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for number, both in enumerate((False, True, False)):
            os.pwrite(fd, b"%d" % number * 100_000, number * 100_000)
            die(mounted, both=both)
            for before in range(number + 1):
                assert os.pread(fd, 100_000, before * 100_000) == b"%d" % before * 100_000
        free = os.statvfs(mounted.mountpoint).f_bfree
        path.unlink()
    wait_until(lambda: os.statvfs(mounted.mountpoint).f_bfree > free + 70, "its frames are free")
    end(pools, mounted)


@pytest.mark.parametrize("mode", ["fs", "block"])
def test_a_pool_on_an_ordinary_disk_goes_on(pools: PoolMaker, tmp_path: Path, mode: str) -> None:
    pool = tmp_path / "pmem0"
    pmemfs_here("create", pool, "--size", "64M", "--mode", mode)
    mounted = mount_kept(pools, pool)
    path = mounted.mountpoint / "f" if mode == "fs" else mounted.device
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for number, both in enumerate((False, True)):
            os.pwrite(fd, b"%d" % number * 100_000, number * 100_000)
            die(mounted, both=both)
            os.fsync(fd)
            assert os.pread(fd, 100_000, number * 100_000) == b"%d" % number * 100_000
    end(pools, mounted)
    log_file(str(pool)).unlink()


def test_a_successor_that_is_killed_has_a_successor(
    pools: PoolMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000")
    mounted = mount(pools, "fs")
    chance = random.Random(7)
    with opened(mounted.mountpoint / "gone", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"acknowledged", 0)
        (mounted.mountpoint / "gone").unlink()
        for number in range(8):
            standby = standby_of(mounted)
            assert standby is not None
            os.kill(mounted.pid, 9)
            time.sleep(chance.uniform(0.0, 0.05))
            os.kill(standby, 9)
            wait_for_successor(mounted, {standby})
            (mounted.mountpoint / f"{number}").mkdir()
            assert os.pread(fd, 12, 0) == b"acknowledged"
    end(pools, mounted)


@pytest.mark.parametrize("delay", [0.15, 0.3])
def test_a_remount_that_is_under_way_is_done_or_can_be_done_again(
    pools: PoolMaker, delay: float
) -> None:
    mounted = mount(pools, "fs")
    path = mounted.mountpoint / "f"
    for word in ("ro", "rw", "ro", "rw"):
        words = [BIN / "pmemfs", "mount", "-o", f"remount,{word}", mounted.mountpoint]
        with subprocess.Popen(words, stderr=subprocess.PIPE) as remounting:
            # The command takes most of this time for its own start.
            time.sleep(delay)
            die(mounted)
            remounting.communicate()
        remount(mounted, word)
        session = Session.of(mounted)
        if word == "rw":
            path.write_bytes(b"content")
            assert session.pool_state() == "dirty"
        else:
            with pytest.raises(OSError, match="Read-only"):
                path.write_bytes(b"other")
            assert session.pool_state() == "clean"
    assert path.read_bytes() == b"content"
    end(pools, mounted)
