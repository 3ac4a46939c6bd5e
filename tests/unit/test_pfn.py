"""`pfn_t`: both lives of the word, one at a time and vectorised."""

from __future__ import annotations

import errno

import numpy as np
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
    pfn_ts_to_pfn,
    pfns_to_pfn_t,
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


@given(geometries, st.data())
def test_arrays_of_words_answer_as_single_words_do(
    geometry: PageGeometry, data: st.DataObject
) -> None:
    frames = data.draw(st.lists(st.integers(0, (1 << 60) - 1), max_size=20))
    pages = data.draw(st.lists(st.integers(0, geometry.page_count - 1), max_size=20))
    words = [pfn_to_pfn_t(pfn) for pfn in frames] + [page_to_pfn_t(p, geometry) for p in pages]
    words = data.draw(st.permutations(words))
    expected = [pfn_t_to_pfn(word, geometry) for word in words]
    assert pfn_ts_to_pfn(np.array(words, np.uint64), geometry).tolist() == expected
    vectorised = pfns_to_pfn_t(np.array(frames, np.uint64))
    assert vectorised.tolist() == [pfn_to_pfn_t(pfn) for pfn in frames]


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0,)])
def test_arrays_of_any_shape_keep_it(shape: tuple[int, ...]) -> None:
    words = np.full(shape, page_to_pfn_t(3, GEOMETRY), np.uint64)
    pfns = pfn_ts_to_pfn(words, GEOMETRY)
    assert pfns.shape == shape
    assert (pfns == GEOMETRY.page_to_pfn(3)).all()
    assert (pfn_ts_to_pfn(pfns_to_pfn_t(pfns)) == pfns).all()


@given(geometries, st.integers(0, (1 << 60) - 1))
def test_any_word_with_a_page_is_in_the_pool_or_refused_alike(
    geometry: PageGeometry, sixteenths: int
) -> None:
    word = sixteenths << 4
    try:
        expected = int(pfn_t_to_pfn(word, geometry))
    except NotInPool:
        with pytest.raises(NotInPool):
            pfn_ts_to_pfn(np.array([word], np.uint64), geometry)
    else:
        assert pfn_ts_to_pfn(np.array([word], np.uint64), geometry).tolist() == [expected]


@pytest.mark.parametrize("pfn", PAST_GEOMETRY)
def test_a_frame_outside_the_data_has_no_page(pfn: int) -> None:
    with pytest.raises(NotInPool, match=f"page frame {pfn:#x} is outside") as caught:
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
        lambda: pfn_ts_to_pfn(np.array([pfn_word, page_word], np.uint64)),
    ):
        with pytest.raises(NoPageStructures) as caught:
            asked()
        assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("offset_bytes", [0, 32, 4096 + 16])
def test_page_structures_lie_on_lines_above_zero(offset_bytes: int) -> None:
    with pytest.raises(BadGeometry):
        PageGeometry(Pfn(1), 1, 0, offset_bytes)
