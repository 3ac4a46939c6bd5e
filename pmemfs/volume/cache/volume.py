"""Mode `cache`: one file, as large as the origin, of which the pool holds what is used.

`onefile` says how the file behaves, `index` how a block changes atomically. Here requests meet the
parts: a hit is answered at once, and everything that has to wait is a coroutine.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import trio

from pmemfs.clock import coarse_ns
from pmemfs.errors import CannotGrow, sentence_of, system_error
from pmemfs.media.cache import Policy
from pmemfs.media.cachereport import CacheReport, CacheSettings, OriginReport
from pmemfs.memmap.base import Memmap
from pmemfs.origin.base import Origin
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool
from pmemfs.tally import Tally
from pmemfs.units import MIB, format_size
from pmemfs.volume.base import Later, Piece, Room
from pmemfs.volume.cache.blocks import Blocks
from pmemfs.volume.cache.blocks import Piece as BlockPiece
from pmemfs.volume.cache.cleaning import Cleaner
from pmemfs.volume.cache.errands import Errands
from pmemfs.volume.cache.eviction import Eviction
from pmemfs.volume.cache.fencing import Fencing
from pmemfs.volume.cache.groups import Gate, Groups
from pmemfs.volume.cache.growing import End
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.index import Index, OwnLocks, SetLocks
from pmemfs.volume.cache.link import OriginLink, watched
from pmemfs.volume.cache.misses import Misses
from pmemfs.volume.cache.onlookers import CacheOnlookers, OwnCounts
from pmemfs.volume.cache.opening import marks_to_note
from pmemfs.volume.cache.order import OriginOrder
from pmemfs.volume.cache.quick import Places, QuickMisses
from pmemfs.volume.cache.search import DirtySearch
from pmemfs.volume.cache.sequential import Advice, Readers
from pmemfs.volume.cache.writeback import WriteBack
from pmemfs.volume.cache.writing import Part, Writer
from pmemfs.volume.cache.zeroing import CachedBlocks, Zeroer
from pmemfs.volume.coming import Waiter
from pmemfs.volume.onefile import INODE, OneFileVolume
from pmemfs.volume.pinned import PinnedFrames

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

_COPY_BYTES = MIB
_MOST_QUICK = 32
"""So many blocks of a request are fetched each by itself, though by one transfer."""


class CacheVolume(OneFileVolume):
    """The cache of one pool. Until `begin` it has no origin."""

    tally: Tally | None = None
    """Where the counts last longer than this process. None: nothing of them does."""

    def __init__(
        self, pool: Pool, memmap: Memmap, *, uid: int = 0, gid: int = 0, mode: int = 0o600,
        onlookers: CacheOnlookers | None = None, locks: SetLocks | None = None,
        gate: Gate | None = None, places: Callable[[bytearray], Places] | None = None,
    ) -> None:  # fmt: skip
        """`places` makes what fills many places at once, from what is known of each group.

        Raises DamagedCache.
        """
        self._onlookers = onlookers or CacheOnlookers()
        super().__init__(pool.label, self._onlookers, uid=uid, gid=gid, mode=mode)
        self.pinned = PinnedFrames()
        self._medium = medium = pool.medium
        self.read_only = medium.read_only
        self.head = StoredHead.open(pool)
        head, self.ground = self.head.head, self.head.ground
        self.was_settled = bool(head.is_settled)
        self.fencing = fencing = Fencing(medium)
        self.groups = groups = Groups(medium, self.ground, gate, is_settled=self.was_settled)
        index = Index(medium, memmap, self.ground, locks or OwnLocks(), groups)
        self.index = index
        self.blocks = Blocks(medium, self.ground, index, self._onlookers.note_reserved)
        self.cached = CachedBlocks(medium, self.ground)
        self.origin_link = link = OriginLink(None, timeout_seconds=head.origin_timeout_seconds)
        self.errands = Errands(link)
        self._end = end = End()
        order, victim = OriginOrder(), Eviction(memmap, self.ground).choose
        self.misses = Misses(
            index, self.blocks, link, order, fencing, victim, lambda: end.size_bytes
        )
        self.quick = QuickMisses(
            self.misses, places(groups.states), medium, index, link, order,
            self.ground.block_shift, lambda: end.size_bytes,
        ) if places and fencing.is_quick and not medium.read_only else None  # fmt: skip
        if self.quick is not None:
            self.misses.may_have = partial(self._has, self.quick)
        self.cleaner = Cleaner(index, self.blocks, link, order, fencing, self.misses)
        self.search = DirtySearch(groups)
        self.write_backs = WriteBack(
            self.ground, index, groups, self.search, self.cleaner, link, fencing, self.cached,
            self.count_dirty, self.errands,
        )  # fmt: skip
        self.writer = Writer(
            index, self.blocks, self.misses, self.cleaner, link, order, fencing, victim,
            self.write_backs.make_room, lambda: end.size_bytes,
        )  # fmt: skip
        self.zeroer = Zeroer(self.cached, index, self.ground.block_shift, self.misses,
                             self.cleaner, link, order, fencing)  # fmt: skip
        self.readers = Readers(self.ground.block_shift)
        self._read_hits = self._write_hits = self._missed = 0
        counted = head.dirty_blocks if self.was_settled else 0
        # Counts of workers go on from those of another daemon's time, which the search counts.
        self._dirty_before = counted - self._onlookers.counters().dirtied
        self._serving: trio.CancelScope | None = None
        self._rewriting = trio.Lock()
        self._made_good = 0
        """After so many failed flushes, what was written through was written again."""
        link.has_owed = self._allow_fsyncs
        self._obey()
        self._show_size()

    # Its life

    async def begin(self, origin: Origin | None) -> None:
        """Serve with this origin, which `opening` has found to be the right one; None: without."""
        self.origin_link.begin(origin)
        if not self.read_only:
            marks = await marks_to_note(origin) if origin else {}
            await self._rewrite_head(is_settled=0, **marks)
        self._allow()

    async def resume(self) -> None:
        """Serve what another daemon has served until it was killed; `arrive` brings the origin.

        What the cache has is served meanwhile. The head says that the last mount has not ended.
        """
        self.origin_link.expect()
        # What was written through may be dirty, and an fsync owes it to the origin.
        self._made_good = -1
        self._allow()

    async def arrive(self, origin: Origin) -> None:
        """The origin is there again, after `resume`."""
        if not self.read_only:
            # Before anything changes it.
            await self._rewrite_head(**await marks_to_note(origin))
        self.origin_link.begin(origin)
        self._allow()

    def renew(self) -> None:
        """Go on in a new generation of page structures, after workers have died, whose locks are
        free again.

        No worker may be in a section, and no other task may have run in that generation. Raises
        OSError (ENOSPC).
        """
        self.index.take_anew()
        if self.quick is not None:
            self.quick.take_anew()
        if not self.fencing.is_quick or self._medium.read_only:
            # Workers change no tags there.
            return
        self.groups.forget()
        index = self.index
        self._dirty_before = index.cleaned - index.dirtied - self._onlookers.counters().dirtied
        self.write_backs.search_anew()

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run what serves misses and writes back, until it is cancelled. It has started when
        requests may come."""
        with trio.CancelScope() as self._serving:
            async with trio.open_nursery() as nursery:
                self.misses.nursery = self.errands.nursery = nursery
                nursery.start_soon(self.origin_link.watch)
                if self.quick is not None:
                    nursery.start_soon(self.quick.serve)
                    nursery.start_soon(self.quick.watch)
                if not self.read_only:
                    nursery.start_soon(self.write_backs.serve)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self.errands.nursery = None

    async def finish(self) -> None:
        """The last request was answered: leave what a later mount needs to know.

        What is dirty stays dirty. The caller has stopped `serve`, and made all durable.
        """
        if self.read_only:
            return
        mark, link = None, self.origin_link
        # Neither an origin that hangs must keep this process for ever, nor one that can't be
        # connected to.
        link.note_end(link.timeout_seconds)
        with trio.move_on_after(link.patience_seconds):
            async with watched(link):
                mark = await self._settled_mark()
        if mark is None or not self.search.is_done or self.search.has_failed:
            return
        await self.fencing.fence()
        dirty = self.count_dirty()
        await self._rewrite_head(is_settled=1, dirty_blocks=dirty, origin_mark=mark)

    async def _settled_mark(self) -> bytes | None:
        """The mark of the origin after all that was written to it; None if that can't be known."""
        origin = self.origin_link.origin
        if origin is None:
            # Nobody has written to it from here.
            return self.head.head.origin_mark if self.was_settled else None
        try:
            await self.cleaner.settle()
            return await self.origin_link.mark()
        except OSError as error:
            log.warning("the origin %s could not be left in order: %s", self.origin_link.name,
                        sentence_of(error))  # fmt: skip
            return None

    # Content

    def _check_writable(self, number: int) -> None:
        super()._check_writable(number)
        if self.writer.policy is Policy.READ_ONLY:
            raise system_error(errno.EROFS)

    def read(self, number: int, offset_bytes: int, length_bytes: int) -> Later[bytes | memoryview]:
        self._check_device(number)
        length_bytes = min(length_bytes, self.size_bytes - offset_bytes)
        if length_bytes <= 0 or offset_bytes < 0:
            return b""
        if self.quick is not None:
            # First, and without `pieces`: with workers, nearly all that comes here has missed.
            block, shift = offset_bytes >> self.blocks.shift, self.blocks.shift
            count = (offset_bytes + length_bytes - 1 >> shift) - block + 1
            if count <= _MOST_QUICK and not self.quick.may_have(block, count):
                few = [BlockPiece(block, offset_bytes - (block << shift), length_bytes)]
                if count > 1:
                    few = list(self.blocks.pieces(offset_bytes, length_bytes))
                return self._read_quickly(self.quick, few)
        pieces = list(self.blocks.pieces(offset_bytes, length_bytes))
        parts = [self.blocks.load(piece) for piece in pieces]
        if None in parts:
            return self._read_later(pieces, parts)
        self._read_hits += len(parts)
        return parts[0] if len(parts) == 1 else b"".join(parts)  # type: ignore[return-value,arg-type]

    def bring(self, offset_bytes: int, length_bytes: int, waiter: Waiter) -> int:
        """Begin to bring the blocks of a read that the data plane has not found; of how many the
        waiter will be told. 0: the read has to come here by `read`."""
        quick, shift = self.quick, self.blocks.shift
        length_bytes = min(length_bytes, self.size_bytes - offset_bytes)
        if quick is None or self.read_only or length_bytes <= 0:
            return 0
        first = offset_bytes >> shift
        count = (offset_bytes + length_bytes - 1 >> shift) - first + 1
        if (
            count > _MOST_QUICK or quick.may_have(first, count) or not quick.takes(first, count)
            or self.readers.is_scan(first, count)
        ):  # fmt: skip
            return 0
        advice = self.readers.missed(first, count)
        quick.bring(first, count, waiter)
        self._missed += count
        self.misses.fetch_ahead(first + count, advice.ahead_blocks)
        return count

    def _has(self, quick: QuickMisses, block: int) -> bool:
        """Whether the cache has a block, asked in the faster way first."""
        return quick.may_have(block) and self.index.find(block) is not None

    def _read_quickly(
        self, quick: QuickMisses, pieces: list[BlockPiece]
    ) -> Later[bytes | memoryview]:
        """Read parts of blocks of which the cache has none."""
        first, count = pieces[0].block, len(pieces)
        advice = self.readers.missed(first, count)
        if not advice.is_bypassing and not self.read_only:
            coming = quick.read(pieces)
            if coming is not None:
                self._missed += count
                self.misses.fetch_ahead(first + count, advice.ahead_blocks)
                return coming
        return self._read_later(pieces, [None] * count, advice)

    async def _read_later(
        self, pieces: list[BlockPiece], parts: list[bytes | memoryview | None],
        advice: Advice | None = None,
    ) -> bytes | memoryview:  # fmt: skip
        missing = [piece.block for piece, part in zip(pieces, parts, strict=True) if part is None]
        self._missed += len(missing)
        self._read_hits += len(pieces) - len(missing)
        behind = pieces[-1].block + 1
        advice = advice or self.readers.missed(missing[0], behind - missing[0])
        is_kept = not advice.is_bypassing and not self.read_only
        ahead = advice.ahead_blocks if is_kept else 0
        brought = await self.misses.bring(missing, is_kept=is_kept, ahead_blocks=ahead)
        whole = [
            brought[piece.block][piece.start : piece.start + piece.length] if part is None else part
            for piece, part in zip(pieces, parts, strict=True)
        ]
        return whole[0] if len(whole) == 1 else b"".join(whole)

    def write(
        self, number: int, offset_bytes: int, data: Buffer, *, may_overwrite: bool = True
    ) -> Later[int]:
        self._check_writable(number)
        view = memoryview(data).cast("B")
        view = view[: max(0, self.size_bytes - offset_bytes)]
        if not view or offset_bytes < 0:
            raise OSError(errno.ENOSPC, "the end of the device")
        parts = self.writer.parts(offset_bytes, view)
        if self.writer.policy is not Policy.WRITE_BACK or self.write_backs.is_over_limit:
            return self._write_later(parts, len(view))
        left = self.writer.write_now(parts)
        self._write_hits += len(parts) - len(left)
        if left:
            return self._write_later(left, len(view))
        self._note_write(coarse_ns())
        return len(view)

    async def _write_later(self, parts: list[Part], length: int) -> int:
        if self.writer.policy is Policy.WRITE_BACK and self.write_backs.is_over_limit:
            await self.write_backs.wait_below_limit(len(parts))
        await self._write_parts(parts)
        self._note_write(coarse_ns())
        return length

    async def _write_parts(self, parts: list[Part]) -> None:
        if self.writer.policy is Policy.WRITE_BACK:
            await self.writer.write(parts)
        else:
            await self.errands.run(partial(self.writer.write, parts))

    def copy(
        self, source: int, source_bytes: int, target: int, target_bytes: int, length_bytes: int,
        *, may_overwrite: bool = True,
    ) -> Later[int]:  # fmt: skip
        return self._copy(source, source_bytes, target, target_bytes, length_bytes)

    async def _copy(
        self, source: int, source_bytes: int, target: int, target_bytes: int, length_bytes: int
    ) -> int:
        done = 0
        while done < length_bytes:
            step = min(_COPY_BYTES, length_bytes - done)
            reading = self.read(source, source_bytes + done, step)
            data = reading if isinstance(reading, (bytes, memoryview)) else await reading
            if not data:
                break
            writing = self.write(target, target_bytes + done, data)
            done += writing if isinstance(writing, int) else await writing
            if len(data) < step or target_bytes + done >= self.size_bytes:
                break
        return done

    def allocate(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> None:
        self._check_writable(number)
        if offset_bytes + length_bytes > self.size_bytes:
            raise OSError(errno.ENOSPC, "the end of the device")

    def punch(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        self._check_writable(number)
        return self._zero(offset_bytes, min(length_bytes, self.size_bytes - offset_bytes))

    def zero(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> Later[None]:
        return self.punch(number, offset_bytes, length_bytes)

    async def _zero(self, offset_bytes: int, length_bytes: int) -> None:
        if length_bytes <= 0:
            return
        end, block_bytes = offset_bytes + length_bytes, self.blocks.block_bytes
        first = -(-offset_bytes // block_bytes)
        # The last block of the origin is whole, even if it ends before the end of the block.
        stop = -(-end // block_bytes) if end == self.size_bytes else end // block_bytes
        if first < stop:
            edges = [(offset_bytes, first * block_bytes), (stop * block_bytes, end)]
            work = partial(self.zeroer.zero, first, stop - first, self.size_bytes)
            await self.errands.run(work)
        else:
            edges = [(offset_bytes, end)]
        for start, until in edges:
            if start < until:
                await self._write_parts(self.writer.parts(start, memoryview(bytes(until - start))))
        self._note_write(coarse_ns())

    def write_back(self, number: int) -> Later[None]:
        if self.writer.policy is Policy.WRITE_BACK and not self.origin_link.owes_flush:
            return None
        return self._settle()

    async def _settle(self) -> None:
        await self.errands.run(self._settle_now)

    async def _settle_now(self) -> None:
        """Let the origin have durably what was answered because it has it."""
        failed = self.origin_link.failed_flushes
        if self.writer.policy is not Policy.WRITE_BACK and failed != self._made_good:
            # What was written through is dirty again since then.
            await self.write_backs.flush()
            self._made_good = failed
        else:
            await self.cleaner.settle()
        self.origin_link.check_owed()

    @property
    def never_closed(self) -> Collection[int]:
        return (INODE,)

    def pieces(self, number: int, offset_bytes: int, length_bytes: int, most: int) -> list[Piece]:
        self._check_device(number)
        refuse_arrays()

    # The whole

    def room(self) -> Room:
        return Room(self.size_bytes // FRAME_BYTES, 0, file_count=2)

    async def resize(self) -> tuple[int, int]:
        """Take over the origin's size if it has grown; the old one and the new one.

        Raises OSError, and CannotGrow if the origin has become smaller.
        """
        old_bytes, origin = self.size_bytes, self.origin_link.origin
        if origin is None:
            raise system_error(errno.ENOTCONN)
        new_bytes = await self.origin_link.resize_seen()
        if new_bytes < old_bytes:
            why = (f"its origin {origin.name} has become smaller, {format_size(new_bytes)} instead "
                   f"of {format_size(old_bytes)}")  # fmt: skip
            raise CannotGrow(path=self._medium.name, why=why)
        if new_bytes > old_bytes:
            self._forbid_writes()
            await self._onlookers.grace()
            try:
                await self._end.move(new_bytes, self.blocks.shift, self.index, self.misses,
                                     self.cleaner, self.fencing)  # fmt: skip
                await self._rewrite_head(origin_bytes=new_bytes)
                self._show_size()
            finally:
                self._allow()
        return old_bytes, new_bytes

    async def change_settings(self, **changes: int) -> None:
        """Store fields of the head anew, and obey them from now on. Raises OSError."""
        policy = changes.get("policy")
        if policy is not None and policy != Policy.WRITE_BACK:
            # No worker may be making a block dirty when the new policy begins to hold.
            self._forbid_writes()
            self._onlookers.allow_fsyncs(False)
            await self._onlookers.grace()
        await self._rewrite_head(**changes)
        self._obey()
        self._allow()

    def stop_writing(self) -> None:
        self.read_only = self.write_backs.is_paused = True
        self._forbid_writes()

    def settle(self) -> bool:
        return self.write_backs.is_busy or self.misses.is_busy

    def resume_writing(self) -> None:
        self.read_only = self.write_backs.is_paused = self._medium.read_only
        self._allow()

    # What is said of it

    def count_dirty(self) -> int:
        """How many blocks are dirty, as far as the search has come."""
        return (
            self._dirty_before + self.groups.found_dirty
            + self.index.dirtied + self._onlookers.counters().dirtied - self.index.cleaned
        )  # fmt: skip

    def settings(self) -> CacheSettings:
        """What a user may set."""
        head = self.head.head
        return CacheSettings(
            Policy(head.policy).word, head.max_dirty_percent, head.max_dirty_age_seconds,
            head.origin_timeout_seconds, head.read_ahead_bytes, head.bypass_bytes,
        )  # fmt: skip

    def own_counts(self) -> OwnCounts:
        """What this process has done, and those in whose place it serves."""
        misses, given_back = self.misses.counts(), self.quick.given_back if self.quick else 0
        own = OwnCounts(
            self._read_hits, self._write_hits, self._missed + self.writer.missed - given_back,
            misses.joined, misses.fetched_blocks, misses.ahead_blocks, misses.bypassed_blocks,
            misses.without_place, self.index.inserted, self.index.evicted, self.index.cleaned,
            self.write_backs.full_set_waits, self.write_backs.limit_waits,
        )  # fmt: skip
        return OwnCounts(*self.tally.totals(Tally.CACHE, own)) if self.tally else own

    def statistics(self) -> CacheReport:
        """The figures so far."""
        workers, own = self._onlookers.counters(), self.own_counts()
        return CacheReport(
            block_bytes=self.blocks.block_bytes,
            place_count=self.ground.place_count,
            settings=self.settings(),
            origin=self._origin_report(),
            read_hits=own.read_hits + workers.read_hits,
            # A write of a whole block that is not there needs the origin no more than any other.
            write_hits=own.write_hits + workers.write_hits + workers.inserted,
            misses=own.misses,
            joined=own.joined,
            fetched=own.fetched,
            read_ahead=own.read_ahead,
            bypassed=own.bypassed,
            without_place=own.without_place,
            inserted=own.inserted + workers.inserted,
            evicted=own.evicted + workers.evicted,
            dirty=self.count_dirty(),
            oldest_dirty_ns=self.write_backs.oldest_ns,
            cleaned=own.cleaned,
            full_set_waits=own.full_set_waits,
            limit_waits=own.limit_waits,
            is_searching=not self.search.is_done,
        )

    def _origin_report(self) -> OriginReport:
        link, head = self.origin_link, self.head.head
        return OriginReport(
            name=head.origin, identity=head.origin_identity, size_bytes=head.origin_bytes,
            state=link.state.value, last_error=link.last_error, errors=link.errors,
            retries=link.retries, timeouts=link.timeouts, read_bytes=link.read_bytes,
            written_bytes=link.written_bytes, write_back_failures=self.write_backs.failures,
        )  # fmt: skip

    def _obey(self) -> None:
        """Serve as the head says."""
        head = self.head.head
        self.writer.policy = Policy(head.policy)
        self.origin_link.timeout_seconds = head.origin_timeout_seconds
        self.readers.read_ahead_bytes = head.read_ahead_bytes
        self.readers.bypass_bytes = head.bypass_bytes
        self.write_backs.max_dirty_percent = head.max_dirty_percent
        self.write_backs.max_dirty_age_seconds = head.max_dirty_age_seconds

    def _allow(self) -> None:
        """Let workers do what the policy allows."""
        is_back = self.writer.policy is Policy.WRITE_BACK
        may_write = is_back and self.fencing.is_quick and not self.read_only
        self.write_backs.allow_writes = (
            self._onlookers.allow_writes if may_write else lambda is_allowed: None
        )
        self._onlookers.allow_writes(may_write and not self.write_backs.is_over_limit)
        self._allow_fsyncs()

    def _forbid_writes(self) -> None:
        """Let no worker write, whatever the share of dirty blocks is."""
        self.write_backs.allow_writes = lambda is_allowed: None
        self._onlookers.allow_writes(False)

    async def _rewrite_head(self, **changes: int | bytes) -> None:
        """Change fields of the head. Raises OSError."""
        async with self._rewriting:
            await self.fencing.run(lambda: self.head.rewriting(**changes))

    def _allow_fsyncs(self) -> None:
        """Let workers answer an fsync by themselves where nobody has to flush the origin for it."""
        is_back = self.writer.policy is Policy.WRITE_BACK
        may_fsync = is_back and self.fencing.is_quick and not self.origin_link.owes_flush
        self._onlookers.allow_fsyncs(may_fsync)

    def _show_size(self) -> None:
        self._have_size(self.head.head.origin_bytes)
        self._end.size_bytes = self.cleaner.size_bytes = self.size_bytes
        self._onlookers.show_cache(self.ground, self.size_bytes)


def refuse_arrays() -> NoReturn:
    """Raise what a client gets that wants to map pages of a cache."""
    raise OSError(errno.EOPNOTSUPP, "pages of a cache can't be mapped: they may leave it any time")
