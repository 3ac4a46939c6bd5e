"""Times of files in a mounted file system, beside those of the kernel's own file systems."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.mount

ROUNDS = 600
LONG_AGO_NS = 946_684_800_123_456_789


@contextmanager
def open_file(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(params=["one file", "new files"])
def written(request: pytest.FixtureRequest, root: Path) -> Iterator[Callable[[], int]]:
    """Writes to a file here; its time of modification: of one that the data plane comes to serve,
    or of a new one each time."""
    numbers = itertools.count()

    def write_new() -> int:
        path = root / f"file{next(numbers)}"
        with open_file(path) as fd:
            os.write(fd, b"x")
            status = os.fstat(fd)
        path.unlink()
        return status.st_mtime_ns

    if request.param == "new files":
        yield write_new
        return
    with open_file(root / "file") as fd:

        def write() -> int:
            os.pwrite(fd, b"x" * 4096, 0)
            return os.fstat(fd).st_mtime_ns

        write()
        write()
        yield write


def test_what_the_kernel_writes_afterwards_is_not_older(
    written: Callable[[], int], shm: Path
) -> None:
    reversals = 0
    for number in range(ROUNDS):
        here_ns = written()
        # A new one: nobody has looked at its times, so the kernel stamps it by its coarse clock.
        path = shm / f"theirs{number}"
        path.write_bytes(b"y")
        reversals += path.stat().st_mtime_ns < here_ns
        path.unlink()
    assert reversals == 0


@pytest.fixture
def finer(shm: Path) -> Callable[[], None]:
    """Lets the kernel stamp a file of its own between two ticks, which takes its clock ahead."""
    path = shm / "finer"
    path.write_bytes(b"")

    def stamp() -> None:
        path.stat()
        os.utime(path)

    return stamp


@pytest.mark.parametrize("is_finer", [False, True])
def test_times_of_one_file_never_go_backwards(
    root: Path, finer: Callable[[], None], is_finer: bool
) -> None:
    with open_file(root / "file") as fd:

        def modified_ns() -> int:
            return os.fstat(fd).st_mtime_ns

        last_ns = modified_ns()
        reversals = 0
        for number in range(ROUNDS):
            for step in (
                lambda: os.pwrite(fd, b"x" * 100, 0),
                lambda: os.utime(fd),
                lambda number=number: os.ftruncate(fd, 100 + number % 2),
            ):
                if is_finer:
                    finer()
                step()
                now_ns = modified_ns()
                reversals += now_ns < last_ns
                last_ns = now_ns
    assert reversals == 0


@pytest.mark.parametrize("is_finer", [False, True])
def test_times_of_a_directory_never_go_backwards(
    root: Path, finer: Callable[[], None], is_finer: bool
) -> None:
    path, other = root / "file", root / "other"
    last_ns = root.stat().st_mtime_ns
    reversals = 0
    for _ in range(ROUNDS // 4):
        for step in (
            path.touch, lambda: os.utime(root), lambda: path.rename(other), lambda: os.utime(root),
            other.unlink,
        ):  # fmt: skip
            if is_finer:
                finer()
            step()
            now_ns = root.stat().st_mtime_ns
            reversals += now_ns < last_ns
            last_ns = now_ns
    assert reversals == 0


@pytest.mark.parametrize("size", [1, 4096])
def test_within_one_tick_what_comes_last_counts(root: Path, size: int) -> None:
    path = root / "file"
    with open_file(path) as fd:
        for _ in range(300):
            os.pwrite(fd, b"x" * size, 0)
            os.utime(fd, ns=(5, LONG_AGO_NS))
            assert os.fstat(fd).st_mtime_ns == LONG_AGO_NS, "set after the write"
            os.pwrite(fd, b"y" * size, 0)
            assert os.fstat(fd).st_mtime_ns > LONG_AGO_NS, "written after it was set"
            os.utime(fd, ns=(5, LONG_AGO_NS))
            os.ftruncate(fd, size)
            assert os.fstat(fd).st_mtime_ns > LONG_AGO_NS
            os.utime(fd, ns=(5, LONG_AGO_NS))
    assert path.stat().st_mtime_ns == LONG_AGO_NS
