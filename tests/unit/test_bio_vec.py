"""A vec names the same memory, whichever life its word has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.bio.bio_vec import BioVec
from pmemfs.errors import NoPageStructures
from pmemfs.pfn import FRAME_BYTES, PageGeometry, Pfn, page_to_pfn_t, pfn_to_pfn_t

GEOMETRY = PageGeometry(Pfn(100), page_count=30, order=0, memmap_offset_bytes=4096)


@given(st.integers(100, 129), st.integers(1, 3 * FRAME_BYTES), st.integers(0, FRAME_BYTES - 1))
def test_a_vec_begins_where_its_frame_does_and_its_offset_says(
    pfn: int, length: int, offset: int
) -> None:
    by_number = BioVec(pfn_to_pfn_t(pfn), length, offset)
    by_page = BioVec(page_to_pfn_t(pfn - 100, GEOMETRY), length, offset)
    assert by_number.pool_offset_bytes() == pfn * FRAME_BYTES + offset
    assert by_page.pool_offset_bytes(GEOMETRY) == by_number.pool_offset_bytes(GEOMETRY)


def test_a_vec_with_a_page_needs_the_page_structures() -> None:
    vec = BioVec(page_to_pfn_t(3, GEOMETRY), 1, 0)
    with pytest.raises(NoPageStructures):
        vec.pool_offset_bytes()
