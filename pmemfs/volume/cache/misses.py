"""Fetches blocks from the origin: each block once, and neighbours together.

A fetch is a task of its own. Readers wait for it, for as long as the user said; the fetch goes on
without them, because the origin may touch its pages until it answers. Invariants:
- a place is reserved before the origin is asked, and becomes the block only when all of its bytes
  are there and flushed;
- a fetch whose block was given to the origin meanwhile is stale: it may have read the bytes of
  before. The table of fetches under way is there to note that, so whoever gives the origin bytes
  calls `note_change` first. A stale block is neither kept nor shown to a reader. Where the cache
  has no tag of the block that would keep a fetch from publishing, `forestall` is called instead;
- a block for which there is no place goes through a buffer. So no reader waits for a write-back.
"""

from __future__ import annotations

import errno
import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from pmemfs.errors import PmemfsError, cause_of, sentence_of
from pmemfs.media.cache import TagState
from pmemfs.memmap.base import Access
from pmemfs.origin.base import MOST_BYTES, MOST_VIEWS
from pmemfs.volume.cache.blocks import Blocks, clipped, runs_of
from pmemfs.volume.cache.fencing import Fencing
from pmemfs.volume.cache.groups import Found
from pmemfs.volume.cache.index import Index, Place, Publication, Victim
from pmemfs.volume.cache.link import OriginLink
from pmemfs.volume.cache.order import OriginOrder
from pmemfs.volume.cache.steps import Steps
from pmemfs.volume.coming import Waiter

log = logging.getLogger(__name__)

_MOST_BLOCKS_BYTES = 1 << 20
_KEPT_BUFFERS = 64

Bytes = bytes | memoryview


class Reader(NamedTuple):
    """Somebody who waits for bytes of a block without a task."""

    block: int
    start: int
    length: int
    """0: no bytes are wanted, because the block is read where it is then."""
    coming: Waiter
    deadline: float


@dataclass(slots=True, eq=False)
class Fetch:
    """Blocks that follow each other, and are being fetched together."""

    first: int
    count: int
    is_kept: bool
    """Whether the blocks come into the cache."""
    wanted: set[int]
    """The blocks that readers wait for."""
    done: trio.Event = field(default_factory=trio.Event)
    stale: set[int] = field(default_factory=set)
    is_publishing: bool = False
    """Whether its blocks are coming into the cache, so that it is too late to call them stale."""
    data: dict[int, Bytes] = field(default_factory=dict)
    """The wanted blocks, when it is done. A block that is missing there is stale."""
    error: Exception | None = None
    readers: list[Reader] = field(default_factory=list)
    is_shown: bool = False
    """Whether a reader waits for bytes."""


class MissCounts(NamedTuple):
    """What the fetches of a mount have done."""

    fetched_blocks: int
    joined: int
    """Reads that waited for a fetch that was under way already."""
    bypassed_blocks: int
    without_place: int
    """Blocks that were not kept because their set was full of dirty blocks."""
    stale: int
    ahead_blocks: int


