"""A pool of one answer: made, mounted, asked, and taken away, by the commands that a user types.

Invariant: `remove` takes away whatever was made, however far that came, and nothing else. It never
removes a tree: should the mount still be there, that would delete what lies in it.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pmemfs.compare.programs import run_program
from pmemfs.compare.rows import Answer
from pmemfs.control.client import call
from pmemfs.control.places import socket_path
from pmemfs.control.shape import decode
from pmemfs.errors import CommandFailed, PmemfsError
from pmemfs.logs import log_file
from pmemfs.mount.mountpoint import detach
from pmemfs.mount.processes import python_words
from pmemfs.mountinfo import Mount, mount_at
from pmemfs.observe.answers import MountStatus, Pages

_COMMAND_SECONDS = 300
_ANSWER_SECONDS = 60
_NS = 1e9

PROGRAM = python_words("pmemfs.cli.main")
"""This pmemfs, whatever is on the PATH."""

Report = TypeVar("Report")


class Subject:
    """The pool of an answer, and its mount."""

    def __init__(self, answer: Answer, directory: Path, size_bytes: int) -> None:
        self.answer = answer
        self.pool = directory / "pool"
        self.mountpoint = directory / "mount"
        self._size_bytes = size_bytes
        self.commands: list[str] = []
        """What was typed, with names for the two paths."""

    def create(self) -> float:
        """Make the pool, a file system; the seconds that took. Raises CommandFailed."""
        words = ["--size", str(self._size_bytes), "--mode", "fs", *self.answer.options]
        return self._run("create", self.pool, *words)

    def mount(self) -> float:
        """Mount it; the seconds until the mount answered. Raises CommandFailed."""
        self.mountpoint.mkdir(exist_ok=True)
        return self._run("mount", self.pool, self.mountpoint)

    def umount(self) -> None:
        """Unmount it, and see its daemon end. Raises CommandFailed."""
        self._run("umount", self.mountpoint)

    def remove(self) -> None:
        """Take everything away. Raises UnmountFailed where a mount had to stay, with its files."""
        if self._mount():
            with suppress(PmemfsError):
                self.umount()
        if self._mount():
            detach(str(self.mountpoint))
        self.pool.unlink(missing_ok=True)
        log_file(str(self.pool)).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self.mountpoint.rmdir()

    def status(self) -> MountStatus:
        """What the daemon says of the mount. Raises PmemfsError."""
        return self._ask("info", MountStatus)

    def pages(self) -> Pages:
        """What the daemon says of the pages. Raises PmemfsError, also where there are none."""
        return self._ask("pages", Pages, hottest=0)

    def cpu_seconds(self) -> float:
        """CPU time that the processes of the mount have used so far."""
        status = self.status()
        pids = {pid for pid in (status.pid, status.data_plane_pid) if pid}
        return sum(map(_cpu_seconds, pids))

    def _ask(self, method: str, shape: type[Report], **params: Any) -> Report:
        mount = self._mount()
        if mount is None:
            raise CommandFailed(command="pmemfs mount", why="the mount has ended by itself")
        path, owner_uid = socket_path(mount), mount.owner_uid
        # `call` gives what the shape makes of the answer.
        report: Report = call(
            path, method, lambda result: decode(shape, result),
            owner_uid=owner_uid, timeout_seconds=_ANSWER_SECONDS, **params,
        )  # fmt: skip
        return report

    def _mount(self) -> Mount | None:
        return mount_at(os.path.realpath(self.mountpoint.parent) + f"/{self.mountpoint.name}")

    def _run(self, command: str, *words: str | Path) -> float:
        began = time.perf_counter()
        done = run_program([*PROGRAM, command, *map(str, words), "--json"], _COMMAND_SECONDS)
        seconds = time.perf_counter() - began
        if done.code:
            raise CommandFailed(command=f"pmemfs {command}", why=_message(done.err))
        return seconds


def _message(lines: str) -> str:
    """The sentence of the error in what a command wrote to standard error, with --json."""
    for line in reversed(lines.strip().splitlines()):
        with suppress(ValueError, TypeError, KeyError):
            return str(json.loads(line)["message"])
    return lines.strip() or "it gave no reason"


def _cpu_seconds(pid: int) -> float:
    """CPU time of the threads of a process that live, to the nanosecond.

    Source: Documentation/scheduler/sched-stats.rst of the kernel; /proc/PID/stat counts in ticks of
    10 ms, which is too coarse here.
    """
    total_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):
            total_ns += int(path.read_text().split()[0])
    return total_ns / _NS
