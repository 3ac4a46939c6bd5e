"""What all tests share: memory to put pools in, and real mounts that are cleaned up after."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kit.ceph_node import CephNode, missing_programs, shared_node
from kit.commands import BIN
from kit.left_open import follow, nothing_left_open
from kit.mounts import ENABLE_URING, ENGINES, Engine, Mounted, PoolMaker, may_pass, pool_maker
from kit.namespaces import Run, as_ordinary_user, mount_namespace
from kit.shared_setting import kept_at

ROOT = Path(__file__).parents[1]
_IS_WITHIN_A_TEST = "PYTEST_CURRENT_TEST" in os.environ
"""Whether this whole run is a part of a test of another one, which holds the lock for it."""
_MOST_DESCRIPTORS = 256
"""A quarter of what a process may have open where nobody has raised the limit."""
_URING_NOTE = Path("/run/pmemfs-tests-enable-uring")
_HELD = pytest.StashKey[ExitStack]()
_LOCK, _GATE, _KEPT = pytest.StashKey[int](), pytest.StashKey[int](), pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Close what a test and its fixtures leave open."""
    with nothing_left_open():
        yield
    if len(os.listdir("/proc/self/fd")) >= _MOST_DESCRIPTORS:
        # What only waits for the garbage collector does not count.
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) < _MOST_DESCRIPTORS, "tests leave too much open"


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory, gone after the test."""
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(params=ENGINES, ids=str)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Run a test once with each engine: its `pools` mount with this one."""
    assert isinstance(request.param, Engine)
    return request.param


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
        may_pass(maker)
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
    """The helper of mount(8), where that looks for it; one that is installed stays.

    There is one place for all processes that run tests, so one at a time uses it.
    """
    places = [Path("/sbin/mount.pmemfs"), Path("/sbin/mount.fuse.pmemfs")]
    lock = os.open(places[0].parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = [place for place in places if not place.exists()]
        for place in made:
            # What a run that was killed has left leads nowhere.
            place.unlink(missing_ok=True)
            place.symlink_to(BIN / "mount.pmemfs")
        yield
        for place in made:
            place.unlink()
    finally:
        os.close(lock)


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephNode]:
    """A Ceph cluster of one node, shared with the other processes that run tests."""
    if missing := missing_programs():
        pytest.skip(f"{missing[0]} is not installed; scripts/install-origins --tests installs it")
    with shared_node() as node:
        yield node


@pytest.fixture
def inside(pools: PoolMaker) -> Iterator[Run]:
    """Runs a command as root in a mount namespace in which every user may mount."""
    with mount_namespace(pools) as run:
        yield run


@pytest.fixture
def user(pools: PoolMaker, inside: Run) -> Run:
    """Runs a command as an ordinary user, in that namespace."""
    return as_ordinary_user(inside, pools.directory / "home")


# How long an example takes says how busy the machine is.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("any"), max_examples=25)
settings.load_profile("any")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes a second, which is what makes mounts of its own or needs a cluster, and put
    all in order.

    A process that runs tests takes whole files: the virtual machines come first, then the files
    with slow tests, so that in the end no process has a long one to itself; what all others have
    to wait for comes last.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        is_long = "pools" in fixtures and not item.get_closest_marker("quick")
        if is_long or "ceph" in fixtures:
            item.add_marker("slow")
    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (is_alone(item), not is_guest(item), item.path not in long_files))


def pytest_collection_finish() -> None:
    """Leave what was collected out of each collection of garbage: it stays until the end. In forked
    children, too, which would otherwise copy all of it."""
    gc.collect()
    gc.freeze()


def is_guest(item: pytest.Item) -> bool:
    """Whether a test waits for virtual machines, which are slow, and do little at times."""
    return item.get_closest_marker("guest") is not None


def is_alone(item: pytest.Item | None) -> bool:
    """Whether nothing else may run beside a test."""
    return item is not None and item.get_closest_marker("alone") is not None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After each file give back what the C library keeps of large buffers, up to 2 GiB: the more a
    process has, the longer it takes to fork."""
    if nextitem is None or nextitem.path != item.path:
        ctypes.CDLL(None).malloc_trim(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Run a test that is to be alone while none of the other processes runs one; the time that it
    waits for that is not the test's.

    Locks of the same file, exclusive or shared, do that; who waits keeps newcomers out with a
    second one. The lock is kept where the next test shares fixtures that were the reason for it.
    A run that a test has started takes none: who waits to be alone waits for that test, too, and
    would keep its run out for ever.
    """
    if _IS_WITHIN_A_TEST:
        return (yield)
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
    processes that run them is started. And know what each of these has open."""
    follow()
    # A shell lets what it starts in the background ignore SIGINT, and so would all its children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(session.config, "workerinput") and os.access(ENABLE_URING, os.W_OK):
        held = session.config.stash[_HELD] = ExitStack()
        held.enter_context(kept_at(ENABLE_URING, "Y", _URING_NOTE))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Switch it back, unless another run needs it."""
    session.config.stash.get(_HELD, ExitStack()).close()