class Misses:
    """The fetches under way of one cache."""

    def __init__(
        self, index: Index, blocks: Blocks, link: OriginLink, order: OriginOrder,
        fencing: Fencing, victim: Victim, size_bytes: Callable[[], int],
    ) -> None:  # fmt: skip
        self._index = index
        self._blocks = blocks
        self._link = link
        self._order = order
        self._fencing = fencing
        self._victim = victim
        self._size_bytes = size_bytes
        self.under_way: dict[int, Fetch] = {}
        """By their blocks."""
        self._buffers: list[mmap.mmap] = []
        self.may_have: Callable[[int], bool] = lambda block: index.find(block) is not None
        """Whether the cache has a block. There is a faster way to ask with a native engine."""
        self.nursery: trio.Nursery | None = None
        """Of the tasks that fetch."""
        self.fetched = self.joined = self._bypassed = 0
        self._without_place = self._stale = self._ahead = 0

    def counts(self) -> MissCounts:
        """The counts so far."""
        return MissCounts(self.fetched, self.joined, self._bypassed, self._without_place,
                          self._stale, self._ahead)  # fmt: skip

    @property
    def is_busy(self) -> bool:
        """Whether any fetch is under way."""
        return bool(self.under_way)

    async def forestall(self, first: int, count: int) -> bool:
        """As `note_change`. After it no fetch brings bytes of before into the cache: on media whose
        fences take long, blocks may just be published, and nothing stops that. Whether it had to
        wait for some."""
        has_waited = False
        for fetch in {self.under_way[block] for block in self.note_change(first, count)}:
            if fetch.is_publishing:
                await fetch.done.wait()
                has_waited = True
        return has_waited

    def note_change(self, first: int, count: int) -> Sequence[int]:
        """The origin is about to be given these blocks; those of them that are being fetched."""
        if not self.under_way:
            return ()
        if count <= len(self.under_way):
            changed = [block for block in range(first, first + count) if block in self.under_way]
        else:
            changed = [block for block in self.under_way if first <= block < first + count]
        for block in changed:
            self.under_way[block].stale.add(block)
        return changed

    async def bring(
        self, wanted: Sequence[int], *, is_kept: bool = True, ahead_blocks: int = 0
    ) -> dict[int, Bytes]:
        """The bytes of blocks that the cache did not have just now. Raises OSError."""
        deadline = trio.current_time() + self._link.timeout_seconds
        found: dict[int, Bytes] = {}
        missing = list(wanted)
        while True:
            fetches = self._begin(missing, is_kept, ahead_blocks)
            ahead_blocks = 0
            with trio.move_on_at(deadline) as waiting:
                for fetch in fetches:
                    await fetch.done.wait()
            if waiting.cancelled_caught:
                raise self._link.note_timeout()
            again = []
            for block in missing:
                data = self._take(block, fetches)
                if data is None:
                    again.append(block)
                else:
                    found[block] = data
            if not again:
                return found
            missing = again

    async def bring_past(self, blocks: Sequence[int]) -> dict[int, Bytes]:
        """The bytes that the origin has of blocks that follow each other, whatever the cache has.
        Raises OSError."""
        fetches = []
        for first, count in runs_of(blocks, _MOST_BLOCKS_BYTES >> self._blocks.shift):
            fetch = Fetch(first, count, False, set(range(first, first + count)))
            await self._carry_out(fetch)
            if fetch.error:
                raise OSError(errno.EIO, sentence_of(fetch.error)) from fetch.error
            fetches.append(fetch)
        return {block: data for fetch in fetches for block, data in fetch.data.items()}

    def _take(self, block: int, fetches: Sequence[Fetch]) -> Bytes | None:
        for fetch in fetches:
            if fetch.first <= block < fetch.first + fetch.count:
                if fetch.error:
                    raise OSError(errno.EIO, sentence_of(fetch.error)) from fetch.error
                if block in fetch.data:
                    return fetch.data[block]
        # Somebody has written to it meanwhile, so it was in the cache at that time.
        piece = next(self._blocks.pieces(block << self._blocks.shift, self._blocks.block_bytes))
        return self._blocks.load(piece)

    def _begin(self, wanted: Sequence[int], is_kept: bool, ahead_blocks: int) -> list[Fetch]:
        """Join the fetches that are under way, and begin those that are not."""
        fetches: dict[Fetch, None] = {}
        fresh: list[int] = []
        for block in wanted:
            fetch = self.under_way.get(block)
            if fetch is None or block in fetch.stale:
                fresh.append(block)
            else:
                fetch.wanted.add(block)
                fetches[fetch] = None
                self.joined += 1
        ahead = list(self._absent_behind(wanted[-1] + 1, ahead_blocks)) if ahead_blocks else []
        for fetch in self._start(fresh, is_kept, is_wanted=True):
            fetches[fetch] = None
        # Apart from those, so that nobody waits for them, or fails with them.
        self._start_ahead(ahead)
        return list(fetches)

    def fetch_ahead(self, first: int, count: int) -> None:
        """Begin to fetch blocks that nobody waits for, up to the first that is there."""
        if count:
            self._start_ahead(list(self._absent_behind(first, count)))

    def _start_ahead(self, blocks: Sequence[int]) -> None:
        self._ahead += len(blocks)
        self._start(blocks, True, is_wanted=False)

    def _start(self, blocks: Sequence[int], is_kept: bool, *, is_wanted: bool) -> list[Fetch]:
        fetches = []
        for first, count in runs_of(blocks, _MOST_BLOCKS_BYTES >> self._blocks.shift):
            mine = range(first, first + count)
            fetch = Fetch(first, count, is_kept, set(mine) if is_wanted else set())
            self.under_way.update(dict.fromkeys(mine, fetch))
            self.carry_out(fetch)
            fetches.append(fetch)
        return fetches

    def _absent_behind(self, first: int, count: int) -> Iterator[int]:
        last = self._size_bytes() - 1 >> self._blocks.shift
        for block in range(first, min(first + count, last + 1)):
            with suppress(OSError):
                if block not in self.under_way and not self.may_have(block):
                    yield block
                    continue
            return

    async def _carry_out(self, fetch: Fetch) -> None:
        held: list[Place] = []
        try:
            await self._order.unchanging(fetch.first, fetch.count)
            places = await self._reserve(fetch)
            held += [place for place in places if place]
            # What is fetched ahead without a place would be of no use to anybody.
            if held or fetch.wanted:
                await self._transfer(fetch, places)
        except Exception as error:
            # Also what nobody expects fails these readers only, and not the mount.
            if not isinstance(cause_of(error), (OSError, PmemfsError)):
                log.error("a fetch failed", exc_info=error)
            fetch.error = error
        finally:
            for place in held:
                self._index.release(place)
            self.end(fetch)

    def carry_out(self, fetch: Fetch) -> None:
        """Begin to fetch, in a task of its own."""
        assert self.nursery is not None
        self.nursery.start_soon(self._carry_out, fetch)

    def end(self, fetch: Fetch) -> None:
        """Tell all who wait for a fetch what has become of it."""
        for block in range(fetch.first, fetch.first + fetch.count):
            if self.under_way.get(block) is fetch:
                del self.under_way[block]
        self._stale += len(fetch.stale)
        fetch.done.set()
        for reader in fetch.readers:
            data = fetch.data.get(reader.block)
            if not reader.length and fetch.error is None:
                # A block that is not there now is asked for again, in the other way.
                reader.coming.give(b"")
            elif data is not None:
                reader.coming.give(_part(data, reader))
            elif fetch.error is not None:
                reader.coming.fail(OSError(errno.EIO, sentence_of(fetch.error)))
            elif self.nursery is not None:
                self.nursery.start_soon(self._bring_again, reader)

    async def _bring_again(self, reader: Reader) -> None:
        """Bring a block to a reader whose fetch was stale."""
        try:
            data = self._take(reader.block, ())
            if data is None:
                data = (await self.bring([reader.block]))[reader.block]
        except OSError as error:
            reader.coming.fail(error)
        else:
            reader.coming.give(_part(data, reader))

    async def _reserve(self, fetch: Fetch) -> list[Place | None]:
        if not fetch.is_kept:
            self._bypassed += fetch.count
            return [None] * fetch.count
        blocks = range(fetch.first, fetch.first + fetch.count)
        try:
            places = await self._fencing.run(
                lambda: self._index.reserving(blocks, self._victim, Access.READ)
            )
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # Not even for page structures. That is no reason to fail a reader.
            places = [None] * fetch.count
        places = [self._prepared(place) for place in places]
        self._without_place += sum(place is None for place in places)
        return places

    def _prepared(self, place: Place | None) -> Place | None:
        """A place with memory behind it; None if a sparse pool can't have more."""
        if place is not None:
            try:
                self._blocks.prepare(place)
                self._index.prepare(place)
            except OSError:
                self._index.release(place)
                return None
        return place

    async def _transfer(self, fetch: Fetch, places: list[Place | None]) -> None:
        """Read all blocks from the origin; those that have places become blocks of the cache."""
        blocks, shift = self._blocks, self._blocks.shift
        offset = fetch.first << shift
        length = min(fetch.count << shift, self._size_bytes() - offset)
        buffer = self._take_buffer() if None in places else None
        try:
            views = clipped(self._views(places, buffer), length)
            for start, part in _portions(views):
                await self._link.read(offset + start, part)
            self._zero_tail(places, buffer, length)
            self.fetched += fetch.count
            refused = await self._publish(fetch, places)
            # From here on nothing awaits: a reader that joins now would find the block itself.
            for block in fetch.wanted - fetch.stale - refused:
                at = block - fetch.first
                place = places[at]
                if place is not None:
                    fetch.data[block] = blocks.load_place(place, 0, blocks.block_bytes)
                elif buffer is not None:
                    fetch.data[block] = buffer[at << shift : at + 1 << shift]
        finally:
            if buffer is not None:
                self._give_buffer(buffer)

    def _views(self, places: Sequence[Place | None], buffer: mmap.mmap | None) -> list[memoryview]:
        """The places as one list of views. Where there is no place, it is the buffer."""
        blocks, views = self._blocks, list[memoryview]()
        whole = memoryview(buffer) if buffer is not None else memoryview(b"")
        run: list[Place] = []
        for at, place in enumerate(places):
            if place is not None:
                run.append(place)
                continue
            if run:
                views += blocks.views(run, len(run) << blocks.shift)
                run = []
            views.append(whole[at << blocks.shift : at + 1 << blocks.shift])
        return views + (blocks.views(run, len(run) << blocks.shift) if run else [])

    def _zero_tail(
        self, places: Sequence[Place | None], buffer: mmap.mmap | None, length: int
    ) -> None:
        """Let what lies behind the end of the origin be zeroes."""
        inside = length & self._blocks.block_bytes - 1
        if not inside:
            return
        zeroes = bytes(self._blocks.block_bytes - inside)
        place = places[-1]
        if place is not None:
            self._blocks.fill(place, inside, zeroes)
        elif buffer is not None:
            buffer[length : length + len(zeroes)] = zeroes

    async def _publish(self, fetch: Fetch, places: Sequence[Place | None]) -> set[int]:
        """Let the places be the blocks; which of them are something else by now."""
        numbered = [(fetch.first + at, place) for at, place in enumerate(places) if place]
        if not numbered:
            return set()
        for _, place in numbered:
            self._blocks.flush(place)
        asked: list[Publication] = []

        def begin() -> Steps[list[Found | None]]:
            # Nothing awaits between this look and the lock, because the groups were seen before.
            fetch.is_publishing = True
            asked[:] = [
                Publication(place, block, TagState.CLEAN, None)
                for block, place in numbered if block not in fetch.stale
            ]  # fmt: skip
            return self._index.publishing(asked)

        results = await self._fencing.run(begin)
        return {item.block for item, result in zip(asked, results, strict=True) if result is None}

    def _take_buffer(self) -> mmap.mmap:
        return self._buffers.pop() if self._buffers else mmap.mmap(-1, _MOST_BLOCKS_BYTES)

    def _give_buffer(self, buffer: mmap.mmap) -> None:
        # Another one is freed with the last view of it.
        if len(self._buffers) < _KEPT_BUFFERS:
            self._buffers.append(buffer)


def _part(data: Bytes, reader: Reader) -> Bytes:
    return data[reader.start : reader.start + reader.length] if reader.length < len(data) else data


def _portions(views: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """As many views at once as one call of an origin takes, and where they begin."""
    start = length = 0
    part: list[memoryview] = []
    for view in views:
        if part and (len(part) == MOST_VIEWS or length + len(view) > MOST_BYTES):
            yield start, part
            start, length, part = start + length, 0, []
        part.append(view)
        length += len(view)
    if part:
        yield start, part
