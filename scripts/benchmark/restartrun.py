"""The pause that a caller sees when processes of a mount are killed, and what surviving that costs.

Invariants: a pause is the longest time that a call was under way between one kill and the next;
each kill waits until successors serve; the victims take turns, so that what else the machine does
hits all alike.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from benchmark import host
from benchmark.cells import MIB
from benchmark.errors import BenchError, SubjectFailed
from benchmark.mountrun import FILES_PER_DIRECTORY, POPULATE, ReadingCell
from benchmark.pmemfsmount import PmemfsMount
from benchmark.report import Reading
from benchmark.stage import Interrupts, Settings

WORK = Path(__file__).with_name("restartwork.py")
WORK_SECONDS = 600.0
POOL_BYTES = 512 * MIB
OPEN_FILES = 1000
# of many files, those that are known to the kernel and the daemon
KNOWN_SHARE = 10
KILLS_PER_ROUND = 4
RESTART_SECONDS = 30.0
# so long a caller goes on before it is killed again
CALM_SECONDS = 1.0
VICTIMS = ("data plane", "daemon", "both")
RESTART_CELLS = (
    ReadingCell("standby", "pause", "a caller's pause, with a standby"),
    ReadingCell("started", "pause", "a caller's pause, without one"),
    ReadingCell("kept", "memory", "keeper and standby"),
)


def pause_name(cell: str, victim: str, at: int) -> str:
    """The key of a reading."""
    return f"{cell}-{victim.replace(' ', '-')}-p{at}"


class RestartBench:
    """Takes the readings. ``say`` and ``warn`` as in `Stage`."""

    def __init__(
        self, settings: Settings, say: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.failed = False
        self._settings = settings
        self._known = max(OPEN_FILES, settings.many_files // KNOWN_SHARE)
        self._say = say
        self._warn = warn

    def measure(
        self, cells: list[ReadingCell], interrupts: Interrupts, advance: Callable[[], None]
    ) -> list[Reading]:
        """All readings of these cells."""
        takers = {"standby": self._pauses, "started": self._pauses, "kept": self._memory}
        readings: list[Reading] = []
        for cell in cells:
            interrupts.arm()
            try:
                options = "keeper,no_standby" if cell.name == "started" else "keeper"
                with self._mounted(options, interrupts) as mounted:
                    taken = takers[cell.name](cell, mounted)
            except (BenchError, OSError, subprocess.SubprocessError) as problem:
                self.failed = True
                self._warn(f"{cell.name}: {problem}")
                taken = [Reading(cell.name, cell.name, cell.caption, "s", error=str(problem))]
            readings += taken
            advance()
        return readings

    @contextlib.contextmanager
    def _mounted(self, options: str, interrupts: Interrupts) -> Iterator[PmemfsMount]:
        """A mount that is kept, with many files; removed when this ends."""
        made = PmemfsMount("restart", mode="fs", options=options)
        # More deaths than a keeper takes for an accident.
        os.environ["PMEMFS_MOST_DEATHS"] = "1000000"
        try:
            made.create(POOL_BYTES, is_sparse=True)
            self._say(f"making {self._known:,} files")
            words = [sys.executable, str(POPULATE), str(made.pool)]
            finished = host.run([*words, str(self._known), str(FILES_PER_DIRECTORY)], WORK_SECONDS)
            if finished.code != 0:
                raise SubjectFailed(f"{POPULATE.name}: {finished.last_words}")
            made.mount()
            yield made
        finally:
            del os.environ["PMEMFS_MOST_DEATHS"]
            interrupts.disarm()
            made.remove()

    def _pauses(self, cell: ReadingCell, mounted: PmemfsMount) -> list[Reading]:
        kills: list[tuple[str, float]] = []
        with calling(mounted.mountpoint, OPEN_FILES) as caller:
            for number in range(self._settings.rounds * KILLS_PER_ROUND * len(VICTIMS)):
                victim = VICTIMS[number % len(VICTIMS)]
                self._say(f"{cell.caption}: kill {number + 1}, {victim}")
                kills.append((victim, kill(mounted, victim)))
            kills.append(("", time.monotonic()))
            told, _ = caller.communicate(timeout=WORK_SECONDS)
        if caller.returncode:
            raise SubjectFailed("a caller got an error")
        slow = json.loads(told)
        pauses: dict[str, list[float]] = {victim: [] for victim in VICTIMS}
        for (victim, begin), (_, end) in pairwise(kills):
            parts = (min(at + took, end) - max(at, begin) for at, took in slow)
            pauses[victim].append(max([0.0, *parts]))
        what = f"{cell.caption}, {self._known:,} inodes known, {OPEN_FILES:,} files open"
        readings = []
        for victim, found in pauses.items():
            late = sorted(found)[len(found) * 99 // 100]
            readings += [
                Reading(cell.name, pause_name(cell.name, victim, 50), f"{what}: {victim} killed",
                        "s", found),
                Reading(cell.name, pause_name(cell.name, victim, 99), "the same, p99", "s", [late]),
            ]  # fmt: skip
        return readings

    def _memory(self, cell: ReadingCell, mounted: PmemfsMount) -> list[Reading]:
        with calling(mounted.mountpoint, OPEN_FILES):
            found = mounted.processes()
            readings = []
            for name in ("keeper", "standby"):
                if name not in found:
                    raise SubjectFailed(f"it has no {name}")
                pid = found[name]
                private = host.private_bytes(pid, mounted.pool)
                shared = host.proportional_bytes(pid)
                readings += [
                    Reading(cell.name, f"{name}-private", f"private memory of the {name}", "bytes",
                            [private]),
                    Reading(cell.name, f"{name}-pss", "the same with its share of what is shared",
                            "bytes", [shared]),
                ]  # fmt: skip
        return readings


@contextlib.contextmanager
def calling(mountpoint: Path, open_files: int) -> Iterator[subprocess.Popen[str]]:
    """A caller at work. Raises SubjectFailed."""
    words = [sys.executable, str(WORK), str(mountpoint), str(open_files)]
    caller = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert caller.stdout is not None
        if caller.stdout.readline() != "ready\n":
            raise SubjectFailed("a caller got an error before anything was killed")
        yield caller
    finally:
        caller.kill()
        caller.communicate()


def kill(mounted: PmemfsMount, victim: str) -> float:
    """kill -9, and wait until successors serve; when it was. Raises SubjectFailed."""
    time.sleep(CALM_SECONDS)
    before = mounted.processes()
    names = ("data plane", "daemon") if victim == "both" else (victim,)
    at = time.monotonic()
    for name in names:
        os.kill(before[name], 9)
    # Nothing is asked meanwhile, because that takes CPU time from those who are awaited.
    time.sleep(CALM_SECONDS)
    deadline = at + RESTART_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(BenchError):
            now = mounted.processes()
            if all(now[name] != before[name] for name in names):
                return at
        time.sleep(0.1)
    raise SubjectFailed(f"after kill -9 of {victim} it was not served again in {RESTART_SECONDS} s")
