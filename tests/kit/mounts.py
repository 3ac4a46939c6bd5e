"""Real mounts: pools that are created, mounted, and cleaned up after whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kit.commands import pmemfs_here, pmemfs_ok, run_command
from kit.processes import end_process, is_running, stop, wait_until
from pmemfs.control.client import call
from pmemfs.control.places import socket_path
from pmemfs.errors import InvalidLabel
from pmemfs.logs import log_file
from pmemfs.media.label import LAYOUT, State, validate
from pmemfs.mountinfo import Mount, mount_at, mounts

Test = TypeVar("Test", bound=Callable[..., object])


ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")


@dataclass(frozen=True)
class Engine:
    """What serves a mount."""

    name: str
    transport: str = "auto"

    @property
    def options(self) -> tuple[str, ...]:
        """Options of `pmemfs mount`."""
        return ("--engine", self.name, "--transport", self.transport)

    def __str__(self) -> str:
        return self.name if self.transport == "auto" else f"{self.name}-{self.transport}"


UNKEPT = ("-o", "no_keeper")
"""Options of `pmemfs mount`, for a mount that ends with each of its processes."""
NATIVE = [Engine("native", "uring"), Engine("native", "fd")]
ENGINES = [*NATIVE, Engine("python")]
"""Every engine that `pmemfs mount` knows; what a user sees is promised for each."""


NATIVE_ONLY = [
    pytest.mark.usefixtures("engine"),
    pytest.mark.parametrize("engine", NATIVE, indirect=True, ids=str),
]
"""Marks for what the reference cannot do: run a test once with each transport."""


def native_only(test: Test) -> Test:
    """`NATIVE_ONLY` for one test."""
    for mark in NATIVE_ONLY:
        test = mark(test)
    return test


EACH_ENGINE = [
    pytest.mark.usefixtures("engine"),
    pytest.mark.parametrize("engine", [NATIVE[0], Engine("python")], indirect=True, ids=str),
]
"""Marks for what commands and the control plane do, whatever carries a request: run a test once
with each engine. The reference reads /dev/fuse, as the other transport of the native one does."""


def each_engine(test: Test) -> Test:
    """`EACH_ENGINE` for one test."""
    for mark in EACH_ENGINE:
        test = mark(test)
    return test


@dataclass
class Mounted:
    """A pool that is mounted."""

    pool: Path
    mountpoint: Path

    @property
    def device(self) -> Path:
        """The file of mode `block`."""
        return self.mountpoint / self.pool.name

    def info(self) -> dict[str, Any]:
        """`pmemfs info`."""
        return dict(json.loads(pmemfs_here("info", self.mountpoint, "--json")))

    def wait_until_idle(self) -> None:
        """Return when no page is in use. A worker lets go of one after it has answered."""
        wait_until(lambda: self.pages()["counts"]["in_use"] == 0, "no page is in use")

    def pages(self, hottest: int = 10) -> dict[str, Any]:
        """`pmemfs pages`."""
        said = pmemfs_here("pages", self.mountpoint, "--json", "--hottest", hottest)
        return dict(json.loads(said))

    @property
    def data_plane_pid(self) -> int:
        """The process that moves the bytes."""
        return int(self.info()["data_plane_pid"])

    @property
    def pid(self) -> int:
        """The daemon, asked without a command line, which would take its time."""
        mount = mount_at(str(self.mountpoint))
        assert mount is not None
        return int(call(socket_path(mount), "info")["pid"])


@dataclass
class PoolMaker:
    """Creates and mounts pools in a directory of /dev/shm, and takes everything away at the end."""

    directory: Path
    mountpoints: list[Path] = field(default_factory=list)
    engine: Engine = Engine("native")

    def create(self, name: str = "pmem0", size: str = "64M", *options: object) -> Path:
        """`pmemfs create`; the path of the pool."""
        path = self.directory / name
        pmemfs_here("create", path, "--size", size, *options)
        return path

    def mountpoint(self, name: str = "mnt") -> Path:
        """A directory to mount on."""
        path = self.directory / "mounts" / name
        # What is there may be a dead mount, which can't be looked at.
        if mount_at(str(path)) is None:
            path.mkdir(parents=True, exist_ok=True)
        self.mountpoints.append(path)
        return path

    def mount(self, pool: Path, *options: object, at: str | None = None) -> Mounted:
        """`pmemfs mount`."""
        mountpoint = self.mountpoint(at or f"of-{pool.name}")
        pmemfs_ok("mount", pool, mountpoint, *self.engine.options, *options)
        return Mounted(pool, mountpoint)

    def umount(self, mounted: Mounted) -> None:
        """`pmemfs umount`, and wait for the end of the daemon.

        The command does not, where the mount namespace of another test has a copy of the mount.
        """
        pid = mounted.pid
        pmemfs_here("umount", mounted.mountpoint)
        wait_until(lambda: not is_running(pid), "the daemon has ended")

    def clean_up(self) -> None:
        """Unmount what is left, end the daemons that are left, whatever state they are in."""
        for mountpoint in reversed(self.mountpoints):
            while mount := mount_at(str(mountpoint)):
                with suppress(subprocess.TimeoutExpired):
                    if run_command("umount", mountpoint, timeout=20).code == 0:
                        continue
                if mount.is_ours:
                    abort_connection(mount)
                run_command("umount", "--lazy", mountpoint, timeout=20)
        for pid in self._daemons():
            end_process(pid)
        for pool in self.directory.glob("*"):
            log_file(str(pool)).unlink(missing_ok=True)
        with suppress(OSError):
            shutil.rmtree(self.directory)

    def _daemons(self) -> list[int]:
        """The daemons of this maker's pools, found by the directory, which no other test has."""
        wanted = os.fsencode(f"{self.directory}/")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command, pid = (entry / "cmdline").read_bytes(), int(entry.name)
                leads = os.getsid(pid) == pid
                if wanted in command and (leads or b"pmemfs.daemons.mountd" in command):
                    found.append(pid)
        return found


