"""The whole comparison: the room that it takes, the rounds, and how to repeat it.

Invariants: one pool exists at a time, so the comparison takes the room of one; whatever was made is
removed, also after a signal or an error, and before the caller hears of it.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pmemfs.compare.device import opened_device
from pmemfs.compare.programs import Interrupts
from pmemfs.compare.rows import ANSWERS, BASE, Answer, Reading
from pmemfs.compare.subject import Subject
from pmemfs.compare.turn import Plan, Turn
from pmemfs.compare.workload import choose_tool
from pmemfs.errors import BadUsage, CannotCompare, NoSpace
from pmemfs.mountinfo import mount_of_device
from pmemfs.reach import check_answers
from pmemfs.units import GIB, KIB, MIB, format_size
from pmemfs.version import VERSION

LEAST_POOL_BYTES = 32 * MIB
_MOST_FILE_BYTES = GIB
_MOST_DEVICE_BYTES = 64 * MIB
_SPARE_BYTES = 64 * MIB


class Settings(NamedTuple):
    """What was asked for."""

    medium: str
    size_bytes: int
    rounds: int
    seconds: float
    idle_seconds: float
    device: str | None = None
    report: str | None = None

    @property
    def file_bytes(self) -> int:
        """Of the file that the workload is done in: it has room in a pool with a page of 1 GiB."""
        return min(self.size_bytes // 4, _MOST_FILE_BYTES) // MIB * MIB

    @property
    def device_bytes(self) -> int:
        """What is transferred from the device."""
        return min(self.file_bytes, _MOST_DEVICE_BYTES)

    @property
    def command(self) -> str:
        """The command line that does the same again, with all that was left to defaults."""
        words = ["pmemfs", "compare", "--medium", self.medium, "--size", _written(self.size_bytes),
                 "--rounds", str(self.rounds), "--seconds", f"{self.seconds:g}",
                 "--idle", f"{self.idle_seconds:g}"]  # fmt: skip
        if self.device is not None:
            words += ["--device", self.device]
        if self.report is not None:
            words += ["--report", self.report]
        return shlex.join(words)


class Fact(NamedTuple):
    """Something that another run has to have in common with this one."""

    name: str
    value: str


class Comparison(NamedTuple):
    """All that came of a run."""

    command: str
    facts: tuple[Fact, ...]
    answers: tuple[Answer, ...]
    steps: tuple[str, ...]
    """What was done with each pool, as commands."""
    readings: tuple[Reading, ...]


Tell = Callable[[str, int, int], None]
"""Is told what is done, how many steps are behind it, and how many there are."""


def check_settings(settings: Settings) -> None:
    """Refuse what can't work before anything is made.

    Raises BadUsage, NoSpace, CannotTransfer and Silent.
    """
    if settings.size_bytes < LEAST_POOL_BYTES:
        least = format_size(LEAST_POOL_BYTES)
        raise BadUsage(why=f"--size: the pools need {least} each, for the files of the workload")
    check_answers(settings.medium)
    if not os.path.isdir(settings.medium):
        said = settings.medium or "''"
        why = f"--medium: {said} is not a directory; name one that pools can be made in"
        raise BadUsage(why=f"{why}, such as /dev/shm")
    if not os.access(settings.medium, os.W_OK):
        raise BadUsage(why=f"--medium: this user can make no files in {settings.medium}")
    if settings.device is not None:
        check_answers(settings.device)
        with opened_device(settings.device, settings.device_bytes):
            pass
    needed, free = room_bytes(settings), free_bytes(settings.medium)
    if needed > free:
        raise NoSpace(
            path=settings.medium,
            wanted=f"{format_size(needed)} (one pool of {format_size(settings.size_bytes)}, and "
            "page structures in DRAM)",
            why=f"only {format_size(max(free, 0))} is free; give a smaller --size, or --medium "
            "with another directory",
        )


def room_bytes(settings: Settings) -> int:
    """The memory that the comparison takes at most: one pool, structures in DRAM, and programs."""
    return settings.size_bytes + settings.size_bytes // 64 + _SPARE_BYTES


def free_bytes(medium: str) -> int:
    """What a directory can take: of a tmpfs not more than there is memory."""
    status = os.statvfs(medium)
    free = status.f_bavail * status.f_frsize
    return min(free, _memory_bytes("MemAvailable")) if _type_of(medium) == "tmpfs" else free


def compare(settings: Settings, tell: Tell) -> Comparison:
    """Run it. Raises Interrupted, and CannotCompare where nothing can be mounted."""
    interrupts = Interrupts()
    readings: list[Reading] = []
    served: list[Fact] = []
    started = datetime.now(UTC)
    with interrupts.taken(), opened_device(settings.device, settings.device_bytes) as device:
        tool = choose_tool()
        plan = Plan(tool, device, settings.size_bytes, settings.file_bytes, settings.seconds)
        turns = order(settings.rounds)
        for number, (round_number, answer) in enumerate(turns):
            with _own_directory(settings.medium, interrupts) as directory:
                turn = Turn(plan, answer, round_number, directory)
                with _removed(turn.subject, interrupts):
                    turn.take(_teller(tell, turn, number, len(turns)))
                _check_base(turn)
                readings += turn.readings
                served = served or [Fact(*fact) for fact in turn.served]
        if settings.idle_seconds:
            readings += _idle_readings(plan, settings, readings, interrupts, tell)
        facts = [*_facts(settings, started, tool.description, device.description), *served]
    return Comparison(settings.command, tuple(facts), ANSWERS, tuple(_steps()), tuple(readings))


def order(rounds: int) -> list[tuple[int, Answer]]:
    """Whose turn it is, in which round: each round begins with another answer, and every other one
    goes backwards, so that what changes slowly favours nobody."""
    turns = []
    for number in range(rounds):
        start = number % len(ANSWERS)
        rotated = [*ANSWERS[start:], *ANSWERS[:start]]
        turns += [(number, answer) for answer in (reversed(rotated) if number % 2 else rotated)]
    return turns


def _teller(tell: Tell, turn: Turn, number: int, total: int) -> Callable[[str], None]:
    where = f"round {turn.round_number + 1}, {turn.subject.answer.name}"
    return lambda what: tell(f"{where}: {what}", number, total)


@contextmanager
def _own_directory(medium: str, interrupts: Interrupts) -> Iterator[Path]:
    with interrupts.held():
        directory = Path(tempfile.mkdtemp(prefix="pmemfs-compare-", dir=medium))
    try:
        yield directory
    finally:
        # What could not be taken out of it has been named already.
        with interrupts.held(), suppress(OSError):
            directory.rmdir()


@contextmanager
def _removed(subject: Subject, interrupts: Interrupts) -> Iterator[None]:
    """Take a pool and its mount away afterwards, whatever happens."""
    try:
        yield
    finally:
        with interrupts.held():
            subject.remove()


def _idle_readings(
    plan: Plan, settings: Settings, readings: Sequence[Reading], interrupts: Interrupts, tell: Tell
) -> list[Reading]:
    """DRAM for page structures when nobody uses the mount any more, for each answer once."""
    found = []
    for answer in ANSWERS:
        at_work = [r.value for r in readings if (r.row, r.answer) == ("in-dram", answer.name)]
        if None in at_work or not at_work:
            continue
        idle = 0.0
        if any(at_work):
            tell(f"{answer.name}: waiting until it is idle", 0, 1)
            with _own_directory(settings.medium, interrupts) as directory:
                turn = Turn(plan, answer, 0, directory)
                with _removed(turn.subject, interrupts):
                    idle = turn.idle_dram_bytes(settings.idle_seconds)
        found.append(Reading("in-dram-idle", answer.name, 0, idle))
    return found


def _check_base(turn: Turn) -> None:
    """Raise CannotCompare where not even the base can be mounted: then there is nothing to say."""
    if turn.subject.answer.name != BASE:
        return
    for one in turn.readings:
        if one.error and one.row in ("create", "mount"):
            raise CannotCompare(why=one.error)


def _steps() -> Iterator[str]:
    for answer in ANSWERS:
        words = ["--size", "SIZE", "--mode", "fs", *answer.options]
        yield shlex.join(["pmemfs", "create", "POOL", *words])
    yield "pmemfs mount POOL MOUNTPOINT"


# -- what another run has to have in common with this one -------------------------------------


def _facts(settings: Settings, started: datetime, tool: str, device: str) -> Iterator[Fact]:
    file_bytes, rounds = format_size(settings.file_bytes), settings.rounds
    yield Fact("date", started.isoformat(timespec="seconds"))
    yield Fact("pmemfs", f"{VERSION}, Python {platform.python_version()}")
    yield Fact("kernel", platform.release())
    cpus = len(os.sched_getaffinity(0))
    yield Fact("machine", f"{_cpu_model()}, {cpus} CPUs, "
               f"{format_size(_memory_bytes('MemTotal'))} of memory")  # fmt: skip
    yield Fact("load", f"{os.getloadavg()[0]:.2f} at the end, over the last minute")
    yield Fact("medium", _medium(settings.medium))
    yield Fact("pools", f"{format_size(settings.size_bytes)} each, mode fs; one at a time")
    yield Fact(
        "workload", f"in a file of {file_bytes}, direct I/O, {settings.seconds:g} s each: {tool}"
    )
    yield Fact("transfers", f"{format_size(settings.device_bytes)} from {device}")
    yield Fact("rounds", f"{rounds}, in which the answers take turns")


def _medium(path: str) -> str:
    mount = mount_of_device(os.stat(path).st_dev)
    return f"{path} ({mount.fs_type} on {mount.mountpoint}, {mount.options})" if mount else path


def _type_of(path: str) -> str:
    mount = mount_of_device(os.stat(path).st_dev)
    return mount.fs_type if mount else ""


def _memory_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * KIB if found else 0


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _written(size_bytes: int) -> str:
    """A size as a command takes it, exactly."""
    for suffix, factor in (("G", GIB), ("M", MIB), ("K", KIB)):
        if size_bytes % factor == 0:
            return f"{size_bytes // factor}{suffix}"
    return str(size_bytes)
