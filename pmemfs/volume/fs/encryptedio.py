"""Loads and stores the bytes of one encrypted file, which lie encrypted in the pool, in place.

The unit of encryption is a block of 16 bytes. A write that begins or ends within a block reads the
rest of that block, and stores the block anew. Invariants:
- a power failure leaves such an edge block old or new. Half of each would decrypt to garbage, and
  take bytes with it that were fsynced long ago. So where fences make bytes durable, the new block
  is first noted in the file's live line (see `media.live`), and carried out again from there;
- zeroes are stored as any other bytes. So whatever lies below the size was written through the key,
  and nothing has to remember which frames were not;
- what workers of a data plane may see is stored, and read, under the locks of its pages. Two
  writers of one block would each store it with the old bytes of the other otherwise;
- bytes are moved within the pool as they are stored, because the place in the file is what they are
  encrypted with, and not the place in the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from pmemfs.medium.base import Durability, Medium
from pmemfs.memmap.base import Memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.units import MIB
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.livelines import LiveLines
from pmemfs.volume.pageio import PageIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 16
_INSIDE = BLOCK_BYTES - 1
_ZEROES = memoryview(bytes(MIB))


class Cipher(Protocol):
    """Encrypts the content of files."""

    def xts(
        self, slot: int, first_unit: int, data: Buffer, encrypts: bool, *, offset: int = 0
    ) -> bytes:
        """Encrypt or decrypt whole blocks with the key in a slot; they begin `offset` bytes into
        the frame `first_unit` of a file."""


class EncryptedIO(PageIO):
    """Loads and stores bytes in the frames of one encrypted file."""

    def __init__(
        self, medium: Medium, memmap: Memmap, lines: LiveLines, inode: Inode, cipher: Cipher,
        slot: int, *, is_new: bool,
    ) -> None:  # fmt: skip
        """`is_new` says that no commit has mapped the frames yet, so a power failure before that
        harms nobody."""
        super().__init__(medium, memmap)
        self._lines = lines
        self._inode = inode
        self._cipher = cipher
        self._slot = slot
        self._notes_edges = medium.durability is Durability.CACHE_LINES and not is_new
        self._locks = None if is_new else lines.locks

    def load(self, number: int, position: int, pool_offset: int, length: int) -> memoryview | bytes:
        before = position & _INSIDE
        whole = (before + length + _INSIDE) & -BLOCK_BYTES
        raw = self._load_locked(number, position - before, pool_offset - before, whole)
        if self._medium.read_only:
            raw = self._lines.with_redo(self._inode, pool_offset - before, raw)
        plain = self._coded(position - before, raw, encrypts=False)
        return memoryview(plain)[before : before + length] if length != whole else plain

    def _load_locked(
        self, number: int, position: int, pool_offset: int, length: int
    ) -> memoryview | bytes:
        locks = self._locks
        if locks is None:
            return super().load(number, position, pool_offset, length)
        parts = []
        for done, step in _pages_of(position, length):
            pfn = (pool_offset + done) >> PAGE_SHIFT
            locks.lock(pfn)
            try:
                part = super().load(number, position + done, pool_offset + done, step)
                # Copied under the lock, because it may be a view of the pool.
                parts.append(bytes(part))
            finally:
                locks.unlock(pfn)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def zero(self, position: int, pool_offset: int, length: int) -> None:
        for done in range(0, length, len(_ZEROES)):
            step = min(len(_ZEROES), length - done)
            self._write(position + done, pool_offset + done, _ZEROES[:step])

    def _write(self, position: int, pool_offset: int, data: bytes | memoryview) -> None:
        view, locks = memoryview(data), self._locks
        if locks is None:
            self._write_blocks(position, pool_offset, view)
            return
        for done, step in _pages_of(position, len(view)):
            pfn = (pool_offset + done) >> PAGE_SHIFT
            locks.lock(pfn)
            try:
                self._write_blocks(position + done, pool_offset + done, view[done : done + step])
            finally:
                locks.unlock(pfn)

    def _write_blocks(self, position: int, pool_offset: int, view: memoryview) -> None:
        # What belongs to the block in which the range begins, whole blocks, and what is left.
        first = min(-position & _INSIDE, len(view))
        last = first + ((len(view) - first) & -BLOCK_BYTES)
        if first:
            self._write_edge(position, pool_offset, view[:first])
        if first < last:
            raw = self._coded(position + first, view[first:last], encrypts=True)
            self._put(pool_offset + first, raw)
        if last < len(view):
            self._write_edge(position + last, pool_offset + last, view[last:])

    def _write_edge(self, position: int, pool_offset: int, part: memoryview) -> None:
        """Store bytes that lie within one block."""
        before = position & _INSIDE
        start, at = position - before, pool_offset - before
        raw = self._medium.read(at, BLOCK_BYTES)
        block = bytearray(self._coded(start, raw, encrypts=False))
        block[before : before + len(part)] = part
        raw = self._coded(start, block, encrypts=True)
        # A worker raises the size after it has stored, so it may have stored beside these bytes.
        may_harm = self._locks is not None or self._has_neighbours(position, len(part))
        if not self._notes_edges or not may_harm:
            self._put(at, raw)
            return
        with self._lines.redo_locked(self._inode):
            self._lines.note_redo(self._inode, at, raw)
            self._put(at, raw)
            self._medium.fence()
            self._lines.forget_redo(self._inode)

    def _coded(self, position: int, data: Buffer, *, encrypts: bool) -> bytes:
        unit, inside = position >> PAGE_SHIFT, position & (FRAME_BYTES - 1)
        return self._cipher.xts(self._slot, unit, data, encrypts, offset=inside)

    def _has_neighbours(self, position: int, length: int) -> bool:
        """Whether the file has other bytes in the block that these bytes lie in."""
        size_bytes = self._lines.size_of(self._inode)
        start, end = position & -BLOCK_BYTES, position + length
        return min(position, size_bytes) > start or (end < size_bytes and end < start + BLOCK_BYTES)


def _pages_of(position: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that lie in one page each: where they begin in it, and their length."""
    done = 0
    while done < length:
        step = min(length - done, FRAME_BYTES - ((position + done) & (FRAME_BYTES - 1)))
        yield done, step
        done += step
