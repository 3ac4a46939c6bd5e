"""Zones: the ranges of a pool, each with one purpose, computed from the pool's geometry.

    label | (to the alignment) | data | memmap | (what is left over) | label copy

or, in pools without the feature `MEMMAP_BEHIND_DATA`,

    label | memmap | (to the alignment) | data | (what is left over) | label copy

Invariants: zones do not overlap and lie inside the pool. The data zone starts on the alignment and
has as many whole pages as fit. The memmap zone has a structure for each page, and exists in the
scheme `pmem` alone. In the first layout only the label lies before the data, so the data zone of a
larger pool starts at the same place: this is why a pool can grow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pmemfs.errors import BadGeometry
from pmemfs.pfn import FRAME_BYTES, PAGE_STRUCTURE_BYTES
from pmemfs.units import GIB, KIB, MIB, align_up, format_size, is_power_of_two

LABEL_BYTES = 4 * KIB
PAGE_SIZES_BYTES = (4 * KIB, 2 * MIB, GIB)
DEFAULT_ALIGNMENT_BYTES = 2 * MIB


class Zone(NamedTuple):
    """A range of the pool."""

    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        """The first byte behind the zone."""
        return self.offset_bytes + self.size_bytes

    def contains(self, offset_bytes: int, length_bytes: int) -> bool:
        """Whether the whole range lies in the zone."""
        return self.offset_bytes <= offset_bytes and offset_bytes + length_bytes <= self.end_bytes


class Zones(NamedTuple):
    """All zones of a pool."""

    label: Zone
    memmap: Zone
    data: Zone
    label_copy: Zone

    @property
    def end_bytes(self) -> int:
        """The size of the pool."""
        return self.label_copy.end_bytes

    def in_order(self) -> tuple[tuple[str, Zone], ...]:
        """Names and zones, in the order of their offsets."""
        middle = [("memmap", self.memmap), ("data", self.data)]
        middle.sort(key=lambda named: named[1].offset_bytes)
        return (("label", self.label), *middle, ("label copy", self.label_copy))


def compute_zones(
    pool_size_bytes: int,
    *,
    page_size_bytes: int,
    alignment_bytes: int,
    memmap_in_pool: bool,
    memmap_behind_data: bool,
    asked_bytes: int | None = None,
) -> Zones:
    """The zones of a pool of this geometry. An empty memmap zone lies in front.

    `asked_bytes` is the size that the user asked for, if it was rounded; a message then says that.

    Raises BadGeometry if a number is not allowed or not even one page fits.
    """
    _check_geometry(pool_size_bytes, page_size_bytes, alignment_bytes)
    structure_bytes = PAGE_STRUCTURE_BYTES if memmap_in_pool else 0
    is_behind = memmap_in_pool and memmap_behind_data

    def data_offset_bytes(page_count: int) -> int:
        in_front = 0 if is_behind else page_count * structure_bytes
        return align_up(LABEL_BYTES + in_front, alignment_bytes)

    def data_end_bytes(page_count: int) -> int:
        return data_offset_bytes(page_count) + page_count * page_size_bytes

    def end_bytes(page_count: int) -> int:
        behind = page_count * structure_bytes if is_behind else 0
        return align_up(data_end_bytes(page_count) + behind, LABEL_BYTES) + LABEL_BYTES

    if end_bytes(1) > pool_size_bytes:
        raise BadGeometry(
            why=f"a pool of {format_size(asked_bytes or pool_size_bytes)} is too small: with this "
            f"page size and alignment it needs at least {format_size(end_bytes(1))}"
        )
    page_count = _largest_that_fits(end_bytes, pool_size_bytes, pool_size_bytes // page_size_bytes)
    return Zones(
        label=Zone(0, LABEL_BYTES),
        memmap=Zone(
            data_end_bytes(page_count) if is_behind else LABEL_BYTES, page_count * structure_bytes
        ),
        data=Zone(data_offset_bytes(page_count), page_count * page_size_bytes),
        label_copy=Zone(pool_size_bytes - LABEL_BYTES, LABEL_BYTES),
    )


def _largest_that_fits(
    end_bytes: Callable[[int], int], pool_size_bytes: int, upper_bound: int
) -> int:
    low, high = 1, upper_bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if end_bytes(middle) <= pool_size_bytes else (low, middle - 1)
    return low


def _check_geometry(pool_size_bytes: int, page_size_bytes: int, alignment_bytes: int) -> None:
    if pool_size_bytes % FRAME_BYTES:
        raise BadGeometry(why=f"a pool of {pool_size_bytes} bytes is not a multiple of 4096 bytes")
    if page_size_bytes not in PAGE_SIZES_BYTES:
        raise BadGeometry(why=f"a page of {format_size(page_size_bytes)} is not 4K, 2M or 1G")
    if not is_power_of_two(alignment_bytes) or alignment_bytes < page_size_bytes:
        raise BadGeometry(
            why=f"an alignment of {format_size(alignment_bytes)} is not a power of two that is at "
            f"least the page size, {format_size(page_size_bytes)}"
        )
