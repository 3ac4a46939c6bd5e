"""What a mount needs to go on stands in its shared memory, whatever becomes of its daemon."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import stat
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit.commands import pmemfs_ok, run_command
from kit.mounts import NATIVE_ONLY, UNKEPT, Mounted, PoolMaker
from kit.posix import opened
from kit.processes import is_running, stopped, wait_until
from pmemfs.dataplane import layouts
from pmemfs.dataplane.tables import NAME, SharedMemory
from pmemfs.errors import NotMounted
from pmemfs.observe.shared import SharedReport, open_memory, read_shared
from pmemfs.units import KIB, MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, *NATIVE_ONLY]

SHOW = Path(__file__).parents[2] / "scripts/show-shared"
FILES = 3000


def report_of(place: object) -> SharedReport:
    memory, pids = open_memory(str(place))
    try:
        return read_shared(memory, pids)
    finally:
        os.close(memory)


WAYS = {
    "read": os.O_RDONLY,
    "write": os.O_WRONLY,
    "append": os.O_RDWR | os.O_APPEND,
    "gone": os.O_RDWR,
}


def use(mounted: Mounted, stack: ExitStack) -> tuple[Counter[tuple[int, str, int]], set[int]]:
    """Use a mount: what is open then, as inode, kind and access, and all inodes that are known."""
    root = mounted.mountpoint
    (root / "many").mkdir()
    for number in range(FILES):
        (root / "many" / f"{number}").touch()
    known = {entry.inode() for entry in os.scandir(root / "many")}
    expected: Counter[tuple[int, str, int]] = Counter()
    writers: list[int] = []
    for name, flags in WAYS.items():
        path = root / name
        path.write_bytes(bytes(MIB))
        for _ in range(2):
            fd = os.open(path, flags)
            stack.callback(os.close, fd)
            expected[os.fstat(fd).st_ino, "file", flags & (os.O_ACCMODE | os.O_APPEND)] += 1
        writers += [fd] if flags & os.O_ACCMODE else []
        known.add(os.fstat(fd).st_ino)
    (root / "gone").unlink()
    fd = os.open(root / "many", os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, fd)
    expected[os.fstat(fd).st_ino, "directory", os.O_RDONLY] += 1
    known.add(os.fstat(fd).st_ino)
    # A RELEASE waits for nobody, and the last one that the daemon knows of takes a table back.
    wait_until(lambda: what_is_open(report_of(mounted.pid)) == expected, "all is released")
    for fd in writers:
        # Shown to the data plane, since there is more to come.
        for _ in range(4):
            os.write(fd, bytes(64 * KIB))
    # An answer may be counted when its caller has it.
    wait_until(lambda: report_of(mounted.pid).unanswered == 0, "all answers are counted")
    return expected, known


def what_is_open(report: SharedReport) -> Counter[tuple[int, str, int]]:
    return Counter((o.inode, o.kind, o.flags & (os.O_ACCMODE | os.O_APPEND)) for o in report.opened)


def at_rest(report: SharedReport) -> SharedReport:
    """A report without what changes while nobody asks for anything."""
    return dataclasses.replace(report, pids=(), workers=(), shared_bytes=0)


def test_it_tells_what_a_test_did_also_of_a_daemon_that_is_stopped_or_dead(
    pools: PoolMaker,
) -> None:
    mounted = pools.mount(pools.create("pmem0", "128M", "--mode", "fs"), *UNKEPT)
    pid, data_plane = mounted.pid, mounted.data_plane_pid
    before = report_of(mounted.mountpoint)
    with ExitStack() as stack:
        expected, known = use(mounted, stack)
        with stopped(pid):
            report = report_of(mounted.mountpoint)
            assert at_rest(report) == at_rest(report_of(pid)) == at_rest(report_of(data_plane))
            check(report, before, mounted, (pid, data_plane))
            assert what_is_open(report) == expected
            assert report.held_inodes == len(known)
            written = {ino for ino, _, flags in expected if flags & os.O_ACCMODE}
            assert {table.inode for table in report.tables} == written
            assert all(table.size_bytes >= MIB for table in report.tables)
            shown = run_command(SHOW, mounted.mountpoint)
            assert shown.code == 0, shown.err
            assert f"held            {len(known)} inodes" in shown.out
            same = json.loads(run_command(SHOW, data_plane, "--json").out)
            assert len(same["opened"]) == expected.total()
        memory, _ = open_memory(str(pid))
        stack.callback(os.close, memory)
        report = report_of(pid)
        # The data plane ends with the daemon; stopped, it is a data plane that has not yet.
        with stopped(data_plane):
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_running(pid), "the daemon is dead")
            left = report_of(mounted.mountpoint)
            assert left.pids == (data_plane,)
            assert at_rest(left) == at_rest(report)
        wait_until(lambda: not is_running(data_plane), "the data plane has ended")
        assert what_is_open(read_shared(memory)) == expected


def check(
    report: SharedReport, before: SharedReport, mounted: Mounted, pids: tuple[int, ...]
) -> None:
    """What does not depend on what was done."""
    info = mounted_stat(mounted)
    assert report.pids == tuple(sorted(pids))
    assert report.device == info
    assert report.transport == ("uring" if report.queue_count else "fd")
    assert len(report.workers) == report.queue_count + report.reader_count
    assert all(worker.thread_id and not worker.is_paused for worker in report.workers)
    assert report.agreement == before.agreement
    assert report.agreement["minor"] > 0
    assert report.agreement["max_write"] >= 64 * KIB
    assert "mode=600" in report.options
    assert report.unanswered == 0
    assert before.opened == before.tables == ()
    assert before.held_inodes == 0


def mounted_stat(mounted: Mounted) -> int:
    """The device number of a mount, asked of nobody who may be stopped."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if f" {mounted.mountpoint} " in line:
            major, _, minor = line.split()[2].partition(":")
            return os.makedev(int(major), int(minor))
    raise AssertionError("it is not mounted")


