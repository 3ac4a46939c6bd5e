"""A pool of pmemfs in /dev/shm and its mount.

Invariants: `remove` removes whatever was made, however far that came, and may be called again; a
mount that is not served as asked for is never handed out.
"""

import contextlib
import functools
import json
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark import backing, host
from benchmark.cells import MIB
from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable

VOLUME = "bench"


@dataclass(frozen=True)
class Requests:
    """What a mount has been asked since it began, and how much of it the daemon answered."""

    count: int
    forwarded: int


class PmemfsMount:
    """One pool, mounted or not.

    Pool and mountpoint are in one folder of our own. The pool's name is the same in every run, for
    the daemon's log may be named after it.
    """

    def __init__(
        self,
        name: str,
        engine: str = "native",
        transport: str = "auto",
        scheme: str = "pmem",
        mode: str = "block",
        options: str = "",
    ) -> None:
        over = f", transport {transport}" if engine == "native" else ""
        self.description = f"mode {mode}, {engine} engine{over}, page structures: {scheme}"
        self.served = ""
        self._name = name
        self._engine = engine
        self._transport = transport
        self._scheme = scheme
        self._mode = mode
        self._options = ["-o", options] if options else []
        self._folder: Path | None = None
        self._command = "pmemfs"
        self._daemon: tuple[int, int] | None = None  # pid and start time

    @property
    def mountpoint(self) -> Path:
        """Where it is mounted; valid after `create`."""
        assert self._folder is not None
        return self._folder / "mnt"

    @property
    def pool(self) -> Path:
        """The file; valid after `create`."""
        assert self._folder is not None
        return self._folder / f"bench-{self._name}"

    def create(
        self, pool_bytes: int, is_sparse: bool = False, settings: Sequence[str] = ()
    ) -> None:
        """Make the pool, with ``settings`` of ``create`` beside the usual ones. Raises
        SubjectUnavailable or SubjectFailed with a sentence."""
        backing.require_fuse()
        self._command = host.find_pmemfs()
        options = ["--size", f"{pool_bytes // MIB}M", "--scheme", self._scheme, "--name", VOLUME]
        if self._mode != "block":
            told = help_of(self._command, "create")
            if self._mode not in offered_choices(told, "--mode"):
                raise SubjectUnavailable(f"the installed pmemfs has no mode {self._mode}")
            options += ["--mode", self._mode]
        self._folder = backing.make_folder()
        sparse = ["--sparse"] if is_sparse else []
        backing.checked([self._command, "create", str(self.pool), *options, *sparse, *settings])
        self.mountpoint.mkdir()

    def mount(self) -> float:
        """Mount it, and learn who serves it; the seconds until the mount answered."""
        wanted = self._wanted_of_mount()
        options = [word for pair in wanted.items() for word in pair]
        options += self._options
        command = [self._command, "mount", *options, str(self.pool), str(self.mountpoint)]
        begin = time.monotonic()
        try:
            backing.checked(command)
        except SubjectFailed as problem:
            if self._transport == "uring" and not host.fuse_uring_allowed():
                raise SubjectUnavailable(
                    f"{problem} (this kernel has FUSE over io_uring switched off: "
                    "/sys/module/fuse/parameters/enable_uring)"
                ) from None
            raise
        seconds = time.monotonic() - begin
        self._daemon = self._ask_daemon()
        return seconds

    def unmount(self) -> None:
        """Unmount, by force if need be, and see the daemon end."""
        servers = {pid: host.start_time_ticks(pid) for pid in self.daemon_pids()}
        if host.is_mounted(self.mountpoint):
            with contextlib.suppress(BenchError, OSError):
                command = [self._command, "umount", str(self.mountpoint)]
                host.run(command, backing.COMMAND_TIMEOUT_SECONDS)
        if host.is_mounted(self.mountpoint):
            # With a daemon that hangs go the requests that keep the mount busy.
            self._kill_daemon()
            self._unmount_by_force()
        self._await_end(servers)

    def kill(self) -> None:
        """End all of its processes at once, as kill -9 does, and clear the dead mount away."""
        servers = {pid: host.start_time_ticks(pid) for pid in self.daemon_pids()}
        self._kill_daemon()
        self._await_end(servers)
        if host.is_mounted(self.mountpoint):
            self._unmount_by_force()

    def remove(self) -> None:
        """Unmount, and remove mountpoint and pool."""
        if self._folder is None:
            return
        try:
            self.unmount()
        finally:
            self.pool.unlink(missing_ok=True)
            if not host.is_mounted(self.mountpoint):
                with contextlib.suppress(FileNotFoundError):
                    self.mountpoint.rmdir()
                self._folder.rmdir()
                self._folder = None

    def daemon_pids(self) -> tuple[int, ...]:
        """The daemon and all processes it started (a native data plane is one of them)."""
        pid = self._living_daemon()
        return host.with_descendants(pid) if pid is not None else ()

    def processes(self) -> dict[str, int]:
        """The processes that serve it now, by what they are. Raises SubjectFailed."""
        self._daemon = self._ask_daemon()
        told = self.info()
        found = {"daemon": told["pid"], "data plane": told["data_plane_pid"]}
        if keeper := (told.get("kept") or {}).get("keeper_pid"):
            found["keeper"] = keeper
        if others := set(host.with_descendants(told["pid"])) - set(found.values()):
            found["standby"] = min(others)
        return found

    def private_bytes(self) -> int | None:
        """Of the daemon and its data plane together, without the pool and the memfd they map."""
        pids = self.daemon_pids()
        return sum(host.private_bytes(pid, self.pool) for pid in pids) if pids else None

    def control_plane_bytes(self) -> int | None:
        """The same of the daemon alone."""
        pid = self._living_daemon()
        return None if pid is None else host.private_bytes(pid, self.pool)

    def info(self) -> dict[str, Any]:
        """What ``pmemfs info --json`` says of the mount. Raises SubjectFailed otherwise."""
        return self._told("info")

    def requests(self) -> Requests | None:
        """What ``pmemfs stat --json`` has counted; None of an engine that doesn't tell who answers.

        Raises SubjectFailed.
        """
        return requests_of(self._told("stat"))

    def _told(self, command: str) -> dict[str, Any]:
        told = backing.checked([self._command, command, str(self.mountpoint), "--json"])
        try:
            answer = json.loads(told)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise SubjectFailed(f"pmemfs {command} --json gave no JSON object")
        return answer

    def _wanted_of_mount(self) -> dict[str, str]:
        """Options of ``pmemfs mount`` that make it this subject.

        Raises SubjectUnavailable if the installed pmemfs does not offer one of them.
        """
        wanted = {"--engine": self._engine}
        if self._transport != "auto":
            wanted["--transport"] = self._transport
        told = help_of(self._command, "mount")
        for option, choice in wanted.items():
            if choice not in offered_choices(told, option):
                raise SubjectUnavailable(f"the installed pmemfs has no mount {option} {choice}")
        return wanted

    def _ask_daemon(self) -> tuple[int, int]:
        answer = self.info()
        try:
            pid = int(answer["pid"])
        except (ValueError, KeyError, TypeError):
            raise SubjectFailed("pmemfs info --json gave no pid") from None
        self.served = served_as(answer, self._engine, self._transport)
        started = host.start_time_ticks(pid)
        if started is None:
            raise SubjectFailed(f"pmemfs info --json names process {pid}, which does not exist")
        return pid, started

    def _living_daemon(self) -> int | None:
        if self._daemon is None:
            return None
        pid, started = self._daemon
        return pid if host.start_time_ticks(pid) == started else None

    def _unmount_by_force(self) -> None:
        force = ["umount", "--lazy"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        host.run([*force, str(self.mountpoint)], backing.COMMAND_TIMEOUT_SECONDS)
        if host.is_mounted(self.mountpoint):
            raise SubjectFailed(f"{self.mountpoint} could not be unmounted")

    def _await_end(self, servers: dict[int, int | None]) -> None:
        """See these processes end, given with their start times; kill those that do not."""

        def living() -> list[int]:
            return [pid for pid, at in servers.items() if at and host.start_time_ticks(pid) == at]

        deadline = time.monotonic() + backing.END_SECONDS
        while left := living():
            if time.monotonic() > deadline:
                for pid in left:
                    _kill(pid)
                raise SubjectFailed("its daemon outlived the mount and was killed")
            time.sleep(0.02)

    def _kill_daemon(self) -> None:
        for pid in self.daemon_pids():
            _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def served_as(answer: Mapping[str, Any], engine: str, transport: str) -> str:
    """What ``pmemfs info --json`` says of engine and transport, as a note.

    Raises SubjectFailed if that is not what was asked for: another thing would be measured.
    """
    got_engine, got_transport = answer.get("engine"), answer.get("transport")
    if got_engine != engine:
        raise SubjectFailed(f"engine {engine} was asked for and {got_engine} serves")
    if transport not in ("auto", got_transport):
        raise SubjectFailed(f"transport {transport} was asked for and {got_transport} serves")
    return f"served over {got_transport}" if got_transport else f"served by engine {got_engine}"


def requests_of(answer: Mapping[str, Any]) -> Requests | None:
    """The sums of ``pmemfs stat --json``; None where nobody counts what was forwarded.

    Raises SubjectFailed if there are no counts at all.
    """
    try:
        counts = answer["operations"].values()
        if any(one["forwarded"] is None for one in counts):
            return None
        forwarded = sum(one["forwarded"] for one in counts)
        return Requests(sum(one["requests"] for one in counts), forwarded)
    except (AttributeError, KeyError, TypeError):
        raise SubjectFailed("pmemfs stat --json gave no counts of requests") from None


@functools.cache
def help_of(program: str, command: str) -> str:
    """The help of a command of the installed pmemfs, which is asked once."""
    return backing.checked([program, command, "--help"])


def offered_choices(told: str, option: str) -> set[str]:
    """The choices of an option in the help of a command: ``--engine [native|python]``."""
    found = re.search(rf"{re.escape(option)}\s+\[([^]]*)\]", told)
    return {word.strip() for word in found[1].split("|")} if found else set()
