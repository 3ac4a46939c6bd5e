"""TRIM and zeroes of whole blocks: from the cache, and from the origin.

A block that only the cache has becomes `ZERO` there first. Otherwise a crash, or an origin that
fails, would bring back what the origin had before. A clean block simply leaves the cache: until the
origin has the zeroes, it has the same bytes as the block had.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

import trio

from pmemfs.errors import DamagedCache
from pmemfs.media.cache import BLOCK, GROUP_SHIFT, REGION_SHIFT, SET_BYTES, WAYS, Ground, TagState
from pmemfs.medium.base import Medium
from pmemfs.memmap.base import Access
from pmemfs.units import GIB
from pmemfs.volume.cache.cleaning import Cleaner
from pmemfs.volume.cache.fencing import Fencing
from pmemfs.volume.cache.groups import Found
from pmemfs.volume.cache.index import Index
from pmemfs.volume.cache.link import OriginLink
from pmemfs.volume.cache.misses import Misses
from pmemfs.volume.cache.order import OriginOrder
from pmemfs.volume.cache.steps import Steps

_STEP_BYTES = GIB
_AT_ONCE = 64


class CachedBlocks:
    """Finds the blocks of a range that the cache has, without asking for each of them."""

    def __init__(self, medium: Medium, ground: Ground) -> None:
        self._medium = medium
        self._ground = ground

    def within(self, first: int, count: int) -> Iterator[list[Found]]:
        """The tags of blocks of a range, some sets at a time. Damaged tags are left out."""
        ground, end = self._ground, first + count
        regions = range(first >> REGION_SHIFT, (end - 1 >> REGION_SHIFT) + 1)
        if len(regions) < ground.group_count:
            for region in regions:
                start = max(first, region << REGION_SHIFT)
                stop = min(end, region + 1 << REGION_SHIFT)
                for set_number, set_count in self._sets_of(start, stop - start):
                    yield self._look(set_number, set_count, start, stop)
            return
        for group in range(ground.group_count):
            set_number = group << GROUP_SHIFT
            set_count = min(1 << GROUP_SHIFT, ground.set_count - set_number)
            yield self._look(set_number, set_count, first, end)

    def _sets_of(self, first: int, count: int) -> list[tuple[int, int]]:
        """The sets of blocks of one region: one range of sets, or two if it wraps around."""
        total = self._ground.set_count
        if count >= total:
            return [(0, total)]
        start = self._ground.set_of(first)
        before_end = min(count, total - start)
        wrapped = [(0, count - before_end)] if count > before_end else []
        return [(start, before_end), *wrapped]

    def in_sets(self, set_number: int, set_count: int) -> list[Found]:
        """All tags of some sets. Damaged tags are left out."""
        return self._look(set_number, set_count, 0, 1 << BLOCK.width)

    def _look(self, set_number: int, set_count: int, first: int, end: int) -> list[Found]:
        at = self._ground.tag_offset(set_number, 0)
        raw = self._medium.read(at, set_count * SET_BYTES)
        if not any(raw):
            return []
        found = []
        for position, word in enumerate(struct.unpack(f"<{set_count * WAYS}Q", raw)):
            if word and first <= BLOCK.of(word) < end:
                number, way = set_number + position // WAYS, position % WAYS
                try:
                    tag = self._ground.read_tag(word, number, way)
                except DamagedCache:
                    continue
                if tag is not None:
                    found.append(Found(number, way, word, tag))
        return found


class Zeroer:
    """Lets whole blocks of one cache read as zeroes."""

    def __init__(
        self, cached: CachedBlocks, index: Index, shift: int, misses: Misses, cleaner: Cleaner,
        link: OriginLink, order: OriginOrder, fencing: Fencing,
    ) -> None:  # fmt: skip
        self._cached = cached
        self._index = index
        self._shift = shift
        self._misses = misses
        self._cleaner = cleaner
        self._link = link
        self._order = order
        self._fencing = fencing

    async def zero(self, first: int, count: int, size_bytes: int) -> None:
        """Let blocks read as zeroes. Raises OSError."""
        step = _STEP_BYTES >> self._shift
        for start in range(first, first + count, step):
            some = min(step, first + count - start)
            async with self._order.changing(start, some):
                await self._misses.forestall(start, some)
                await self._leave(start, some)
                offset = start << self._shift
                length = min(some << self._shift, size_bytes - offset)
                failed = self._link.failed_flushes
                await self._link.write_zeroes(offset, length)
                self._link.owe_flush()
                await self._hand_over(start, some, failed)

    async def _leave(self, first: int, count: int) -> None:
        """Let the cache have none of these blocks, or only as zeroes."""
        for founds in self._cached.within(first, count):
            for at in range(0, len(founds), _AT_ONCE):
                await self._leave_some(founds[at : at + _AT_ONCE])
            await trio.lowlevel.checkpoint()

    async def _leave_some(self, founds: Sequence[Found]) -> None:
        while founds:
            dirty = [found for found in founds if found.tag.state is TagState.DIRTY]
            clean = [found for found in founds if not found.tag.is_dirty]
            left = [*await self._change(self._index.clearing, clean),
                    *await self._change(self._index.zeroing, dirty)]  # fmt: skip
            # What was dirty has become clean meanwhile, or was written to, and has another tag now.
            again = [self._index.find(found.tag.block) for found in left]
            founds = [found for found in again if found and found.tag.state is not TagState.ZERO]

    async def _change(
        self, change: Callable[[Sequence[Found]], Steps[list[bool]]], founds: Sequence[Found]
    ) -> list[Found]:
        """Change the tags of some blocks; those that had another tag by then."""
        if not founds:
            return []
        results = await self._fencing.run(lambda: change(founds))
        return [found for found, is_done in zip(founds, results, strict=True) if not is_done]

    async def _hand_over(self, first: int, count: int, failed_flushes: int) -> None:
        """The origin has the zeroes; the tags that say so may go once it was flushed, but not if a
        flush has failed since."""
        for founds in self._cached.within(first, count):
            if self._link.failed_flushes != failed_flushes:
                return
            held = []
            for block in (f.tag.block for f in founds if f.tag.state is TagState.ZERO):
                found = self._index.hold(block, Access.PIN)
                if found and found.tag.state is TagState.ZERO:
                    held.append(found)
                elif found:
                    self._index.release(found)
            await self._cleaner.take_over(held)
            await trio.lowlevel.checkpoint()
