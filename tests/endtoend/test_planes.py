"""Two processes serve one mount: what each can survive of the other, and of the memory below."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import pmemfs_here, run_command
from kit.mounts import (
    UNKEPT,
    Engine,
    Mounted,
    PoolMaker,
    Session,
    abort_connection,
    mounts_at,
    native_only,
)
from kit.posix import opened
from kit.processes import is_running, stopped, wait_until
from pmemfs.logs import JOURNAL, log_file
from pmemfs.mountinfo import mount_at
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount]

ENDED = (errno.ENOTCONN, errno.ECONNABORTED, errno.ECANCELED, errno.EIO)
"""What requests are answered with whose server is gone."""
READ_WRITERS = 4
CAP_SYS_RESOURCE = 24
PF_MEMALLOC_NOIO = 0x00080000
"""What PR_SET_IO_FLUSHER sets in a task, where this capability is there."""


@contextmanager
def load(device: Path) -> Iterator[list[str]]:
    """Threads that read and write until the mount fails them; what went wrong otherwise."""
    problems: list[str] = []
    started = threading.Barrier(READ_WRITERS + 1)

    def work(number: int) -> None:
        try:
            with opened(device) as fd:
                step = 0
                while True:
                    at = (number * 64 + step % 64) * 4096
                    data = bytes([step % 256]) * 4096
                    os.pwrite(fd, data, at)
                    if os.pread(fd, 4096, at) != data:
                        problems.append(f"torn at {at}")
                        return
                    step += 1
                    if step == 20:
                        started.wait()
        except OSError as error:
            if error.errno not in ENDED:
                problems.append(str(error))

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(READ_WRITERS)]
    for thread in threads:
        thread.start()
    started.wait(30)
    yield problems
    for thread in threads:
        thread.join(30)
        if thread.is_alive():
            problems.append("somebody waits for ever")


def abort(mounted: Mounted) -> None:
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    abort_connection(mount)


def unmount_lazily_then_abort(mounted: Mounted) -> None:
    """Lazily alone, those who have the file open go on for as long as they like."""
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    assert run_command("umount", "--lazy", mounted.mountpoint).code == 0
    abort_connection(mount)


WAYS: dict[str, Callable[[Mounted], None]] = {
    "SIGTERM": lambda mounted: os.kill(mounted.pid, signal.SIGTERM),
    "SIGKILL": lambda mounted: os.kill(mounted.pid, signal.SIGKILL),
    "SIGKILL of the data plane": lambda mounted: os.kill(
        mounted.data_plane_pid if mounted.info()["data_plane_pid"] else mounted.pid, signal.SIGKILL
    ),
    "abort": abort,
    "lazy unmount": unmount_lazily_then_abort,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_under_load_everything_ends_and_the_pool_can_be_mounted_again(
    pools: PoolMaker, engine: Engine, way: str
) -> None:
    mounted = pools.mount(pools.create(size="16M"), *UNKEPT)
    session = Session.of(mounted)
    data_plane = mounted.info()["data_plane_pid"]
    with load(mounted.device) as problems:
        time.sleep(0.2)
        WAYS[way](mounted)
    assert problems == []
    wait_until(lambda: not is_running(session.pid), "the daemon has ended")
    if data_plane:
        wait_until(lambda: not is_running(data_plane), "the data plane has ended")
    pools.mount(mounted.pool)
    assert mounts_at(mounted.mountpoint) == 1
    with opened(mounted.device) as fd:
        for slot in range(READ_WRITERS * 64):
            assert len(set(os.pread(fd, 4096, slot * 4096))) <= 2


@native_only
def test_mapped_io_goes_on_while_the_control_plane_does_nothing(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        # Before its first write to a file the kernel asks for capabilities, which are no table's.
        os.pwrite(fd, b"first", 0)
        with stopped(mounted.pid):
            os.pwrite(fd, b"written", 0)
            assert os.pread(fd, 7, 0) == b"written"
            os.fsync(fd)
            assert os.lseek(fd, 0, os.SEEK_DATA) == 0
    # A worker may count a write when its caller has been answered.
    wait_until(lambda: mounted.info()["io"]["writes"] == 2, "both writes are counted")


@pytest.mark.parametrize("kind", ["block", "fs"])
def test_a_native_mount_does_without_pyfuse3(pools: PoolMaker, engine: Engine, kind: str) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M", "--mode", kind))
    has_it = "pyfuse3" in Path(f"/proc/{mounted.pid}/maps").read_text()
    assert has_it == (engine.name == "python")


@native_only
def test_an_idle_mount_burns_no_cpu(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        for _ in range(2000):
            os.pread(fd, 4096, 0)
    pids = (mounted.pid, mounted.data_plane_pid)

    def used_seconds() -> float:
        total = 0
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    def is_at_rest() -> bool:
        before = used_seconds()
        time.sleep(0.5)
        return used_seconds() == before

    # What a mount does once, when it begins and after its first requests, may take a while.
    wait_until(is_at_rest, "it is at rest")
    before = used_seconds()
    time.sleep(5)
    # Of one CPU, 1 % is 0.05 s.
    assert used_seconds() - before <= 0.05


def workers_of(mounted: Mounted) -> list[dict[str, int]]:
    """What each worker has counted since the mount."""
    return list(json.loads(pmemfs_here("stat", mounted.mountpoint, "--json"))["workers"])


@native_only
def test_a_worker_waits_awake_while_requests_come(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))

    def was_awake() -> bool:
        for _ in range(500):
            os.pread(fd, 4096, 0)
        return sum(worker["spins"] for worker in workers_of(mounted)) > 0

    with opened(mounted.device) as fd:
        wait_until(was_awake, "a worker that waits awake finds a request", 60)


@native_only
def test_workers_of_an_idle_mount_sleep_and_stay_asleep(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        for _ in range(2000):
            os.pread(fd, 4096, 0)
        tasks = Path(f"/proc/{mounted.data_plane_pid}/task")

        def switches() -> int:
            """How often a thread of the data plane went to sleep, or gave its CPU to another."""
            return sum(
                int(line.split()[1])
                for task in tasks.iterdir()
                for line in (task / "status").read_text().splitlines()
                if line.startswith("voluntary_ctxt_switches")
            )

        # A request that the control plane answers may still be under way.
        wait_until(lambda: switches() == (time.sleep(0.2), switches())[1], "all workers sleep")
        before = switches()
        time.sleep(2)
        assert switches() - before <= 4


@native_only
def test_a_pool_that_is_cut_off_answers_eio_there_and_serves_the_rest(pools: PoolMaker) -> None:
    # In the scheme `pmem` what is cut off first are the page structures, without which nothing is.
    mounted = pools.mount(pools.create("pmem0", "32M", "--scheme", "on-demand"))
    start = mounted.info()["pool"]["zones"]["data"]["offset_bytes"]
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"kept", 0)
        os.truncate(mounted.pool, start + 8 * MIB)
        for attempt in (
            lambda: os.pread(fd, 4096, 16 * MIB),
            lambda: os.pwrite(fd, b"x" * 4096, 16 * MIB),
            lambda: os.pwrite(fd, b"x" * MIB, 8 * MIB - 4096),
        ):
            with pytest.raises(OSError, match="Input/output") as caught:
                attempt()
            assert caught.value.errno == errno.EIO
        assert os.pread(fd, 4, 0) == b"kept"
        os.pwrite(fd, b"more", 4 * MIB)
        assert os.pread(fd, 4, 4 * MIB) == b"more"
    assert is_running(mounted.pid)
    mounted.wait_until_idle()
    assert mounted.info()["fault_count"] == 3
    if not os.path.exists(JOURNAL):
        frame = f"{(start + 16 * MIB) // 4096:#x}"
        log = log_file(str(mounted.pool))
        wait_until(lambda: frame in log.read_text(), "the log names the page")
    os.truncate(mounted.pool, 32 * MIB)


@native_only
def test_both_processes_are_marked_as_needed_for_reclaim(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    effective = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    for pid in (mounted.pid, mounted.data_plane_pid):
        status = Path(f"/proc/{pid}/status").read_text()
        locked_kib = int(status.split("VmLck:")[1].split()[0])
        assert locked_kib > 1024, "its memory is locked"
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                # A thread of the control plane that had nothing to do has ended.
                continue
            flags = int(fields[6])
            assert bool(flags & PF_MEMALLOC_NOIO) == bool(effective >> CAP_SYS_RESOURCE & 1)
