"""Bad memory under the mapping of a pool: each way to touch it, and who else gets a SIGBUS."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from kit.poison import address_of, in_child, poisoner
from pmemfs.errors import MemoryFault
from pmemfs.medium import faultlog
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.units import KIB, MIB

FRAME = 4 * KIB
BAD = 128 * FRAME
"""The bad page of all tests here; what is behind it is bad too where the file is cut off."""

Way = Callable[[MappedMedium], None]


@pytest.fixture
def path(shm: Path) -> Path:
    """A file with memory everywhere, and something in it."""
    path = shm / "pool"
    path.write_bytes(b"pool" * (MIB // 4))
    return path


@contextmanager
def poisoned(medium: MappedMedium) -> Iterator[None]:
    with poisoner() as poison:
        poison.poison(address_of(medium.view(BAD, FRAME)))
        yield


@contextmanager
def cut(medium: MappedMedium) -> Iterator[None]:
    os.ftruncate(medium.fileno(), BAD)
    yield
    os.ftruncate(medium.fileno(), medium.size_bytes)


WAYS = {"poison": poisoned, "cut": cut}


def touch_view(medium: MappedMedium) -> None:
    assert medium.view(BAD, 1)[0] == 0, "somebody sees zeroes, and not a signal"
    medium.check_touched()


def store_through_view(medium: MappedMedium) -> None:
    medium.view(BAD - 8, 16)[:] = bytes(16)
    assert medium.has_faulted()
    medium.check_touched()


def touch_with_numpy(medium: MappedMedium) -> None:
    words = np.frombuffer(medium.view(0, medium.size_bytes), "<u8")
    words += 1
    medium.check_touched()


def flush(medium: MappedMedium) -> None:
    medium.durability = Durability.CACHE_LINES
    medium.flush(BAD - 64, 128)


TOUCHES: dict[str, Way] = {
    "read": lambda medium: medium.read(BAD + 5, 1) and None,
    "read across": lambda medium: medium.read(BAD - 4, 8) and None,
    "store": lambda medium: medium.store(BAD, b"x"),
    "store across": lambda medium: medium.store(BAD - 4, bytes(8)),
    "view": touch_view,
    "store through a view": store_through_view,
    "numpy": touch_with_numpy,
    "flush": flush,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("touch", TOUCHES)
def test_a_touch_of_bad_memory_is_an_error_that_names_the_page(
    path: Path, touch: str, way: str
) -> None:
    def child() -> None:
        with closing(MappedMedium.open(str(path))) as medium:
            with WAYS[way](medium), pytest.raises(MemoryFault, match=f"{BAD >> 12:#x}") as caught:
                TOUCHES[touch](medium)
            assert caught.value.errno == errno.EIO
            assert isinstance(caught.value, OSError)
            assert str(path) in str(caught.value)
            assert medium.fault_count == 1
            # Nothing was put there for good: the next touch is one of the pool.
            medium.store(BAD, b"real")
            assert bytes(medium.view(BAD, 4)) == b"real"
            medium.check_touched()
            assert os.pread(medium.fileno(), 4, BAD) == b"real"

    assert in_child(child) == 0


@pytest.mark.parametrize("touch", TOUCHES)
def test_memory_that_stays_bad_is_met_again(path: Path, touch: str) -> None:
    def child() -> None:
        with closing(MappedMedium.open(str(path))) as medium, cut(medium):
            for _ in range(3):
                with pytest.raises(MemoryFault):
                    TOUCHES[touch](medium)
            assert medium.read(0, 4) is not None, "and the rest can be read"

    assert in_child(child) == 0


def test_what_is_stored_beside_a_bad_page_is_there(path: Path) -> None:
    def child() -> None:
        with closing(MappedMedium.open(str(path))) as medium:
            with cut(medium), pytest.raises(MemoryFault):
                medium.store(BAD - 4, b"goodlost")
            assert medium.read(BAD - 4, 8) == b"good\0\0\0\0"

    assert in_child(child) == 0


def test_a_read_only_mapping_survives_too(path: Path) -> None:
    def child() -> None:
        with closing(MappedMedium.open(str(path), read_only=True)) as medium:
            os.truncate(path, BAD)
            with pytest.raises(MemoryFault):
                medium.read(BAD, 1)
            assert medium.read(0, 4) == b"pool"

    assert in_child(child) == 0


def test_what_another_thread_has_met_and_not_told_is_not_read_as_zeroes(path: Path) -> None:
    def child() -> None:
        with closing(MappedMedium.open(str(path))) as medium, cut(medium):
            has_met, may_tell = threading.Event(), threading.Event()
            told: list[MemoryFault] = []

            def meet() -> None:
                assert medium.view(BAD, 1)[0] == 0
                has_met.set()
                may_tell.wait()
                try:
                    medium.check_touched()
                except MemoryFault as fault:
                    told.append(fault)

            thread = threading.Thread(target=meet)
            thread.start()
            has_met.wait()
            assert not medium.has_faulted()
            assert medium.read(0, 4) == b"pool", "an innocent read is none of it"
            with pytest.raises(MemoryFault):
                medium.read(BAD, 8)
            may_tell.set()
            thread.join()
            assert [fault.pfn for fault in told] == [BAD >> 12]

    assert in_child(child) == 0


def test_two_media_do_not_mix_their_faults_up(path: Path, shm: Path) -> None:
    other = shm / "other"
    other.write_bytes(bytes(MIB))

    def child() -> None:
        with (
            closing(MappedMedium.open(str(path))) as one,
            closing(MappedMedium.open(str(other))) as two,
        ):
            os.truncate(path, BAD)
            assert one.view(BAD, 1)[0] == 0
            two.check_touched()
            two.store(BAD, b"x")
            with pytest.raises(MemoryFault, match=str(path)):
                one.check_touched()

    assert in_child(child) == 0


def test_a_view_of_before_the_medium_grew_is_guarded_too(path: Path) -> None:
    def child() -> None:
        with closing(MappedMedium.open(str(path))) as medium:
            view = medium.view(0, MIB)
            medium.extend(2 * MIB)
            os.truncate(path, BAD)
            assert view[BAD] == 0
            with pytest.raises(MemoryFault):
                medium.check_touched()

    assert in_child(child) == 0


# A sparse medium, past its mapping


@pytest.mark.parametrize(
    "touch",
    [
        lambda medium: medium.read(BAD, 1),
        lambda medium: medium.read(BAD - 1, 2),
        lambda medium: medium.store(BAD, b"x"),
        lambda medium: medium.reserve(BAD, 1),
        lambda medium: medium.clear(BAD, FRAME),
        lambda medium: medium.extend(2 * MIB),
    ],
)  # fmt: skip
def test_what_was_cut_off_a_sparse_file_neither_reads_as_zeroes_nor_comes_back(
    shm: Path, touch: Way
) -> None:
    path = shm / "sparse"
    path.touch()
    os.truncate(path, MIB)
    with closing(MappedMedium.open(str(path))) as medium:
        assert medium.is_hole(BAD, FRAME)
        os.truncate(path, BAD)
        with pytest.raises(MemoryFault, match=f"{BAD >> 12:#x}"):
            touch(medium)
        assert not medium.is_hole(BAD, FRAME)
        assert path.stat().st_size == BAD
        medium.store(0, b"kept")
        assert medium.read(0, 4) == b"kept"


# Everybody else's memory, and everybody else's signals


def touch_lost_memory(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), MIB) as mapping:
        os.truncate(path, BAD)
        mapping[BAD]


def test_a_fault_of_memory_that_is_no_pool_kills(path: Path, shm: Path) -> None:
    other = shm / "other"
    other.write_bytes(bytes(MIB))

    def child() -> None:
        with closing(MappedMedium.open(str(path))):
            touch_lost_memory(other)

    assert in_child(child) == signal.SIGBUS


def test_a_fault_where_a_pool_was_mapped_kills(path: Path) -> None:
    def child() -> None:
        MappedMedium.open(str(path)).close()
        touch_lost_memory(path)

    assert in_child(child) == signal.SIGBUS


def test_a_signal_that_somebody_sends_kills(path: Path) -> None:
    def child() -> None:
        with closing(MappedMedium.open(str(path))):
            os.kill(os.getpid(), signal.SIGBUS)

    assert in_child(child) == signal.SIGBUS


# The log


def test_the_same_fault_is_said_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.ERROR)
    now = 1000.0
    monkeypatch.setattr(faultlog.time, "monotonic", lambda: now)
    monkeypatch.setattr(faultlog, "_said", {})
    for _ in range(100):
        faultlog.report_fault("/pool", 0x80, "a read failed")
        faultlog.report_fault("/pool", 0x81, "a read failed")
        now += 1
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "/pool: page frame 0x80 could not be touched",
        "/pool: page frame 0x81 could not be touched",
    ] * 2
