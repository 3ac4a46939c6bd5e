"""Gives the origin what only the cache has, and lets those blocks be clean.

    hold the block -> write it to the origin -> flush the origin -> its tag says CLEAN -> let go

Invariants:
- a block is held from before its bytes are read until its tag was looked at again. So nobody else
  gets its place meanwhile, and a tag that is still the same word belongs to the same bytes;
- nothing becomes clean before the origin was flushed after the write;
- a block that was written to meanwhile stays dirty, because its tag is another word;
- what fails stays dirty, and so does all that the origin has answered before a flush of it has
  failed: a server that died may have lost it, and the next flush says nothing of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import trio

from pmemfs.media.cache import TagState
from pmemfs.memmap.base import Access
from pmemfs.units import MIB
from pmemfs.volume.cache.blocks import Blocks, runs_of
from pmemfs.volume.cache.fencing import Fencing
from pmemfs.volume.cache.groups import Found
from pmemfs.volume.cache.index import Index
from pmemfs.volume.cache.link import OriginLink
from pmemfs.volume.cache.misses import Misses
from pmemfs.volume.cache.order import OriginOrder

_RUN_BYTES = 2 * MIB
_AT_ONCE = 64
_URGENT_SECONDS = 0.03
_MOST_WRITTEN = 4096
"""So many blocks at most are held until the next flush."""


class Cleaner:
    """Cleans blocks of one cache."""

    def __init__(
        self, index: Index, blocks: Blocks, link: OriginLink, order: OriginOrder,
        fencing: Fencing, misses: Misses,
    ) -> None:  # fmt: skip
        self._index = index
        self._blocks = blocks
        self._link = link
        self._order = order
        self._fencing = fencing
        self._misses = misses
        self._written: list[Found] = []
        self._settling = trio.Lock()
        self._asked = self._answered = 0
        """How many have asked to settle, and up to which of them that was done."""
        self._failure: OSError | None = None
        """Of the last time that it was done."""
        self._settled_at = 0.0
        self.has_settled: Callable[[], None] = lambda: None
        """Called whenever something may have become clean."""
        self.waiters = 0
        """Writers that wait for blocks to become clean, so a flush must not wait for many."""
        self.size_bytes = 0
        """Of the origin."""

    async def clean(self, blocks: Sequence[int], *, most_runs: int = 1) -> None:
        """Clean those of some blocks that are dirty. Raises the first OSError, after all others
        were tried."""
        await self.write_out(blocks, most_runs=most_runs)
        await self.settle()

    async def write_out(self, blocks: Sequence[int], *, most_runs: int = 1) -> None:
        """Write dirty blocks to the origin, so many runs at once; they become clean by `settle`."""
        failures: list[OSError] = []
        runs = runs_of(sorted(set(blocks)), _RUN_BYTES >> self._blocks.shift)

        async def write_some() -> None:
            # All of these tasks take from the same runs, so few are begun at once.
            for first, count in runs:
                try:
                    await self._write_run(first, count)
                except OSError as error:
                    failures.append(error)
                    if self._link.is_away:
                        return

        if len(blocks) == 1 or most_runs == 1:
            await write_some()
        else:
            async with trio.open_nursery() as nursery:
                for _ in range(min(most_runs, len(blocks))):
                    nursery.start_soon(write_some)
        if failures:
            raise failures[0]

    @property
    def has_written(self) -> bool:
        """Whether blocks wait for the origin's flush."""
        return bool(self._written) or self._link.has_unflushed

    async def take_over(self, held: Sequence[Found]) -> None:
        """The origin has been given these blocks, which are held: they are clean once it was
        flushed."""
        self._written += held
        if len(self._written) > _MOST_WRITTEN:
            await self.settle()

    async def settle(self) -> None:
        """Flush the origin. All that was written before is clean then. Raises OSError."""
        self._asked += 1
        number = self._asked
        async with self._settling:
            if number > self._answered:
                await self._settle_for(self._asked)
            elif self._failure:
                raise self._failure

    async def _settle_for(self, asked: int) -> None:
        """Settle once for all that have asked so far. Were it once for each, the last of many
        writers with full sets would wait for a flush of each of them."""
        try:
            await self._settle_all()
        except OSError as error:
            self._failure, self._answered = error, asked
            raise
        # If this is cancelled, the next one of them does it.
        self._failure, self._answered = None, asked

    async def _settle_all(self) -> None:
        written, self._written = self._written, []
        self._settled_at = trio.current_time()
        try:
            if self._link.has_unflushed:
                try:
                    await self._link.flush()
                except BaseException:
                    written, self._written = [*written, *self._written], []
                    raise
            # A block may have been written twice. It becomes clean, and is counted, once.
            once = dict.fromkeys(written)
            zeroes = [found for found in once if found.tag.state is TagState.ZERO]
            others = [found for found in once if found.tag.state is not TagState.ZERO]
            for some in _few(others):
                await self._fencing.run(partial(self._index.cleaning, some))
            for some in _few(zeroes):
                await self._fencing.run(partial(self._index.clearing, some))
        finally:
            for found in written:
                self._index.release(found)
            self.has_settled()

    async def _write_run(self, first: int, count: int) -> None:
        """Write the dirty blocks among some that follow each other."""
        async with self._order.changing(first, count):
            held: list[Found] = []
            try:
                for block in range(first, first + count):
                    found = self._hold_dirty(block)
                    if found:
                        held.append(found)
                for part in _alike(held):
                    failed = self._link.failed_flushes
                    await self._write_part(part)
                    del held[: len(part)]
                    if self._link.failed_flushes == failed:
                        # They are held until they are settled.
                        self._written += part
                        continue
                    for found in part:
                        self._index.release(found)
            finally:
                for found in held:
                    self._index.release(found)
        if len(self._written) > _MOST_WRITTEN or self._is_waited_for():
            await self.settle()

    def _is_waited_for(self) -> bool:
        """Whether a writer waits for blocks to become clean, and has waited for a while."""
        return self.waiters > 0 and trio.current_time() > self._settled_at + _URGENT_SECONDS

    def _hold_dirty(self, block: int) -> Found | None:
        found = self._index.hold(block, Access.PIN)
        if found and not found.tag.is_dirty:
            self._index.release(found)
            return None
        return found

    async def _write_part(self, part: Sequence[Found]) -> None:
        """Write blocks that follow each other, all zeroes or none."""
        shift, first = self._blocks.shift, part[0].tag.block
        self._misses.note_change(first, len(part))
        offset = first << shift
        length = min(len(part) << shift, self.size_bytes - offset)
        if length <= 0:
            return
        if part[0].tag.state is TagState.ZERO:
            await self._link.write_zeroes(offset, length)
        else:
            places = [self._index.place_of(found) for found in part]
            await self._link.write(offset, self._blocks.views(places, length))


def _few(founds: Sequence[Found]) -> Iterator[Sequence[Found]]:
    """As many as are changed in one step, for which all other tasks wait."""
    for at in range(0, len(founds), _AT_ONCE):
        yield founds[at : at + _AT_ONCE]


def _alike(founds: Sequence[Found]) -> list[list[Found]]:
    """Parts that follow each other and are all zeroes, or none."""
    parts: list[list[Found]] = []
    for found in founds:
        last = parts[-1][-1].tag if parts else None
        is_zero = found.tag.state is TagState.ZERO
        if (
            last is not None
            and found.tag.block == last.block + 1
            and is_zero == (last.state is TagState.ZERO)
        ):
            parts[-1].append(found)
        else:
            parts.append([found])
    return parts
