"""fio as the instrument: the command line of one run, and the figures read from its JSON.

The command lines and `parse` are pure functions. Latencies are whole latencies (submission and
completion), because a memory-backed target completes inside the submitting call and would otherwise
look free.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import host
from benchmark.cells import MIB, Cell
from benchmark.errors import BenchError, FioError

_PERCENTILES = ("--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=50:99")


@dataclass(frozen=True)
class Fio:
    """The installed fio, and its engine for several requests in flight.

    ``startup_cpu_seconds`` is what it uses before and after its work, to be taken off its bill.
    """

    version: str
    deep_engine: str
    startup_cpu_seconds: float


@dataclass(frozen=True)
class Target:
    """What fio opens. ``size_bytes`` is the working set, at most what the file or device holds.
    ``engine`` are fio's words for an engine that opens something else than a file at ``path``."""

    path: Path
    size_bytes: int
    direct: bool
    engine: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """How long one run measures, after a ramp whose figures are dropped."""

    ramp_ms: int
    runtime_ms: int

    @property
    def total_seconds(self) -> float:
        return (self.ramp_ms + self.runtime_ms) / 1000


@dataclass(frozen=True)
class Figures:
    """What one run measured, all callers together; what an instrument doesn't tell is None."""

    iops: float
    mib_per_second: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    longest_us: float | None = None


@functools.cache
def probe(deep_engine: str) -> Fio:
    """Find fio and its engines; ``deep_engine`` ``auto`` prefers io_uring to libaio.

    io_uring counts only if a run through it succeeds: fio may have it and the kernel refuse it.
    """
    host.require_tool("fio", "install it, for example: apt-get install fio")
    version = host.run(["fio", "--version"], timeout_seconds=10).stdout.strip()
    wanted = ("io_uring", "libaio") if deep_engine == "auto" else (deep_engine,)
    for engine in wanted:
        trial = ["fio", "--name=probe", "--filename=/dev/zero", "--size=4k", "--rw=read", "--bs=4k"]
        finished = host.run([*trial, f"--ioengine={engine}"], timeout_seconds=30)
        if finished.code == 0:
            return Fio(version, engine, finished.cpu_seconds)
    raise BenchError(f"fio's engine {' or '.join(wanted)} does not work on this machine")


def prefill_command(target: Target) -> list[str]:
    """The run that writes every byte once, so that no measured read meets a hole."""
    return [
        *_common(target, "prefill"),
        "--rw=write",
        "--bs=1M",
        "--ioengine=psync",
        "--end_fsync=1",
    ]


def measure_command(
    cell: Cell, target: Target, timing: Timing, deep_engine: str, cpu: int | None, seed: int
) -> list[str]:
    """The run that measures ``cell``. ``cpu`` pins the caller; one ``seed`` gives one sequence of
    offsets.

    A depth of 1 uses psync: one thread, one pread or pwrite at a time. A cell's own engine goes
    before ``deep_engine``.
    """
    command = [
        *_common(target, cell.name),
        f"--rw={cell.fio_rw}",
        f"--bs={cell.block_bytes}",
        f"--numjobs={cell.jobs}",
        "--group_reporting=1",
        "--time_based=1",
        f"--runtime={timing.runtime_ms}ms",
        # without randrepeat=0 fio goes by a seed of its own
        f"--randseed={seed}",
        "--randrepeat=0",
        "--random_generator=tausworthe64",
        "--norandommap=1",
        *_PERCENTILES,
    ]
    if timing.ramp_ms:
        command.append(f"--ramp_time={timing.ramp_ms}ms")
    if target.engine:
        command += [*target.engine, f"--iodepth={cell.depth}"]
    elif cell.depth == 1:
        command.append("--ioengine=psync")
    else:
        command += [f"--ioengine={cell.engine or deep_engine}", f"--iodepth={cell.depth}"]
    if cpu is not None:
        command.append(f"--cpus_allowed={cpu}")
    return command


def replay_command(log: Path, depth: int, engine: str) -> list[str]:
    """The run that does what a log of fio's second format says, as fast as it can."""
    return [
        "fio",
        "--name=replay",
        f"--read_iolog={log}",
        "--replay_no_stall=1",
        f"--ioengine={engine}",
        f"--iodepth={depth}",
        *("--direct=1", "--allow_file_create=0", "--eta=never", "--output-format=json"),
        *_PERCENTILES,
    ]


