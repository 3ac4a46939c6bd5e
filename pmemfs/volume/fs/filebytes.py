"""The bytes of regular files: reading, writing and copying them.

Invariants:
- data is changed in place, so a crash may leave a mixture of old and new words in bytes that were
  overwritten and not fsynced;
- the bytes of a write are stored before the size that covers them. Otherwise a reader, or a mount
  after a crash, would find what the frames held before.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from pmemfs.errors import system_error
from pmemfs.media.inode import SIZE_LIMIT_BYTES
from pmemfs.medium.base import Durability
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.units import MIB
from pmemfs.volume.base import HOLE, Piece
from pmemfs.volume.fs.extents import frames_of
from pmemfs.volume.fs.fileframes import FileFrames, pieces_of
from pmemfs.volume.fs.inode import APPEND_ONLY, IMMUTABLE, KEEPS_AHEAD, Inode
from pmemfs.volume.fs.spans import spans_of
from pmemfs.volume.fs.store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

_COPY_BYTES = MIB


class FileBytes:
    """Operations on the bytes of files."""

    def __init__(self, store: Store, frames: FileFrames) -> None:
        self._store = store
        self._frames = frames

    def read(self, number: int, offset_bytes: int, length_bytes: int) -> bytes | memoryview:
        """The bytes of a range, as far as the file has them. Raises OSError."""
        inode = self._frames.file(number)
        length_bytes = min(length_bytes, self._store.size_of(inode) - offset_bytes)
        if length_bytes <= 0:
            return b""
        page_io = self._frames.io_of(inode)
        parts = [
            self._frames.packed.load(inode, position, length) if pool_offset < 0
            else page_io.load(number, position, pool_offset, length)
            for position, pool_offset, length in pieces_of(inode, offset_bytes, length_bytes)
        ]  # fmt: skip
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check_open(self, number: int, flags: int) -> None:
        """Raise OSError (EPERM) if flags of the inode forbid these flags of open(2)."""
        inode = self._store.inode(number)
        if inode.transform is not None or inode.pieces:
            self._store.refuse_unserved(inode)
            self._store.sealing.refuse_locked(inode)
        if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
            return
        self._store.refuse(inode, IMMUTABLE)
        if flags & os.O_TRUNC or not flags & os.O_APPEND:
            self._store.refuse(inode, APPEND_ONLY)

    def write(
        self, number: int, offset_bytes: int, data: Buffer, *, may_overwrite: bool = True
    ) -> int:
        """Store bytes; how many, which is always all. Raises OSError: ENOSPC, EFBIG, EPERM.

        `may_overwrite` is true for a caller who opened an append-only file before it became so.
        """
        inode = self._frames.file(number)
        self._store.refuse(inode, IMMUTABLE)
        if not may_overwrite and offset_bytes < self._store.size_of(inode):
            self._store.refuse(inode, APPEND_ONLY)
        view = memoryview(data).cast("B")
        end = offset_bytes + len(view)
        if not view:
            return 0
        if end > SIZE_LIMIT_BYTES - 1:
            raise system_error(errno.EFBIG)
        self._store.begin_writing()
        size_bytes = self._store.size_of(inode)
        page_io = self._frames.io_of(inode)
        changed = min(offset_bytes, size_bytes) >> PAGE_SHIFT
        self._frames.packed.make_way(inode, changed, frames_of(end) - changed)
        # Looked up before `_fill` maps the holes: the bytes of those are stored by `_fill`.
        mapped = list(pieces_of(inode, offset_bytes, len(view)))
        if offset_bytes > size_bytes:
            self._leave_gap(inode, size_bytes, offset_bytes)
        if any(pool_offset < 0 for _, pool_offset, _ in mapped):
            self._fill(inode, offset_bytes, view, size_bytes)
        for position, pool_offset, length in mapped:
            if pool_offset >= 0:
                start = position - offset_bytes
                page_io.store(number, position, pool_offset, view[start : start + length])
        if end > size_bytes:
            if self._store.medium.durability is Durability.CACHE_LINES:
                # The bytes become durable before the size, or a reader after a power failure would
                # see what the frames held before.
                self._store.medium.fence()
            self._store.set_live_size(inode, end)
        self._store.set_written_ns(inode, self._store.times.now_ns())
        return len(view)

    def copy(
        self, source: int, source_bytes: int, target: int, target_bytes: int, length_bytes: int,
        *, may_overwrite: bool = True,
    ) -> int:  # fmt: skip
        """Copy a range as far as the source has it; how many bytes. Raises OSError as `write`."""
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
        """Where data (or a hole) comes next, as lseek(2) says. Raises OSError (ENXIO)."""
        inode = self._frames.file(number)
        size_bytes = self._store.size_of(inode)
        if not 0 <= offset_bytes < size_bytes:
            raise system_error(errno.ENXIO)
        first = offset_bytes >> PAGE_SHIFT
        for index, pfn, _ in spans_of(inode, first, frames_of(size_bytes) - first):
            if (pfn != HOLE) == for_data:
                return max(offset_bytes, index << PAGE_SHIFT)
        if for_data:
            raise system_error(errno.ENXIO)
        return size_bytes

    def has_hole(self, number: int, offset_bytes: int, length_bytes: int) -> bool:
        """Whether a range has a hole in front of the end of the file. Raises OSError."""
        inode = self._frames.file(number)
        end = min(offset_bytes + length_bytes, self._store.size_of(inode))
        first = offset_bytes >> PAGE_SHIFT
        return any(pfn == HOLE for _, pfn, _ in spans_of(inode, first, frames_of(end) - first))

    def pieces(self, number: int, offset_bytes: int, length_bytes: int, most: int) -> list[Piece]:
        """Where the whole frames of a range lie in the pool: the first pieces, so many at most.

        Raises OSError: EISDIR, EINVAL.
        """
        first, end = offset_bytes >> PAGE_SHIFT, frames_of(offset_bytes + length_bytes)
        inode = self._frames.file(number)
        # Most files have no pieces, and each pin asks this.
        look = partial(spans_of, inode) if inode.pieces else inode.extents.pieces
        return [
            (
                (index << PAGE_SHIFT) - offset_bytes,
                pfn << PAGE_SHIFT if pfn >= 0 else pfn,
                frame_count << PAGE_SHIFT,
            )
            for index, pfn, frame_count in islice(look(first, end - first), most)
        ]

    def note_stores(self, number: int) -> None:
        """A program has stored into frames of a file by itself: note it as a write. Raises
        OSError."""
        inode = self._frames.file(number)
        self._store.begin_writing()
        self._store.set_written_ns(inode, self._store.times.now_ns())

    def persist(self, number: int) -> None:
        """Make durable what was written to a file, with its size and times. Raises OSError."""
        self.write_back(number)
        self._store.medium.fence()

    def write_back(self, number: int) -> None:
        """Begin to make the size and the times of a file durable; a fence must follow."""
        # Whether or not anything was written here: the data plane may have done so.
        if not self._store.read_only:
            self._store.lines.write_back(self._store.inode(number).slot_offset)

    # Writing where no frames are mapped yet

    def _fill(self, inode: Inode, offset_bytes: int, data: memoryview, size_bytes: int) -> None:
        """Map the holes of a range that is written to, after its bytes are in the new frames.

        It maps more than the range if more writes look likely. Raises OSError (ENOSPC).
        """
        hole, end = offset_bytes >> PAGE_SHIFT, frames_of(offset_bytes + len(data))
        first, window_end = self._frames.placing.window(
            inode, hole, end, size_frames=frames_of(size_bytes),
            is_append=0 < size_bytes == offset_bytes,
        )  # fmt: skip
        try:
            self._map_filled(inode, first, window_end, offset_bytes, data, size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC or (first, window_end) == (hole, end):
                # No room for more than was asked for: map that alone.
                raise
            self._map_filled(inode, hole, end, offset_bytes, data, size_bytes)

    def _map_filled(
        self, inode: Inode, first: int, end: int, offset_bytes: int, data: memoryview,
        size_bytes: int,
    ) -> None:  # fmt: skip
        data_end = offset_bytes + len(data)
        page_io = self._frames.io_of(inode, is_new=True)
        # New frames get their bytes before the commit maps them, so a crash shows either the
        # hole or the bytes.
        with self._store.change() as change:
            for extent in self._frames.map_holes(change, inode, first, end - first):
                start = extent.index << PAGE_SHIFT
                stop = start + (extent.frame_count << PAGE_SHIFT)
                at = (extent.pfn << PAGE_SHIFT) - start
                low, high = max(start, offset_bytes), min(stop, data_end)
                if low >= high:
                    low = high = stop
                page_io.zero(start, at + start, low - start)
                if low < high:
                    part = data[low - offset_bytes : high - offset_bytes]
                    page_io.store(inode.number, low, at + low, part)
                cleared = stop if self._frames.must_clear else min(stop, size_bytes)
                page_io.zero(high, at + high, cleared - high)

    def _leave_gap(self, inode: Inode, size_bytes: int, offset_bytes: int) -> None:
        """Prepare the gap between the size and a write behind it: zeroes, or holes if possible."""
        first, end = frames_of(size_bytes), offset_bytes >> PAGE_SHIFT
        if inode.extents.end > first < end and not inode.state.flags & KEEPS_AHEAD:
            with self._store.change(urgent=True) as change:
                self._frames.unmap(change, inode, first, end - first)
        self._frames.zero_mapped(inode, size_bytes, offset_bytes)
