"""Writes, by each of the four policies.

- write-back: the block is dirty in the cache when the write is answered.
- write-through: then the origin has got it as well. It is clean once the origin was flushed, at the
  next fsync or soon; so a power failure of both leaves the origin without it, and the cache dirty.
- write-around: the cache forgets the block first, and then the origin gets it. A block that is
  dirty from another policy is written through instead, since nobody else has its bytes.
- read-only: refused.

Invariants:
- a block changes in one step: the new bytes are put together elsewhere, and published only if the
  block is still what the rest of the bytes was taken from;
- a write of a part of a block that the cache does not have fetches that block first;
- a writer waits only while its set has no room, or more blocks are dirty than the user allows.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import trio

from pmemfs.errors import SetBusy, system_error
from pmemfs.media.cache import Policy, TagState
from pmemfs.memmap.base import Access
from pmemfs.volume.cache.blocks import Blocks, Piece, runs_of
from pmemfs.volume.cache.cleaning import Cleaner
from pmemfs.volume.cache.fencing import Fencing
from pmemfs.volume.cache.groups import Found
from pmemfs.volume.cache.index import Index, Place, Publication, Victim
from pmemfs.volume.cache.link import OriginLink
from pmemfs.volume.cache.misses import Misses
from pmemfs.volume.cache.order import OriginOrder
from pmemfs.volume.cache.steps import Steps

_RUNS = 4
_AT_ONCE = 64
"""Blocks that are stored in one step, so that other tasks wait for so many at most."""


class Part(NamedTuple):
    """A piece, and the bytes for it."""

    piece: Piece
    data: memoryview


class _Stored(NamedTuple):
    """What has become of parts."""

    fresh: list[Found]
    """The tags of those blocks that were not dirty before."""
    left: list[Part]


class Writer:
    """Writes to one cache. `make_room` cleans a block of a set that is full of dirty ones."""

    def __init__(
        self, index: Index, blocks: Blocks, misses: Misses, cleaner: Cleaner, link: OriginLink,
        order: OriginOrder, fencing: Fencing, victim: Victim,
        make_room: Callable[[Sequence[int]], Awaitable[None]], size_bytes: Callable[[], int],
    ) -> None:  # fmt: skip
        self._index = index
        self._blocks = blocks
        self._misses = misses
        self._cleaner = cleaner
        self._link = link
        self._order = order
        self._fencing = fencing
        self._victim = victim
        self._make_room = make_room
        self._size_bytes = size_bytes
        self._writers = OriginOrder()
        self.policy = Policy.WRITE_BACK
        self.missed = 0
        """Blocks that had to be fetched, because a part of them was written."""

    def parts(self, offset_bytes: int, data: memoryview) -> list[Part]:
        """What a write brings, by blocks."""
        parts, done = [], 0
        for piece in self._blocks.pieces(offset_bytes, len(data)):
            parts.append(Part(piece, data[done : done + piece.length]))
            done += piece.length
        return parts

    def write_now(self, parts: Sequence[Part]) -> list[Part]:
        """Do as much of a write-back as needs no waiting; the rest. Raises OSError."""
        if not self._fencing.is_quick:
            return list(parts)
        left: list[Part] = []
        for at in range(0, len(parts), _AT_ONCE):
            some = parts[at : at + _AT_ONCE]
            try:
                left += self._fencing.run_now(self._storing(some)).left
            except SetBusy:
                left += some
        return left

    async def write(self, parts: Sequence[Part]) -> None:
        """Write by the policy, whatever has to be waited for. Raises OSError."""
        if self.policy is Policy.WRITE_BACK:
            await self._store(parts)
        elif self.policy is Policy.WRITE_THROUGH:
            await self._write_through(parts)
        elif self.policy is Policy.WRITE_AROUND:
            await self._write_around(parts)
        else:
            raise system_error(errno.EROFS)

    async def _store(self, parts: Sequence[Part]) -> list[Found]:
        """Let blocks be dirty with these bytes in them; the tags of those that were not before."""
        fresh: list[Found] = []
        for at in range(0, len(parts), _AT_ONCE):
            left, missed = list(parts[at : at + _AT_ONCE]), set[int]()
            while left:
                stored = await self._fencing.run(partial(self._storing, left))
                fresh += stored.fresh
                left = stored.left
                if left:
                    await self._help(left, missed)
            await trio.lowlevel.checkpoint()
        return fresh

    async def _help(self, left: Sequence[Part], missed: set[int]) -> None:
        """Do what keeps parts from being stored: fetch their blocks, or make room."""
        absent = [
            part.piece.block for part in left
            if not self._is_whole(part.piece) and self._index.find(part.piece.block) is None
        ]  # fmt: skip
        if absent:
            self.missed += len(set(absent) - missed)
            missed.update(absent)
            await self._misses.bring(absent)
            if any(self._index.find(block) is None for block in absent):
                # There was no room for it in its set.
                await self._make_room(absent)
            return
        await self._make_room([part.piece.block for part in left])

    def _storing(self, parts: Sequence[Part]) -> Steps[_Stored]:
        """Store what can be stored."""
        left: list[Part] = []
        chosen: list[tuple[Part, Found | None]] = []
        held: list[Found | Place] = []
        index = self._index
        try:
            for part in parts:
                is_whole = self._is_whole(part.piece)
                block = part.piece.block
                found = index.find(block) if is_whole else index.hold(block, Access.PIN)
                if found and not is_whole:
                    held.append(found)
                if found or is_whole:
                    chosen.append((part, found))
                else:
                    left.append(part)
            places = yield from index.reserving(
                [part.piece.block for part, _ in chosen], self._victim, Access.WRITE
            )
            held += [place for place in places if place]
            items, stored = [], []
            for (part, found), place in zip(chosen, places, strict=True):
                if place is None:
                    left.append(part)
                    continue
                self._fill(place, part, found)
                items.append(Publication(place, part.piece.block, TagState.DIRTY, found))
                stored.append(part)
            results = yield from index.publishing(items)
            left += [part for part, result in zip(stored, results, strict=True) if result is None]
        finally:
            for one in held:
                index.release(one)
        return _Stored(
            [
                result for item, result in zip(items, results, strict=True)
                if result and not (item.expected and item.expected.tag.is_dirty)
            ],
            left,
        )  # fmt: skip

    def _fill(self, place: Place, part: Part, found: Found | None) -> None:
        """Put a block together."""
        blocks, piece = self._blocks, part.piece
        blocks.prepare(place)
        end = piece.start + piece.length
        if found is not None and not self._is_whole(piece):
            if piece.start:
                blocks.fill(place, 0, blocks.load_held(found, 0, piece.start))
            if end < blocks.block_bytes:
                rest = blocks.block_bytes - end
                blocks.fill(place, end, blocks.load_held(found, end, rest))
        elif end < blocks.block_bytes:
            # Behind the end of the origin lie zeroes.
            blocks.fill(place, end, bytes(blocks.block_bytes - end))
        blocks.fill(place, piece.start, part.data)

    def _is_whole(self, piece: Piece) -> bool:
        """Whether a piece is all of its block that the origin has."""
        block_bytes = self._blocks.block_bytes
        inside = min(block_bytes, self._size_bytes() - (piece.block << self._blocks.shift))
        return piece.start == 0 and piece.length >= inside

    # Through and around

    async def _write_through(self, parts: Sequence[Part]) -> None:
        # What was dirty just before has bytes of a write that was answered.
        fresh = await self._store(parts)
        try:
            await self._cleaner.write_out([part.piece.block for part in parts], most_runs=_RUNS)
        except OSError:
            # The writer is told that it failed, so nobody may find it in the cache, unless another
            # writer has put its bytes on top of these.
            await self._fencing.run(lambda: self._index.clearing(fresh))
            raise

    async def _write_around(self, parts: Sequence[Part]) -> None:
        by_block = {part.piece.block: part for part in parts}
        for first, count in runs_of(list(by_block), _AT_ONCE):
            some = [by_block[block] for block in range(first, first + count)]
            # Two writes to parts of one block must not take the rest of it from each other.
            async with self._writers.changing(first, count):
                await self._write_run_around(first, count, some)

    async def _write_run_around(self, first: int, count: int, parts: Sequence[Part]) -> None:
        unit, blocks = self._link.block_bytes, range(first, first + count)
        start = (first << self._blocks.shift) + parts[0].piece.start
        data = b"".join(part.data for part in parts)
        async with self._order.changing(first, count):
            # What is being fetched now may be of before, so it must not come into the cache.
            await self._misses.forestall(first, count)
            await self._forget(blocks)
            is_even = not start % unit and not len(data) % unit
            if is_even and not any(self._is_dirty(block) for block in blocks):
                await self._link.write_copy(start, data)
                self._link.owe_flush()
                return
        await self._write_through(parts)
        await self._cleaner.settle()
        await self._forget(blocks)

    def _is_dirty(self, block: int) -> bool:
        found = self._index.find(block)
        return found is not None and found.tag.is_dirty

    async def _forget(self, blocks: Sequence[int]) -> None:
        """Let the cache not have some blocks, unless they are dirty."""
        founds = [found for block in blocks if (found := self._index.find(block))]
        clean = [found for found in founds if not found.tag.is_dirty]
        if clean:
            await self._fencing.run(lambda: self._index.clearing(clean))
