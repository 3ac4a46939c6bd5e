"""Zones: aligned, apart, inside the pool, and as many pages as fit."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmemfs.errors import BadGeometry
from pmemfs.media.zones import LABEL_BYTES, PAGE_SIZES_BYTES, Zones, compute_zones
from pmemfs.pfn import PAGE_STRUCTURE_BYTES
from pmemfs.units import GIB, KIB, MIB, TIB, align_up

pool_sizes = (
    st.integers(1, 1 << 16) | st.integers(1, 1 << 36) | st.integers(1, (1 << 51) - 1)
).map(lambda frames: frames * 4 * KIB)
page_sizes = st.sampled_from(PAGE_SIZES_BYTES)
alignment_shifts = st.integers(0, 12)


orders = st.sampled_from([None, "in front", "behind"])
"""Where the memmap is; None: not in the pool."""

Order = str | None


def zones_of(pool: int, page: int, shift: int, order: Order) -> Zones | None:
    try:
        return compute_zones(
            pool,
            page_size_bytes=page,
            alignment_bytes=page << shift,
            memmap_in_pool=order is not None,
            memmap_behind_data=order == "behind",
        )
    except BadGeometry:
        # Of numbers like these, only the size can be what is wrong.
        return None


@given(pool_sizes, page_sizes, alignment_shifts, orders)
@example(16 * KIB, 4 * KIB, 0, "in front")
@example(16 * KIB, 4 * KIB, 0, "behind")
@example(12 * KIB, 4 * KIB, 0, None)
@example(16 * TIB, 4 * KIB, 9, "in front")
@example(16 * TIB, 4 * KIB, 9, "behind")
def test_zones_are_apart_aligned_and_inside_the_pool(
    pool: int, page: int, shift: int, order: Order
) -> None:
    zones = zones_of(pool, page, shift, order)
    if zones is None:
        return
    end = 0
    for _, zone in zones.in_order():
        assert zone.size_bytes >= 0
        assert zone.offset_bytes >= end
        end = zone.end_bytes
    assert end == pool
    assert zones.label.size_bytes == zones.label_copy.size_bytes == LABEL_BYTES
    assert zones.data.offset_bytes % (page << shift) == 0
    assert zones.data.size_bytes % page == 0
    assert zones.data.size_bytes > 0
    page_count = zones.data.size_bytes // page
    assert zones.memmap.size_bytes == (page_count * PAGE_STRUCTURE_BYTES if order else 0)
    assert zones.memmap.offset_bytes % PAGE_STRUCTURE_BYTES == 0
    assert (zones.memmap.offset_bytes > zones.data.offset_bytes) == (order == "behind")


def needed_bytes(pages: int, page: int, alignment: int, order: Order) -> int:
    """What a pool of so many pages takes, by the drawings in the module's docstring."""
    memmap = pages * PAGE_STRUCTURE_BYTES
    in_front = memmap if order == "in front" else 0
    behind = align_up(memmap, 4 * KIB) if order == "behind" else 0
    return align_up(LABEL_BYTES + in_front, alignment) + pages * page + behind + LABEL_BYTES


@given(pool_sizes, page_sizes, alignment_shifts, orders)
def test_not_one_more_page_would_fit(pool: int, page: int, shift: int, order: Order) -> None:
    zones = zones_of(pool, page, shift, order)
    pages = zones.data.size_bytes // page if zones else 0
    assert needed_bytes(pages + 1, page, page << shift, order) > pool
    if pages:
        assert needed_bytes(pages, page, page << shift, order) <= pool


@given(pool_sizes, pool_sizes, page_sizes, alignment_shifts, st.sampled_from([None, "behind"]))
def test_the_data_of_a_larger_pool_starts_where_it_did_and_is_no_less(
    pool: int, other: int, page: int, shift: int, order: Order
) -> None:
    before = zones_of(min(pool, other), page, shift, order)
    after = zones_of(max(pool, other), page, shift, order)
    if before is None:
        return
    assert after is not None
    assert after.data.offset_bytes == before.data.offset_bytes
    assert after.data.size_bytes >= before.data.size_bytes
    assert after.memmap.offset_bytes >= before.memmap.offset_bytes


@pytest.mark.parametrize(
    ("pool", "page", "alignment", "why"),
    [
        (MIB + 1, 4 * KIB, 2 * MIB, "not a multiple of 4096"),
        (GIB, 8 * KIB, 2 * MIB, "a page of 8KiB is not 4K, 2M or 1G"),
        (GIB, 0, 2 * MIB, "a page of 0B"),
        (GIB, 4 * KIB, 3 * MIB, "not a power of two"),
        (GIB, 4 * KIB, 0, "not a power of two"),
        (GIB, 2 * MIB, 4 * KIB, "at least the page size, 2MiB"),
        (0, 4 * KIB, 4 * KIB, "too small"),
        (-4096, 4 * KIB, 4 * KIB, "too small"),
        (2 * MIB, 4 * KIB, 2 * MIB, "too small: .* needs at least"),
        (GIB, GIB, GIB, "too small"),
        (GIB, 4 * KIB, 1 << 63, "too small"),
    ],
)
def test_an_impossible_geometry_is_refused_with_its_reason(
    pool: int, page: int, alignment: int, why: str
) -> None:
    with pytest.raises(BadGeometry, match=why):
        compute_zones(
            pool,
            page_size_bytes=page,
            alignment_bytes=alignment,
            memmap_in_pool=True,
            memmap_behind_data=True,
        )


def test_a_zone_contains_what_lies_in_it_whole() -> None:
    zones = zones_of(GIB, 4 * KIB, 9, "behind")
    assert zones is not None
    zone = zones.data
    assert zone.contains(zone.offset_bytes, zone.size_bytes)
    assert not zone.contains(zone.offset_bytes, zone.size_bytes + 1)
    assert not zone.contains(zone.offset_bytes - 1, 1)
