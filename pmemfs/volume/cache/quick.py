"""The quick way of a miss: many blocks at once, with no task for any of them.

What it does is what `misses` does, for the common case: a request for bytes of a few blocks that
the cache does not have, of an origin that is well. All blocks that were asked for since the last
step are reserved by one native call, and given to the origin together; all that have come since are
published by another. Everything else goes the other way, at whatever point that turns out: a block
that is there by now, a set without room, a group that was not seen, an origin that fails. So
errors, patience and retries are in one place only. Invariants:
- a fetch is in the table of `Misses` from the moment that a reader waits for it, so whoever changes
  a block finds it there, whichever way it goes;
- a reserved place is released only after the origin has let go of its pages;
- between the look at `stale` and the tag that is stored nothing awaits.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import trio
from trio.lowlevel import Abort

from pmemfs.errors import MemoryFault, system_error
from pmemfs.medium.base import Medium
from pmemfs.origin.vectors import Vectors
from pmemfs.volume.cache.blocks import Piece
from pmemfs.volume.cache.index import Index
from pmemfs.volume.cache.link import OriginLink
from pmemfs.volume.cache.misses import Bytes, Fetch, Misses, Reader
from pmemfs.volume.cache.order import OriginOrder
from pmemfs.volume.coming import Coming, Waiter, gathered
from pmemfs.volume.onefile import INODE

_LEAST_LOOK_SECONDS = 0.1
_MOST_BYTES = 1 << 20
"""Of one transfer. With blocks of 4 KiB it has 256 views, fewer than an origin takes."""


class Places(Protocol):
    """Reserves and publishes many places with one call; see `dataplane/filling.pxi`."""

    @property
    def evicted(self) -> int:
        """How many blocks had to go."""

    def may_have(self, block: int, count: int = 1) -> bool:
        """Whether the cache has any of some blocks, or can't tell here."""

    def reserve(self, blocks: list[int], mapping: int) -> list[int]:
        """Where the place of each block begins; 0: there is none for it here."""

    def publish(self, blocks: list[int], offsets: list[int]) -> list[bool]:
        """Let places be blocks; which of them are now."""

    def hold(self, offsets: list[int]) -> None:
        """Take the references of `reserve` again. Raises OSError."""

    def release(self, offsets: list[int]) -> None:
        """Drop the references that `reserve` has taken."""


