"""Requests that make no sense get an errno, and the daemon lives on."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator

import pytest

from kit.commands import run_command
from kit.mounts import ENGINES, Mounted, Session, pool_maker
from kit.posix import opened
from pmemfs.units import MIB

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module", params=ENGINES, ids=str)
def session_of_all(request: pytest.FixtureRequest) -> Iterator[tuple[Mounted, Session]]:
    """One mount for all of these tests, which none of them may end."""
    with pool_maker(request.param) as pools:
        mounted = pools.mount(pools.create(size="16M"))
        yield mounted, Session.of(mounted)


@pytest.fixture
def mounted(session_of_all: tuple[Mounted, Session]) -> Iterator[Mounted]:
    mounted, session = session_of_all
    yield mounted
    assert mounted.pid == session.pid, "the daemon has lived on"
    with opened(mounted.device) as fd:
        assert os.pwrite(fd, b"alive", 4096) == 5
        assert os.pread(fd, 5, 4096) == b"alive"


def errno_of(attempt: Callable[[], object]) -> int:
    """The errno that a call fails with; 0 if it doesn't."""
    try:
        attempt()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62, (1 << 63) - 8192])
def test_a_read_far_behind_the_end_is_empty(mounted: Mounted, offset: int) -> None:
    with opened(mounted.device) as fd:
        assert os.pread(fd, 4096, offset) == b""


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62, (1 << 63) - 8192, (1 << 63) - 4096])
def test_a_write_far_behind_the_end_fails(mounted: Mounted, offset: int) -> None:
    before = mounted.device.read_bytes()
    with opened(mounted.device) as fd:
        refused = errno_of(lambda: os.pwrite(fd, b"x" * 4096, offset))
        assert refused in (errno.ENOSPC, errno.EFBIG, errno.EINVAL)
    assert mounted.device.read_bytes() == before


def test_a_negative_offset_is_invalid(mounted: Mounted) -> None:
    with opened(mounted.device) as fd:
        assert errno_of(lambda: os.pread(fd, 1, -1)) == errno.EINVAL
        assert errno_of(lambda: os.pwrite(fd, b"x", -1)) == errno.EINVAL
        assert errno_of(lambda: os.lseek(fd, -1, os.SEEK_SET)) == errno.EINVAL


@pytest.mark.parametrize("size", [0, 1 << 40, 1 << 62])
def test_no_size_can_be_set(mounted: Mounted, size: int) -> None:
    before = mounted.device.stat().st_size
    os.truncate(mounted.device, size)
    assert mounted.device.stat().st_size == before


def test_nothing_to_transfer_is_nothing(mounted: Mounted) -> None:
    with opened(mounted.device) as fd:
        assert os.pread(fd, 0, 0) == b""
        assert os.pwrite(fd, b"", 0) == 0
        assert os.preadv(fd, [bytearray(1)] * 1000, 0) == 1000
        assert len(os.pread(fd, 8 * MIB, MIB)) == 8 * MIB


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"x" * 255, errno.ENOENT),
        (b"x" * 256, errno.ENAMETOOLONG),
        (b"x" * 4095, errno.ENAMETOOLONG),
        (b"\xff\xfe\n\x01", errno.ENOENT),
        ("ü".encode(), errno.ENOENT),
        (b"pmem0/below", errno.ENOTDIR),
        (b"pmem", errno.ENOENT),
        (b"pmem00", errno.ENOENT),
    ],
)
def test_a_name_that_is_not_there_is_answered(mounted: Mounted, name: bytes, expected: int) -> None:
    path = os.fsencode(mounted.mountpoint) + b"/" + name
    assert errno_of(lambda: os.stat(path)) == expected
    creation = errno_of(lambda: os.open(path, os.O_CREAT | os.O_WRONLY))
    assert creation == (errno.EPERM if expected == errno.ENOENT else expected)


def test_what_is_not_supported_says_so(mounted: Mounted) -> None:
    device, root = mounted.device, mounted.mountpoint
    with opened(device) as fd:
        attempts: dict[str, Callable[[], object]] = {
            "setxattr": lambda: os.setxattr(device, "user.x", b"y"),
            "getxattr": lambda: os.getxattr(device, "user.x"),
            "removexattr": lambda: os.removexattr(device, "user.x"),
            "readlink": lambda: os.readlink(device),
            "tmpfile": lambda: os.open(root, os.O_TMPFILE | os.O_RDWR),
            "rmdir": lambda: os.rmdir(device),
            "rmdir of the root": lambda: os.rmdir(root),
            "listdir of the file": lambda: os.listdir(device),
            "open of the directory": lambda: os.open(root, os.O_WRONLY),
            "rename over itself": lambda: os.rename(root, root / "below"),
        }
        if mounted.info()["engine"] == "python":
            attempts["shared mapping"] = lambda: mmap.mmap(fd, 4096)
        for name, attempt in attempts.items():
            refused = errno_of(attempt)
            assert refused not in (0, errno.EIO, errno.ENOTCONN), name


def test_what_no_device_can_do_to_its_ranges_is_refused_and_changes_nothing(
    mounted: Mounted,
) -> None:
    device = mounted.device
    before = device.read_bytes()
    modes = ["--collapse-range", "--insert-range"]
    if mounted.info()["engine"] == "python":
        modes += ["--punch-hole", "--zero-range"]
    for mode in modes:
        assert run_command("fallocate", mode, "--length=4096", device).code != 0
    assert device.read_bytes() == before


def test_seeking_data_finds_all_of_the_file(mounted: Mounted) -> None:
    with opened(mounted.device) as fd:
        assert os.lseek(fd, 5, os.SEEK_DATA) == 5
        assert os.lseek(fd, 5, os.SEEK_HOLE) == mounted.device.stat().st_size
        assert errno_of(lambda: os.lseek(fd, 1 << 40, os.SEEK_DATA)) == errno.ENXIO


def test_opening_and_listing_a_thousand_times_leaves_nothing_behind(mounted: Mounted) -> None:
    for _ in range(1000):
        os.close(os.open(mounted.device, os.O_RDWR))
    for _ in range(200):
        assert os.listdir(mounted.mountpoint) == ["pmem0"]
