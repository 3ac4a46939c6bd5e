"""The bytes of blocks: of those that the cache has, and of places that are being filled.

A request is a list of pieces, each of which lies in one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pmemfs.media.cache import Ground, TagState
from pmemfs.medium.base import Medium
from pmemfs.memmap.base import Access
from pmemfs.units import MIB
from pmemfs.volume.cache.groups import Found
from pmemfs.volume.cache.index import Index, Place

_CHUNK_BYTES = 2 * MIB
"""Workers of a data plane touch a sparse pool only in chunks that have memory everywhere."""


class Piece(NamedTuple):
    """A part of a block that a request wants, or brings."""

    block: int
    start: int
    """Counted from the start of the block."""
    length: int


class Blocks:
    """The blocks of one cache, as bytes."""

    def __init__(
        self, medium: Medium, ground: Ground, index: Index,
        note_reserved: Callable[[int, int], None] = lambda offset_bytes, length_bytes: None,
    ) -> None:  # fmt: skip
        """`note_reserved` tells the workers of a data plane where a sparse pool has memory."""
        self._medium = medium
        self._note_reserved = note_reserved
        self._reserved_chunks = bytearray(-(-medium.size_bytes // _CHUNK_BYTES))
        self._index = index
        self.shift = ground.block_shift
        self.block_bytes = 1 << ground.block_shift
        self._zeroes = bytes(self.block_bytes)

    def pieces(self, offset_bytes: int, length_bytes: int) -> Iterator[Piece]:
        """The pieces of a range, in order."""
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            start = offset_bytes & self.block_bytes - 1
            length = min(self.block_bytes - start, end - offset_bytes)
            yield Piece(offset_bytes >> self.shift, start, length)
            offset_bytes += length

    def load(
        self, piece: Piece, access: Access = Access.READ
    ) -> bytes | memoryview | None:  # fmt: skip
        """The bytes of a piece; None if the cache doesn't have the block. Raises OSError."""
        found = self._index.hold(piece.block, access)
        if found is None:
            return None
        try:
            return self.load_held(found, piece.start, piece.length)
        finally:
            self._index.release(found)

    def load_held(self, found: Found, start: int, length: int) -> bytes | memoryview:
        """Bytes of a block that is held."""
        if found.tag.state is TagState.ZERO:
            return self._zeroes[:length]
        return self._medium.read(self._index.place_of(found).pool_offset + start, length)

    def load_place(self, place: Place, start: int, length: int) -> bytes | memoryview:
        """Bytes of a place that is held."""
        return self._medium.read(place.pool_offset + start, length)

    def fill(self, place: Place, start: int, data: bytes | memoryview) -> None:
        """Store bytes in a place that is reserved, and begin to make them durable."""
        at = place.pool_offset + start
        self._medium.store(at, data)
        self._medium.flush(at, len(data))

    def flush(self, place: Place) -> None:
        """Begin to make durable what somebody else has stored in a place."""
        self._medium.flush(place.pool_offset, self.block_bytes)

    def prepare(self, place: Place) -> None:
        """Let a place have memory, so that its view can be touched. Raises OSError (ENOSPC)."""
        if self._medium.reserved:
            return
        first, end = place.pool_offset, place.pool_offset + self.block_bytes
        for chunk in range(first // _CHUNK_BYTES, (end - 1) // _CHUNK_BYTES + 1):
            if not self._reserved_chunks[chunk]:
                self._reserve(chunk, first)

    def _reserve(self, chunk: int, place_offset: int) -> None:
        start = chunk * _CHUNK_BYTES
        length = min(_CHUNK_BYTES, self._medium.size_bytes - start)
        try:
            self._medium.reserve(start, length)
        except OSError:
            # There is not as much left. Whatever there is goes to this block.
            self._medium.reserve(place_offset, self.block_bytes)
        else:
            self._reserved_chunks[chunk] = 1
            self._note_reserved(start, length)

    def views(self, places: Sequence[Place], length_bytes: int) -> list[memoryview]:
        """So many bytes of places, one after the other; places that lie side by side as one."""
        views: list[memoryview] = []
        start = end = -1
        for place in places:
            if place.pool_offset != end:
                if end > start:
                    views.append(self._medium.view(start, end - start))
                start = place.pool_offset
            end = place.pool_offset + self.block_bytes
        views.append(self._medium.view(start, end - start))
        return clipped(views, length_bytes)


def clipped(views: list[memoryview], length_bytes: int) -> list[memoryview]:
    """The first so many bytes of views."""
    kept: list[memoryview] = []
    for view in views:
        if length_bytes <= 0:
            break
        kept.append(view[:length_bytes])
        length_bytes -= len(view)
    return kept


def runs_of(blocks: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Blocks in order, as first and count of those that follow each other, so many at most."""
    first = count = 0
    for block in blocks:
        if count and block == first + count and count < most:
            count += 1
            continue
        if count:
            yield first, count
        first, count = block, 1
    if count:
        yield first, count
