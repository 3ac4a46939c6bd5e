"""Page structures that move: what was in the old zone is in the new one, and nothing else is."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from pmemfs.memmap.moving import clipped, live_runs, move_structures
from pmemfs.pfn import PAGE_STRUCTURE_BYTES
from pmemfs.ranges import without

SIZE = PAGE_STRUCTURE_BYTES
SHIFT = 2


@given(st.lists(st.sampled_from([0, 1, 3]), max_size=40))
def test_the_runs_are_the_stretches_that_live(states: list[int]) -> None:
    runs = live_runs(bytearray(states), 1, SHIFT)
    pages = {page for first, end in runs for page in range(first, end)}
    assert pages == {page for page in range(len(states) << SHIFT) if states[page >> SHIFT] == 1}
    assert all(end < first for (_, end), (first, _) in pairwise(runs))
    assert all(end <= 5 for _, end in clipped(runs, 5))


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_what_is_left_of_ranges(wanted: set[int], taken: set[int]) -> None:
    left = without(_ranges(wanted), _ranges(taken))
    assert {n for start, end in left for n in range(start, end)} == wanted - taken


def _ranges(numbers: set[int]) -> list[tuple[int, int]]:
    return [(number, number + 1) for number in sorted(numbers)]


@example(living=[False, True], old_at=0, new_at=3, more=-2)
@given(
    st.lists(st.booleans(), min_size=1, max_size=12),
    st.integers(0, 80),
    st.integers(0, 80),
    st.integers(-2, 20),
)
def test_structures_keep_their_index_and_no_stale_one_is_left(
    living: list[bool], old_at: int, new_at: int, more: int
) -> None:
    old_count = len(living) << SHIFT
    new_count = max(1, old_count + more)
    memory = memoryview(bytearray((160 + 20) * SIZE))
    stamps = {}
    for page in range(old_count):
        if living[page >> SHIFT]:
            stamps[page] = bytes([page + 1]) * SIZE
            memory[(old_at + page) * SIZE : (old_at + page + 1) * SIZE] = stamps[page]
    stray = (175 * SIZE, 176 * SIZE)
    memory[stray[0] : stray[1]] = b"\xff" * SIZE
    runs = live_runs(bytes(living), 1, SHIFT)
    move_structures(
        memory,
        runs,
        min(old_count, new_count),
        old_offset=old_at * SIZE,
        new_offset=new_at * SIZE,
        new_end=(new_at + new_count) * SIZE,
        stale=[stray],
    )
    for page in range(new_count):
        found = bytes(memory[(new_at + page) * SIZE : (new_at + page + 1) * SIZE])
        assert found == stamps.get(page, bytes(SIZE)), f"page {page}"
    assert bytes(memory[stray[0] : stray[1]]) == b"\xff" * SIZE, "it lies outside"
