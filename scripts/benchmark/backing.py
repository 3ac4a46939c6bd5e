"""What subjects are made of: files in /dev/shm, loop devices, and the commands that handle them.

Invariants: everything made here bears the prefix ``pmemfs-bench-`` and is of our own making; to
remove what is not there, or is there only half, is no mistake.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmark import host
from benchmark.cells import MIB
from benchmark.errors import SubjectFailed, SubjectUnavailable

PREFIX = "pmemfs-bench-"
COMMAND_TIMEOUT_SECONDS = 60.0
END_SECONDS = 10.0


class MemoryFile:
    """A file in /dev/shm of our own, fully allocated."""

    def __init__(self, name: str) -> None:
        self.path = host.SHM / f"{PREFIX}{os.getpid()}-{name}"

    def create(self, size_bytes: int) -> None:
        """Make it; a name in use belongs to somebody else and is refused."""
        allocate(self.path, size_bytes)

    def remove(self) -> None:
        """Remove it, if it is there."""
        self.path.unlink(missing_ok=True)


def allocate(path: Path, size_bytes: int) -> None:
    """Make a new file with room behind all of its bytes; SubjectFailed if there is too little."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        raise SubjectFailed(f"cannot allocate {size_bytes // MIB} MiB: {error.strerror}") from None
    finally:
        os.close(descriptor)


def write_new(path: Path, size_bytes: int) -> None:
    """Make a new file by writing all of it, a whole number of MiB, from begin to end."""
    block = bytes(MIB)
    with open(path, "xb", buffering=0) as opened:
        while opened.tell() < size_bytes:
            if opened.write(block) != len(block):
                raise SubjectFailed(f"{path.name} could not be written to its end")


class LoopDevice:
    """A loop device on a file of our own.

    Devices are found by their file, so that one is detached too whose attaching was interrupted.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._device: Path | None = None

    @property
    def path(self) -> Path:
        """The block device; valid after `attach`."""
        assert self._device is not None
        return self._device

    def attach(self, direct_io: bool) -> str:
        """Attach a free device; returns what must be known to judge its figures.

        ``direct_io`` asks the driver to open its file with O_DIRECT. Where the kernel refuses, it
        goes through the page cache, which for tmpfs is the file's own memory either way.
        """
        attach = ["losetup", "--find", "--show", "--nooverlap", str(self._file)]
        self._device = Path(checked(attach).strip())
        if direct_io:
            host.run(["losetup", "--direct-io=on", str(self._device)], COMMAND_TIMEOUT_SECONDS)
        state = "on" if _attribute(self._device.name, "loop/dio") == "1" else "off"
        refused = ", the kernel refused on" if direct_io and state == "off" else ""
        return f"direct-io={state}{refused}, scheduler {self._scheduler()}"

    def detach(self) -> None:
        """Detach what is attached to the file, and see it go."""
        for device in self._attached():
            checked(["losetup", "--detach", f"/dev/{device}"])
        deadline = time.monotonic() + END_SECONDS
        while attached := self._attached():
            if time.monotonic() > deadline:
                raise SubjectFailed(f"/dev/{attached[0]} stays attached to {self._file}")
            time.sleep(0.02)
        self._device = None

    def _attached(self) -> list[str]:
        names = [found.name for found in Path("/sys/block").glob("loop*")]
        return [name for name in names if _attribute(name, "loop/backing_file") == str(self._file)]

    def _scheduler(self) -> str:
        words = _attribute(self.path.name, "queue/scheduler").split()
        return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")


def _attribute(device: str, name: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/sys/block/{device}/{name}").read_text().strip()
    return ""


def require_loop_devices() -> None:
    """Raise SubjectUnavailable unless loop devices can be attached here."""
    if os.geteuid() != 0:
        raise SubjectUnavailable("attaching a loop device needs root")
    if shutil.which("losetup") is None:
        raise SubjectUnavailable("losetup was not found: install mount (util-linux)")
    if not Path("/dev/loop-control").exists():
        raise SubjectUnavailable(
            "this kernel offers no loop devices (/dev/loop-control is missing)"
        )


def require_fuse() -> None:
    """Raise SubjectUnavailable unless this kernel has FUSE."""
    if not Path("/dev/fuse").exists():
        raise SubjectUnavailable("this kernel offers no FUSE (/dev/fuse is missing)")


def require_program(name: str, advice: str) -> None:
    """Raise SubjectUnavailable unless the program is on the PATH."""
    if shutil.which(name) is None:
        raise SubjectUnavailable(f"{name} was not found: {advice}")


def make_folder() -> Path:
    """A new, empty folder in /dev/shm."""
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=host.SHM)).resolve()


def opens_direct(path: Path) -> bool:
    """Whether the file can be opened with O_DIRECT (tmpfs learnt it in kernel 6.6)."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def checked(command: Sequence[str]) -> str:
    """stdout of a command that must succeed; SubjectFailed with its last line if it does not."""
    finished = host.run(command, timeout_seconds=COMMAND_TIMEOUT_SECONDS)
    if finished.code != 0:
        what = " ".join([Path(command[0]).name, *command[1:2]])
        raise SubjectFailed(f"{what}: {finished.last_words}")
    return finished.stdout


def unmount(mountpoint: Path) -> None:
    """Unmount what is mounted there, if anything is, politely or else lazily."""
    is_root = os.geteuid() == 0
    polite, lazy = (["umount"], "--lazy") if is_root else (["fusermount3", "-u"], "-z")
    for command in (polite, [*polite, lazy]):
        if host.is_mounted(mountpoint):
            host.run([*command, str(mountpoint)], COMMAND_TIMEOUT_SECONDS)
    if host.is_mounted(mountpoint):
        raise SubjectFailed(f"{mountpoint} could not be unmounted")
