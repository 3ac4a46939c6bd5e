"""The things measured. To add one: write a class with the methods of `Subject`, list it in
`SUBJECTS`.

Invariants: `setup` leaves a file or device at ``path`` that holds at least the asked-for bytes;
`teardown` removes whatever `setup` made, however far it came, and nothing else, and may be called
again.
"""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmark import backing, host
from benchmark.cells import MIB
from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable
from benchmark.peers import Nbdfuse, Qsd

FILE_NAME = "bench"


class Subject(Protocol):
    """One thing to measure. ``notes`` tell the reader what must be known to judge its figures."""

    name: str
    description: str
    notes: list[str]

    @property
    def path(self) -> Path:
        """The file or device that fio opens; valid after `setup`."""

    @property
    def direct(self) -> bool:
        """Whether fio opens it with O_DIRECT."""

    def memory_bytes(self, size_bytes: int) -> int:
        """How much of /dev/shm it takes to offer ``size_bytes``."""

    def setup(self, size_bytes: int) -> None:
        """Make it. Raises SubjectUnavailable or SubjectFailed with a sentence."""

    def teardown(self) -> None:
        """Remove it. Raises SubjectFailed if something had to stay behind."""

    def daemon_pids(self) -> tuple[int, ...]:
        """The processes that serve it, which a pinned cell pins; empty where the kernel serves."""

    def private_bytes(self) -> int | None:
        """Memory of these processes beside what is offered; None where that is of no interest."""


class Tmpfs:
    """A file in tmpfs: the memory itself with a file system's system calls, the upper bound."""

    name = "tmpfs"
    description = "a file in /dev/shm"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.direct = True
        self._file = backing.MemoryFile(self.name)
        self.path = self._file.path

    def memory_bytes(self, size_bytes: int) -> int:
        """Exactly the bytes offered."""
        return size_bytes

    def setup(self, size_bytes: int) -> None:
        """Allocate the file."""
        self._file.create(size_bytes)
        self.direct = backing.opens_direct(self.path)
        if not self.direct:
            self.notes.append("this kernel's tmpfs refuses O_DIRECT: measured with direct=0")

    def teardown(self) -> None:
        """Remove the file."""
        self._file.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """None: the kernel copies within the caller's own system call."""
        return ()

    def private_bytes(self) -> int | None:
        """No processes, no memory."""
        return None


class Loop:
    """The kernel's loop device over a file in tmpfs: what there is without pmemfs."""

    direct = True

    def __init__(self, name: str, direct_io: bool) -> None:
        self.name = name
        self.description = "the kernel's loop device over a file in /dev/shm"
        self.notes: list[str] = []
        self._direct_io = direct_io
        self._file = backing.MemoryFile(name)
        self._device = backing.LoopDevice(self._file.path)

    @property
    def path(self) -> Path:
        """The block device."""
        return self._device.path

    def memory_bytes(self, size_bytes: int) -> int:
        """Exactly the bytes offered."""
        return size_bytes

    def setup(self, size_bytes: int) -> None:
        """Allocate the file and attach a free loop device to it."""
        backing.require_loop_devices()
        self._file.create(size_bytes)
        self.notes.append(self._device.attach(self._direct_io))
        self.notes.append(
            "pinned cells pin the caller only: the driver's kernel workers can't be pinned"
        )

    def teardown(self) -> None:
        """Detach the device and remove the file."""
        try:
            self._device.detach()
        finally:
            self._file.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """None: kernel workers, which come and go."""
        return ()

    def private_bytes(self) -> int | None:
        """No processes, no memory."""
        return None


