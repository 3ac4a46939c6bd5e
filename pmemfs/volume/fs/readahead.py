"""Decompresses the pieces that a program will read next, in another thread, while it takes what it
has read.

Invariants:
- the thread gets bytes that were loaded before it began, and gives bytes back. It touches neither
  the pool nor anything else of the file system, because nothing of that is made for two threads;
- what it has made is looked up by the piece itself, so of a piece that was replaced meanwhile
  nothing is ever taken.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pmemfs.errors import DamagedPiece
from pmemfs.media.transform import StoredPiece, piece_checksum
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.transform.codec import Codec, codec_of

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

Key = tuple[int, int, int, StoredPiece]
"""The inode, its generation, the index of the piece in the file, and the piece."""

_MOST_AHEAD = 16
_MOST_READERS = 64


class ReadAhead:
    """What is being decompressed before it is asked for."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._coming: dict[Key, Future[bytes]] = {}
        self._ends: dict[int, int] = {}
        """Where the last read of a file ended, of the files that were read last."""

    def is_sequential(self, number: int, position: int, end: int) -> bool:
        """Note a read; whether it goes on where the last read of the file ended."""
        before = self._ends.pop(number, None)
        if len(self._ends) >= _MOST_READERS:
            del self._ends[next(iter(self._ends))]
        self._ends[number] = end
        return before == position

    def is_coming(self, key: Key) -> bool:
        """Whether a piece was asked for already."""
        return key in self._coming

    def begin(self, key: Key, stored: bytes) -> None:
        """Decompress a piece, given what is stored of it."""
        codec = codec_of(key[3].id)
        if codec is None:
            return
        while len(self._coming) >= _MOST_AHEAD:
            self._coming.pop(next(iter(self._coming))).cancel()
        self._coming[key] = self._executor.submit(unpacked, codec, key[3], stored)

    def take(self, key: Key) -> bytes | None:
        """The plain bytes of a piece, if that is quicker than to decompress it here."""
        future = self._coming.pop(key, None)
        if future is None or future.cancel():
            return None
        # Its reader is told of the damage, when the piece is read again.
        with suppress(DamagedPiece):
            return future.result()
        return None


def unpacked(codec: Codec, piece: StoredPiece, stored: bytes) -> bytes:
    """The plain bytes of a piece. Raises DamagedPiece."""
    if piece_checksum(stored) != piece.checksum:
        raise DamagedPiece(why="its checksum is wrong")
    return codec.decompress(stored, piece.frame_count << PAGE_SHIFT)
