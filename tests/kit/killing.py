"""Processes of a mount that are killed under load, and what the programs notice of it.

A `Load` has programs that know what each call answers (`kit/unbroken`) and fio, which verifies what
it writes. `Kills` kills the daemon, the data plane or both, and waits for their successors.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from kit import unbroken
from kit.mounts import Mounted, PoolMaker
from kit.postgres import Postgres
from kit.processes import is_running, wait_until
from pmemfs.control.client import call
from pmemfs.control.places import socket_path
from pmemfs.errors import PmemfsError
from pmemfs.mountinfo import mount_at

DAEMON, PLANE, BOTH = "daemon", "data plane", "both"
VICTIMS = (DAEMON, PLANE, BOTH)
RESTART_SECONDS = 30.0
END_SECONDS = 150.0
_AFTER_SECONDS = 0.3
KEPT = ("-o", "keeper")
"""Options of a mount that outlives its processes."""


# -- the load ------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What all programs have to say in the end."""

    wrong: list[str] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    slow: list[tuple[str, float, float]] = field(default_factory=list)
    """What was called, when, and how many seconds it took."""

    def pause(self, begin: float, end: float) -> float:
        """The longest that a call of the reader was under way between two moments, in seconds."""
        parts = (min(at + took, end) - max(at, begin) for _, at, took in self.slow)
        return max([0.0, *parts])