def test_when_all_is_closed_and_forgotten_nothing_is_left(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "128M", "--mode", "fs"))
    with ExitStack() as stack:
        use(mounted, stack)
    for path in (mounted.mountpoint / "many").iterdir():
        path.unlink()
    for name in ("many", "read", "write", "append"):
        path = mounted.mountpoint / name
        path.rmdir() if path.is_dir() else path.unlink()

    def is_empty() -> bool:
        report = report_of(mounted.pid)
        has_files = report.held_inodes or report.opened or report.tables
        return not has_files and report.table_bytes == 0

    # The kernel forgets what has no name.
    wait_until(is_empty, "all is forgotten")


def test_a_request_that_the_daemon_has_not_answered_is_counted(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "32M", "--mode", "fs"))
    threads = [threading.Thread(target=os.listxattr, args=(mounted.mountpoint,)) for _ in range(3)]
    pid = mounted.pid
    # An answer may be counted when its caller has it.
    wait_until(lambda: report_of(pid).unanswered == 0, "the command that mounted is answered")
    with stopped(pid):
        for thread in threads:
            thread.start()
        # No worker knows the attributes of users.
        wait_until(lambda: report_of(pid).unanswered == 3, "all have asked")
    for thread in threads:
        thread.join(60)
    wait_until(lambda: report_of(pid).unanswered == 0, "all are answered")


def test_what_was_set_of_a_device_and_by_a_remount_stands_there(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    mounted.device.chmod(0o640)
    os.chown(mounted.device, 5, 6)
    with opened(mounted.device) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        report = report_of(mounted.mountpoint)
        assert [(o.kind, o.flags & os.O_ACCMODE) for o in report.opened] == [("file", os.O_RDWR)]
        assert [table.inode for table in report.tables] == [os.fstat(fd).st_ino]
        memory, _ = open_memory(str(mounted.pid))
        shared = SharedMemory(memory, read_only=True)
        kept = shared.kept_attributes(os.fstat(fd).st_ino)
        assert kept is not None
        assert (kept.mode, kept.uid, kept.gid) == (stat.S_IFREG | 0o640, 5, 6)
        shared.close()
    assert "noatime" not in report.options.split(",")
    pmemfs_ok("mount", "-o", "remount,noatime", mounted.mountpoint)
    assert "noatime" in report_of(mounted.mountpoint).options.split(",")


def test_what_is_no_mount_is_refused_with_a_sentence(tmp_path: Path) -> None:
    # Not this process: other tests make such memory in it.
    for place in (tmp_path, os.getppid(), 1 << 30):
        shown = run_command(SHOW, place)
        assert shown.code == 1
        assert shown.err.startswith(f"show-shared: {place} is not a ")
        assert "Traceback" not in shown.err


def has_memory(mounted: Mounted) -> bool:
    """Whether somebody has memory that seems to be of a mount."""
    try:
        memory, _ = open_memory(str(mounted.mountpoint))
    except NotMounted:
        return False
    os.close(memory)
    return True


def test_memory_of_another_user_is_not_taken_for_that_of_a_mount(pools: PoolMaker) -> None:
    # The reference has no such memory, so whatever is found here is a lie.
    mounted = pools.mount(pools.create(), "--engine", "python", "--transport", "auto")
    real, _ = open_memory(str(pools.mount(pools.create("pmem1")).mountpoint))
    # Nor has a mount that had its device number before, whose processes may end only now.
    wait_until(lambda: not has_memory(mounted), "nobody has such memory")
    liar = os.memfd_create(NAME)
    try:
        os.truncate(liar, os.fstat(real).st_size)
        os.pwrite(liar, os.pread(real, layouts.HEADER.size_bytes, 0), 0)
        device = mounted.mountpoint.stat().st_dev.to_bytes(8, "little")
        os.pwrite(liar, device, layouts.HEADER.offset_of("device"))
        assert report_of(mounted.mountpoint).device == mounted.mountpoint.stat().st_dev
        os.fchown(liar, 65534, 65534)
        with pytest.raises(NotMounted):
            open_memory(str(mounted.mountpoint))
    finally:
        os.close(liar)
        os.close(real)
