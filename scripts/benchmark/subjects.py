"""The things measured. To add one: write a class with the methods of `Subject`, list it in
`SUBJECTS`.

Invariants: `setup` leaves a file or device at ``path`` that holds at least the asked-for bytes;
`teardown` removes whatever `setup` made, however far it came, and nothing else, and may be called
again.
"""

import contextlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from benchmark import host
from benchmark.cells import MIB
from benchmark.errors import BenchError, SubjectFailed, SubjectUnavailable

FILE_NAME = "bench"
COMMAND_TIMEOUT_SECONDS = 60.0
DAEMON_END_SECONDS = 10.0


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


class MemoryFile:
    """A file in /dev/shm of our own, fully allocated."""

    def __init__(self, name: str) -> None:
        self.path = host.SHM / f"pmemfs-bench-{os.getpid()}-{name}"

    def create(self, size_bytes: int) -> None:
        """Make it; a name in use belongs to somebody else and is refused."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            raise SubjectFailed(
                f"cannot allocate {size_bytes // MIB} MiB: {error.strerror}"
            ) from None
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Remove it, if it is there."""
        self.path.unlink(missing_ok=True)


def opens_direct(path: Path) -> bool:
    """Whether the file can be opened with O_DIRECT (tmpfs learnt it in kernel 6.6)."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _checked(command: Sequence[str]) -> str:
    """stdout of a command that must succeed; SubjectFailed with its last line if it does not."""
    finished = host.run(command, timeout_seconds=COMMAND_TIMEOUT_SECONDS)
    if finished.code != 0:
        what = " ".join([Path(command[0]).name, *command[1:2]])
        raise SubjectFailed(f"{what}: {finished.last_words}")
    return finished.stdout


class Tmpfs:
    """A file in tmpfs: the memory itself with a file system's system calls, the upper bound."""

    name = "tmpfs"
    description = "a file in /dev/shm"

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.direct = True
        self._file = MemoryFile(self.name)
        self.path = self._file.path

    def memory_bytes(self, size_bytes: int) -> int:
        """Exactly the bytes offered."""
        return size_bytes

    def setup(self, size_bytes: int) -> None:
        """Allocate the file."""
        self._file.create(size_bytes)
        self.direct = opens_direct(self.path)
        if not self.direct:
            self.notes.append("this kernel's tmpfs refuses O_DIRECT: measured with direct=0")

    def teardown(self) -> None:
        """Remove the file."""
        self._file.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """None: the kernel copies within the caller's own system call."""
        return ()