def counted_command(
    cell: Cell, target: Target, engine: str, count: int, offset_bytes: int
) -> list[str]:
    """The run of so many requests of ``cell``, always the same ones, from an offset on."""
    return [
        *_common(target, cell.name),
        f"--rw={cell.fio_rw}",
        f"--bs={cell.block_bytes}",
        f"--offset={offset_bytes}",
        f"--io_size={count * cell.block_bytes}",
        *("--randseed=1", "--randrepeat=0", "--random_generator=tausworthe64", "--norandommap=1"),
        *(f"--ioengine={engine}", f"--iodepth={cell.depth}"),
        *_PERCENTILES,
    ]


def _common(target: Target, name: str) -> list[str]:
    # Without allow_file_create=0 fio makes a missing file, folders included, and measures that
    # instead. The same buffers are written again and again (no scrambling): the generator must cost
    # nothing.
    # fio takes ':' in a file name as a separator
    path = str(target.path).replace(":", chr(92) + ":")
    return [
        "fio",
        f"--name={name}",
        *([] if target.engine else [f"--filename={path}"]),
        f"--size={target.size_bytes}",
        f"--direct={int(target.direct)}",
        "--allow_file_create=0",
        "--scramble_buffers=0",
        "--verify=0",
        "--eta=never",
        "--output-format=json",
    ]


def parse(code: int, stdout: str, stderr: str, cell: Cell) -> Figures:
    """Figures of a finished run, or FioError with fio's own words.

    fio may put notes before the JSON, reports some errors only there, and can end with exit code 0
    having done nothing: all three are dealt with here.
    """
    document = _document(stdout)
    jobs: list[dict[str, Any]] = document.get("jobs", []) if document else []
    if code != 0 or not jobs or any(job["error"] for job in jobs):
        raise FioError(_complaint(code, stdout, stderr))
    if len(jobs) != 1:
        raise FioError(f"fio reported {len(jobs)} groups where one was asked for")
    figures = jobs[0][cell.direction]
    if not figures["total_ios"]:
        raise FioError("fio ended without doing any I/O in the measured time")
    percentile = figures["lat_ns"]["percentile"]
    return Figures(
        iops=figures["iops"],
        mib_per_second=figures["bw_bytes"] / MIB,
        p50_us=percentile["50.000000"] / 1000,
        p99_us=percentile["99.000000"] / 1000,
        longest_us=figures["lat_ns"]["max"] / 1000,
    )


def _document(stdout: str) -> dict[str, Any] | None:
    """The JSON object in fio's output, which may have lines of text before it."""
    start = re.search(r"^\{", stdout, flags=re.MULTILINE)
    if start is None:
        return None
    try:
        document, _ = json.JSONDecoder().raw_decode(stdout, start.start())
    except json.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _complaint(code: int, stdout: str, stderr: str) -> str:
    """The first line with which fio says what is wrong; those after it say it again."""
    lines = [line.strip() for line in (stderr + "\n" + stdout).splitlines()]
    said = [line for line in lines if line.startswith("fio:")]
    said += [line.strip() for line in stderr.splitlines() if line.strip()]
    return said[0] if said else f"fio ended with exit code {code} and no message"


def run(command: Sequence[str], cell: Cell, timeout_seconds: float) -> tuple[Figures, float]:
    """Run one measuring command: its figures, and the CPU seconds that fio used.

    fio's own account of its CPU use is not taken: it leaves out io_uring's kernel threads.
    """
    finished = host.run(command, timeout_seconds=timeout_seconds)
    figures = parse(finished.code, finished.stdout, finished.stderr, cell)
    return figures, finished.cpu_seconds


def prefill(target: Target) -> None:
    """Write the whole target once, at a pace of 5 MiB/s or better."""
    timeout_seconds = 30 + target.size_bytes / (5 * MIB)
    finished = host.run(prefill_command(target), timeout_seconds=timeout_seconds)
    if finished.code != 0:
        raise FioError(_complaint(finished.code, finished.stdout, finished.stderr))


def read_all(target: Target) -> None:
    """Read the whole target once, at a pace of 5 MiB/s or better."""
    command = [*_common(target, "read"), "--rw=read", "--bs=128k", "--ioengine=psync"]
    finished = host.run(command, timeout_seconds=30 + target.size_bytes / (5 * MIB))
    if finished.code != 0:
        raise FioError(_complaint(finished.code, finished.stdout, finished.stderr))
