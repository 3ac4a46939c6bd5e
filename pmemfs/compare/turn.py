"""One turn of one answer: everything that is read of it in a round, from `create` to `umount`.

Invariant: a step that fails is a reading, with the sentence that the program gave, and the steps
that don't need it go on. Only what breaks the whole comparison leaves a turn as an exception.
"""

from __future__ import annotations

import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pmemfs.compare.device import Device
from pmemfs.compare.pinned import cut_while_pinned, pin_seconds, transfer
from pmemfs.compare.rows import Answer, Reading
from pmemfs.compare.subject import Subject
from pmemfs.compare.workload import TASKS, Tool
from pmemfs.errors import CommandFailed, PmemfsError, sentence_of
from pmemfs.pfn import FRAME_BYTES, PAGE_STRUCTURE_BYTES
from pmemfs.units import GIB, MIB

DATA = "data"
_AGAIN = 100
_LOOK_SECONDS = 0.5


class Plan(NamedTuple):
    """What is the same in all turns."""

    tool: Tool
    device: Device
    pool_bytes: int
    file_bytes: int
    """Of the file that the workload is done in."""
    seconds: float
    """For each task."""


class Turn:
    """Collects the readings of one answer in one round."""

    def __init__(self, plan: Plan, answer: Answer, round_number: int, directory: Path) -> None:
        self._plan = plan
        self._answer = answer
        self.round_number = round_number
        self.subject = Subject(answer, directory, plan.pool_bytes)
        self.readings: list[Reading] = []
        self.served: list[tuple[str, str]] = []
        """What the daemon says of how it serves, and of the medium: names and values."""

    def take(self, say: Callable[[str], None]) -> None:
        """Take all readings. `say` is told what comes next."""
        say("creating and mounting")
        if not self._start():
            return
        self._first_touch()
        for task in TASKS:
            say(task.key.replace("-", " "))
            with self._reading(task.key) as read:
                rate = self._plan.tool.requests_per_second(
                    task, str(self._data), self._plan.file_bytes, self._plan.seconds,
                    seed=self.round_number + 1,
                )  # fmt: skip
                read(rate if task.is_random else rate * task.block_bytes / MIB)
        self._memory()
        say("pages in use")
        self._buffered()
        self._pages_in_use()
        with self._reading():
            self.subject.umount()

    @property
    def _data(self) -> Path:
        return self.subject.mountpoint / DATA

    @contextmanager
    def _reading(self, *rows: str) -> Iterator[Callable[..., None]]:
        """Read these rows: the values are passed in their order, or all have one error."""
        values: Sequence[float] = ()

        def read(*taken: float) -> None:
            nonlocal values
            values = taken

        try:
            yield read
        except (PmemfsError, OSError) as error:
            # The command's own sentence, which is the same without our words around it.
            why = error.facts["why"] if isinstance(error, CommandFailed) else sentence_of(error)
            for row in rows:
                self._note(row, None, str(why))
            if not rows:
                raise
        else:
            for row, value in zip(rows, values, strict=True):
                self._note(row, value)

    def _note(self, row: str, value: float | None, error: str = "") -> None:
        self.readings.append(Reading(row, self._answer.name, self.round_number, value, error))

    def _start(self) -> bool:
        """Create, mount, fill the file, and mount again, so that no page has been touched."""
        with self._reading("create") as read:
            read(self.subject.create())
        if self.readings[-1].error:
            return False
        with self._reading("mount") as read:
            self.subject.mount()
            _fill(self._data, self._plan.file_bytes)
            self.subject.umount()
            read(self.subject.mount())
        return not self.readings[-1].error

    def _first_touch(self) -> None:
        with self._reading("first-touch", "again") as read, _opened(self._data) as fd:
            with mmap.mmap(-1, FRAME_BYTES) as buffer:
                taken = [_seconds_of(os.preadv, fd, [buffer], 0) for _ in range(_AGAIN + 1)]
            read(taken[0], median(taken[1:]))

    def _memory(self) -> None:
        with self._reading("structures", "in-pool", "unusable", "in-dram") as read:
            status = self.subject.status()
            pool = status.pool
            self.served = [
                ("served by", f"engine {status.engine}, {status.transport_reason}"),
                ("a pool there", f"{pool.kind}, durable by {pool.durability}"),
            ]
            in_pool = pool.zones["memmap"].size_bytes
            data_bytes = pool.zones["data"].size_bytes
            count = 0 if pool.scheme == "none" else pool.page_count
            unusable = pool.size_bytes - data_bytes - in_pool
            read(count, in_pool, unusable, dram_bytes(self.subject))
        with self._reading("filled") as read:
            counts = self.subject.pages().counts
            read((counts["total"] - counts["uninitialised"]) * PAGE_STRUCTURE_BYTES)

    def _buffered(self) -> None:
        with (
            self._reading("buffered", "buffered-cpu") as read,
            _opened(self._data) as file,
            mmap.mmap(-1, MIB) as buffer,
        ):

            def copy() -> None:
                for offset in range(0, self._plan.device.size_bytes, MIB):
                    self._plan.device.read_into(memoryview(buffer), offset)
                    os.pwritev(file, [buffer], offset)
                os.fsync(file)

            read(*self._transfer(copy))

    def _transfer(self, move: Callable[[], None]) -> tuple[float, float]:
        """MiB a second, and milliseconds of CPU time for each GiB, of a transfer.

        It is the second one: the first fills page tables, which a program does once.
        """
        move()
        before = self.subject.cpu_seconds() + _own_cpu_seconds()
        taken = _seconds_of(move)
        used = self.subject.cpu_seconds() + _own_cpu_seconds() - before
        size_bytes = self._plan.device.size_bytes
        return size_bytes / MIB / taken, 1000 * used * GIB / size_bytes

    def _pages_in_use(self) -> None:
        subject = self.subject
        with self._reading("pin") as read:
            read(pin_seconds(subject))
        with self._reading("direct", "direct-cpu") as read:
            transfer(subject, DATA, self._plan.device, lambda move: read(*self._transfer(move)))
        with self._reading("truncate", "kept-busy") as read:
            read(*cut_while_pinned(subject))

    def idle_dram_bytes(self, most_seconds: float) -> float:
        """DRAM for page structures some time after the work, or earlier if nothing is left."""
        subject = self.subject
        subject.create()
        subject.mount()
        _fill(self._data, self._plan.file_bytes)
        deadline = time.monotonic() + most_seconds
        while (found := dram_bytes(subject)) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return found


def dram_bytes(subject: Subject) -> int:
    """DRAM that page structures take now."""
    structures = subject.status().structures
    return structures.dram_bytes if structures else 0


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file of the mount, for direct I/O."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _fill(path: Path, size_bytes: int) -> None:
    """Write a file of that size, durably."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        with mmap.mmap(-1, MIB) as buffer:
            buffer.write(os.urandom(MIB))
            for offset in range(0, size_bytes, MIB):
                os.pwritev(fd, [buffer], offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def _seconds_of(call: Callable[..., object], *words: object) -> float:
    began = time.perf_counter()
    call(*words)
    return time.perf_counter() - began


def _own_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
