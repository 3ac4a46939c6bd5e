"""`pfn_t`: both lives of the word, one at a time and vectorised."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.errors import BadGeometry, NoPageStructures, NotInPool
from pmemfs.pfn import (
    PAGE_STRUCTURE_BYTES,
    PFN_DEV,
    PFN_FLAGS_MASK,
    PFN_MAP,
    PageGeometry,
    Pfn,
    page_to_pfn_t,
    pfn_t_has_page,
    pfn_t_to_page,
    pfn_t_to_pfn,
    pfn_to_pfn_t,
)

geometries = st.builds(
    PageGeometry,
    first_pfn=st.integers(1, 1 << 36).map(Pfn),
    page_count=st.integers(1, 1 << 20),
    order=st.sampled_from([0, 9, 18]),
    memmap_offset_bytes=st.integers(1, 1 << 30).map(lambda n: n * PAGE_STRUCTURE_BYTES),
)
GEOMETRY = PageGeometry(Pfn(512), page_count=10, order=9, memmap_offset_bytes=4096)
PAST_GEOMETRY = (GEOMETRY.first_pfn - 1, GEOMETRY.first_pfn + GEOMETRY.pfn_count)


@given(geometries, st.data())
def test_every_pfn_of_a_page_leads_to_that_page(
    geometry: PageGeometry, data: st.DataObject
) -> None:
    page = data.draw(st.integers(0, geometry.page_count - 1))
    within = data.draw(st.integers(0, (1 << geometry.order) - 1))
    first = geometry.page_to_pfn(page)
    assert geometry.pfn_to_page(first + within) == page
    assert geometry.first_pfn <= first
    assert first + (1 << geometry.order) <= geometry.first_pfn + geometry.pfn_count


@given(st.integers(0, (1 << 60) - 1), st.sampled_from([PFN_DEV, PFN_DEV | PFN_MAP, 0, 14]))
def test_a_word_with_a_pfn_answers_it_without_any_geometry(pfn: int, flags: int) -> None:
    word = pfn_to_pfn_t(pfn, flags)
    assert word < 1 << 64
    assert word & PFN_FLAGS_MASK == flags | PFN_DEV
    assert not pfn_t_has_page(word)
    assert pfn_t_to_pfn(word) == pfn


@given(geometries, st.data())
def test_a_word_with_a_page_answers_the_page_and_its_first_pfn(
    geometry: PageGeometry, data: st.DataObject
) -> None:
    page = data.draw(st.integers(0, geometry.page_count - 1))
    word = page_to_pfn_t(page, geometry)
    assert word != 0
    assert pfn_t_has_page(word)
    assert pfn_t_to_page(word, geometry) == page
    assert pfn_t_to_pfn(word, geometry) == geometry.page_to_pfn(page)


@given(geometries, st.data())
def test_a_word_with_a_pfn_finds_its_page_where_there_is_one(
    geometry: PageGeometry, data: st.DataObject
) -> None:
    frame = data.draw(st.integers(0, geometry.pfn_count - 1))
    word = pfn_to_pfn_t(geometry.first_pfn + frame)
    assert pfn_t_to_page(word, geometry) == frame >> geometry.order


@given(geometries, st.integers(0, (1 << 60) - 1))
def test_any_word_with_a_page_is_in_the_pool_or_refused(
    geometry: PageGeometry, sixteenths: int
) -> None:
    word = sixteenths << 4
    try:
        pfn = int(pfn_t_to_pfn(word, geometry))
    except NotInPool:
        return
    assert 0 <= geometry.pfn_to_page(pfn) < geometry.page_count


@pytest.mark.parametrize("pfn", PAST_GEOMETRY)
def test_a_frame_outside_the_data_has_no_page(pfn: int) -> None:
    with pytest.raises(NotInPool, match=f"frame {pfn:#x} is outside .*0x200 to 0x15ff$") as caught:
        GEOMETRY.pfn_to_page(pfn)
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("page", [-1, 10])
def test_no_word_is_made_for_a_page_that_does_not_exist(page: int) -> None:
    with pytest.raises(NotInPool):
        page_to_pfn_t(page, GEOMETRY)


def test_without_page_structures_a_word_has_no_page() -> None:
    pfn_word, page_word = pfn_to_pfn_t(5), page_to_pfn_t(1, GEOMETRY)
    for asked in (
        lambda: pfn_t_to_page(pfn_word, None),
        lambda: pfn_t_to_page(page_word, None),
        lambda: pfn_t_to_pfn(page_word),
    ):
        with pytest.raises(NoPageStructures) as caught:
            asked()
        assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("offset_bytes", [0, 32, 4096 + 16])
def test_page_structures_lie_on_lines_above_zero(offset_bytes: int) -> None:
    with pytest.raises(BadGeometry):
        PageGeometry(Pfn(1), 1, 0, offset_bytes)
