"""What a copy moves of a file: all of its data, in whole frames, and no more holes than it must."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.client.stretches import (
    MOST_BATCH_BYTES,
    MOST_BATCH_STRETCHES,
    Stretch,
    data_of,
    holes_between,
    in_batches,
    in_frames,
)
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB, TIB

SIZES = st.one_of(
    st.integers(0, 20 * FRAME_BYTES), st.integers(0, 3 * MOST_BATCH_BYTES), st.integers(0, TIB)
)


@st.composite
def data_and_size(draw: st.DrawFn) -> tuple[list[Stretch], int]:
    """A file's data, as a file system might say: in order, apart, within the size."""
    size_bytes = draw(SIZES)
    limits = st.integers(0, size_bytes)
    near = limits.map(lambda at: min(at // FRAME_BYTES * FRAME_BYTES, size_bytes))
    marks = sorted(draw(st.sets(limits | near, max_size=24)))
    return [
        Stretch(start, end - start) for start, end in zip(marks[::2], marks[1::2], strict=False)
    ], size_bytes


def covered(stretches: Iterable[Stretch]) -> int:
    return sum(stretch.length for stretch in stretches)


def assert_apart_and_in_order(stretches: list[Stretch], size_bytes: int) -> None:
    assert all(stretch.length > 0 and stretch.start >= 0 for stretch in stretches)
    assert all(one.end <= other.start for one, other in pairwise(stretches))
    assert not stretches or stretches[-1].end <= size_bytes


@given(data_and_size())
def test_all_data_is_moved_in_whole_frames_and_holes_of_a_frame_stay(
    case: tuple[list[Stretch], int],
) -> None:
    data, size_bytes = case
    moved = list(in_frames(data, size_bytes))
    assert_apart_and_in_order(moved, size_bytes)
    assert all(one.end < other.start for one, other in pairwise(moved)), "they do not touch"
    for stretch in data:
        assert any(m.start <= stretch.start and stretch.end <= m.end for m in moved)
    for stretch in moved:
        assert stretch.start % FRAME_BYTES == 0
        assert stretch.end % FRAME_BYTES == 0 or stretch.end == size_bytes
        # Each frame of it has data.
        first, last = Stretch(stretch.start, FRAME_BYTES), Stretch(stretch.end - 1, 1)
        assert any(d.start < first.end and d.end > first.start for d in data)
        assert any(d.end > last.start // FRAME_BYTES * FRAME_BYTES for d in data)
    assert covered(moved) <= covered(data) + 2 * FRAME_BYTES * len(data)


@given(data_and_size())
def test_holes_are_what_no_stretch_covers(case: tuple[list[Stretch], int]) -> None:
    data, size_bytes = case
    holes = list(holes_between(data, size_bytes))
    assert_apart_and_in_order(sorted([*data, *holes]), size_bytes)
    assert covered(data) + covered(holes) == size_bytes


@given(data_and_size())
def test_batches_are_the_same_bytes_and_bounded(case: tuple[list[Stretch], int]) -> None:
    data, size_bytes = case
    # A terabyte has 16,384 batches.
    stretches = [s for s in in_frames(data, size_bytes) if s.length <= 4 * MOST_BATCH_BYTES]
    batches = list(in_batches(stretches))
    flat = [stretch for batch in batches for stretch in batch]
    assert_apart_and_in_order(flat, size_bytes)
    assert list(in_frames(flat, size_bytes)) == stretches
    for batch in batches:
        assert 0 < len(batch) <= MOST_BATCH_STRETCHES
        assert covered(batch) <= MOST_BATCH_BYTES
    for one in flat:
        assert one.start % FRAME_BYTES == 0
        # Cut nowhere but where a batch must end.
        assert one.start // MOST_BATCH_BYTES == (one.end - 1) // MOST_BATCH_BYTES
    for one, other in pairwise(batches):
        full = covered(one) + other[0].length > MOST_BATCH_BYTES or covered(one) == MOST_BATCH_BYTES
        assert full or len(one) == MOST_BATCH_STRETCHES


def test_a_file_of_many_small_stretches_takes_few_batches() -> None:
    stretches = [Stretch(at * MIB, FRAME_BYTES) for at in range(1000)]
    assert len(list(in_batches(stretches))) == -(-1000 // MOST_BATCH_STRETCHES)


def test_a_file_system_says_where_the_data_is(shm: Path) -> None:
    path = shm / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * TIB)
        for at in (0, 3 * MIB + 5, TIB):
            file.seek(at)
            file.write(b"x")
    with path.open("rb") as file:
        found = list(data_of(file.fileno(), 4 * TIB))
        assert found == [Stretch(at, FRAME_BYTES) for at in (0, 3 * MIB, TIB)]
        # What a caller takes for the size may be less by now, or never was it.
        assert list(data_of(file.fileno(), 10)) == [Stretch(0, 10)]
        os.truncate(path, 3 * MIB)
        assert list(data_of(file.fileno(), 4 * TIB)) == [Stretch(0, FRAME_BYTES)]


@pytest.mark.parametrize("size_bytes", [0, MIB])
def test_a_file_of_nothing_but_a_hole_has_no_data(shm: Path, size_bytes: int) -> None:
    with (shm / "hole").open("wb+") as file:
        file.truncate(size_bytes)
        assert list(data_of(file.fileno(), size_bytes)) == []


def test_what_knows_no_holes_is_all_data() -> None:
    with open("/proc/cpuinfo", "rb") as file:
        with pytest.raises(OSError, match="Invalid argument"):
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        assert list(data_of(file.fileno(), MIB)) == [Stretch(0, MIB)]
