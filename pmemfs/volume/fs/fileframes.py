"""The frames of regular files: sizes, holes, and what is mapped ahead of need.

Invariants:
- a frame below the size is initialised before it is mapped. Bytes behind the size are undefined,
  and become zeroes before the size passes them, unless the write that raises the size stores them
  itself. Otherwise a file would show what its frames held before, perhaps another user's data;
- no piece has bytes behind the size that are not zeroes when the size passes them;
- a truncation takes a new epoch, so the old live line does not count any more. Without this, a
  crash right after a truncation could bring the old size back over frames that are gone.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from functools import partial

from pmemfs.errors import system_error
from pmemfs.media import log as media
from pmemfs.media.inode import EPOCH_MASK, LIVE_OFFSET, SIZE_LIMIT_BYTES
from pmemfs.media.transform import PIECE_FRAMES, pack_piece
from pmemfs.medium.base import Durability
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.base import HOLE, Later
from pmemfs.volume.fs.commits import Decides
from pmemfs.volume.fs.encryptedio import EncryptedIO
from pmemfs.volume.fs.extents import MappedExtent, Run, frames_of
from pmemfs.volume.fs.inode import FIXED, IMMUTABLE, KEEPS_AHEAD, Inode, State
from pmemfs.volume.fs.packed import PackedPieces
from pmemfs.volume.fs.placing import Placing
from pmemfs.volume.fs.spans import spans_of
from pmemfs.volume.fs.store import Store
from pmemfs.volume.fs.transaction import Transaction
from pmemfs.volume.pageio import PageIO

_MOST_PIECES_AT_ONCE = 16
"""To make so many plain takes some ms."""


class FileFrames:
    """Operations on the frames of files."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sealing = store.sealing
        self._medium, self._memmap = store.pool.medium, store.ground.memmap
        self._page_io = PageIO(self._medium, self._memmap)
        self.placing = Placing(store.allocator)
        self.packed = PackedPieces(store, self._page_io, self.placing)
        self.must_clear = store.medium.durability is Durability.MSYNC
        """Whether a size may become durable before the bytes that it covers, because both wait for
        msync. Then every frame is zeroed before it is mapped."""

    # Sizes and holes

    def truncate(self, inode: Inode, size_bytes: int, changes: dict[str, int]) -> None:
        """Set a size, and other attributes with it. Raises OSError: EISDIR, EINVAL, EFBIG."""
        if not inode.is_file:
            raise system_error(errno.EISDIR if inode.is_directory else errno.EINVAL)
        if not 0 <= size_bytes < SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        if inode.transform is not None or inode.pieces:
            self._store.refuse_unserved(inode)
        self._store.begin_writing()
        old_bytes = self._store.size_of(inode)
        is_shorter = size_bytes < old_bytes
        self._sealing.refuse_locked(inode)
        state = self._resized(inode, size_bytes, **changes)
        # Frames that were mapped ahead do not become part of a file that truncate makes longer: the
        # new range is a hole, as on other file systems.
        first_gone = frames_of(min(size_bytes, old_bytes))
        if is_shorter:
            state.flags &= ~KEEPS_AHEAD
            self.packed.changes(inode, first_gone, inode.end - first_gone)
        else:
            # A truncation leaves a piece whole that the size cuts, because it needs no room.
            self.packed.make_way_for_zeroes(inode, old_bytes, inode.end << PAGE_SHIFT)
            if state.flags & KEEPS_AHEAD:
                first_gone = inode.end
        # Before the commit, so that a longer size never covers old bytes. If the transaction fails,
        # only bytes behind the size have changed.
        self.zero_mapped(inode, old_bytes, min(size_bytes, first_gone << PAGE_SHIFT))
        with self._store.change(urgent=True, decides=Decides.ATTRIBUTES) as change:
            self._unmap_behind(change, inode, first_gone)
            self._set_size(change, inode, state)

    def punch(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        """Turn a range into a hole. Raises OSError: EINVAL, EPERM."""
        inode = self._range(number, offset_bytes, length_bytes, unless=FIXED)
        size_bytes = self._store.size_of(inode)
        end = offset_bytes + length_bytes
        first, last = frames_of(offset_bytes), end >> PAGE_SHIFT
        # Up to the end: the last frame has nothing but this range, so it can go whole.
        if end >= size_bytes:
            last = max(last, frames_of(size_bytes))
        last = max(first, last)
        self.packed.make_way_for_zeroes(inode, offset_bytes, end)
        with self._store.change(urgent=True) as change:
            if last > first:
                self.unmap(change, inode, first, last - first)
            self._touch_file(change, inode)
        # These bytes are overwritten in place, so this waits until the transaction has succeeded.
        self.zero_mapped(inode, offset_bytes, min(end, first << PAGE_SHIFT, size_bytes))
        self.zero_mapped(inode, max(last << PAGE_SHIFT, offset_bytes), min(end, size_bytes))
        self._store.medium.fence()

    def allocate(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> Later[None]:
        """Map a range; what was a hole becomes zeroes.

        Raises OSError: ENOSPC, EFBIG, EINVAL, EPERM.
        """
        change = partial(
            self._reserve, number, offset_bytes, length_bytes, keep_size=keep_size, clear=False
        )
        return self._when_plain(number, offset_bytes, length_bytes, change)

    def zero(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> Later[None]:
        """Map a range and fill it with zeroes. Raises OSError as `allocate`."""
        change = partial(
            self._reserve, number, offset_bytes, length_bytes, keep_size=keep_size, clear=True
        )
        return self._when_plain(number, offset_bytes, length_bytes, change)

    def collapse(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        """Take a range out of a file; what follows moves up. Raises OSError: EINVAL, EPERM."""
        change = partial(self._collapse, number, offset_bytes, length_bytes)
        return self._when_shiftable(number, offset_bytes, length_bytes, change)

    def insert(self, number: int, offset_bytes: int, length_bytes: int) -> Later[None]:
        """Insert a hole into a file; the rest moves back. Raises OSError: EINVAL, EFBIG, EPERM."""
        change = partial(self._insert, number, offset_bytes, length_bytes)
        return self._when_shiftable(number, offset_bytes, length_bytes, change)

    def _collapse(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        inode = self._range(number, offset_bytes, length_bytes, unless=FIXED)
        size_bytes = self._store.size_of(inode)
        if (offset_bytes | length_bytes) % FRAME_BYTES or offset_bytes + length_bytes >= size_bytes:
            raise system_error(errno.EINVAL)
        self._shift(inode, offset_bytes, -length_bytes, size_bytes)

    def _insert(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        inode = self._range(number, offset_bytes, length_bytes, unless=FIXED)
        size_bytes = self._store.size_of(inode)
        if (offset_bytes | length_bytes) % FRAME_BYTES or offset_bytes >= size_bytes:
            raise system_error(errno.EINVAL)
        if size_bytes + length_bytes >= SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        self._shift(inode, offset_bytes, length_bytes, size_bytes)

    def make_plain(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        """Let what is compressed in a range of a file lie as plain bytes in frames of its own.

        Raises OSError (ENOSPC).
        """
        inode = self._range(number, offset_bytes, length_bytes, unless=0)
        first = offset_bytes >> PAGE_SHIFT
        self.packed.make_way(inode, first, frames_of(offset_bytes + length_bytes) - first)

    def _when_shiftable(
        self, number: int, offset_bytes: int, length_bytes: int, change: Callable[[], None]
    ) -> Later[None]:
        if length_bytes % (PIECE_FRAMES << PAGE_SHIFT) == 0:
            # All pieces can lie where they come to, but for those at the borders.
            change()
            return None
        behind = max(1, SIZE_LIMIT_BYTES - 1 - offset_bytes)
        return self._when_plain(number, offset_bytes, behind, change)

    def _when_plain(
        self, number: int, offset_bytes: int, length_bytes: int, change: Callable[[], None]
    ) -> Later[None]:
        """Do what makes the pieces of a range plain; at once, unless there are many of them."""
        if len(self._store.inode(number).pieces) <= _MOST_PIECES_AT_ONCE:
            change()
            return None
        return self._make_plain_and(number, offset_bytes, length_bytes, change)

    async def _make_plain_and(
        self, number: int, offset_bytes: int, length_bytes: int, change: Callable[[], None]
    ) -> None:
        """Make the pieces of a range plain, with other tasks in between, and then do something."""
        # Imported here, because the commands that make file systems never get here.
        import trio

        inode = self._range(number, offset_bytes, length_bytes, unless=IMMUTABLE)
        first, end = offset_bytes >> PAGE_SHIFT, frames_of(offset_bytes + length_bytes)
        for index, _ in inode.pieces_in(first, end - first):
            self.packed.make_way(self.file(number), index, 1)
            await trio.lowlevel.checkpoint()
        change()

    # For the code that serves I/O

    def extents(self, number: int) -> list[MappedExtent]:
        """All extents of a file, those behind its size included."""
        return list(self.file(number).extents)

    def live_line(self, number: int) -> int:
        """The offset in the pool of a file's live line."""
        return self.file(number).slot_offset + LIVE_OFFSET

    def key_slot(self, number: int) -> int:
        """1 + the slot of an encrypted file's key in secret memory; 0: plain. Raises OSError
        (ENOKEY)."""
        inode = self.file(number)
        return 1 + self._sealing.content_key(inode)[1] if inode.is_encrypted else 0

    def append_limit(self, number: int) -> int:
        """The byte up to which a file can grow into frames that are mapped already."""
        inode = self.file(number)
        size_bytes = self._store.size_of(inode)
        index = size_bytes >> PAGE_SHIFT
        limit = index
        for extent in inode.extents.pieces(index, max(0, inode.extents.end - index)):
            if extent.pfn < 0:
                break
            limit += extent.frame_count
        return max(size_bytes, limit << PAGE_SHIFT)

    def trim_ahead(self, number: int) -> bool:
        """At the last close of a file, give back what was mapped ahead and persist its live line;
        whether anything was.

        Where a fence is an msync, the live line is left to fsync. Raises OSError.
        """
        # The data plane may have written for long without this process reading the inode, so it is
        # perhaps not in memory any more.
        inode = self._store.inode(number)
        if not inode.is_file or self._store.read_only:
            return False
        inode.next_fill_frame = -1
        self._store.allocator.unhold(number)
        self._store.lines.write_back(inode.slot_offset)
        if self._store.medium.durability is Durability.CACHE_LINES:
            self._store.medium.fence()
        first = frames_of(self._store.size_of(inode))
        is_kept = inode.state.flags & KEEPS_AHEAD or inode.unknown_id
        was_ahead = inode.end > first and not is_kept
        if was_ahead:
            with self._store.change(urgent=True) as change:
                self._unmap_behind(change, inode, first)
        self._store.untrimmed.discard(number)
        return was_ahead

    # What others need, and how a file changes

    def io_of(self, inode: Inode, *, is_new: bool = False) -> PageIO:
        """What loads and stores the bytes of a file. Raises OSError (ENOKEY).

        `is_new` is for frames that no commit has mapped yet.
        """
        if not inode.is_encrypted:
            return self._page_io
        cipher, slot = self._sealing.content_key(inode)
        return EncryptedIO(
            self._medium, self._memmap, self._store.lines, inode, cipher, slot, is_new=is_new
        )

    def map_holes(
        self, change: Transaction, inode: Inode, index: int, frame_count: int
    ) -> list[MappedExtent]:
        """Map the holes of a range; the new extents, whose content is undefined."""
        new: list[MappedExtent] = []
        size_frames = frames_of(self._store.size_of(inode))
        for hole in list(spans_of(inode, index, frame_count)):
            if hole.pfn == HOLE:
                new += self.placing.place(change, inode, hole, size_frames)
        for extent in new:
            change.append(inode, media.pack_extent(*extent))

        # Only after the commit: until then a failure has to leave the extents as they were.
        def apply() -> None:
            for extent in new:
                inode.map(*extent)
            self._store.untrimmed.add(inode.number)
            if inode.transform is not None:
                self._store.cache.note_compressed(inode)

        if new:
            change.then(apply)
        return new

    def _reserve(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool, clear: bool
    ) -> None:
        unless = FIXED if clear else IMMUTABLE
        inode = self._range(number, offset_bytes, length_bytes, unless=unless)
        end = offset_bytes + length_bytes
        if end >= SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        old_bytes = self._store.size_of(inode)
        size_bytes = old_bytes if keep_size else max(old_bytes, end)
        first, new_io = offset_bytes >> PAGE_SHIFT, self.io_of(inode, is_new=True)
        changed = offset_bytes if size_bytes == old_bytes else min(offset_bytes, old_bytes)
        changed >>= PAGE_SHIFT
        self.packed.make_way(inode, changed, frames_of(end) - changed)
        # Bytes between the old size and the new one that are mapped already must not show what the
        # frames held before.
        self.zero_mapped(inode, old_bytes, size_bytes)
        old = list(pieces_of(inode, offset_bytes, min(end, old_bytes) - offset_bytes))
        # What is cleared below is not there yet at the commit, so that would not decide.
        with self._store.change(decides=None if clear else Decides.RANGE) as change:
            for extent in self.map_holes(change, inode, first, frames_of(end) - first):
                start = extent.index << PAGE_SHIFT
                stop = start + (extent.frame_count << PAGE_SHIFT)
                # Behind the size bytes may stay as they are, unless a size could become durable
                # before them.
                if not self.must_clear:
                    stop = min(stop, size_bytes)
                new_io.zero(start, extent.pfn << PAGE_SHIFT, stop - start)
            state = self._resized(inode, size_bytes)
            if end > size_bytes:
                state.flags |= KEEPS_AHEAD
            self._set_size(change, inode, state)
        if clear:
            # In place, so this waits until the transaction has succeeded.
            page_io = self.io_of(inode)
            for position, pool_offset, length in old:
                if pool_offset >= 0:
                    page_io.zero(position, pool_offset, length)
            self._store.medium.fence()

    def _shift(self, inode: Inode, offset_bytes: int, distance_bytes: int, size_bytes: int) -> None:
        """Move all of a file from an offset on, back or up; moving up drops the range before it."""
        if inode.is_encrypted:
            # The place in the file is a part of what the bytes are encrypted with.
            raise OSError(errno.EOPNOTSUPP, "an encrypted file can't be moved within itself")
        index, distance = offset_bytes >> PAGE_SHIFT, distance_bytes >> PAGE_SHIFT
        moved_from = index - min(distance, 0)
        self._make_way_to_shift(inode, index, moved_from, distance)
        end = max(inode.end, moved_from)
        moved = [e for e in inode.extents.pieces(moved_from, end - moved_from) if e.pfn >= 0]
        pieces = inode.pieces_in(moved_from, end - moved_from)
        gone = _runs_in(inode, index, moved_from - index)
        state = self._resized(inode, size_bytes + distance_bytes)
        if end > index and end + distance >= SIZE_LIMIT_BYTES >> PAGE_SHIFT:
            raise system_error(errno.EFBIG)
        with self._store.change(decides=Decides.RANGE) as change:
            if end > index:
                # One hole over all of it comes first, so the extents after it find nothing to
                # overwrite, in whatever direction they move.
                change.append(inode, media.pack_hole(index, end - index))
            for extent in moved:
                new_index = extent.index + distance
                change.append(inode, media.pack_extent(new_index, extent.pfn, extent.frame_count))
            for at, piece in pieces:
                change.append(inode, pack_piece(at + distance, piece))

            frames = [(extent.pfn, extent.frame_count) for extent in moved]
            change.announce(partial(self._store.ground.pinned.left, inode.number, frames))

            def apply() -> None:
                inode.unmap(index, end - index)
                for extent in moved:
                    inode.map(extent.index + distance, extent.pfn, extent.frame_count)
                for at, piece in pieces:
                    inode.set_piece(at + distance, piece)

            change.then(apply)
            change.release(inode, gone)
            self._set_size(change, inode, state)

    def _make_way_to_shift(self, inode: Inode, index: int, moved_from: int, distance: int) -> None:
        """Let no piece be cut where a range is taken out of a file or inserted, and let those move
        that can lie where they come to."""
        if distance % PIECE_FRAMES:
            self.packed.make_way(inode, index, max(1, inode.end - index))
            return
        self.packed.changes(inode, index, max(1, inode.end - index))
        for at in {index, moved_from}:
            if inode.cut_piece(at, max(1, inode.end - at)) is not None:
                self.packed.make_way(inode, at, 1)

    def unmap(self, change: Transaction, inode: Inode, index: int, frame_count: int) -> None:
        """Turn a range into a hole within a transaction, and release its frames.

        A piece that only a part of the range is in stays as it is.
        """
        end = index + frame_count
        for at, piece in inode.pieces_in(index, frame_count):
            if at < index:
                index = at + piece.frame_count
            if at + piece.frame_count > end:
                end = at
        runs = _runs_in(inode, index, end - index)
        if runs:
            change.append(inode, media.pack_hole(index, end - index))
            change.then(lambda: inode.unmap(index, end - index))
            change.release(inode, runs)

    def _unmap_behind(self, change: Transaction, inode: Inode, index: int) -> None:
        """Release all frames from an index on, except those of a piece that begins before it."""
        for at, piece in inode.pieces_in(index, 1):
            if at < index:
                index = at + piece.frame_count
        if inode.end > index:
            self.unmap(change, inode, index, inode.end - index)

    def _resized(self, inode: Inode, size_bytes: int, **changes: int) -> State:
        """The attributes with another size, in a new epoch."""
        now_ns = self._store.times.now_ns()
        state = self._store.state_of(inode).replaced(modified_ns=now_ns, changed_ns=now_ns)
        state = state.replaced(**changes)
        state.size_bytes = size_bytes
        state.epoch = (state.epoch + 1) & EPOCH_MASK
        return state

    def _set_size(self, change: Transaction, inode: Inode, state: State) -> None:
        change.append(inode, state.pack())

        def apply() -> None:
            # The new epoch makes the old line void first. Between the two stores no task runs, and
            # a crash leaves a line of the epoch before, for which the log's size counts.
            inode.set_state(state)
            self._store.set_live_size(inode, state.size_bytes)
            # A published table has the old limit and perhaps extents that are gone.
            self._store.tables.changed(inode.number)

        change.then(apply)

    def _touch_file(self, change: Transaction, inode: Inode) -> None:
        now_ns = self._store.times.now_ns()
        state = self._store.state_of(inode).replaced(modified_ns=now_ns, changed_ns=now_ns)
        change.append(inode, state.pack())
        change.then(partial(inode.set_state, state))

    def zero_mapped(self, inode: Inode, start_bytes: int, end_bytes: int) -> None:
        """Store zeroes into the mapped parts of a range."""
        if start_bytes >= end_bytes:
            return
        page_io = self.io_of(inode)
        pieces = pieces_of(inode, start_bytes, end_bytes - start_bytes)
        for position, pool_offset, length in pieces:
            if pool_offset >= 0:
                page_io.zero(position, pool_offset, length)

    def file(self, number: int) -> Inode:
        """A regular file. Raises OSError: EISDIR, EINVAL."""
        inode = self._store.inode(number)
        if not inode.is_file:
            raise system_error(errno.EISDIR if inode.is_directory else errno.EINVAL)
        if inode.transform is not None or inode.pieces:
            self._store.refuse_unserved(inode)
        return inode

    def _range(self, number: int, offset_bytes: int, length_bytes: int, *, unless: int) -> Inode:
        """The file that a range belongs to. Raises OSError: EINVAL, EFBIG, EPERM for `unless`."""
        if offset_bytes < 0 or length_bytes <= 0:
            raise system_error(errno.EINVAL)
        if offset_bytes + length_bytes >= SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        inode = self.file(number)
        self._sealing.refuse_locked(inode)
        self._store.refuse(inode, unless)
        self._store.begin_writing()
        return inode


def pieces_of(inode: Inode, offset_bytes: int, length_bytes: int) -> Iterable[tuple[int, int, int]]:
    """The pieces of a range of a file: position, offset in the pool (-1: a hole) and length."""
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        pfn, count = inode.extents.find(offset_bytes >> PAGE_SHIFT)
        inside = offset_bytes & (FRAME_BYTES - 1)
        length = min(end - offset_bytes, (count << PAGE_SHIFT) - inside)
        yield offset_bytes, (pfn << PAGE_SHIFT) + inside if pfn >= 0 else -1, length
        offset_bytes += length


def _runs_in(inode: Inode, index: int, frame_count: int) -> list[Run]:
    """The frames of a range, in which no piece is cut."""
    if frame_count <= 0:
        return []
    runs = [
        Run(extent.pfn, extent.frame_count)
        for extent in inode.extents.pieces(index, frame_count)
        if extent.pfn >= 0
    ]
    pieces = inode.pieces_in(index, frame_count)
    return runs + [Run(piece.pfn, piece.stored_frames) for _, piece in pieces]
