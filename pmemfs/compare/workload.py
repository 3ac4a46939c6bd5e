"""The workload, the same for all answers: fio where it is there, else a small loop of our own.

Both do direct I/O in a file that was written before, so no read meets a hole and the kernel's page
cache has no part in it. The loop has one request under way at a time, and fio 32 of 4 KiB; so the
figures of the two are not compared with each other.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pmemfs.compare.programs import Finished, run_program
from pmemfs.errors import WorkloadFailed
from pmemfs.units import KIB, MIB

_DEPTH = 32
_GRACE_SECONDS = 60
_RAMP_SECONDS = 0.1
_CHECK_EVERY = 16
"""The loop looks at the clock after so many requests."""


class Task(NamedTuple):
    """One kind of work, by the key of its row."""

    key: str
    direction: Literal["read", "write"]
    is_random: bool

    @property
    def block_bytes(self) -> int:
        """The size of a request."""
        return 4 * KIB if self.is_random else MIB


TASKS = (
    Task("random-read", "read", True),
    Task("random-write", "write", True),
    Task("sequential-read", "read", False),
    Task("sequential-write", "write", False),
)


class Tool(ABC):
    """What does the work, and says how much it did."""

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, with its version, and how it works."""

    @abstractmethod
    def requests_per_second(
        self, task: Task, path: str, size_bytes: int, seconds: float, seed: int
    ) -> float:
        """Work in the first `size_bytes` of a file for so long. Raises WorkloadFailed."""


class Fio(Tool):
    """fio(1)."""

    def __init__(self, program: str, version: str, engine: str) -> None:
        self._program = program
        self._version = version
        self._engine = engine

    @property
    def description(self) -> str:
        if self._engine == "psync":
            return f"{self._version}, one request at a time (psync)"
        return f"{self._version}, {_DEPTH} requests of 4 KiB under way ({self._engine}), 1 of 1 MiB"

    def command(
        self, task: Task, path: str, size_bytes: int, seconds: float, seed: int
    ) -> list[str]:
        """fio's command line. A seed gives one sequence of offsets."""
        is_deep = task.is_random and self._engine != "psync"
        return [
            self._program,
            f"--name={task.key}",
            # fio takes ':' in a name for a separator.
            f"--filename={path.replace(':', chr(92) + ':')}",
            f"--size={size_bytes}",
            f"--rw={'rand' if task.is_random else ''}{task.direction}",
            f"--bs={task.block_bytes}",
            *([f"--ioengine={self._engine}", f"--iodepth={_DEPTH}"] if is_deep
              else ["--ioengine=psync"]),
            "--direct=1",
            # Without it fio makes a file that is missing, and measures that.
            "--allow_file_create=0",
            "--time_based=1",
            f"--runtime={round(seconds * 1000)}ms",
            f"--ramp_time={round(_RAMP_SECONDS * 1000)}ms",
            f"--randseed={seed}",
            "--norandommap=1",
            "--scramble_buffers=0",
            "--eta=never",
            "--output-format=json",
        ]  # fmt: skip

    def requests_per_second(
        self, task: Task, path: str, size_bytes: int, seconds: float, seed: int
    ) -> float:
        command = self.command(task, path, size_bytes, seconds, seed)
        return parse_fio(run_program(command, seconds + _GRACE_SECONDS), task.direction)


def parse_fio(finished: Finished, direction: str) -> float:
    """Requests a second in fio's report. Raises WorkloadFailed, with fio's own words.

    fio may put lines of text before the JSON, says some errors only there, and can end with 0
    although it has done nothing.
    """
    document = _first_object(finished.out)
    jobs = document.get("jobs") or [] if document else []
    if finished.code or not jobs or jobs[0].get("error"):
        raise WorkloadFailed(what="fio", why=_complaint(finished))
    figures: dict[str, Any] = jobs[0].get(direction) or {}
    if not figures.get("total_ios"):
        raise WorkloadFailed(what="fio", why="it did nothing in the time that it had")
    return float(figures["iops"])


def _first_object(text: str) -> dict[str, Any] | None:
    start = re.search(r"^\{", text, re.MULTILINE)
    if start is None:
        return None
    try:
        document, _ = json.JSONDecoder().raw_decode(text, start.start())
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _complaint(finished: Finished) -> str:
    lines = [line.strip() for line in (finished.err + "\n" + finished.out).splitlines()]
    said = [line for line in lines if line.startswith("fio:")] or finished.err.split("\n")
    return next(filter(None, said), f"it ended with exit code {finished.code} and no word")


class Loop(Tool):
    """One request at a time, in Python: for machines without fio."""

    description = "a loop in Python (there is no fio here), one request at a time"

    def requests_per_second(
        self, task: Task, path: str, size_bytes: int, seconds: float, seed: int
    ) -> float:
        flags = os.O_RDONLY if task.direction == "read" else os.O_WRONLY
        buffer = mmap.mmap(-1, task.block_bytes)
        call = os.preadv if task.direction == "read" else os.pwritev
        try:
            fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            raise WorkloadFailed(what="the loop", why=_reason(error)) from None
        try:
            return _repeat(call, fd, buffer, _offsets(task, size_bytes, seed), seconds)
        except OSError as error:
            raise WorkloadFailed(what="the loop", why=_reason(error)) from None
        finally:
            os.close(fd)
            buffer.close()


def _offsets(task: Task, size_bytes: int, seed: int) -> Callable[[int], int]:
    """The offset of each request by its number."""
    block_count = max(1, size_bytes // task.block_bytes)
    chosen = random.Random(seed)
    if task.is_random:
        return lambda _: chosen.randrange(block_count) * task.block_bytes
    return lambda number: number % block_count * task.block_bytes


def _repeat(
    call: Callable[[int, list[mmap.mmap], int], int],
    fd: int,
    buffer: mmap.mmap,
    offset_of: Callable[[int], int],
    seconds: float,
) -> float:
    done, buffers, began = 0, [buffer], time.perf_counter()
    while True:
        for _ in range(_CHECK_EVERY):
            if call(fd, buffers, offset_of(done)) != len(buffer):
                raise WorkloadFailed(what="the loop", why="a request ended early")
            done += 1
        taken = time.perf_counter() - began
        if taken >= seconds:
            return done / taken


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def choose_tool(search_path: str | None = None) -> Tool:
    """fio with the best of its engines that works here, or our own loop.

    An engine counts only if fio has used it: fio may have it and the kernel refuse it.
    """
    import shutil

    program = shutil.which("fio", path=search_path)
    if program is None:
        return Loop()
    version = run_program([program, "--version"], _GRACE_SECONDS).out.strip()
    words = ["--name=try", "--filename=/dev/zero", "--size=4k", "--rw=read", "--bs=4k"]
    for engine in ("io_uring", "libaio", "psync"):
        trial = [program, *words, f"--ioengine={engine}", "--output-format=json"]
        if run_program(trial, _GRACE_SECONDS).code == 0:
            return Fio(program, version, engine)
    return Loop()
