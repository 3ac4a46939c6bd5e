"""Compresses what is cold, a few pieces of one file at a time, and makes plain what is hot again.

    the file is withdrawn from workers, or shown to them without these ranges
    a grace period                          until then a worker may still write there
    the bytes are compressed                in another process, which runs when nothing else does
    one transaction                         unless the range has changed meanwhile

Invariants:
- only what nobody holds is compressed: no page has a reference, no pin has a frame of the file, and
  the file is not being moved. A program that has a page as an array would store into nothing;
- between the grace period and the commit every change of the range comes through `make_way` or
  `changes` of `packed`, which say so to the batch. So a range that changed is dropped;
- only what frees more than it takes is committed, so it may take of the reserve, and a full pool
  can be made to hold more.

How old a page is says its page structure, and the age of one that was never touched counts from the
mount. So in a pool of the scheme `none` there is only `rewrite`.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pmemfs.errors import DamagedFileSystem, DamagedPiece, MemoryFault, PmemfsError, sentence_of
from pmemfs.media.transform import COMPRESSIONS, PIECE_FRAMES
from pmemfs.medium.faultlog import report_fault
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.transform.codec import codec_of
from pmemfs.volume.fs.extents import frames_of
from pmemfs.volume.fs.fileframes import FileFrames
from pmemfs.volume.fs.inode import IMMUTABLE, Inode
from pmemfs.volume.fs.packed import Batch
from pmemfs.volume.fs.store import Store

if TYPE_CHECKING:
    import trio

log = logging.getLogger(__name__)

Pack = Callable[[bytes, int, int], Awaitable[bytes]]
"""Compresses bytes, given the ID and the level of the compression. Raises OSError."""

_STEP_SECONDS = 1.0
_POLL_SECONDS = 0.0005
_RETRY_SECONDS = 5.0
"""After a failure, as when the process that compresses was killed."""
_PIECES_AT_ONCE = 16
"""Of one transaction, which takes some ms."""
_LOOKED_AT_ONCE = 256
"""So many ranges are looked at while nothing else is served: some ms."""
_WALKING_SECONDS = 0.005
"""How much of each step is spent on looking for files that nobody has opened yet."""
_LEAST_FRAMES = 2
"""A piece of one frame can't become smaller."""
_MOST_TRIED = 1 << 20
_SHARE_FOR_WARMING = 16
"""What is hot is made plain while more than one such part of the pool is free."""


class Cooling(NamedTuple):
    """What the compression of cold files has done on this mount."""

    packed: int
    """How many pieces were compressed."""
    made_plain: int
    saved_frames: int
    """By those that were compressed, at that time."""


class Rewritten(NamedTuple):
    """The frames that the content of a file took before and after it was rewritten."""

    before_frames: int
    after_frames: int


async def pack_here(data: bytes, kind: int, level: int) -> bytes:
    """Compress in this thread."""
    codec = codec_of(kind)
    assert codec is not None, "no file gets a compression that is not known"
    return codec.compress(data, level)