class Pmemfs:
    """A pmemfs pool in /dev/shm, mounted; fio works on the one file of its volume.

    Pool and mountpoint are in one folder of our own. The pool's name is the same in every run, for
    the daemon's log may be named after it.
    """

    def __init__(
        self, name: str, engine: str = "native", transport: str = "auto", scheme: str = "pmem"
    ) -> None:
        self.name = name
        over = f", transport {transport}" if engine == "native" else ""
        self.description = f"pmemfs, {engine} engine{over}, page structures: {scheme}"
        self.notes: list[str] = []
        self.direct = True
        self._engine = engine
        self._transport = transport
        self._scheme = scheme
        self._folder: Path | None = None
        self._command = "pmemfs"
        self._daemon: tuple[int, int] | None = None  # pid and start time

    @property
    def path(self) -> Path:
        """The volume's file."""
        return self._mountpoint / FILE_NAME

    @property
    def _mountpoint(self) -> Path:
        assert self._folder is not None
        return self._folder / "mnt"

    @property
    def _pool(self) -> Path:
        assert self._folder is not None
        return self._folder / f"bench-{self.name}"

    def memory_bytes(self, size_bytes: int) -> int:
        """The bytes offered, their page structures (64 bytes per 4 KiB), labels and alignment."""
        extra_mib = size_bytes // MIB // 32 + 16
        return size_bytes + extra_mib * MIB

    def setup(self, size_bytes: int) -> None:
        """Create the pool, mount it, and learn who serves it."""
        backing.require_fuse()
        self._command = host.find_pmemfs()
        wanted = self._wanted_of_mount()
        self._folder = backing.make_folder()
        self._create(self.memory_bytes(size_bytes))
        self._mountpoint.mkdir()
        options = [word for pair in wanted.items() for word in pair]
        self._mount([self._command, "mount", *options, str(self._pool), str(self._mountpoint)])
        if not self.path.exists():
            raise SubjectFailed(f"the mount has no file {FILE_NAME!r}")
        self._daemon = self._ask_daemon()
        self.direct = backing.opens_direct(self.path)
        if not self.direct:
            self.notes.append("O_DIRECT refused: measured with direct=0, through the page cache")

    def teardown(self) -> None:
        """Unmount, by force if need be, see the daemon end, and remove mountpoint and pool."""
        if self._folder is None:
            return
        servers = {pid: host.start_time_ticks(pid) for pid in self.daemon_pids()}
        try:
            self._unmount(self._mountpoint)
            self._await_end(servers)
        finally:
            self._pool.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._mountpoint.rmdir()
        self._folder.rmdir()
        self._folder = None

    def daemon_pids(self) -> tuple[int, ...]:
        """The daemon and all processes it started (a native data plane is one of them)."""
        pid = self._living_daemon()
        return host.with_descendants(pid) if pid is not None else ()

    def private_bytes(self) -> int | None:
        """Of the daemon and its data plane together, without the pool and the memfd they map."""
        pids = self.daemon_pids()
        return sum(host.private_bytes(pid, self._pool) for pid in pids) if pids else None

    def _wanted_of_mount(self) -> dict[str, str]:
        """Options of ``pmemfs mount`` that make it this subject.

        Raises SubjectUnavailable if the installed pmemfs does not offer one of them.
        """
        wanted = {"--engine": self._engine}
        if self._transport != "auto":
            wanted["--transport"] = self._transport
        told = backing.checked([self._command, "mount", "--help"])
        for option, choice in wanted.items():
            if choice not in offered_choices(told, option):
                raise SubjectUnavailable(f"the installed pmemfs has no mount {option} {choice}")
        return wanted

    def _mount(self, command: list[str]) -> None:
        try:
            backing.checked(command)
        except SubjectFailed as problem:
            if self._transport == "uring" and not host.fuse_uring_allowed():
                raise SubjectUnavailable(
                    f"{problem} (this kernel has FUSE over io_uring switched off: "
                    "/sys/module/fuse/parameters/enable_uring)"
                ) from None
            raise

    def _create(self, pool_bytes: int) -> None:
        size = f"{pool_bytes // MIB}M"
        options = ["--size", size, "--scheme", self._scheme, "--name", FILE_NAME]
        backing.checked([self._command, "create", str(self._pool), *options])

    def _ask_daemon(self) -> tuple[int, int]:
        told = backing.checked([self._command, "info", str(self._mountpoint), "--json"])
        try:
            answer = json.loads(told)
            pid = int(answer["pid"])
        except (ValueError, KeyError, TypeError):
            raise SubjectFailed("pmemfs info --json gave no pid") from None
        self.notes.append(served_as(answer, self._engine, self._transport))
        started = host.start_time_ticks(pid)
        if started is None:
            raise SubjectFailed(f"pmemfs info --json names process {pid}, which does not exist")
        return pid, started

    def _living_daemon(self) -> int | None:
        if self._daemon is None:
            return None
        pid, started = self._daemon
        return pid if host.start_time_ticks(pid) == started else None

    def _unmount(self, mountpoint: Path) -> None:
        if host.is_mounted(mountpoint):
            with contextlib.suppress(BenchError, OSError):
                command = [self._command, "umount", str(mountpoint)]
                host.run(command, backing.COMMAND_TIMEOUT_SECONDS)
        if host.is_mounted(mountpoint):
            # With a daemon that hangs go the requests that keep the mount busy.
            self._kill_daemon()
            force = ["umount", "--lazy"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            host.run([*force, str(mountpoint)], backing.COMMAND_TIMEOUT_SECONDS)
        if host.is_mounted(mountpoint):
            raise SubjectFailed(f"{mountpoint} could not be unmounted")

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


def offered_choices(told: str, option: str) -> set[str]:
    """The choices of an option in the help of a command: ``--engine [native|python]``."""
    found = re.search(rf"{re.escape(option)}\s+\[([^]]*)\]", told)
    return {word.strip() for word in found[1].split("|")} if found else set()


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "tmpfs": Tmpfs,
    "loop": lambda: Loop("loop", direct_io=True),
    "loop-buffered": lambda: Loop("loop-buffered", direct_io=False),
    "pmemfs": lambda: Pmemfs("pmemfs"),
    "pmemfs-uring": lambda: Pmemfs("pmemfs-uring", transport="uring"),
    "pmemfs-fd": lambda: Pmemfs("pmemfs-fd", transport="fd"),
    "none": lambda: Pmemfs("none", scheme="none"),
    "python": lambda: Pmemfs("python", engine="python"),
    "nbdfuse": Nbdfuse,
    "qsd": lambda: Qsd("qsd", "cache.direct=on,aio=native"),
    "qsd-buffered": lambda: Qsd("qsd-buffered", "cache.direct=off,aio=io_uring"),
}

# the loop device with direct-io=off is there to check that "on" does not put it at a disadvantage,
# one transport by itself to see what auto is worth
DEFAULT_SUBJECTS = (
    *("tmpfs", "loop", "pmemfs", "none", "python"),
    *("nbdfuse", "qsd", "qsd-buffered"),
)
