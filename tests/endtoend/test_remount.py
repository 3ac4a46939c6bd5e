"""`mount -o remount`, by mount(8) and by pmemfs: what kernel, daemon and pool are afterwards."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_here, pmemfs_ok, refused, run_command
from kit.mounts import Engine, Mounted, PoolMaker, Session
from kit.namespaces import Run
from kit.posix import next_tick, opened
from kit.processes import is_running, stopped, wait_until
from pmemfs.control.client import RemoteError, call
from pmemfs.control.places import socket_path
from pmemfs.media.filesystem import HEAD, HEAD_FRAME, validate_head
from pmemfs.media.label import Mode, State
from pmemfs.medium.mapped import MappedMedium
from pmemfs.mountinfo import Mount, mount_at
from pmemfs.pool import Pool
from pmemfs.volume.fs.ground import geometry_of

pytestmark = [pytest.mark.mount, pytest.mark.skipif(os.geteuid() != 0, reason="not root")]

MODES = ["block", "fs"]
HOUR_NS = 3600 * 10**9


@pytest.fixture(params=MODES)
def mounted(request: pytest.FixtureRequest, pools: PoolMaker, engine: Engine) -> Mounted:
    """A pool of one mode in each way, and of both modes with the native engine.

    What differs by transport and engine does so in one place, whatever the mode.
    """
    if (str(engine) == "native-uring") != (request.param == "fs"):
        pytest.skip("the other mode is tried in this way")
    return pools.mount(pools.create("pmem0", "32M", "--mode", request.param))


@pytest.fixture
def files(pools: PoolMaker, engine: Engine) -> Mounted:
    """A pool of mode `fs`, with each engine."""
    return pools.mount(pools.create("pmem0", "32M", "--mode", "fs"))


def kernels(mounted: Mounted) -> Mount:
    """What the kernel says of a mount."""
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    return mount


def kill(mounted: Mounted) -> None:
    """End both planes as a crash does."""
    plane_pid = mounted.info()["data_plane_pid"]
    Session.of(mounted).kill()
    if plane_pid:
        wait_until(lambda: not is_running(plane_pid), "and the data plane, too")
    run_command("umount", "--lazy", mounted.mountpoint)


def assert_clean(path: Path) -> None:
    """Label and head say so, and it is so."""
    with closing(MappedMedium.open(str(path), read_only=True)) as medium:
        pool = Pool.open(medium)
        assert pool.label.state == State.CLEAN
        if pool.label.mode == Mode.FS:
            raw = medium.read(geometry_of(pool).offset_of(HEAD_FRAME), HEAD.size_bytes)
            assert validate_head(raw, pool.label.uuid).is_clean == 1
    assert pmemfs("check", path).code == 0


def remount(mounted: Mounted, options: str) -> None:
    pmemfs_ok("mount", "-o", f"remount,{options}", mounted.mountpoint)


def assert_agreed(mounted: Mounted, *, read_only: bool) -> None:
    """Kernel, daemon and pool say the same."""
    word = "ro" if read_only else "rw"
    place, shared = kernels(mounted).flags
    assert (place[0], shared[0]) == (word, word)
    info = mounted.info()
    assert info["read_only"] is read_only
    assert info["pool"]["state"] == ("clean" if read_only else "dirty")
    assert ("ro" in info["options"].split(",")) is read_only
    (row,) = [row for row in json.loads(pmemfs_here("list", "--json"))
              if row["mountpoint"] == str(mounted.mountpoint)]  # fmt: skip
    assert row["state"] == ("read-only" if read_only else "mounted")


def test_to_read_only_and_back(mounted: Mounted) -> None:
    path = mounted.device
    path.open("ab").close() if path.exists() else path.touch()
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"before", 4096)
    remount(mounted, "ro")
    assert_agreed(mounted, read_only=True)
    with pytest.raises(OSError, match="Read-only file system"):
        os.open(path, os.O_WRONLY)
    with opened(path, os.O_RDONLY) as fd:
        assert os.pread(fd, 6, 4096) == b"before"
    refused(pmemfs("resize", mounted.mountpoint, "--size", "64M"), 1, "read-only")
    remount(mounted, "ro")
    remount(mounted, "rw")
    assert_agreed(mounted, read_only=False)
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"behind", 4096)
        assert os.pread(fd, 6, 4096) == b"behind"


@pytest.mark.quick
def test_a_kill_after_a_remount_to_read_only_leaves_a_clean_pool(
    pools: PoolMaker, mounted: Mounted
) -> None:
    path = mounted.device
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for at in range(50):
            os.pwrite(fd, b"x" * 5000, at * 5000)
    remount(mounted, "ro")
    with opened(path, os.O_RDONLY) as fd:
        os.pread(fd, 100, 0)
    kill(mounted)
    assert_clean(mounted.pool)
    again = pools.mount(mounted.pool)
    assert again.device.read_bytes()[:250_000] == b"x" * 250_000


def test_the_daemon_follows_a_kernel_that_was_remounted_alone(mounted: Mounted) -> None:
    def is_served(*, read_only: bool) -> bool:
        info = mounted.info()
        state = "clean" if read_only else "dirty"
        return info["read_only"] is read_only and info["pool"]["state"] == state

    # As systemd does at shutdown, and mount(8) where no helper is installed.
    run_command("mount", "-i", "-o", "remount,ro", mounted.mountpoint)
    wait_until(lambda: is_served(read_only=True), "the daemon has closed the pool")
    assert_agreed(mounted, read_only=True)
    run_command("mount", "-i", "-o", "remount,rw", mounted.mountpoint)
    wait_until(lambda: is_served(read_only=False), "the daemon has opened it again")
    assert_agreed(mounted, read_only=False)
    with opened(mounted.device, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"again", 0)
    # A command that opens the mount tells the daemon first, which is no reason to close it again.
    remount(mounted, "ro")
    remount(mounted, "rw")
    time.sleep(1.2)
    assert_agreed(mounted, read_only=False)


def test_a_kill_after_a_remount_to_writable_leaves_a_dirty_pool(mounted: Mounted) -> None:
    session = Session.of(mounted)
    remount(mounted, "ro")
    remount(mounted, "rw")
    with opened(mounted.device, os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"y" * 100_000, 0)
        kill(mounted)
    assert session.pool_state() == "dirty"
    assert pmemfs("check", mounted.pool).code == 0


def test_unmounting_what_is_read_only_by_now_leaves_it_clean(mounted: Mounted) -> None:
    session = Session.of(mounted)
    remount(mounted, "ro")
    pmemfs_ok("umount", mounted.mountpoint)
    session.assert_ended()


def test_what_is_open_for_writing_keeps_a_mount_writable(mounted: Mounted) -> None:
    with opened(mounted.device, os.O_RDWR | os.O_CREAT) as fd:
        done = pmemfs("mount", "-o", "remount,ro", mounted.mountpoint)
        refused(done, 32, str(mounted.mountpoint), "open for writing")
        assert_agreed(mounted, read_only=False)
        os.pwrite(fd, b"on", 0)
    remount(mounted, "ro")
    assert_agreed(mounted, read_only=True)


def test_a_file_without_a_name_keeps_a_mount_writable(files: Mounted) -> None:
    path = files.mountpoint / "gone"
    path.write_bytes(b"x" * 10_000)
    with opened(path, os.O_RDONLY):
        path.unlink()
        refused(pmemfs("mount", "-o", "remount,ro", files.mountpoint), 32, "open for writing")
    remount(files, "ro")
    assert_agreed(files, read_only=True)


def test_what_began_read_only_stays_so(pools: PoolMaker, engine: Engine) -> None:
    mounted = pools.mount(pools.create(size="16M"), "-r")
    done = pmemfs("mount", "-o", "remount,rw", mounted.mountpoint)
    refused(done, 32, "mounted read-only from the beginning", "unmount it")
    assert kernels(mounted).is_read_only
    remount(mounted, "ro,noatime")
    assert "noatime" in kernels(mounted).options


@pytest.mark.parametrize("fstab", [False, True], ids=["mountinfo", "fstab"])
def test_mount_8_remounts(mounted: Mounted, helper: None, tmp_path: Path, fstab: bool) -> None:
    line = tmp_path / "fstab"
    line.write_text(f"{mounted.pool} {mounted.mountpoint} pmemfs noexec,noauto 0 0\n" if fstab
                    else "")  # fmt: skip
    for options, read_only in (("remount,ro", True), ("remount,ro", True), ("remount", True),
                               ("remount,rw,noatime", False)):  # fmt: skip
        if fstab and options == "remount":
            # What the line says counts.
            read_only = False
        done = run_command("mount", "--fstab", line, "-o", options, mounted.mountpoint)
        assert (done.code, done.err) == (0, ""), options
        assert_agreed(mounted, read_only=read_only)
    assert {"noatime"} < set(kernels(mounted).options.split(","))
    assert ("noexec" in kernels(mounted).options) is fstab
    assert ("nosuid" in kernels(mounted).options) is not fstab


def test_a_shutdown_may_remount_read_only_without_any_helper(mounted: Mounted) -> None:
    done = run_command("mount", "-i", "-o", "remount,ro", mounted.pool, mounted.mountpoint)
    assert done.code == 0, done.err
    assert kernels(mounted).is_read_only
    # The daemon, which nobody has told, goes on, and learns of it later.
    assert mounted.info()["pid"]
    remount(mounted, "ro")
    assert_agreed(mounted, read_only=True)
    remount(mounted, "rw")
    assert_agreed(mounted, read_only=False)


def refuses_what_the_kernel_passes_on(mounted: Mounted) -> bool:
    """Whether a daemon that is read-only refuses to write and leaves the pool as it is, though the
    kernel is writable. False if it has followed the kernel before all was tried."""
    remount(mounted, "ro")
    session, before = Session.of(mounted), mounted.pool.read_bytes()
    done = run_command("mount", "-i", "-o", "remount,rw", mounted.pool, mounted.mountpoint)
    assert done.code == 0, done.err
    failures = [
        failure_of(lambda: mounted.device.write_bytes(b"x" * 10_000)),
        failure_of((mounted.mountpoint / "new").touch),
        failure_of(lambda: os.setxattr(mounted.device, "user.x", b"x")),
    ]
    after, state = mounted.pool.read_bytes(), session.pool_state()
    if not mounted.info()["read_only"]:
        return False
    for failure in failures:
        assert re.search(r"Read-only|not permitted|not supported", failure)
    label_and_data = len(before) * 3 // 4
    # It may be about to follow: then the pool is marked dirty first.
    return state == "clean" and after[:label_and_data] == before[:label_and_data]


def failure_of(attempt: Callable[[], object]) -> str:
    """The error that something ends with."""
    try:
        attempt()
    except OSError as error:
        return str(error)
    return ""


def test_a_daemon_that_is_read_only_refuses_what_the_kernel_passes_on(mounted: Mounted) -> None:
    mounted.device.touch()
    # It follows the kernel within a second, and nothing tells when.
    wait_until(lambda: refuses_what_the_kernel_passes_on(mounted), "all is refused")
    remount(mounted, "rw")
    assert_agreed(mounted, read_only=False)
    mounted.device.write_bytes(b"x" * 10_000)


def test_a_daemon_is_not_read_only_before_the_kernel_is(mounted: Mounted) -> None:
    with pytest.raises(RemoteError, match="the kernel still lets it be written to"):
        call(socket_path(kernels(mounted)), "remount", options="ro")
    assert_agreed(mounted, read_only=False)


def test_whoever_writes_meanwhile_writes_before_or_not_at_all(files: Mounted) -> None:
    """Writers come and go; at some moment none has anything open, and then nothing changes."""
    ends = threading.Event()
    refusals: list[int | None] = []

    def write(name: str) -> None:
        number = 0
        while not ends.is_set():
            number += 1
            path = files.mountpoint / f"{name}{number % 8}"
            try:
                path.write_bytes(b"x" * (1 + number * 997 % 100_000))
                if number % 3 == 0:
                    path.unlink()
            except OSError as error:
                refusals.append(error.errno)
                return
            time.sleep(0.003)

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    try:
        deadline = time.monotonic() + 60
        while True:
            done = pmemfs("mount", "-o", "remount,ro", files.mountpoint)
            if done.code == 0 or time.monotonic() > deadline:
                break
            refused(done, 32, "open for writing")
        for writer in writers:
            writer.join(60)
            assert not writer.is_alive()
        before = files.pool.read_bytes()
    finally:
        ends.set()
    assert done.code == 0
    assert set(refusals) == {errno.EROFS}
    assert_agreed(files, read_only=True)
    # Longer than what tidies up now and then waits.
    time.sleep(1.5)
    data = len(before) * 3 // 4
    assert files.pool.read_bytes()[:data] == before[:data]
    kill(files)
    assert_clean(files.pool)


def test_of_two_remounts_at_once_one_ends_before_the_other_begins(
    mounted: Mounted, tmp_path: Path
) -> None:
    remount(mounted, "ro")
    began, may_go_on = tmp_path / "began", tmp_path / "may-go-on"
    # A mount(8) that is slow, so that the other command comes when the daemon is writable already
    # and the kernel is not yet.
    slow = tmp_path / "mount"
    slow.write_text(
        f"""#!/bin/sh
        touch {began}
        until [ -e {may_go_on} ]; do sleep 0.05; done
        PATH={os.environ["PATH"]} exec mount "$@"
        """
    )
    slow.chmod(0o755)
    command = [BIN / "pmemfs", "mount", mounted.pool, mounted.mountpoint, "-o"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    writable = subprocess.Popen([*command, "remount,rw"], env={**os.environ, "PATH": path})
    try:
        wait_until(began.exists, "the kernel is asked")
        read_only = subprocess.Popen([*command, "remount,ro"])
        with suppress(subprocess.TimeoutExpired):
            read_only.wait(3)
    finally:
        may_go_on.touch()
    assert (writable.wait(60), read_only.wait(60)) == (0, 0)
    assert_agreed(mounted, read_only=True)


def is_accessed_by_reads(path: Path) -> bool:
    """Whether some reads change the time of access."""
    before = path.stat().st_atime_ns
    with opened(path, os.O_RDONLY) as fd:
        for at in range(5):
            os.pread(fd, 100, at)
    return path.stat().st_atime_ns != before


def accessed_by_read(path: Path) -> bool:
    """Whether reading a file, whose time of access is newer than its last change, is an access."""
    now = time.time_ns()
    os.utime(path, ns=(now - HOUR_NS, now - 2 * HOUR_NS))
    next_tick()
    # Reading changes nothing yet: relatime notes an access after a change, and utimensat is one.
    path.read_bytes()
    next_tick()
    return is_accessed_by_reads(path)


def listed_after_a_change(directory: Path) -> bool:
    """Whether a listing is an access of a directory that has changed since the last one."""
    (directory / str(time.time_ns())).touch()
    next_tick()
    before = directory.stat().st_atime_ns
    os.listdir(directory)
    return directory.stat().st_atime_ns != before


def read_after_a_change(path: Path) -> bool:
    """Whether a read is an access of a file that has changed since the last one."""
    path.write_bytes(b"x" * 5000)
    next_tick()
    return is_accessed_by_reads(path)


def test_a_remount_changes_which_reads_are_accesses(files: Mounted) -> None:
    path, directory = files.mountpoint / "file", files.mountpoint / "directory"
    path.write_bytes(b"x" * 5000)
    directory.mkdir()
    assert read_after_a_change(path)
    assert not accessed_by_read(path)
    for options, shown, every_read, first_read, lists in (
        ("strictatime", "", True, True, True),
        ("noatime", "noatime", False, False, False),
        ("relatime", "relatime", False, True, True),
        ("nodiratime", "nodiratime", False, True, False),
        ("diratime,strictatime", "", True, True, True),
        ("ro", "ro", False, None, None),
        ("rw", "", True, True, True),
        ("relatime", "relatime", False, True, True),
    ):
        remount(files, options)
        place = set(kernels(files).flags[0])
        wanted = {shown} if shown else set()
        assert wanted <= place
        assert place & {"noatime", "relatime", "nodiratime"} <= {*wanted, "relatime"}
        assert ("relatime" in place) is ("strictatime" not in files.info()["options"]
                                         and "noatime" not in place)  # fmt: skip
        if options == "ro":
            before = path.stat().st_atime_ns
            assert path.read_bytes()
            assert os.listdir(directory)
            assert path.stat().st_atime_ns == before
            continue
        assert accessed_by_read(path) is every_read, options
        assert read_after_a_change(path) is first_read, options
        assert listed_after_a_change(directory) is lists, options


def test_flags_of_the_kernel_change_one_by_one(mounted: Mounted) -> None:
    for options, present, absent in (
        ("noexec", {"nosuid", "nodev", "noexec"}, {"nosymfollow"}),
        ("nosymfollow", {"nosuid", "nodev", "noexec", "nosymfollow"}, set()),
        ("sync", {"nosuid", "nodev", "noexec", "nosymfollow", "sync"}, set()),
        ("suid,symfollow,exec", {"nodev", "sync"}, {"nosuid", "noexec", "nosymfollow"}),
        ("ro", {"ro", "nodev", "sync"}, {"nosuid", "noexec"}),
        ("async,rw,dev", {"rw"}, {"nosuid", "noexec", "nodev", "sync", "ro"}),
    ):
        remount(mounted, options)
        shown = set(kernels(mounted).options.split(","))
        assert present <= shown, options
        assert not absent & shown, options


def test_a_busy_mount_on_a_name_that_is_no_text_is_one_sentence(pools: PoolMaker) -> None:
    pool = pools.create(size="16M")
    mounted = pools.mount(pool, at=os.fsdecode(b"caf\xe9"))
    with opened(mounted.device, os.O_RDWR):
        refused(pmemfs("mount", "-o", "remount,ro", mounted.mountpoint), 32, "open for writing")
    assert not mounted.info()["read_only"]


@pytest.mark.parametrize(
    "option",
    ["uid=3", "mode=644", "cached", "populate", "huge_pages", "allow_other", "engine=python",
     "transport=fd", "nonsense", "mode=9"],
)  # fmt: skip
def test_what_cannot_change_is_refused_by_name(pools: PoolMaker, helper: None, option: str) -> None:
    mounted = pools.mount(pools.create(size="16M"), "--transport", "uring")
    before = kernels(mounted)
    done = pmemfs("mount", "-o", f"remount,ro,{option}", mounted.mountpoint)
    refused(done, 2, repr(option))
    through = run_command("mount", "-o", f"remount,ro,{option}", mounted.mountpoint)
    refused(through, 1, repr(option))
    assert kernels(mounted) == before
    assert not mounted.info()["read_only"]


def test_what_it_has_already_is_no_change(pools: PoolMaker, engine: Engine, helper: None) -> None:
    mounted = pools.mount(pools.create(size="16M"), "-o", "mode=640,allow_other,noatime")
    before = kernels(mounted), mounted.info()["options"]
    transport = mounted.info()["transport"]
    asked = f"remount,mode=640,uid=0,allow_other,engine={engine.name}"
    if engine.name == "native":
        asked += f",transport={transport}"
    for options in ("remount", asked):
        pmemfs_ok("mount", "-o", options, mounted.pool, mounted.mountpoint)
        done = run_command("mount", "-o", options, mounted.mountpoint)
        assert (done.code, done.err) == (0, "")
        assert kernels(mounted) == before[0]
        assert set(before[1].split(",")) <= set(mounted.info()["options"].split(","))


def test_what_is_not_mounted_is_not_remounted(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    other = pools.create("pmem1", "16M")
    empty = pools.mountpoint("empty")
    refused(pmemfs("mount", "-o", "remount", empty), 32, "no pool is mounted there")
    refused(pmemfs("mount", "-o", "remount", other, mounted.mountpoint), 32, "pmem0 is mounted")
    refused(pmemfs("mount", "-o", "remount", mounted.pool), 32, "no pool is mounted there")
    assert pmemfs("mount", mounted.pool).code == 2


def test_a_daemon_that_is_stopped_or_dead_is_one_sentence(mounted: Mounted, helper: None) -> None:
    session = Session.of(mounted)
    with stopped(session.pid):
        done = pmemfs("mount", "-o", "remount,ro", mounted.mountpoint)
        refused(done, 32, str(mounted.mountpoint), "does not answer")
        through = run_command("mount", "-o", "remount,ro", mounted.mountpoint)
        refused(through, 32, "does not answer")
    assert_agreed(mounted, read_only=False)
    session.kill()
    refused(pmemfs("mount", "-o", "remount,ro", mounted.mountpoint), 32, "does not answer")


def test_places_of_one_mount_are_read_only_together(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    second = pools.mountpoint("second")
    pmemfs_ok("mount", mounted.pool, second)
    with opened(second / "pmem0", os.O_WRONLY):
        refused(pmemfs("mount", "-o", "remount,ro", mounted.mountpoint), 32, "open for writing")
    remount(mounted, "ro")
    with pytest.raises(OSError, match="Read-only"):
        os.open(second / "pmem0", os.O_WRONLY)
    pmemfs_ok("mount", "-o", "remount,rw", second)
    with opened(second / "pmem0", os.O_WRONLY) as fd:
        os.write(fd, b"x")


@pytest.mark.slow
def test_the_owner_changes_what_the_kernel_leaves_to_the_daemon(
    pools: PoolMaker, user: Run
) -> None:
    home, program = pools.directory / "home", BIN / "pmemfs"
    pool, mountpoint = home / "pmem0", home / "mnt"
    for words in (("mkdir", mountpoint), (program, "create", pool, "--size", "16M", "--mode", "fs"),
                  (program, "mount", pool, mountpoint),
                  (program, "mount", "-o", "remount", mountpoint),
                  (program, "mount", "-o", "remount,strictatime", mountpoint)):  # fmt: skip
        done = user(*words)
        assert done.code == 0, done
    info = json.loads(user(program, "info", mountpoint, "--json").out)
    assert "strictatime" in info["options"]
    for option in ("ro", "noatime", "noexec"):
        done = user(program, "mount", "-o", f"remount,{option}", mountpoint)
        refused(done, 32, "only root may change")
    assert user("touch", mountpoint / "file").code == 0
    assert user(program, "umount", mountpoint).code == 0
