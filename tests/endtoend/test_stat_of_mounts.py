"""What `pmemfs stat` says after I/O whose number is known, with every engine."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused
from kit.mounts import Engine, Mounted, PoolMaker
from kit.posix import opened
from kit.processes import wait_until

pytestmark = pytest.mark.mount

PAGE = 4096


@pytest.fixture
def mounted(pools: PoolMaker, engine: Engine) -> Mounted:
    """A small pool, mounted with the test's engine."""
    return pools.mount(pools.create(size="16M"))


def stat(mounted: Mounted) -> dict[str, Any]:
    """`pmemfs stat --json`."""
    return dict(json.loads(pmemfs_ok("stat", mounted.mountpoint, "--json")))


def exercise(mounted: Mounted, *, writes: int = 0, reads: int = 0, fsyncs: int = 0) -> None:
    """Write and read so many pages, and return when that is counted: a worker counts a request
    after it has answered it."""
    before = stat(mounted)["operations"]
    with opened(mounted.device) as fd:
        for number in range(writes):
            os.pwrite(fd, bytes(PAGE), number * PAGE)
        for number in range(reads):
            os.pread(fd, 2 * PAGE, number * PAGE)
        for _ in range(fsyncs):
            os.fsync(fd)
    counts = {"write": writes, "read": reads, "fsync": fsyncs}
    wanted = {name: before[name]["requests"] + count for name, count in counts.items()}

    def are_counted() -> bool:
        now = stat(mounted)["operations"]
        return all(now[name]["requests"] >= count for name, count in wanted.items())

    wait_until(are_counted, "all requests are counted")


def moved(report: dict[str, Any], name: str) -> tuple[int, int]:
    """Requests and bytes of an operation."""
    operation = report["operations"][name]
    return operation["requests"], operation["moved_bytes"]


