"""The compressed pieces of files: read, made plain again, changed.

Invariants:
- a piece is never changed in place. What replaces it has its bytes, in frames of its own, before
  one transaction lets it count, so a power failure at any store leaves the one or the other;
- whatever changes a range of a file calls `make_way` first. Then no piece is in its way, and what
  the background compresses of it at that moment is dropped. Otherwise the change would be lost;
- what only deletes needs no room that is not there: a piece that can't be made plain is written
  anew, with zeroes in place of what goes.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from pmemfs.errors import DamagedPiece, MemoryFault, system_error
from pmemfs.media import log as media
from pmemfs.media.transform import HOT_SECONDS, StoredPiece, pack_piece, piece_checksum
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.transform.codec import codec_of
from pmemfs.units import MIB
from pmemfs.volume.fs.extents import MappedExtent, Run, frames_of
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.placing import Placing
from pmemfs.volume.fs.readahead import Key, ReadAhead, unpacked
from pmemfs.volume.fs.store import Store
from pmemfs.volume.fs.transaction import Transaction
from pmemfs.volume.pageio import PageIO

log = logging.getLogger(__name__)

_KEPT_BYTES = 64 * MIB
"""Of plain pieces, for the next read of one."""
_MOST_AHEAD_BYTES = MIB
_MOST_WATCHED = 4096
_MOST_REPORTED = 1024


class Batch:
    """Ranges of one file that are being compressed, and which of them have changed meanwhile."""

    def __init__(self, ranges: dict[int, int]) -> None:
        self.ranges = ranges
        """The number of frames from each index on."""
        self.spoilt: set[int] = set()
        """The indexes of ranges that have changed, or are about to."""

    def spoil(self, index: int, frame_count: int) -> None:
        """A range of the file is about to change."""
        end = index + frame_count
        for start, count in self.ranges.items():
            if start < end and start + count > index:
                self.spoilt.add(start)


class PackedPieces:
    """The pieces of all files of one file system."""

    def __init__(self, store: Store, page_io: PageIO, placing: Placing) -> None:
        self._store = store
        self._page_io = page_io
        self._placing = placing
        self._plain: dict[Key, bytes] = {}
        """The plain bytes of pieces, the least recently read first."""
        self._plain_bytes = 0
        self._heat: dict[tuple[int, int], tuple[int, int]] = {}
        """Of pieces that were read: the last second, and how many seconds."""
        self._reported: dict[Key, None] = {}
        self.ahead: ReadAhead | None = None
        """What decompresses pieces before they are asked for."""
        self.hot: dict[tuple[int, int], None] = {}
        """Pieces that would better be plain: the inode and the index."""
        self.packing: dict[int, Batch] = {}
        """What is being compressed, by inode. A worker of a data plane must not write there."""
        self.cold_seconds: float = 600
        """How long nobody may have touched what is compressed in the background; 0: nothing is."""
        self.made_plain = 0
        """How many pieces were made plain on this mount."""
        self.hits = self.misses = 0
        """Reads of pieces whose plain bytes were kept, and of others."""

    # Reading

    def load(self, inode: Inode, position: int, length: int) -> bytes | memoryview:
        """The bytes of a range that no extent maps: of pieces, and zeroes. Raises OSError."""
        if not inode.pieces:
            return bytes(length)
        first, begin, end = position >> PAGE_SHIFT, position, position + length
        parts: list[bytes | memoryview] = []
        for index, piece in inode.pieces_in(first, frames_of(end) - first):
            start = index << PAGE_SHIFT
            if position < start:
                parts.append(bytes(start - position))
                position = start
            plain = self.plain(inode, index, piece)
            stop = min(end - start, len(plain))
            if position == start and stop == len(plain):
                parts.append(plain)
            else:
                parts.append(memoryview(plain)[position - start : stop])
            position = start + stop
            self._note_read(inode.number, index)
        if position < end:
            parts.append(bytes(end - position))
        if self.ahead and self.ahead.is_sequential(inode.number, begin, end):
            self._read_ahead(self.ahead, inode, end, length)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_ahead(self, ahead: ReadAhead, inode: Inode, position: int, length: int) -> None:
        """Begin to decompress what comes behind a read, as much as that has read."""
        first, end = position >> PAGE_SHIFT, position + min(length, _MOST_AHEAD_BYTES)
        for index, piece in inode.pieces_in(first, frames_of(end) - first):
            key = inode.number, inode.generation, index, piece
            if key in self._plain or ahead.is_coming(key):
                continue
            # Whoever reads it is told of bad memory.
            with suppress(MemoryFault):
                ahead.begin(key, self._stored(key))

    def plain(self, inode: Inode, index: int, piece: StoredPiece) -> bytes:
        """The plain bytes of a piece. Raises OSError: EIO (DamagedPiece), EOPNOTSUPP."""
        key = inode.number, inode.generation, index, piece
        plain = self._plain.pop(key, None)
        if plain is not None:
            self.hits += 1
        else:
            plain = (self.ahead.take(key) if self.ahead else None) or self._unpacked(key)
            self.misses += 1
            self._plain_bytes += len(plain)
            while self._plain_bytes > _KEPT_BYTES:
                self._plain_bytes -= len(self._plain.pop(next(iter(self._plain))))
        self._plain[key] = plain
        return plain

    @property
    def kept_bytes(self) -> int:
        """The plain bytes that are kept for the next read of a piece."""
        return self._plain_bytes

    def forget_all(self) -> None:
        """Let go of all plain bytes; the next read of a piece decompresses it."""
        self._plain.clear()
        self._plain_bytes = 0

    def _stored(self, key: Key) -> bytes:
        """What is stored of a piece. Raises OSError."""
        number, _, index, piece = key
        at = piece.pfn << PAGE_SHIFT
        return bytes(self._page_io.load(number, index << PAGE_SHIFT, at, piece.stored_bytes))

    def _unpacked(self, key: Key) -> bytes:
        number, _, index, piece = key
        codec = codec_of(piece.id)
        if codec is None:
            raise system_error(errno.EOPNOTSUPP)
        stored = self._stored(key)
        try:
            return unpacked(codec, piece, stored)
        except DamagedPiece as damage:
            position = index << PAGE_SHIFT
            where = f"inode {number}, {piece.frame_count << PAGE_SHIFT} bytes at {position}"
            error = DamagedPiece(why=f"{where}: {damage.facts['why']}")
            self._report(key, error)
            raise error from None

    def _report(self, key: Key, error: DamagedPiece) -> None:
        """Log a damaged piece once, because a program that meets one mostly meets it again."""
        if key not in self._reported:
            if len(self._reported) >= _MOST_REPORTED:
                del self._reported[next(iter(self._reported))]
            self._reported[key] = None
            log.error("%s; reading it answers EIO", error)

    def _note_read(self, number: int, index: int) -> None:
        now = int(time.monotonic())
        last, seconds = self._heat.pop((number, index), (0, 0))
        if last != now:
            seconds += 1
            if seconds >= HOT_SECONDS:
                self.note_hot(number, index)
                return
        while len(self._heat) >= _MOST_WATCHED:
            del self._heat[next(iter(self._heat))]
        self._heat[number, index] = now, seconds

    def note_hot(self, number: int, index: int) -> None:
        """A piece is hot: here, or because a worker says so, who reads pieces by itself."""
        if len(self.hot) < _MOST_WATCHED:
            self.hot[number, index] = None

    # Changing

    def changes(self, inode: Inode, index: int, frame_count: int) -> None:
        """A range of a file is about to change in a way that no piece is in."""
        batch = self.packing.get(inode.number)
        if batch:
            batch.spoil(index, frame_count)

    def make_way(self, inode: Inode, index: int, frame_count: int) -> None:
        """A range of a file is about to change: let its pieces be plain. Raises OSError: ENOSPC."""
        if self.packing:
            self.changes(inode, index, frame_count)
        if inode.pieces:
            for at, piece in inode.pieces_in(index, frame_count):
                self._make_plain(inode, at, piece)

    def make_way_for_zeroes(self, inode: Inode, start_bytes: int, end_bytes: int) -> None:
        """A range of a file is about to read as zeroes: let no piece lie in it by halves.

        A piece that is not plain after this has zeroes there. This needs no more room than the
        file has.
        """
        first = start_bytes >> PAGE_SHIFT
        if self.packing:
            self.changes(inode, first, frames_of(end_bytes) - first)
        if not inode.pieces:
            return
        for at, piece in inode.pieces_in(first, frames_of(end_bytes) - first):
            low, high = at << PAGE_SHIFT, at + piece.frame_count << PAGE_SHIFT
            if start_bytes <= low and high <= end_bytes:
                continue
            try:
                self._make_plain(inode, at, piece)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._zero_in(inode, at, piece, max(0, start_bytes - low), end_bytes - low)

    def _make_plain(self, inode: Inode, index: int, piece: StoredPiece) -> None:
        store, plain = self._store, memoryview(self.plain(inode, index, piece))
        hole, start = MappedExtent(index, -1, piece.frame_count), index << PAGE_SHIFT
        with store.change() as change:
            new = list(self._placing.place(change, inode, hole, frames_of(store.size_of(inode))))
            if len(new) > 1:
                # An extent may not replace a part of a piece.
                change.append(inode, media.pack_hole(index, piece.frame_count))
            for extent in new:
                position, length = extent.index << PAGE_SHIFT, extent.frame_count << PAGE_SHIFT
                part = plain[position - start : position - start + length]
                # As an access, because it is one that has caused this: the pages are not cold.
                self._page_io.store(inode.number, position, extent.pfn << PAGE_SHIFT, part)
                change.append(inode, media.pack_extent(*extent))
            change.then(partial(self._was_made_plain, inode, index, piece, new))
            change.release(inode, [Run(piece.pfn, piece.stored_frames)])

    def _was_made_plain(
        self, inode: Inode, index: int, piece: StoredPiece, new: Iterable[MappedExtent]
    ) -> None:
        inode.unmap(index, piece.frame_count)
        for extent in new:
            inode.map(*extent)
        self._forget(inode, index, piece)
        # The piece may have gone on behind a size that a truncation has set.
        self._store.untrimmed.add(inode.number)
        self._store.cache.note_compressed(inode)
        self.made_plain += 1

    def _zero_in(
        self, inode: Inode, index: int, piece: StoredPiece, start_bytes: int, end_bytes: int
    ) -> None:
        """Write a piece anew with zeroes in a range of it, which makes it no larger."""
        plain = bytearray(self.plain(inode, index, piece))
        end_bytes = min(end_bytes, len(plain))
        plain[start_bytes:end_bytes] = bytes(end_bytes - start_bytes)
        codec = codec_of(piece.id)
        assert codec is not None, "its bytes were read just now"
        level = inode.transform.level if inode.transform else 0
        with self._store.change(urgent=True) as change:
            packed = codec.compress(plain, level)
            if not self.replace(change, inode, index, piece.frame_count, packed, piece.id):
                raise system_error(errno.ENOSPC)

    def replace(
        self, change: Transaction, inode: Inode, index: int, frame_count: int, packed: bytes,
        kind: int,
    ) -> bool:  # fmt: skip
        """Let a range of a file lie compressed from the commit on; whether that saves a frame.

        The range is mapped, or is one piece. If it would save nothing, nothing is done. Raises
        OSError (ENOSPC) if not so many frames are free side by side.
        """
        stored_frames = frames_of(len(packed))
        before = inode.pieces.get(index)
        if before:
            old = [Run(before.pfn, before.stored_frames)]
        else:
            old = [Run(e.pfn, e.frame_count) for e in inode.extents.pieces(index, frame_count)]
        if stored_frames >= frame_count:
            return False
        # It frees more than it takes, so it may take of what is kept for such operations.
        run = self._store.allocator.allocate_run(stored_frames, urgent=True)
        change.adopt(run)
        pool_offset = run.pfn << PAGE_SHIFT
        self._page_io.store_coded(inode.number, index << PAGE_SHIFT, pool_offset, packed)
        piece = StoredPiece(
            run.pfn, frame_count, stored_frames, len(packed), piece_checksum(packed), kind
        )
        change.append(inode, pack_piece(index, piece))
        change.then(partial(inode.set_piece, index, piece))
        if before:
            change.then(partial(self._forget, inode, index, before))
        change.release(inode, old)
        return True

    def _forget(self, inode: Inode, index: int, piece: StoredPiece) -> None:
        plain = self._plain.pop((inode.number, inode.generation, index, piece), b"")
        self._plain_bytes -= len(plain)
        self._heat.pop((inode.number, index), None)
        self.hot.pop((inode.number, index), None)