class Cooler:
    """Compresses files of one file system."""

    def __init__(self, store: Store, frames: FileFrames, moving: set[int]) -> None:
        self._store = store
        self._frames = frames
        self._packed = frames.packed
        self._moving = moving
        self._memmap = store.ground.memmap
        self.pack: Pack = pack_here
        """What compresses in the background."""
        self.pack_now: Pack = pack_here
        """What compresses while somebody waits."""
        self.tell: Callable[[int], Awaitable[None] | None] = lambda number: None
        """Is called when a file takes another number of blocks, for a kernel that remembers it."""
        self._mounted_ns = time.time_ns()
        self._due: dict[int, float] = {}
        """Files to be looked at, and when, as long as files get cold in `_due_after` seconds."""
        self._due_after = self.cold_seconds
        self._tried: dict[tuple[int, int], int] = {}
        """Ranges that did not shrink, with the number of writes into them until then."""
        self._walk: Iterator[int] | None = None
        self._lock: trio.Lock | None = None
        self._packed_count = self._saved_frames = 0

    @property
    def cold_seconds(self) -> float:
        """How long nobody may have touched what is compressed."""
        return self._packed.cold_seconds

    def statistics(self) -> Cooling:
        """What was done on this mount."""
        return Cooling(self._packed_count, self._packed.made_plain, self._saved_frames)

    # In the background

    async def serve(self) -> None:
        """Do all this for as long as the file system is served."""
        import trio

        while True:
            await trio.sleep(_STEP_SECONDS)
            try:
                await self.step()
            except MemoryFault as fault:
                report_fault(fault.path, fault.pfn, "compressing a file failed")
            except (OSError, PmemfsError) as error:
                # A mount may become read-only meanwhile.
                if not self._store.read_only:
                    log.error("compressing cold files failed: %s", sentence_of(error))

    async def step(self) -> None:
        """Do what is to be done now. Raises OSError and PmemfsError."""
        await self.warm_hot()
        if not self.may_cool:
            return
        self._find_files()
        now = time.monotonic()
        for number in [number for number, due in self._due.items() if due <= now]:
            if not self.may_cool:
                return
            del self._due[number]
            try:
                soon = await self._cool(number)
            except (OSError, PmemfsError):
                self._due[number] = time.monotonic() + _RETRY_SECONDS
                raise
            if soon is not None:
                self._due[number] = time.monotonic() + soon
            await self.warm_hot()

    @property
    def may_cool(self) -> bool:
        """Whether cold files may be compressed now, without being asked."""
        ground = self._store.ground
        # The search for leaks would take new frames, which no log has yet, for leaked.
        is_ready = not ground.read_only and not ground.may_have_leaks
        return is_ready and self._memmap.has_pages and self.cold_seconds > 0

    def _find_files(self) -> None:
        """Find files with a compression: those in use, and slowly all others."""
        cache, ground = self._store.cache, self._store.ground
        if self._due_after != self.cold_seconds:
            self._due_after = self.cold_seconds
            self._due = dict.fromkeys(self._due, 0.0)
        while cache.compressed:
            self._due.setdefault(cache.compressed.pop(), 0)
        if self._walk is None:
            self._walk = self._all_files()
        end = time.monotonic() + _WALKING_SECONDS
        while ground.has_compressed and time.monotonic() < end:
            number = next(self._walk, None)
            if number is None:
                break
            if self._is_candidate(number):
                self._due.setdefault(number, 0)

    def _all_files(self) -> Iterator[int]:
        table = self._store.table
        for pfn in table.frames():
            yield from table.numbers_in(pfn)

    def _is_candidate(self, number: int) -> bool:
        cache = self._store.cache
        try:
            inode = cache.cached(number) or cache.read_inode(number)
        except (DamagedFileSystem, MemoryFault):
            # Whoever uses this inode is told.
            return False
        return inode is not None and _is_compressed(inode)

    async def _cool(self, number: int) -> float | None:
        """Compress what is cold of a file; in how many seconds to look again, None: not again."""
        import trio

        index: int | None = 0
        soonest: float | None = None
        while index is not None:
            try:
                inode = self._store.inode(number)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    return None
                raise
            if not _is_compressed(inode) or inode.state.flags & IMMUTABLE:
                return None
            ranges, index, soon = self._cold_ranges(inode, index)
            if soon is not None:
                soonest = soon if soonest is None else min(soonest, soon)
            if ranges:
                try:
                    await self._pack_some(number, ranges, is_forced=False)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return float(self.cold_seconds)
                soonest = soonest if soonest is not None else float(self.cold_seconds)
            await trio.lowlevel.checkpoint()
        return soonest

    def _cold_ranges(
        self, inode: Inode, index: int
    ) -> tuple[dict[int, int], int | None, float | None]:
        """Some cold ranges of a file from an index on, where to go on, and when another one may
        have become cold."""
        ranges: dict[int, int] = {}
        soonest: float | None = None
        for _ in range(_LOOKED_AT_ONCE):
            at = self._next_range(inode, index)
            if at is None:
                return ranges, None, soonest
            index, count = at
            soon = self._seconds_left(inode, index, count)
            if soon > 0:
                soonest = soon if soonest is None else min(soonest, soon)
            elif soon == 0:
                ranges[index] = count
            index += PIECE_FRAMES
            if len(ranges) == _PIECES_AT_ONCE:
                break
        return ranges, index, soonest

    def _next_range(
        self, inode: Inode, index: int, *, with_pieces: bool = False
    ) -> tuple[int, int] | None:
        """The next range from an index on that can be a piece: its index and frames."""
        size_frames = frames_of(self._store.size_of(inode))
        while index < size_frames:
            piece = inode.pieces.get(index)
            if piece is not None:
                if with_pieces:
                    return index, piece.frame_count
                index += PIECE_FRAMES
                continue
            pfn, length = inode.extents.find(index)
            if pfn < 0:
                # The next extent may begin within a range, and then that range is no piece.
                hole_end = min(index + length, size_frames)
                next_index = hole_end - hole_end % PIECE_FRAMES
                if with_pieces:
                    behind = (at for at in inode.pieces if at > index)
                    next_index = min(next_index, min(behind, default=next_index))
                index = max(index + PIECE_FRAMES, next_index)
                continue
            count = self._mapped_frames(inode, index, min(index + PIECE_FRAMES, size_frames))
            if count >= _LEAST_FRAMES:
                return index, count
            index += PIECE_FRAMES
        return None

    def _mapped_frames(self, inode: Inode, index: int, end: int) -> int:
        at = index
        while at < end:
            pfn, length = inode.extents.find(at)
            if pfn < 0:
                break
            at += length
        return min(at, end) - index

    def _seconds_left(self, inode: Inode, index: int, count: int) -> float:
        """In how many seconds a range is cold; -1 if it is known not to shrink."""
        newest_ns, writes = self._mounted_ns, 0
        for extent in inode.extents.pieces(index, count):
            activity = self._memmap.activity(extent.pfn, extent.frame_count)
            if activity.is_referenced:
                return float(self.cold_seconds)
            newest_ns = max(newest_ns, activity.last_access_ns)
            writes += activity.writes
        if self._tried.get((inode.number, index)) == writes:
            return -1
        age = max(0, time.time_ns() - newest_ns) / 1e9
        return max(0.0, self.cold_seconds - age)

    # At once

    async def rewrite(self, number: int) -> Rewritten:
        """Let a file lie as its transformation says, however young it is.

        Raises OSError: EBUSY if it is pinned or being moved, ENOSPC, EROFS, EPERM.
        """
        import trio

        inode = self._frames.file(number)
        self._store.refuse(inode, IMMUTABLE)
        self._store.begin_writing()
        self._check_not_held(number)
        before, index = inode.data_frames, 0
        while (at := self._next_range(inode, index, with_pieces=True)) is not None:
            if not _is_compressed(inode):
                index, count = at
                self._packed.make_way(inode, index, count)
                index += PIECE_FRAMES
            else:
                ranges: dict[int, int] = {}
                while at is not None and len(ranges) < _PIECES_AT_ONCE:
                    ranges[at[0]] = at[1]
                    index = at[0] + PIECE_FRAMES
                    at = self._next_range(inode, index, with_pieces=True)
                await self._pack_some(number, ranges, is_forced=True)
                self._check_not_held(number)
            await trio.lowlevel.checkpoint()
            inode = self._frames.file(number)
        return Rewritten(before, inode.data_frames)

    def _check_not_held(self, number: int) -> None:
        if number in self._moving:
            raise OSError(errno.EBUSY, "it is being laid out anew")
        if holders := self._store.ground.pinned.holders_of(number):
            raise OSError(errno.EBUSY, f"it is mapped by {', '.join(holders)}")

    async def warm_hot(self) -> None:
        """Make plain what is hot, while there is enough room."""
        import trio

        allocator, hot = self._store.allocator, self._packed.hot
        while hot and not self._store.read_only:
            number, index = next(iter(hot))
            del hot[number, index]
            enough = allocator.geometry.frame_count // _SHARE_FOR_WARMING
            if allocator.free_up_to(enough) < enough:
                continue
            try:
                inode = self._store.inode(number)
                self._packed.make_way(inode, index, 1)
            except OSError as error:
                if error.errno not in (errno.ESTALE, errno.ENOSPC, errno.EIO):
                    raise
            await self._tell(number)
            await trio.lowlevel.checkpoint()

    async def _tell(self, number: int) -> None:
        told = self.tell(number)
        if told is not None:
            await told

    # A batch

    async def _pack_some(self, number: int, ranges: dict[int, int], *, is_forced: bool) -> None:
        """Compress some ranges of a file, one transaction for all. Raises OSError (ENOSPC)."""
        import trio

        if self._lock is None:
            self._lock = trio.Lock()
        async with self._lock:
            inode = self._frames.file(number)
            assert inode.transform is not None
            kind, level, generation = inode.transform.id, inode.transform.level, inode.generation
            batch = self._packed.packing[number] = Batch(ranges)
            results: list[tuple[int, bytes]] = []
            try:
                await self._withdraw(number)
                for index, count in ranges.items():
                    if not is_forced and self._lock.statistics().tasks_waiting:
                        # A user waits. On a busy machine each piece may take long.
                        break
                    plain = self._bytes_of(number, generation, batch, index, is_forced=is_forced)
                    if plain is None:
                        continue
                    pack = self.pack_now if is_forced else self.pack
                    packed = await pack(plain, kind, level)
                    if frames_of(len(packed)) < count:
                        results.append((index, packed))
                    else:
                        self._note_tried(number, index, count)
                self._commit(number, generation, batch, results, kind)
                await self._tell(number)
            finally:
                del self._packed.packing[number]
                # What did not shrink is the workers' again once the file is published anew.
                self._store.tables.changed(number)

    async def _withdraw(self, number: int) -> None:
        """Wait until no worker can write to what is being compressed."""
        import trio

        await trio.lowlevel.checkpoint()
        tables = self._store.tables
        token = tables.changed(number)
        while token is not None and not tables.is_over(token):  # noqa: ASYNC110
            await trio.sleep(_POLL_SECONDS)

    def _bytes_of(
        self, number: int, generation: int, batch: Batch, index: int, *, is_forced: bool
    ) -> bytes | None:
        """The bytes of a range, zeroes behind the size; None if it can't be compressed now."""
        inode = self._unchanged(number, generation, batch, index)
        if inode is None:
            return None
        count, start = batch.ranges[index], index << PAGE_SHIFT
        piece = inode.pieces.get(index)
        if piece is not None:
            if piece.frame_count != count:
                return None
            try:
                return self._packed.plain(inode, index, piece)
            except DamagedPiece:
                return None
        extents = list(inode.extents.pieces(index, count))
        if any(extent.pfn < 0 for extent in extents):
            # It has changed before it was known to be compressed, while another file was.
            return None
        if self._memmap.has_pages and any(
            self._memmap.are_referenced(extent.pfn, extent.frame_count) for extent in extents
        ):
            return None
        if not is_forced and self._seconds_left(inode, index, count) > 0:
            return None
        medium = self._store.pool.medium
        plain = b"".join(
            bytes(medium.read(extent.pfn << PAGE_SHIFT, extent.frame_count << PAGE_SHIFT))
            for extent in extents
        )
        size_bytes = self._store.size_of(inode)
        return plain[: max(0, size_bytes - start)].ljust(len(plain), b"\0")

    def _unchanged(self, number: int, generation: int, batch: Batch, index: int) -> Inode | None:
        """The file, if a range of it is still as it was and nobody holds it."""
        try:
            inode = self._store.inode(number)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return None
        is_held = number in self._moving or self._store.ground.pinned.has(number)
        is_same = inode.generation == generation and index not in batch.spoilt
        return inode if is_same and not is_held else None

    def _note_tried(self, number: int, index: int, count: int) -> None:
        inode = self._store.cached(number)
        if inode is None or not self._memmap.has_pages:
            return
        if len(self._tried) >= _MOST_TRIED:
            self._tried.clear()
        extents = inode.extents.pieces(index, count)
        self._tried[number, index] = sum(
            self._memmap.activity(extent.pfn, extent.frame_count).writes
            for extent in extents
            if extent.pfn >= 0
        )

    def _commit(
        self, number: int, generation: int, batch: Batch, results: list[tuple[int, bytes]],
        kind: int,
    ) -> None:  # fmt: skip
        """Let the results count. Raises OSError."""
        try:
            self._commit_some(number, generation, batch, results, kind)
        except OSError as error:
            if error.errno != errno.ENOSPC or len(results) < 2:
                raise
            # Each frees more than it takes, so one by one they may find the room.
            for result in results:
                self._commit_some(number, generation, batch, [result], kind)

    def _commit_some(
        self, number: int, generation: int, batch: Batch, results: list[tuple[int, bytes]],
        kind: int,
    ) -> None:  # fmt: skip
        done: list[int] = []
        with self._store.change(urgent=True) as change:
            for index, packed in results:
                inode = self._unchanged(number, generation, batch, index)
                if inode is None:
                    continue
                piece, count = inode.pieces.get(index), batch.ranges[index]
                before = piece.stored_frames if piece else count
                stored = frames_of(len(packed))
                if piece is not None and piece.id == kind and stored >= before:
                    continue
                if self._packed.replace(change, inode, index, count, packed, kind):
                    done.append(before - stored)
        self._packed_count += len(done)
        self._saved_frames += sum(done)


def _is_compressed(inode: Inode) -> bool:
    """Whether a file is to be compressed when it is cold."""
    return inode.is_file and inode.transform is not None and inode.transform.id in COMPRESSIONS
