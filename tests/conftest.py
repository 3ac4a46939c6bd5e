"""What all tests share: memory to put pools in, and real mounts that are cleaned up after."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pmemfs.cli.main import pmemfs as program
from pmemfs.cli.main import run
from pmemfs.control.client import call
from pmemfs.control.places import socket_path
from pmemfs.mountinfo import Mount, mount_at

BIN = Path(sys.executable).parent
_HERE = threading.Lock()

Test = TypeVar("Test", bound=Callable[..., object])

ENABLE_URING = Path("/sys/module/fuse/parameters/enable_uring")
ROOT = Path(__file__).parents[1]
_URING_BEFORE = pytest.StashKey[str]()
_LOCK, _GATE, _KEPT = pytest.StashKey[int](), pytest.StashKey[int](), pytest.StashKey[bool]()


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


NATIVE = [Engine("native", "uring"), Engine("native", "fd")]
ENGINES = [*NATIVE, Engine("python")]
"""Every engine that `pmemfs mount` knows; what a user sees is promised for each."""


@dataclass
class Result:
    """What a command answered."""

    code: int
    out: str
    err: str


def run_command(*words: object, timeout: float = 120) -> Result:
    """Run a program; nothing is raised for its exit code."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def pmemfs(*words: object, timeout: float = 120) -> Result:
    """Run the installed program as a user does; a traceback is always a failure."""
    result = run_command(BIN / "pmemfs", *words, timeout=timeout)
    assert "Traceback" not in result.err, result.err
    return result


def pmemfs_ok(*words: object, timeout: float = 120) -> str:
    """Run the program; its output. It must succeed."""
    result = pmemfs(*words, timeout=timeout)
    assert result.code == 0, result.err
    return result.out


def pmemfs_here(*words: object) -> str:
    """Run a command in this process; its output. It must succeed.

    For what a test needs and does not prove: to start the program takes longer than what it does.
    """
    out, err = io.StringIO(), io.StringIO()
    with _HERE, redirect_stdout(out), redirect_stderr(err):
        code = run(program, [str(word) for word in words])
    assert code == 0, err.getvalue()
    return out.getvalue()


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
        """`pmemfs umount`."""
        pmemfs_here("umount", mounted.mountpoint)

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
        with suppress(OSError):
            shutil.rmtree(self.directory)

    def _daemons(self) -> list[int]:
        """The daemons of this maker's pools, found by the directory, which no other test has."""
        wanted = os.fsencode(f"{self.directory}/")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if wanted in command and b"pmemfs.daemons.mountd" in command:
                    found.append(int(entry.name))
        return found


def abort_connection(mount: Mount) -> None:
    """Abort a FUSE connection through a fusectl of our own; whoever waits for it gets an error."""
    with tempfile.TemporaryDirectory() as directory:
        run_command("mount", "-t", "fusectl", "fusectl", directory)
        try:
            with suppress(FileNotFoundError):
                (Path(directory) / str(mount.minor) / "abort").write_text("1")
        finally:
            run_command("umount", directory)


def is_running(pid: int) -> bool:
    """Whether a process is there and not merely waiting for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_process(pid: int, seconds: float = 10) -> None:
    """Wait a little for a process to end by itself, then end it."""
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    if is_running(pid):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory, gone after the test."""
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


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


@pytest.fixture(params=ENGINES, ids=str)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Run a test once with each engine: its `pools` mount with this one."""
    assert isinstance(request.param, Engine)
    return request.param


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


@pytest.fixture
def pools(request: pytest.FixtureRequest) -> Iterator[PoolMaker]:
    """A maker of pools and mounts for one test, with the test's `engine` if it has one."""
    has_engine = "engine" in request.fixturenames
    with pool_maker(request.getfixturevalue("engine") if has_engine else Engine("native")) as maker:
        yield maker


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def file_system(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Mounted]]:
    """A mounted pool of mode `fs` for all tests of a module, which other users may use; once with
    each engine."""
    assert isinstance(request.param, Engine)
    with pool_maker(request.param) as maker:
        # Other users are let through down to the mount.
        (maker.directory / "mounts").mkdir()
        for directory in (maker.directory, maker.directory / "mounts"):
            directory.chmod(0o755)
        pool = maker.create("files", "256M", "--mode", "fs")
        yield request.param, maker.mount(pool, "-o", "allow_other")


@pytest.fixture
def root(file_system: tuple[Engine, Mounted]) -> Iterator[Path]:
    """An empty directory of a mounted pool of mode `fs`, for one test."""
    _, mounted = file_system
    path = Path(tempfile.mkdtemp(dir=mounted.mountpoint))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def native_root(file_system: tuple[Engine, Mounted], root: Path) -> Path:
    """As `root`, for what the reference cannot do."""
    engine, _ = file_system
    if engine.name != "native":
        pytest.skip("pyfuse3 has no such operation")
    return root


@pytest.fixture
def helper() -> Iterator[None]:
    """The helper of mount(8), where that looks for it; one that is installed stays."""
    place = Path("/sbin/mount.pmemfs")
    if place.exists():
        yield
        return
    place.symlink_to(BIN / "mount.pmemfs")
    yield
    place.unlink()


def uring_is_there() -> bool:
    """Whether mounts can use FUSE over io_uring; `pytest_sessionstart` has done what it could."""
    return ENABLE_URING.exists() and ENABLE_URING.read_text().strip() == "Y"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What others have to wait for comes last."""
    items.sort(key=is_alone)


def is_alone(item: pytest.Item | None) -> bool:
    """Whether nothing else may run beside a test."""
    return item is not None and item.get_closest_marker("alone") is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Run a test that is to be alone while none of the other processes runs one; the time that it
    waits for that is not the test's.

    Locks of the same file, exclusive or shared, do that; who waits keeps newcomers out with a
    second one. The lock is kept where the next test shares fixtures that were the reason for it.
    """
    stash = item.config.stash
    lock = stash.get(_LOCK, None)
    if lock is None:
        lock = stash[_LOCK] = os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)
        stash[_GATE] = os.open(ROOT / "pyproject.toml", os.O_RDONLY | os.O_CLOEXEC)
    if not stash.get(_KEPT, False):
        fcntl.flock(stash[_GATE], fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        fcntl.flock(stash[_GATE], fcntl.LOCK_UN)
    try:
        return (yield)
    finally:
        stash[_KEPT] = is_alone(item) and is_alone(nextitem)
        if not stash[_KEPT]:
            fcntl.flock(lock, fcntl.LOCK_UN)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Switch FUSE over io_uring on for the tests, where that can be done: before any of the
    processes that run them is started."""
    before = ENABLE_URING.read_text() if ENABLE_URING.exists() else "Y"
    is_ours = before.strip() != "Y" and os.access(ENABLE_URING, os.W_OK)
    if is_ours and not hasattr(session.config, "workerinput"):
        ENABLE_URING.write_text("Y")
        session.config.stash[_URING_BEFORE] = before


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Switch it back."""
    before = session.config.stash.get(_URING_BEFORE, None)
    if before is not None:
        ENABLE_URING.write_text(before)
