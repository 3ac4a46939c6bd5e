"""How pieces of the pool come to lie side by side: no gap, no overlap, and units of a device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.client.pieces import HOLE, Layout, lay_out
from pmemfs.errors import BadMapping
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB

FRAME = FRAME_BYTES
UNIT = 2 * MIB


def test_pieces_that_go_on_are_one() -> None:
    found = [(0, 10 * FRAME, FRAME), (FRAME, 11 * FRAME, FRAME), (2 * FRAME, HOLE, FRAME),
             (3 * FRAME, HOLE, FRAME), (4 * FRAME, 12 * FRAME, FRAME)]  # fmt: skip
    assert lay_out(found, 1, "f").pieces == [
        (0, 10 * FRAME, 2 * FRAME), (2 * FRAME, HOLE, 2 * FRAME), (4 * FRAME, 12 * FRAME, FRAME),
    ]  # fmt: skip


def test_a_range_that_begins_within_a_frame_begins_behind_the_first_address() -> None:
    layout = lay_out([(-100, 10 * FRAME, FRAME), (FRAME - 100, 3 * FRAME, FRAME)], 1, "f")
    assert layout.lead_bytes == 100
    assert layout.pieces == [(0, 10 * FRAME, FRAME), (FRAME, 3 * FRAME, FRAME)]


def test_no_piece_is_no_address() -> None:
    assert lay_out([], 1, "f") == Layout([], 0, FRAME, 0)


@pytest.mark.parametrize("start", [0, UNIT, UNIT + 5 * FRAME])
def test_the_largest_piece_lies_for_huge_pages(start: int) -> None:
    layout = lay_out([(0, 7 * FRAME, FRAME), (FRAME, start, UNIT)], 1, "f")
    assert layout.unit_bytes == UNIT
    assert (layout.shift_bytes + FRAME - start) % UNIT == 0


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    gaps=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    holes=st.sets(st.integers(0, 7)),
    lead=st.integers(0, FRAME - 1),
)
def test_every_byte_is_shown_once(
    lengths: list[int], gaps: list[int], holes: set[int], lead: int
) -> None:
    found, at, start = [], -lead, 0
    for number, (length, gap) in enumerate(zip(lengths, gaps, strict=False)):
        start += gap * FRAME
        found.append((at, HOLE if number in holes else start, length * FRAME))
        at += length * FRAME
        start += length * FRAME
    layout = lay_out(found, 1, "f")
    assert layout.lead_bytes == lead

    def frames(pieces: list[tuple[int, int, int]], base: int) -> list[tuple[int, int]]:
        return [
            (at - base + done, start if start == HOLE else start + done)
            for at, start, length in pieces
            for done in range(0, length, FRAME)
        ]

    assert frames(layout.pieces, 0) == frames(found, -lead)


def test_a_device_is_mapped_in_whole_units() -> None:
    layout = lay_out([(-100, UNIT + FRAME, 3 * FRAME)], UNIT, "f")
    assert layout.pieces == [(0, UNIT, UNIT)]
    assert layout.lead_bytes == FRAME + 100
    assert (layout.unit_bytes, layout.shift_bytes) == (UNIT, 0)


def test_pieces_and_holes_in_whole_units_lie_side_by_side_on_a_device() -> None:
    found = [(0, 3 * UNIT, UNIT), (UNIT, HOLE, UNIT), (2 * UNIT, UNIT, FRAME)]
    layout = lay_out(found, UNIT, "f")
    assert layout.pieces == [(0, 3 * UNIT, UNIT), (UNIT, HOLE, UNIT), (2 * UNIT, UNIT, UNIT)]
    assert layout.lead_bytes == 0


@pytest.mark.parametrize(
    "found",
    [
        [(0, 0, FRAME), (FRAME, 3 * FRAME, FRAME)],
        [(0, 0, UNIT), (UNIT, UNIT + FRAME, FRAME)],
        [(0, 0, FRAME), (FRAME, HOLE, FRAME)],
        [(0, HOLE, FRAME), (FRAME, FRAME, FRAME)],
        [(0, FRAME, FRAME), (FRAME, HOLE, UNIT), (UNIT + FRAME, 2 * FRAME, FRAME)],
    ],
)
def test_what_would_share_a_unit_of_a_device_is_refused_with_a_remedy(
    found: list[tuple[int, int, int]],
) -> None:
    with pytest.raises(BadMapping, match="contiguous=True") as refused:
        lay_out(found, UNIT, "kv/0.bin")
    assert "kv/0.bin" in str(refused.value)
    assert "2MiB" in str(refused.value)
