"""The content of regular files: extents, sizes, and what is mapped ahead of need.

Invariants:
- a frame below the size is initialised before it is mapped; what lies behind the size is undefined,
  and becomes zeroes before the size passes it (by anything but bytes that are written there);
- data is changed in place: of bytes that were written before, a crash may leave a mixture of old
  and new words, as of any write that was not fsynced;
- a truncation takes a new epoch, so that the live line of before does not count any more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from pmemfs.errors import system_error
from pmemfs.media import log as media
from pmemfs.media.inode import EPOCH_MASK, LIVE_OFFSET, SIZE_LIMIT_BYTES
from pmemfs.media.log import InodeFlags
from pmemfs.medium.base import Durability
from pmemfs.memmap.base import Memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.units import MIB
from pmemfs.volume.content import Content
from pmemfs.volume.fs.attributes import AttributeOperations
from pmemfs.volume.fs.extents import MappedExtent, Run
from pmemfs.volume.fs.inode import FIXED, Inode, State
from pmemfs.volume.fs.placing import Placing
from pmemfs.volume.fs.tables import Tables
from pmemfs.volume.fs.transaction import Transaction

if TYPE_CHECKING:
    from typing_extensions import Buffer

_COPY_BYTES = MIB


class FileOperations(AttributeOperations):
    """What can be done to the content of files."""

    def __init__(self, pool: Pool, memmap: Memmap, tables: Tables | None = None) -> None:
        super().__init__(pool, memmap, tables)
        self._content = Content(pool.medium, memmap)
        self._placing = Placing(self.allocator)
        # A size may reach the medium before the bytes that it covers, where both wait for msync.
        self._must_clear = self.medium.durability is Durability.MSYNC

    def read(self, number: int, offset_bytes: int, length_bytes: int) -> bytes | memoryview:
        """The bytes of a range, as far as the file has them. Raises OSError."""
        inode = self._file(number)
        length_bytes = min(length_bytes, self.size_of(inode) - offset_bytes)
        if length_bytes <= 0:
            return b""
        parts = [
            bytes(length) if pool_offset < 0
            else self._content.load(number, position, pool_offset, length)
            for position, pool_offset, length in _pieces(inode, offset_bytes, length_bytes)
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_open(self, number: int, flags: int) -> None:
        """Raise OSError (EPERM) where an inode may not be opened with these flags of open(2)."""
        inode = self.inode(number)
        if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
            return
        self.refuse(inode, InodeFlags.IMMUTABLE)
        if flags & os.O_TRUNC or not flags & os.O_APPEND:
            self.refuse(inode, InodeFlags.APPEND_ONLY)

    def write(
        self, number: int, offset_bytes: int, data: Buffer, *, may_overwrite: bool = True
    ) -> int:
        """Store bytes; how many: all. Raises OSError: ENOSPC, EFBIG, EPERM.

        `may_overwrite` is for who had an append-only file open before it became so.
        """
        inode = self._file(number)
        self.refuse(inode, InodeFlags.IMMUTABLE)
        if not may_overwrite and offset_bytes < self.size_of(inode):
            self.refuse(inode, InodeFlags.APPEND_ONLY)
        view = memoryview(data).cast("B")
        end = offset_bytes + len(view)
        if not view:
            return 0
        if end > SIZE_LIMIT_BYTES - 1:
            raise system_error(errno.EFBIG)
        self.begin_writing()
        size_bytes = self.size_of(inode)
        mapped = list(_pieces(inode, offset_bytes, len(view)))
        if offset_bytes > size_bytes:
            self._leave_gap(inode, size_bytes, offset_bytes)
        if any(pool_offset < 0 for _, pool_offset, _ in mapped):
            self._fill(inode, offset_bytes, view, size_bytes)
        for position, pool_offset, length in mapped:
            if pool_offset >= 0:
                start = position - offset_bytes
                self._content.store(number, position, pool_offset, view[start : start + length])
        if end > size_bytes:
            if self.medium.durability is Durability.CACHE_LINES:
                # What the frames held before is no business of whoever reads after a power failure.
                self.medium.fence()
            self.set_live_size(inode, end)
        self.set_written_ns(inode, self.times.now_ns())
        return len(view)

    def copy(
        self, source: int, source_bytes: int, target: int, target_bytes: int, length_bytes: int,
        *, may_overwrite: bool = True,
    ) -> int:  # fmt: skip
        """Copy a range as far as the source has it; how much. Raises OSError as `write`."""
        if source == target and abs(source_bytes - target_bytes) < length_bytes:
            raise system_error(errno.EINVAL)
        done = 0
        while done < length_bytes:
            step = min(_COPY_BYTES, length_bytes - done)
            part = bytes(self.read(source, source_bytes + done, step))
            if not part:
                break
            at = target_bytes + done
            done += self.write(target, at, part, may_overwrite=may_overwrite)
        return done

    def seek(self, number: int, offset_bytes: int, *, for_data: bool) -> int:
        """Where data, or a hole, is next: lseek(2). Raises OSError (ENXIO)."""
        inode = self._file(number)
        size_bytes = self.size_of(inode)
        if not 0 <= offset_bytes < size_bytes:
            raise system_error(errno.ENXIO)
        for position, pool_offset, _ in _pieces(inode, offset_bytes, size_bytes - offset_bytes):
            if (pool_offset >= 0) == for_data:
                return position
        if for_data:
            raise system_error(errno.ENXIO)
        return size_bytes

    def has_hole(self, number: int, offset_bytes: int, length_bytes: int) -> bool:
        """Whether a range meets a hole inside the size. Raises OSError."""
        inode = self._file(number)
        length_bytes = min(length_bytes, self.size_of(inode) - offset_bytes)
        return any(at < 0 for _, at, _ in _pieces(inode, offset_bytes, length_bytes))

    # Sizes and holes

    def truncate(self, inode: Inode, size_bytes: int, changes: dict[str, int]) -> None:
        """Set a size and other attributes with it. Raises OSError: EISDIR, EINVAL, EFBIG."""
        if not inode.is_file:
            raise system_error(errno.EISDIR if inode.is_directory else errno.EINVAL)
        if not 0 <= size_bytes < SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        self.begin_writing()
        old_bytes = self.size_of(inode)
        is_shorter = size_bytes < old_bytes
        state = self._resized(inode, size_bytes, **changes)
        # What was mapped ahead is no part of what a file becomes that is made longer.
        first_gone = frames_of(min(size_bytes, old_bytes))
        if is_shorter:
            state.flags &= ~InodeFlags.KEEPS_AHEAD
        elif state.flags & InodeFlags.KEEPS_AHEAD:
            first_gone = inode.extents.end
        self._zero_mapped(inode, old_bytes, min(size_bytes, first_gone << PAGE_SHIFT))
        with self.change(urgent=True) as change:
            if inode.extents.end > first_gone:
                self._unmap(change, inode, first_gone, inode.extents.end - first_gone)
            self._set_size(change, inode, state)

    def punch(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        """Make a range a hole. Raises OSError: EINVAL, EPERM."""
        inode = self._range(number, offset_bytes, length_bytes, unless=FIXED)
        size_bytes = self.size_of(inode)
        end = offset_bytes + length_bytes
        first, last = frames_of(offset_bytes), end >> PAGE_SHIFT
        if end >= size_bytes:
            last = max(last, frames_of(size_bytes))
        last = max(first, last)
        with self.change(urgent=True) as change:
            if last > first:
                self._unmap(change, inode, first, last - first)
            self._touch_file(change, inode)
        # In place, so not before it is certain that there is room for the records.
        self._zero_mapped(inode, offset_bytes, min(end, first << PAGE_SHIFT, size_bytes))
        self._zero_mapped(inode, max(last << PAGE_SHIFT, offset_bytes), min(end, size_bytes))
        self.medium.fence()

    def allocate(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool
    ) -> None:
        """Map a range, zeroes where it was a hole.

        Raises OSError: ENOSPC, EFBIG, EINVAL, EPERM.
        """
        self._reserve(number, offset_bytes, length_bytes, keep_size=keep_size, clear=False)

    def zero(self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool) -> None:
        """Map a range, and make it zeroes. Raises OSError as `allocate`."""
        self._reserve(number, offset_bytes, length_bytes, keep_size=keep_size, clear=True)

    def collapse(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        """Take a range out of a file. Raises OSError: EINVAL, EPERM."""
        inode = self._range(number, offset_bytes, length_bytes, unless=FIXED)
        size_bytes = self.size_of(inode)
        if (offset_bytes | length_bytes) % FRAME_BYTES or offset_bytes + length_bytes >= size_bytes:
            raise system_error(errno.EINVAL)
        self._shift(inode, offset_bytes, -length_bytes, size_bytes)

    def insert(self, number: int, offset_bytes: int, length_bytes: int) -> None:
        """Put a hole into a file. Raises OSError: EINVAL, EFBIG, EPERM."""
        inode = self._range(number, offset_bytes, length_bytes, unless=FIXED)
        size_bytes = self.size_of(inode)
        if (offset_bytes | length_bytes) % FRAME_BYTES or offset_bytes >= size_bytes:
            raise system_error(errno.EINVAL)
        if size_bytes + length_bytes >= SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        self._shift(inode, offset_bytes, length_bytes, size_bytes)

    # For whoever serves I/O

    def extents(self, number: int) -> list[MappedExtent]:
        """All that is mapped of a file, behind its size too."""
        return list(self._file(number).extents)

    def live_line(self, number: int) -> int:
        """Where the live line of a file is in the pool."""
        return self._file(number).slot_offset + LIVE_OFFSET

    def append_limit(self, number: int) -> int:
        """Up to which byte a file can grow into frames that are mapped already."""
        inode = self._file(number)
        size_bytes = self.size_of(inode)
        index = size_bytes >> PAGE_SHIFT
        limit = index
        for extent in inode.extents.pieces(index, max(0, inode.extents.end - index)):
            if extent.pfn < 0:
                break
            limit += extent.frame_count
        return max(size_bytes, limit << PAGE_SHIFT)

    def trim_ahead(self, number: int) -> None:
        """The last close of a file: give back what was mapped ahead, persist its live line.

        Where that would be an msync it is left to fsync. Raises OSError.
        """
        # It may be written to for long without this process needing, so keeping, anything of it.
        inode = self.inode(number)
        if not inode.is_file or self.read_only:
            return
        inode.next_fill_frame = -1
        self.allocator.unhold(number)
        self.medium.flush(inode.slot_offset + LIVE_OFFSET, 16)
        if self.medium.durability is Durability.CACHE_LINES:
            self.medium.fence()
        first = frames_of(self.size_of(inode))
        if inode.extents.end > first and not inode.state.flags & InodeFlags.KEEPS_AHEAD:
            with self.change(urgent=True) as change:
                self._unmap(change, inode, first, inode.extents.end - first)
        self.untrimmed.discard(number)

    def end(self) -> None:
        """As the store's; what is still open is closed by this."""
        for number in () if self.read_only else list(self.untrimmed):
            # One that fails leaves a file system that isn't clean, which is searched.
            with suppress(OSError):
                self.trim_ahead(number)
        super().end()

    def persist(self, number: int) -> None:
        """Make durable what was written to a file, its size and its times. Raises OSError."""
        self.write_back(number)
        self.medium.fence()

    def write_back(self, number: int) -> None:
        """Begin to make the size and the times of a file durable: a fence must follow."""
        # The data plane has written there, whether or not the inode is in memory here.
        if not self.read_only:
            self.medium.flush(self.inode(number).slot_offset + LIVE_OFFSET, 16)

    # How a file changes

    def _fill(self, inode: Inode, offset_bytes: int, data: memoryview, size_bytes: int) -> None:
        """Map the holes of a range that is written to, with the bytes already in the frames.

        More than the range, where it looks as if more were to come. Raises OSError (ENOSPC).
        """
        hole, end = offset_bytes >> PAGE_SHIFT, frames_of(offset_bytes + len(data))
        first, window_end = self._placing.window(
            inode, hole, end, size_frames=frames_of(size_bytes),
            is_append=0 < size_bytes == offset_bytes,
        )  # fmt: skip
        try:
            self._map_filled(inode, first, window_end, offset_bytes, data, size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC or (first, window_end) == (hole, end):
                raise
            self._map_filled(inode, hole, end, offset_bytes, data, size_bytes)

    def _map_filled(
        self, inode: Inode, first: int, end: int, offset_bytes: int, data: memoryview,
        size_bytes: int,
    ) -> None:  # fmt: skip
        data_end = offset_bytes + len(data)
        with self.change() as change:
            for extent in self._map_holes(change, inode, first, end - first):
                start = extent.index << PAGE_SHIFT
                stop = start + (extent.frame_count << PAGE_SHIFT)
                at = (extent.pfn << PAGE_SHIFT) - start
                low, high = max(start, offset_bytes), min(stop, data_end)
                if low >= high:
                    low = high = stop
                self._content.zero(at + start, low - start)
                if low < high:
                    part = data[low - offset_bytes : high - offset_bytes]
                    self._content.store(inode.number, low, at + low, part)
                cleared = stop if self._must_clear else min(stop, size_bytes)
                self._content.zero(at + high, cleared - high)

    def _map_holes(
        self, change: Transaction, inode: Inode, index: int, frame_count: int
    ) -> list[MappedExtent]:
        """Map what is not mapped of a range: the extents that are new, their content undefined."""
        new: list[MappedExtent] = []
        size_frames = frames_of(self.size_of(inode))
        for hole in list(inode.extents.pieces(index, frame_count)):
            if hole.pfn < 0:
                new += self._placing.place(change, inode, hole, size_frames)
        for extent in new:
            change.append(inode, media.pack_extent(*extent))

        def apply() -> None:
            for extent in new:
                inode.extents.map(*extent)
            self.untrimmed.add(inode.number)

        if new:
            change.then(apply)
        return new

    def _leave_gap(self, inode: Inode, size_bytes: int, offset_bytes: int) -> None:
        """The size is about to pass a range that nobody writes to: zeroes, or holes if possible."""
        first, end = frames_of(size_bytes), offset_bytes >> PAGE_SHIFT
        if inode.extents.end > first < end and not inode.state.flags & InodeFlags.KEEPS_AHEAD:
            with self.change(urgent=True) as change:
                self._unmap(change, inode, first, end - first)
        self._zero_mapped(inode, size_bytes, offset_bytes)

    def _reserve(
        self, number: int, offset_bytes: int, length_bytes: int, *, keep_size: bool, clear: bool
    ) -> None:
        unless = FIXED if clear else InodeFlags.IMMUTABLE
        inode = self._range(number, offset_bytes, length_bytes, unless=unless)
        end = offset_bytes + length_bytes
        if end >= SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        old_bytes = self.size_of(inode)
        size_bytes = old_bytes if keep_size else max(old_bytes, end)
        first = offset_bytes >> PAGE_SHIFT
        self._zero_mapped(inode, old_bytes, size_bytes)
        old = list(_pieces(inode, offset_bytes, min(end, old_bytes) - offset_bytes))
        with self.change() as change:
            for extent in self._map_holes(change, inode, first, frames_of(end) - first):
                start = extent.index << PAGE_SHIFT
                stop = start + (extent.frame_count << PAGE_SHIFT)
                if not self._must_clear:
                    stop = min(stop, size_bytes)
                self._content.zero(extent.pfn << PAGE_SHIFT, stop - start)
            state = self._resized(inode, size_bytes)
            if end > size_bytes:
                state.flags |= InodeFlags.KEEPS_AHEAD
            self._set_size(change, inode, state)
        if clear:
            # In place, so not before it is certain that there is room for the rest.
            for _, pool_offset, length in old:
                if pool_offset >= 0:
                    self._content.zero(pool_offset, length)
            self.medium.fence()

    def _shift(self, inode: Inode, offset_bytes: int, distance_bytes: int, size_bytes: int) -> None:
        """Move all from an offset on; to the front over what is before it."""
        index, distance = offset_bytes >> PAGE_SHIFT, distance_bytes >> PAGE_SHIFT
        moved_from = index - min(distance, 0)
        end = max(inode.extents.end, moved_from)
        moved = [e for e in inode.extents.pieces(moved_from, end - moved_from) if e.pfn >= 0]
        gone = [e for e in inode.extents.pieces(index, moved_from - index) if e.pfn >= 0]
        state = self._resized(inode, size_bytes + distance_bytes)
        if end > index and end + distance >= SIZE_LIMIT_BYTES >> PAGE_SHIFT:
            raise system_error(errno.EFBIG)
        with self.change() as change:
            if end > index:
                change.append(inode, media.pack_hole(index, end - index))
            for extent in moved:
                new_index = extent.index + distance
                change.append(inode, media.pack_extent(new_index, extent.pfn, extent.frame_count))

            def apply() -> None:
                inode.extents.unmap(index, end - index)
                for extent in moved:
                    inode.extents.map(extent.index + distance, extent.pfn, extent.frame_count)

            change.then(apply)
            change.release(inode, [Run(extent.pfn, extent.frame_count) for extent in gone])
            self._set_size(change, inode, state)

    def _unmap(self, change: Transaction, inode: Inode, index: int, frame_count: int) -> None:
        """Make a range a hole, in a transaction; its frames are released."""
        runs = [
            Run(extent.pfn, extent.frame_count)
            for extent in inode.extents.pieces(index, frame_count)
            if extent.pfn >= 0
        ]
        if runs:
            change.append(inode, media.pack_hole(index, frame_count))
            change.then(lambda: inode.extents.unmap(index, frame_count))
            change.release(inode, runs)

    def _resized(self, inode: Inode, size_bytes: int, **changes: int) -> State:
        """The attributes with another size: those of a new epoch."""
        now_ns = self.times.now_ns()
        state = self.state_of(inode).replaced(modified_ns=now_ns, changed_ns=now_ns)
        state = state.replaced(**changes)
        state.size_bytes = size_bytes
        state.epoch = (state.epoch + 1) & EPOCH_MASK
        return state

    def _set_size(self, change: Transaction, inode: Inode, state: State) -> None:
        change.append(inode, state.pack())

        def apply() -> None:
            self._set_state(inode, state)
            self.set_live_size(inode, state.size_bytes)
            self.tables.changed(inode.number)

        change.then(apply)

    def _touch_file(self, change: Transaction, inode: Inode) -> None:
        now_ns = self.times.now_ns()
        state = self.state_of(inode).replaced(modified_ns=now_ns, changed_ns=now_ns)
        change.append(inode, state.pack())
        change.then(lambda: self._set_state(inode, state))

    def _zero_mapped(self, inode: Inode, start_bytes: int, end_bytes: int) -> None:
        """Zeroes into what is mapped of a range."""
        for _, pool_offset, length in _pieces(inode, start_bytes, end_bytes - start_bytes):
            if pool_offset >= 0:
                self._content.zero(pool_offset, length)

    def _file(self, number: int) -> Inode:
        inode = self.inode(number)
        if not inode.is_file:
            raise system_error(errno.EISDIR if inode.is_directory else errno.EINVAL)
        return inode

    def _range(
        self, number: int, offset_bytes: int, length_bytes: int, *, unless: InodeFlags
    ) -> Inode:
        """The file that has a range. Raises OSError: EINVAL, EFBIG, EPERM for these flags."""
        if offset_bytes < 0 or length_bytes <= 0:
            raise system_error(errno.EINVAL)
        if offset_bytes + length_bytes >= SIZE_LIMIT_BYTES:
            raise system_error(errno.EFBIG)
        inode = self._file(number)
        self.refuse(inode, unless)
        self.begin_writing()
        return inode


def frames_of(size_bytes: int) -> int:
    """The frames that so many bytes touch."""
    return (size_bytes + FRAME_BYTES - 1) >> PAGE_SHIFT


def _pieces(inode: Inode, offset_bytes: int, length_bytes: int) -> Iterable[tuple[int, int, int]]:
    """A range of a file as position, offset in the pool (-1: a hole) and length of each piece."""
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        pfn, count = inode.extents.find(offset_bytes >> PAGE_SHIFT)
        inside = offset_bytes & (FRAME_BYTES - 1)
        length = min(end - offset_bytes, (count << PAGE_SHIFT) - inside)
        yield offset_bytes, (pfn << PAGE_SHIFT) + inside if pfn >= 0 else -1, length
        offset_bytes += length