@contextmanager
def watching(mountpoint: Path, *words: object) -> Iterator[subprocess.Popen[str]]:
    """`pmemfs stat --watch` at work."""
    process = subprocess.Popen(
        [BIN / "pmemfs", "stat", mountpoint, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line that is not empty."""
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.strip():
            return line
    raise AssertionError("the output has ended")


def test_every_request_is_counted_once(mounted: Mounted, engine: Engine) -> None:
    before = stat(mounted)
    assert [moved(before, name) for name in ("read", "write", "fsync")] == [(0, 0)] * 3
    exercise(mounted, writes=7, reads=5, fsyncs=3)
    report = stat(mounted)
    assert moved(report, "write") == (7, 7 * PAGE)
    assert moved(report, "read") == (5, 10 * PAGE)
    assert moved(report, "fsync") == (3, 0)
    assert report["engine"] == engine.name
    assert report["since"] == "mount"
    assert report["seconds"] > before["seconds"] > 0
    rate = report["operations"]["write"]["requests_per_second"]
    assert rate == pytest.approx(7 / report["seconds"])
    info = mounted.info()["io"]
    assert (info["writes"], info["reads"], info["fsyncs"]) == (7, 5, 3)


def test_who_answered_and_how_fast_is_told_where_it_was_counted(
    mounted: Mounted, engine: Engine
) -> None:
    exercise(mounted, writes=7, reads=5, fsyncs=3)
    report = stat(mounted)
    for name, requests in (("write", 7), ("read", 5), ("fsync", 3)):
        operation = report["operations"][name]
        if engine.name == "python":
            counted = ("native", "forwarded", "failed", "mean_ns", "p50_ns", "p99_ns", "p99_9_ns")
            assert {operation[key] for key in counted} == {None}
            continue
        assert (operation["native"], operation["forwarded"]) == (requests, 0)
        assert operation["failed"] == 0
        assert 0 < operation["mean_ns"] < 10e9
        assert 0 < operation["p50_ns"] <= operation["p99_ns"] <= operation["p99_9_ns"] < 110e9
        of_workers = [worker["operations"].get(name) for worker in report["workers"]]
        assert sum(counts["requests"] for counts in of_workers if counts) == requests


def test_workers_serve_a_cpu_each_or_dev_fuse(mounted: Mounted, engine: Engine) -> None:
    workers = stat(mounted)["workers"]
    cpus = [worker["cpu"] for worker in workers]
    if engine.name == "python":
        assert workers == []
    elif engine.transport == "uring":
        assert cpus == [*range(len(cpus) - 1), None]
        assert len(cpus) > (os.cpu_count() or 1)
    else:
        assert set(cpus) == {None}
    assert [worker["number"] for worker in workers] == list(range(len(workers)))


def test_requests_of_a_cpu_are_counted_at_its_worker(mounted: Mounted, engine: Engine) -> None:
    if engine.transport != "uring":
        pytest.skip("other transports let any worker serve any CPU")
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in allowed:
            os.sched_setaffinity(0, {cpu})
            exercise(mounted, writes=3 + cpu)
    finally:
        os.sched_setaffinity(0, allowed)
    writes = {
        worker["cpu"]: worker["operations"].get("write", {"requests": 0})["requests"]
        for worker in stat(mounted)["workers"]
    }
    assert {cpu: writes[cpu] for cpu in allowed} == {cpu: 3 + cpu for cpu in allowed}


def test_what_failed_and_what_was_forwarded_is_counted_apart(
    mounted: Mounted, engine: Engine
) -> None:
    if engine.name == "python":
        pytest.skip("the python engine counts neither")
    before = stat(mounted)["operations"]
    size_bytes = mounted.device.stat().st_size
    with opened(mounted.device) as fd:
        # What leaves the device is for the control plane, which writes what fits.
        assert os.pwrite(fd, b"two", size_bytes - 1) == 1
        with pytest.raises(OSError, match="No such device") as caught:
            os.lseek(fd, size_bytes, os.SEEK_DATA)
        assert caught.value.errno == errno.ENXIO
    wait_until(lambda: stat(mounted)["operations"]["seek"]["failed"] == 1, "the last is counted")
    report = stat(mounted)
    after = report["operations"]
    assert (after["write"]["native"], after["write"]["forwarded"]) == (0, 1)
    assert after["write"]["requests"] == 1
    assert (after["seek"]["native"], after["seek"]["failed"]) == (1, 1)
    assert report["control_plane"]["write"] == {"requests": 1, "moved_bytes": 1}
    # So is opening.
    assert after["other"]["forwarded"] > before["other"]["forwarded"]
    assert "control plane: 0 read, 1 write of 1B, 0 fsync" in pmemfs_ok("stat", mounted.pool)


def test_tables_have_what_was_asked_for(mounted: Mounted, engine: Engine) -> None:
    exercise(mounted, writes=7, fsyncs=1)
    out = pmemfs_ok("stat", mounted.mountpoint)
    rows = {line.split()[0]: line.split() for line in out.splitlines()[2:]}
    assert rows["write"][1] == "7"
    assert "P99" not in out
    full = pmemfs_ok("stat", mounted.pool, "--latency", "--per-cpu")
    if engine.name == "python":
        for text in (out, full):
            assert text.splitlines()[-1] == "latencies are counted by the native engine only"
        return
    assert "MEAN us" in out
    assert "WORKER" not in out
    for heading in ("NATIVE", "FORWARDED", "FAILED", "P50 us", "P99 us", "P99.9 us", "WORKER"):
        assert heading in full
    assert ("CPU " in full) == (engine.transport == "uring")


def test_a_watch_of_three_reports_ends_by_itself(mounted: Mounted) -> None:
    exercise(mounted, writes=4)
    began = time.monotonic()
    out = pmemfs_ok("stat", mounted.mountpoint, "--watch", "0.2", "--count", "3", "--json")
    # After an answer that came late the next one comes earlier, but none comes before its time.
    assert time.monotonic() - began > 0.39
    first, *rest = map(json.loads, out.splitlines())
    assert [report["since"] for report in (first, *rest)] == ["mount", "report", "report"]
    assert moved(first, "write") == (4, 4 * PAGE)
    for report in rest:
        assert moved(report, "write") == moved(report, "read") == (0, 0)
        assert report["operations"]["write"]["mean_ns"] is None
        assert 0 < report["seconds"] < 60
    text = pmemfs_ok("stat", mounted.mountpoint, "--watch", "0.2", "--count", "3")
    titles = [line for line in text.splitlines() if line.endswith(" s")]
    assert [title.rsplit(maxsplit=2)[0] for title in titles] == [
        "since the mount",
        "the last",
        "the last",
    ]


def test_a_watch_shows_what_came_in_its_intervals_until_it_is_interrupted(
    mounted: Mounted,
) -> None:
    exercise(mounted, writes=5)
    with watching(mounted.mountpoint, "--watch", "0.2", "--json") as process:
        first = json.loads(next_line(process))
        assert moved(first, "write") == (5, 5 * PAGE)
        exercise(mounted, writes=9, reads=2, fsyncs=1)
        seen = {"write": 0, "read": 0, "fsync": 0}
        while sum(seen.values()) < 12:
            report = json.loads(next_line(process))
            assert report["since"] == "report"
            for name in seen:
                seen[name] += report["operations"][name]["requests"]
        assert seen == {"write": 9, "read": 2, "fsync": 1}
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")


def test_ctrl_c_ends_a_watch_of_tables_quietly(mounted: Mounted) -> None:
    with watching(mounted.mountpoint, "--watch") as process:
        assert next_line(process).startswith("since the mount")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")


def test_a_watch_ends_with_its_mount_and_says_so(mounted: Mounted, pools: PoolMaker) -> None:
    with watching(mounted.mountpoint, "--watch", "0.1", "--json") as process:
        next_line(process)
        pools.umount(mounted)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert err.count("\n") == 1
        assert "does not answer" in err


def test_looking_costs_no_request(mounted: Mounted) -> None:
    def total(report: dict[str, Any]) -> int:
        return sum(operation["requests"] for operation in report["operations"].values())

    before = stat(mounted)
    out = pmemfs_ok("stat", mounted.device.parent, "--watch", "0.01", "--count", "10", "--json")
    assert total(json.loads(out.splitlines()[-1])) == 0
    assert total(stat(mounted)) == total(before)


def test_what_is_no_mount_is_refused_with_a_sentence(shm: Path) -> None:
    refused(pmemfs("stat", shm), 1, "is not a pmemfs mount")
    refused(pmemfs("stat", shm / "nothing"), 1, "no such path")
    refused(pmemfs("stat", shm, "--watch", "0.1", "--json"), 1, "is not a pmemfs mount")
    assert pmemfs("stat", shm, "--count", "2").code == 2
