"""Scatter/gather lists: whatever is done to one, it describes the same memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pmemfs.bio.bio_vec import BioVec, from_array, merge, skip_bytes, to_array, total_bytes
from pmemfs.pfn import FRAME_BYTES, PageGeometry, Pfn, page_to_pfn_t, pfn_to_pfn_t

GEOMETRY = PageGeometry(Pfn(100), page_count=30, order=0, memmap_offset_bytes=4096)

# Few frames and long lengths, so that neighbours touch often.
pfns = st.integers(100, 129)
pfn_words = st.builds(pfn_to_pfn_t, pfns)
page_words = pfns.map(lambda pfn: page_to_pfn_t(pfn - 100, GEOMETRY))
vecs = st.builds(
    BioVec,
    pfn_t=pfn_words | page_words,
    length=st.integers(1, 3 * FRAME_BYTES) | st.sampled_from([512, 1024, 4096, 8192]),
    offset=st.integers(0, FRAME_BYTES - 1) | st.sampled_from([0, 512, 2048]),
)


def ranges(listed: list[BioVec]) -> list[tuple[int, int]]:
    """The memory as maximal runs in order: (first byte, byte behind the last)."""
    runs: list[tuple[int, int]] = []
    for vec in listed:
        start = vec.pool_offset_bytes(GEOMETRY)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + vec.length)
        else:
            runs.append((start, start + vec.length))
    return runs


@given(st.lists(vecs, max_size=12))
def test_merging_keeps_the_memory_and_leaves_no_neighbours(listed: list[BioVec]) -> None:
    merged = merge(listed, GEOMETRY)
    assert ranges(merged) == ranges(listed)
    assert len(merged) == len(ranges(listed))
    assert total_bytes(merged) == total_bytes(listed)


def test_neighbours_of_either_life_merge() -> None:
    by_page = BioVec(page_to_pfn_t(0, GEOMETRY), FRAME_BYTES, 0)
    by_pfn = BioVec(pfn_to_pfn_t(101), 100, 0)
    assert merge([by_page, by_pfn], GEOMETRY) == [by_page._replace(length=FRAME_BYTES + 100)]


@given(st.lists(vecs, max_size=8), st.integers(0, 60_000))
def test_skipping_leaves_exactly_the_rest_of_the_memory(listed: list[BioVec], count: int) -> None:
    rest = skip_bytes(listed, count, GEOMETRY)
    expected: list[tuple[int, int]] = []
    for vec in listed:
        start = vec.pool_offset_bytes(GEOMETRY)
        skipped = min(count, vec.length)
        count -= skipped
        if skipped < vec.length:
            expected.append((start + skipped, start + vec.length))
    found = [
        (v.pool_offset_bytes(GEOMETRY), v.pool_offset_bytes(GEOMETRY) + v.length) for v in rest
    ]
    assert found == expected
    assert all(vec.length > 0 and 0 <= vec.offset < FRAME_BYTES for vec in rest)


def test_skipping_into_a_huge_page_names_the_frame_by_its_number() -> None:
    huge = PageGeometry(Pfn(512), page_count=4, order=9, memmap_offset_bytes=4096)
    vec = BioVec(page_to_pfn_t(1, huge), 2 << 20, 0)
    (rest,) = skip_bytes([vec], 5 * FRAME_BYTES + 7, huge)
    assert rest == BioVec(pfn_to_pfn_t(512 + 512 + 5), (2 << 20) - 5 * FRAME_BYTES - 7, 7)


@given(vecs)
def test_the_frame_count_is_of_every_frame_that_is_touched(vec: BioVec) -> None:
    touched = {byte // FRAME_BYTES for byte in (vec.offset, vec.offset + vec.length - 1)}
    assert vec.frame_count == max(touched) - min(touched) + 1 + min(touched)


@given(st.lists(vecs, max_size=12))
def test_a_list_survives_being_an_array(listed: list[BioVec]) -> None:
    array = to_array(listed)
    assert array.itemsize == 16
    assert from_array(array) == listed
