"""What the end-to-end tests share: other users, small file systems, the traces of a daemon."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conftest import Mounted, PoolMaker, Result, is_running, run_command

from pmemfs.control.places import socket_path
from pmemfs.fuse.mountpoint import source_name
from pmemfs.media.label import LAYOUT, State, validate
from pmemfs.mountinfo import mount_at, mounts

NOBODY = 65534
AS_NOBODY = ("setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--")

MIB = 1 << 20


def refused(result: Result, code: int, *words: str) -> str:
    """A command that failed as it should: the exit code and one sentence that has these words."""
    assert result.code == code, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def mounts_at(mountpoint: Path) -> int:
    """How many mounts lie on a directory, one over the other."""
    return sum(mount.mountpoint == str(mountpoint) for mount in mounts())


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not after {seconds} s: {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Session:
    """The traces of a living daemon, to look for when it should be gone."""

    pool: Path
    mountpoint: Path
    device: str
    pid: int
    socket: Path

    @classmethod
    def of(cls, mounted: Mounted) -> Session:
        """The traces of the daemon of a mount."""
        mount = mount_at(str(mounted.mountpoint))
        assert mount is not None
        session = cls(
            mounted.pool, mounted.mountpoint, mount.device, mounted.pid, socket_path(mount)
        )
        assert is_running(session.pid)
        assert session.socket.exists()
        return session

    @property
    def is_mounted(self) -> bool:
        """Whether the mount is still anywhere. Its number may be given to the next one."""
        return any(
            mount.device == self.device and mount.source == source_name(str(self.pool))
            for mount in mounts()
        )

    @property
    def has_socket(self) -> bool:
        """Whether there is a control socket that isn't of the next mount with this number."""
        is_given_again = any(mount.device == self.device for mount in mounts())
        return self.socket.exists() and (self.is_mounted or not is_given_again)

    def kill(self) -> None:
        """End the daemon as a crash does, and wait until it is gone."""
        os.kill(self.pid, 9)
        wait_until(lambda: not is_running(self.pid), "the daemon is dead")

    def assert_ended(self, state: str = "clean") -> None:
        """No process, no mount, no socket, and the pool as it should be."""
        wait_until(lambda: not is_running(self.pid), "the daemon has ended")
        assert not self.is_mounted
        assert not self.has_socket
        assert self.pool_state() == state

    def pool_state(self) -> str:
        """The state that the label records."""
        with self.pool.open("rb") as file:
            return State(validate(file.read(LAYOUT.size_bytes)).state).word


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A file descriptor."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mounted_tmpfs(directory: Path, *options: str) -> Iterator[Path]:
    """A tmpfs on a directory, with options such as size=16M."""
    directory.mkdir(parents=True, exist_ok=True)
    done = run_command("mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", directory)
    assert done.code == 0, done.err
    try:
        yield directory
    finally:
        if run_command("umount", directory).code:
            run_command("umount", "--lazy", directory)


@contextmanager
def loop_device(file: Path) -> Iterator[Path]:
    """A loop device with direct I/O over a file, detached whatever happens."""
    done = run_command("losetup", "--find", "--show", "--direct-io=on", file)
    assert done.code == 0, done.err
    device = Path(done.out.strip())
    try:
        yield device
    finally:
        run_command("umount", device)
        run_command("losetup", "--detach", device)


def fio(directory: Path, file: Path, *words: object, timeout: float = 120) -> Result:
    """Run fio, which leaves files where it runs. Direct and psync, unless the words say else."""
    command = ["fio", "--name=v", f"--filename={file}", "--direct=1", *map(str, words)]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def may_pass(pools: PoolMaker) -> None:
    """Let other users through the directories down to the pools and mounts."""
    (pools.directory / "mounts").mkdir(exist_ok=True)
    for directory in (pools.directory, pools.directory / "mounts"):
        directory.chmod(0o755)


class Oracle:
    """A device and what must be in it: the same reads and writes go to both."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self.random = random.Random(seed)
        with opened(path, os.O_RDONLY) as fd:
            self.expected = bytearray(read_all(fd, self.size_bytes, 0))

    def exercise(self, steps: int, largest: int = MIB) -> None:
        """Read and write at any offset, with any length up to `largest`, mostly small ones."""
        with opened(self.path) as fd:
            for _ in range(steps):
                length = int(largest ** self.random.random())
                offset = self.random.randrange(self.size_bytes - length)
                if self.random.random() < 0.5:
                    data = self.random.randbytes(length)
                    assert os.pwrite(fd, data, offset) == length
                    self.expected[offset : offset + length] = data
                else:
                    assert os.pread(fd, length, offset) == self.expected[offset : offset + length]

    def compare(self) -> None:
        """All of the device is as it must be."""
        with opened(self.path, os.O_RDONLY) as fd:
            assert read_all(fd, self.size_bytes, 0) == self.expected


def read_all(fd: int, length: int, offset: int) -> bytes:
    """Read a range in pieces of 1 MiB."""
    pieces = []
    while length:
        piece = os.pread(fd, min(length, MIB), offset)
        assert piece, f"the file ends at {offset}"
        pieces.append(piece)
        offset += len(piece)
        length -= len(piece)
    return b"".join(pieces)


def private_bytes(pid: int, pool: Path) -> int:
    """The memory of a process that nobody shares, without the pool, whose memory is the pool's."""
    total_kib = 0
    is_counted = True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            is_counted = str(pool) not in line
        elif is_counted and name in ("Private_Clean:", "Private_Dirty:"):
            total_kib += int(values[0])
    return total_kib * 1024