class Load:
    """Programs at work on a mount."""

    def __init__(self, directory: Path, *, cancels: bool = False) -> None:
        """`directory` is for files of the programs' own; with `cancels` calls may be cancelled."""
        self.directory = directory
        self.cancels = cancels
        self.outcome = Outcome()
        self._programs: dict[str, subprocess.Popen[str]] = {}
        self._readers: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._is_over = threading.Event()

    @contextmanager
    def working(self) -> Iterator[None]:
        """The programs work meanwhile; in the end all that they say is in `outcome`."""
        try:
            yield
            time.sleep(_AFTER_SECONDS)
        except BaseException as failure:
            self.end()
            failure.add_note(f"the programs: {self.outcome.wrong}, {dict(self.outcome.tally)}")
            raise
        self.end()

    def add(self, work: str, place: Path, seed: int) -> None:
        """Start a program of `kit/unbroken`; it makes what it needs before."""
        prepare = unbroken.PROGRAMS[work](place, seed, False)
        prepare.prepare()
        words = [sys.executable, unbroken.__file__, work, str(place), str(seed)]
        if work == "reader":
            self._readers.add(place.name)
        log = self.directory / f"{place.name}.err"
        with log.open("w") as error:
            program = self._programs[place.name] = subprocess.Popen(
                [*words, *(["cancels"] if self.cancels else [])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=error, text=True,
            )  # fmt: skip
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n", log.read_text()

    def add_file_system(self, root: Path) -> None:
        """All kinds of work in a directory of mode `fs`."""
        unbroken.prepare_common(root)
        self.add("reader", root / "read", 1)
        self.add("names", root / "names0", 2)
        self.add("names", root / "names1", 3)
        self.add("bank", root / "bank0", 3)
        self.add("bank", root / "bank1", 5)
        self.add_fio(root / "fio", "2m")

    def add_fio(self, file: Path, size: str, *, offset: str = "0") -> None:
        """Let fio write at random and verify, again and again: 4 jobs, each in its own part."""
        words = [
            "fio", "--name=v", f"--filename={file}", "--direct=1", "--rw=randrw", "--numjobs=4",
            "--bsrange=4k-64k", f"--size={size}", f"--offset_increment={size}",
            f"--offset={offset}", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=16",
            "--ioengine=libaio", "--iodepth=4", "--loops=8", "--rate=8m",
            "--error_dump=1", "--output=fio.out",
        ]  # fmt: skip
        if self.cancels:
            number = errno.ECANCELED
            words.append(f"--ignore_error={number},{number},{number}")
        self._start_thread(self._run_fio, words)

    def add_postgres(self, place: Path) -> None:
        """Let pgbench work on a server with its data there."""
        server = Postgres(place)
        self._start_thread(self._run_postgres, server)

    def _start_thread(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run_postgres(self, server: Postgres) -> None:
        try:
            while not self._is_over.is_set():
                if wrong := server.work():
                    self.outcome.wrong.append(f"pgbench: {wrong}")
                    break
            if wrong := server.end():
                self.outcome.wrong.append(f"postgres: {wrong}")
            self.outcome.tally["committed"] = server.committed
        except Exception as failure:
            self.outcome.wrong.append(f"postgres: {failure}: {stacks(server.pid)}")
        finally:
            server.kill()

    def _run_fio(self, words: Sequence[str]) -> None:
        seed = 0
        while not self._is_over.is_set():
            seed += 1
            running = subprocess.Popen(
                [*words, f"--randseed={seed}"], cwd=self.directory, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            self._programs[f"fio {seed}"] = running
            assert running.stderr is not None
            said = running.stderr.read()
            code = running.wait()
            self.outcome.tally["fio"] += 1
            self.outcome.tally["cancelled"] += said.count("Operation canceled")
            if code and not (self.cancels and not is_of_fio(said)):
                self.outcome.wrong.append(f"fio: {code}: {said[-600:]}")
                return

    @property
    def is_well(self) -> bool:
        """Whether all programs still work."""
        return not self.outcome.wrong and all(
            it.poll() is None or name.startswith("fio") for name, it in list(self._programs.items())
        )

    def end(self) -> None:
        """Let all programs finish what they do, and take down what they have to say."""
        self._is_over.set()
        programs = {name: it for name, it in self._programs.items() if not name.startswith("fio")}
        for program in programs.values():
            assert program.stdin is not None
            # One that has failed reads no more.
            with suppress(BrokenPipeError):
                program.stdin.close()
            program.stdin = None
        deadline = time.monotonic() + END_SECONDS
        for name, program in programs.items():
            self._take_answer(name, program, deadline)
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                self.outcome.wrong.append(f"fio or postgres hangs: {stacks(os.getpid())}")
        for program in self._programs.values():
            program.kill()

    def _take_answer(self, name: str, program: subprocess.Popen[str], deadline: float) -> None:
        try:
            line, _ = program.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.outcome.wrong.append(f"{name} hangs: {stacks(program.pid)}")
            return
        if program.returncode:
            said = (self.directory / f"{name}.err").read_text().strip().splitlines()
            self.outcome.wrong.append(f"{name} failed: {' | '.join(said[-3:])}")
            return
        answer: dict[str, Any] = json.loads(line)
        self.outcome.wrong += [f"{name}: {what}" for what in answer["wrong"]]
        self.outcome.tally.update(answer["tally"])
        if name in self._readers:
            self.outcome.slow += [(what, at, took) for what, at, took in answer["slow"]]


def is_of_fio(said: str) -> bool:
    """Whether fio complains of something else than a call that was cancelled."""
    others = [line for line in said.splitlines() if line and "Operation canceled" not in line]
    return bool(others)


def stacks(pid: int) -> str:
    """Where the threads of a process and of its children wait in the kernel."""
    found = []
    for child in [pid, *children(pid)]:
        for thread in Path(f"/proc/{child}/task").glob("*"):
            with suppress(OSError):
                stack = re.findall(r"\] (\w+)", (thread / "stack").read_text())
                found.append(f"{thread.name} in {' '.join(stack[:6])}")
    return "; ".join(found)


def children(pid: int) -> list[int]:
    """The children of all threads of a process, and theirs."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            found += [int(word) for word in (thread / "children").read_text().split()]
    return [*found, *(it for child in found for it in children(child))]


# -- the kills -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planes:
    """The processes that serve a mount."""

    daemon: int
    plane: int

    @classmethod
    def of(cls, mounted: Mounted) -> Planes:
        """As the daemon says. Raises PmemfsError while there is none that answers."""
        mount = mount_at(str(mounted.mountpoint))
        assert mount is not None, f"{mounted.mountpoint} is mounted no more"
        said = call(socket_path(mount), "info")
        return cls(int(said["pid"]), int(said["data_plane_pid"]))

    def pids(self, victim: str) -> list[int]:
        """The processes that this is about."""
        return {DAEMON: [self.daemon], PLANE: [self.plane], BOTH: [self.plane, self.daemon]}[victim]


@dataclass(frozen=True)
class Kill:
    """What was killed, when, and when the mount was served as before again."""

    victim: str
    at: float
    restarted_at: float


class Kills:
    """The deaths of one mount's processes."""

    def __init__(self, mounted: Mounted, load: Load, seed: int = 1) -> None:
        self.mounted = mounted
        self.load = load
        self.all: list[Kill] = []
        self.seen: set[int] = set()
        """All processes that have served it."""
        self._chance = random.Random(seed)

    def kill(self, victim: str, *, wait: float = 0.4) -> None:
        """kill -9 within so many seconds; return when successors serve the mount."""
        before = self.planes()
        time.sleep(self._chance.uniform(0.0, wait))
        at = time.monotonic()
        for pid in self._chance.sample(before.pids(victim), len(before.pids(victim))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        dead = set(before.pids(victim))
        self.planes(lambda now: not dead & {now.daemon, now.plane})
        self.all.append(Kill(victim, at, time.monotonic()))

    def planes(self, wanted: Callable[[Planes], bool] = lambda planes: True) -> Planes:
        """The processes, as soon as a daemon answers and they are as wanted."""
        deadline = time.monotonic() + RESTART_SECONDS
        failure: object = "they are not the wanted ones"
        while time.monotonic() < deadline and self.load.is_well:
            try:
                planes = Planes.of(self.mounted)
            except (OSError, PmemfsError) as problem:
                failure = problem
            else:
                self.seen |= {planes.daemon, planes.plane}
                if wanted(planes) and is_running(planes.plane):
                    return planes
            time.sleep(0.02)
        assert self.load.is_well, f"a program failed: {failure}"
        raise AssertionError(f"it was not started again within {RESTART_SECONDS} s: {failure}")

    def pauses(self) -> list[float]:
        """How long the reader waited at each kill, in seconds; known when the load has ended."""
        moments = [*(it.at for it in self.all), time.monotonic()]
        return [self.load.outcome.pause(*stretch) for stretch in pairwise(moments)]

    def summary(self) -> str:
        """What was done, and how long the reader waited at the kills; for who runs many rounds."""
        pauses = sorted(self.pauses())
        words = [f"{name} {count}" for name, count in sorted(self.load.outcome.tally.items())]
        if pauses:
            places = {"p50": len(pauses) // 2, "p99": len(pauses) * 99 // 100, "longest": -1}
            words += [f"{name} pause {pauses[at]:.3f} s" for name, at in places.items()]
        return f"{len(pauses)} kills: {', '.join(words)}"


def mount_kept(pools: PoolMaker, pool: Path, *options: object) -> Mounted:
    """A mount that outlives its processes, as soon as it does."""
    mounted = pools.mount(pool, *KEPT, *options)
    wait_until(lambda: mounted.info()["kept"]["keeper_pid"] is not None, "it has a keeper")
    return mounted


def processes_of(directory: Path) -> dict[int, str]:
    """Processes that have something below a directory open, or in their command line; what each is
    to a mount: `daemon`, `data plane`, `keeper` or `other`."""
    wanted = f"{directory}/"
    found = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            files = open_files(pid)
            if any(name.startswith(wanted) for name in files) or wanted in words:
                found[pid] = kind_of(words, files)
    return {pid: kind for pid, kind in found.items() if pid != os.getpid() and is_running(pid)}


def kind_of(words: str, files: list[str]) -> str:
    """What a process is. A daemon may have the command line of what it was forked from."""
    for part, kind in (("keeperd", "keeper"), ("planed", PLANE)):
        if part in words:
            return kind
    is_daemon = "mountd" in words or any("pmemfs-planes" in name for name in files)
    return DAEMON if is_daemon else "other"


def open_files(pid: int) -> list[str]:
    """The paths of what a process has open."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found