@contextmanager
def pool_maker(engine: Engine = Engine("native")) -> Iterator[PoolMaker]:
    """A maker of pools and mounts; needs root or fusermount3, and /dev/fuse."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse here")
    if engine.transport == "uring" and not uring_is_there():
        pytest.skip("this kernel has no FUSE over io_uring, or will not switch it on")
    maker = PoolMaker(Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm")), engine=engine)
    try:
        yield maker
    finally:
        maker.clean_up()


def uring_is_there() -> bool:
    """Whether mounts can use FUSE over io_uring; `pytest_sessionstart` has done what it could."""
    return ENABLE_URING.exists() and ENABLE_URING.read_text().strip() == "Y"


def abort_connection(mount: Mount) -> None:
    """Abort a FUSE connection through a fusectl of our own; whoever waits for it gets an error."""
    with tempfile.TemporaryDirectory() as directory:
        run_command("mount", "-t", "fusectl", "fusectl", directory)
        try:
            with suppress(FileNotFoundError):
                (Path(directory) / str(mount.minor) / "abort").write_text("1")
        finally:
            run_command("umount", directory)


def begin_end(mounted: Mounted, how: str) -> None:
    """Begin to end a mount: by umount(8), by an abort of its connection, or by a signal."""
    if how == "umount":
        assert run_command("umount", mounted.mountpoint).code == 0
    elif how == "abort":
        mount = mount_at(str(mounted.mountpoint))
        assert mount is not None
        abort_connection(mount)
    else:
        os.kill(mounted.pid, signal.SIGTERM)


def mounts_at(mountpoint: Path) -> int:
    """How many mounts lie on a directory, one over the other."""
    return sum(mount.mountpoint == str(mountpoint) for mount in mounts())


@dataclass(frozen=True)
class Session:
    """The traces of a living daemon, to look for when it should be gone."""

    pool: Path
    mountpoint: Path
    device: str
    pid: int
    data_plane_pid: int | None
    keeper_pid: int | None
    socket: Path
    socket_made_ns: int

    @classmethod
    def of(cls, mounted: Mounted) -> Session:
        """The traces of the daemon of a mount."""
        mount = mount_at(str(mounted.mountpoint))
        assert mount is not None
        info, socket = call(socket_path(mount), "info"), Path(socket_path(mount))
        pid, kept = int(info["pid"]), info["kept"]
        keeper_pid = kept["keeper_pid"] if kept else None
        assert is_running(pid)
        return cls(
            mounted.pool, mounted.mountpoint, mount.device, pid, info["data_plane_pid"], keeper_pid,
            socket, socket.stat().st_mtime_ns,
        )  # fmt: skip

    @property
    def is_mounted(self) -> bool:
        """Whether the mount is still anywhere. Its number may be given to the next one."""
        return any(
            mount.device == self.device and mount.source == str(self.pool) for mount in mounts()
        )

    @property
    def has_socket(self) -> bool:
        """Whether its control socket is there, and not that of the next mount with this number."""
        with suppress(FileNotFoundError):
            return self.socket.stat().st_mtime_ns == self.socket_made_ns
        return False

    def kill(self) -> None:
        """End the daemon as a crash does, and wait until nobody has the pool open. Nothing takes
        its place."""
        keeper = self.keeper_pid
        if keeper:
            # Or the daemon starts another keeper.
            stop(self.pid)
            os.kill(keeper, 9)
        os.kill(self.pid, 9)
        wait_until(lambda: not is_running(self.pid), "the daemon is dead")
        wait_until(lambda: not (keeper and is_running(keeper)), "so is its keeper")
        data_plane = self.data_plane_pid
        wait_until(lambda: not (data_plane and is_running(data_plane)), "so is its data plane")

    def assert_ended(self, state: str = "clean") -> None:
        """No process, no mount, no socket, and the pool as it should be."""
        wait_until(lambda: not is_running(self.pid), "the daemon has ended")
        assert not self.is_mounted
        assert not self.has_socket
        assert self.pool_state() == state

    def pool_state(self) -> str:
        """The state that the label records; "" while a daemon is just writing it."""
        with suppress(InvalidLabel), self.pool.open("rb") as file:
            return State(validate(file.read(LAYOUT.size_bytes)).state).word
        return ""


def may_pass(pools: PoolMaker) -> None:
    """Let other users through the directories down to the pools and mounts."""
    (pools.directory / "mounts").mkdir(exist_ok=True)
    for directory in (pools.directory, pools.directory / "mounts"):
        directory.chmod(0o755)