class QuickMisses:
    """The quick fetches of one cache."""

    def __init__(
        self, misses: Misses, places: Places, medium: Medium, index: Index, link: OriginLink,
        order: OriginOrder, block_shift: int, size_bytes: Callable[[], int],
    ) -> None:  # fmt: skip
        self._misses = misses
        self._places = places
        self._medium = medium
        self._index = index
        self._link = link
        self._order = order
        self._shift = block_shift
        self._size_bytes = size_bytes
        self._fresh: list[Fetch] = []
        self._transfers: dict[Vectors, list[tuple[Fetch, int]]] = {}
        """What the origin fills: blocks that follow each other, and where each lies in the pool."""
        self._over: list[Vectors] = []
        self._sleeper: trio.lowlevel.Task | None = None
        self._serves = False
        self._evicted = 0
        self.given_back = 0
        """How many blocks were asked for again, in the other way."""

    def may_have(self, block: int, count: int = 1) -> bool:
        """Whether the cache has any of some blocks, or can't tell here."""
        return self._places.may_have(block, count)

    def read(self, pieces: Sequence[Piece]) -> Coming[Bytes] | None:
        """Bytes of blocks that follow each other, and that the cache does not have; None: they have
        to go the other way."""
        if not self.takes(pieces[0].block, len(pieces)):
            return None
        deadline = trio.current_time() + self._link.timeout_seconds
        parts: list[Coming[Bytes]] = []
        for piece in pieces:
            coming: Coming[Bytes] = Coming()
            reader = Reader(piece.block, piece.start, piece.length, coming, deadline)
            self._fetch_for(reader).is_shown = True
            parts.append(coming)
        return parts[0] if len(parts) == 1 else gathered(parts, b"".join)

    def bring(self, first: int, count: int, waiter: Waiter) -> None:
        """Bring blocks of which this `takes` the fetches; the waiter is told of each of them."""
        deadline = trio.current_time() + self._link.timeout_seconds
        for block in range(first, first + count):
            self._fetch_for(Reader(block, 0, 0, waiter, deadline))

    def takes(self, first: int, count: int) -> bool:
        """Whether blocks that the cache does not have can be fetched in this way now."""
        # What is behind the end must become zeroes, which is for the other way.
        is_whole = first + count << self._shift <= self._size_bytes()
        if not (self._serves and is_whole and self._link.is_well):
            return False
        under_way = self._misses.under_way
        for block in range(first, first + count) if under_way else ():
            fetch = under_way.get(block)
            if fetch is not None and block in fetch.stale:
                return False
        return True

    def _fetch_for(self, reader: Reader) -> Fetch:
        """Join the fetch of a block, or let it be fetched."""
        block, misses = reader.block, self._misses
        fetch = misses.under_way.get(block)
        if fetch is None:
            fetch = misses.under_way[block] = Fetch(block, 1, True, set())
            self._fresh.append(fetch)
            self._wake()
        else:
            misses.joined += 1
            if reader.length:
                fetch.wanted.add(block)
        fetch.readers.append(reader)
        return fetch

    async def serve(self) -> None:
        """Fetch what is asked for, until this is cancelled; then until the origin has ended."""
        self._serves = True
        try:
            while True:
                await self._something()
                self._step()
        finally:
            self._serves = False
            ended, self._fresh = self._fresh, []
            with trio.CancelScope(shield=True):
                while self._transfers:
                    await self._something()
                    ended += self._let_go(self._taken())
            for fetch in ended:
                fetch.error = system_error(errno.EIO)
                self._misses.end(fetch)

    def take_anew(self) -> None:
        """The page structures are of a new generation: take the references anew for what the origin
        fills. None of it becomes a block, because what is known of the groups is void as well, so
        its readers ask again."""
        for run in self._transfers.values():
            self._places.hold([offset for _, offset in run])
            for fetch, _ in run:
                fetch.stale.add(fetch.first)

    async def watch(self) -> None:
        """End the waiting of readers whose time is over. The fetches go on."""
        while True:
            await trio.sleep(max(_LEAST_LOOK_SECONDS, self._link.timeout_seconds / 10))
            now = trio.current_time()
            for fetch in list(self._misses.under_way.values()):
                late = [reader for reader in fetch.readers if reader.deadline < now]
                for reader in late:
                    fetch.readers.remove(reader)
                    reader.coming.fail(self._link.note_timeout())

    async def _something(self) -> None:
        """Let others run, until there is something to do."""
        if self._fresh or self._over:
            await trio.lowlevel.checkpoint()
            return
        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._wake_up)

    def _wake_up(self, _: object) -> Abort:
        self._sleeper = None
        return Abort.SUCCEEDED

    def _wake(self) -> None:
        if self._sleeper is not None:
            trio.lowlevel.reschedule(self._sleeper)
            self._sleeper = None

    def _note_end(self, vectors: Vectors) -> None:
        """The origin has let go of the memory."""
        self._link.end_read(vectors)
        self._over.append(vectors)
        self._wake()

    def _step(self) -> None:
        """Publish what has come, and begin to fetch what is asked for."""
        if self._over:
            self._end(self._taken())
        if self._fresh:
            fresh, self._fresh = self._fresh, []
            self._begin(fresh)

    def _begin(self, fetches: Sequence[Fetch]) -> None:
        """Reserve places, and have the origin fill them."""
        if not self._link.is_well:
            self._go_the_other_way(fetches)
            return
        # These have to wait for who changes them.
        left = [fetch for fetch in fetches if self._order.is_changing(fetch.first)]
        if left:
            fetches = [fetch for fetch in fetches if fetch not in left]
        offsets = self._places.reserve([fetch.first for fetch in fetches], INODE)
        self._index.evicted += self._places.evicted - self._evicted
        self._evicted = self._places.evicted
        try:
            self._medium.check_touched()
        except MemoryFault:
            self._places.release(list(filter(None, offsets)))
            self._go_the_other_way([*left, *fetches])
            return
        unit, block_bytes, view = self._link.block_bytes, 1 << self._shift, self._medium.view
        reads: list[tuple[int, Vectors]] = []
        left += [fetch for fetch, at in zip(fetches, offsets, strict=True) if not at]
        placed = [pair for pair in zip(fetches, offsets, strict=True) if pair[1]]
        for run in _runs(placed, _MOST_BYTES >> self._shift):
            vectors = Vectors([view(offset, block_bytes) for _, offset in run], True, unit)
            self._transfers[vectors] = run
            reads.append((run[0][0].first << self._shift, vectors))
        begun = self._link.begin_reads(reads, self._note_end)
        left += self._let_go([vectors for _, vectors in reads[begun:]])
        self._go_the_other_way(left)

    def _taken(self) -> list[Vectors]:
        over, self._over = self._over, []
        return over

    def _let_go(self, transfers: Sequence[Vectors]) -> list[Fetch]:
        """Give the places of transfers up, whose memory nobody touches; their fetches."""
        found = [pair for vectors in transfers for pair in self._transfers.pop(vectors)]
        self._places.release([offset for _, offset in found])
        return [fetch for fetch, _ in found]

    def _end(self, over: Sequence[Vectors]) -> None:
        """Let what has come be blocks of the cache, and give it to its readers."""
        failed = [vectors for vectors in over if vectors.result != vectors.length_bytes]
        if failed:
            self._go_the_other_way(self._let_go(failed))
        come = [pair for vectors in over if vectors.result == vectors.length_bytes
                for pair in self._transfers.pop(vectors)]  # fmt: skip
        good = [(fetch, offset) for fetch, offset in come if not fetch.stale]
        blocks, offsets = [fetch.first for fetch, _ in good], [offset for _, offset in good]
        try:
            kept = self._places.publish(blocks, offsets)
            self._medium.check_touched()
            self._index.inserted += sum(kept)
            for (fetch, offset), is_kept in zip(good, kept, strict=True):
                if is_kept and (fetch.is_shown or fetch.wanted):
                    fetch.data[fetch.first] = self._medium.read(offset, 1 << self._shift)
        except MemoryFault as error:
            for fetch, _ in come:
                fetch.error = error
        finally:
            self._places.release([offset for _, offset in come])
        self._misses.fetched += len(come)
        for fetch, _ in come:
            self._misses.end(fetch)

    def _go_the_other_way(self, fetches: Sequence[Fetch]) -> None:
        for fetch in fetches:
            # Whoever wants no bytes can't be served from a buffer, so they ask for the bytes.
            back = [reader for reader in fetch.readers if not reader.length]
            self.given_back += len(back)
            if back:
                fetch.readers = [reader for reader in fetch.readers if reader.length]
            fetch.wanted.add(fetch.first)
            self._misses.carry_out(fetch)
            for reader in back:
                reader.coming.give(b"")


def _runs(placed: Sequence[tuple[Fetch, int]], most: int) -> Iterator[list[tuple[Fetch, int]]]:
    """Fetches of blocks that follow each other, as they were asked for, so many together."""
    run: list[tuple[Fetch, int]] = []
    for pair in placed:
        if run and (pair[0].first != run[-1][0].first + 1 or len(run) == most):
            yield run
            run = []
        run.append(pair)
    if run:
        yield run