class Loop:
    """The kernel's loop device over a file in tmpfs: what there is without pmemfs.

    ``direct_io`` asks the driver to open its file with O_DIRECT. Where the kernel refuses, it goes
    through the page cache, which for tmpfs is the file's own memory either way.
    """

    direct = True

    def __init__(self, name: str, direct_io: bool) -> None:
        self.name = name
        self.description = "the kernel's loop device over a file in /dev/shm"
        self.notes: list[str] = []
        self._direct_io = direct_io
        self._file = MemoryFile(name)
        self._device: Path | None = None

    @property
    def path(self) -> Path:
        """The block device."""
        assert self._device is not None
        return self._device

    def memory_bytes(self, size_bytes: int) -> int:
        """Exactly the bytes offered."""
        return size_bytes

    def setup(self, size_bytes: int) -> None:
        """Allocate the file and attach a free loop device to it."""
        if os.geteuid() != 0:
            raise SubjectUnavailable("attaching a loop device needs root")
        if shutil.which("losetup") is None:
            raise SubjectUnavailable("losetup was not found: install util-linux")
        if not Path("/dev/loop-control").exists():
            raise SubjectUnavailable(
                "this kernel offers no loop devices (/dev/loop-control is missing)"
            )
        self._file.create(size_bytes)
        attach = ["losetup", "--find", "--show", "--nooverlap", str(self._file.path)]
        self._device = Path(_checked(attach).strip())
        if self._direct_io:
            host.run(["losetup", "--direct-io=on", str(self._device)], COMMAND_TIMEOUT_SECONDS)
        state = "on" if self._attribute("loop/dio") == "1" else "off"
        refused = ", the kernel refused on" if self._direct_io and state == "off" else ""
        self.notes.append(f"direct-io={state}{refused}, scheduler {self._scheduler()}")
        self.notes.append(
            "pinned cells pin the caller only: the driver's kernel workers can't be pinned"
        )

    def teardown(self) -> None:
        """Detach the device, if it is still ours, and remove the file."""
        try:
            if self._device is not None and self._is_ours():
                _checked(["losetup", "--detach", str(self._device)])
            self._device = None
        finally:
            self._file.remove()

    def daemon_pids(self) -> tuple[int, ...]:
        """None: kernel workers, which come and go."""
        return ()

    def _is_ours(self) -> bool:
        return self._attribute("loop/backing_file") == str(self._file.path)

    def _scheduler(self) -> str:
        words = self._attribute("queue/scheduler").split()
        return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")

    def _attribute(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return Path(f"/sys/block/{self.path.name}/{name}").read_text().strip()
        return ""


class Pmemfs:
    """A pmemfs pool in /dev/shm, mounted; fio works on the one file of its volume.

    Pool and mountpoint are in one folder of our own. The pool's name is the same in every run, for
    the daemon's log may be named after it.
    """

    def __init__(self, name: str, engine: str, scheme: str) -> None:
        self.name = name
        self.description = f"pmemfs, {engine} engine, page structures: {scheme}"
        self.notes: list[str] = []
        self.direct = True
        self._engine = engine
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
        if not Path("/dev/fuse").exists():
            raise SubjectUnavailable("this kernel offers no FUSE (/dev/fuse is missing)")
        self._command = host.find_pmemfs()
        self._folder = Path(tempfile.mkdtemp(prefix="pmemfs-bench-", dir=host.SHM)).resolve()
        self._create(self.memory_bytes(size_bytes))
        self._mountpoint.mkdir()
        mount = [self._command, "mount", "--engine", self._engine]
        _checked([*mount, str(self._pool), str(self._mountpoint)])
        if not self.path.exists():
            raise SubjectFailed(f"the mount has no file {FILE_NAME!r}")
        self._daemon = self._ask_daemon()
        self.direct = opens_direct(self.path)
        if not self.direct:
            self.notes.append("O_DIRECT refused: measured with direct=0, through the page cache")

    def teardown(self) -> None:
        """Unmount, by force if need be, see the daemon end, and remove mountpoint and pool."""
        if self._folder is None:
            return
        try:
            self._unmount(self._mountpoint)
            self._await_end_of_daemon()
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

    def _create(self, pool_bytes: int) -> None:
        size = f"{pool_bytes // MIB}M"
        options = ["--size", size, "--scheme", self._scheme, "--name", FILE_NAME]
        _checked([self._command, "create", str(self._pool), *options])

    def _ask_daemon(self) -> tuple[int, int]:
        answer = _checked([self._command, "info", str(self._mountpoint), "--json"])
        try:
            pid = int(json.loads(answer)["pid"])
        except (ValueError, KeyError, TypeError):
            raise SubjectFailed("pmemfs info --json gave no pid") from None
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
                host.run([self._command, "umount", str(mountpoint)], COMMAND_TIMEOUT_SECONDS)
        if host.is_mounted(mountpoint):
            # With a daemon that hangs go the requests that keep the mount busy.
            self._kill_daemon()
            force = ["umount", "--lazy"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
            host.run([*force, str(mountpoint)], COMMAND_TIMEOUT_SECONDS)
        if host.is_mounted(mountpoint):
            raise SubjectFailed(f"{mountpoint} could not be unmounted")

    def _await_end_of_daemon(self) -> None:
        deadline = time.monotonic() + DAEMON_END_SECONDS
        while self._living_daemon() is not None:
            if time.monotonic() > deadline:
                self._kill_daemon()
                raise SubjectFailed("its daemon outlived the mount and was killed")
            time.sleep(0.02)

    def _kill_daemon(self) -> None:
        for pid in self.daemon_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "tmpfs": Tmpfs,
    "loop": lambda: Loop("loop", direct_io=True),
    "loop-buffered": lambda: Loop("loop-buffered", direct_io=False),
    "pmemfs": lambda: Pmemfs("pmemfs", engine="python", scheme="pmem"),
    "pmemfs-none": lambda: Pmemfs("pmemfs-none", engine="python", scheme="none"),
}

# loop-buffered is there to check that direct-io=on does not put the loop device at a disadvantage
DEFAULT_SUBJECTS = ("tmpfs", "loop", "pmemfs", "pmemfs-none")
