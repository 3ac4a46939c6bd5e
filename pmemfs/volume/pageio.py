"""Moves bytes between callers and frames of the pool, and holds the pages that it touches."""

from __future__ import annotations

from pmemfs.errors import MemoryFault
from pmemfs.medium.base import Medium
from pmemfs.memmap.base import Access, Memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.units import MIB

_ZEROES = memoryview(bytes(MIB))


class PageIO:
    """Loads and stores bytes in the frames of inodes."""

    def __init__(self, medium: Medium, memmap: Memmap) -> None:
        self._medium = medium
        self._memmap = memmap
        self._order = memmap.geometry.order if memmap.geometry else 0

    def load(self, number: int, position: int, pool_offset: int, length: int) -> memoryview | bytes:
        """Bytes of an inode; its byte `position` lies at `pool_offset`. Raises OSError."""
        try:
            return self._load(number, position, pool_offset, length)
        except MemoryFault as fault:
            fault.inode = number
            raise

    def store(self, number: int, position: int, pool_offset: int, data: bytes | memoryview) -> None:
        """Store bytes of an inode, durable with the next fence. Raises OSError."""
        try:
            self._store(number, position, pool_offset, data)
        except MemoryFault as fault:
            fault.inode = number
            raise

    def zero(self, position: int, pool_offset: int, length: int) -> None:
        """Let bytes from `position` of an inode on read as zeroes. Raises OSError.

        No program asked for these stores, so they count as no access.
        """
        self.clear(pool_offset, length)

    def clear(self, pool_offset: int, length: int) -> None:
        """Store zeroes into the pool, whatever an inode's bytes look like there. Raises OSError."""
        while length > 0:
            step = min(length, len(_ZEROES))
            self._put(pool_offset, _ZEROES[:step])
            pool_offset += step
            length -= step

    def store_coded(self, number: int, position: int, pool_offset: int, data: bytes) -> None:
        """Store bytes that stand for some of an inode, coded: the pages are its from now on, and
        no program has asked for that, so it counts as no access. Raises OSError."""
        self._put(pool_offset, data)
        if self._memmap.has_pages:
            pfn, count = self._hold(number, position, pool_offset, len(data), Access.PIN)
            self._memmap.put_pages(pfn, count)

    def move(self, source_bytes: int, target_bytes: int, length: int) -> None:
        """Copy bytes of an inode, as they are stored, to another place for the same positions.

        No program asked for this, so it counts as no access. The copies are durable with the next
        fence. Raises OSError.
        """
        for done in range(0, length, len(_ZEROES)):
            step = min(len(_ZEROES), length - done)
            if not self._medium.is_hole(source_bytes + done, step):
                self._put(target_bytes + done, self._medium.read(source_bytes + done, step))
            else:
                self.clear(target_bytes + done, step)

    def _load(
        self, number: int, position: int, pool_offset: int, length: int
    ) -> memoryview | bytes:
        if not self._medium.reserved and self._medium.is_hole(pool_offset, length):
            # A hole has no memory, so there is no page to hold, and reading must not make one.
            return bytes(length)
        if not self._memmap.has_pages:
            return self._medium.read(pool_offset, length)
        # Held until the bytes are copied, so that the frame can't go to another file in between.
        pfn, count = self._hold(number, position, pool_offset, length, Access.READ)
        try:
            return self._medium.read(pool_offset, length)
        finally:
            self._memmap.put_pages(pfn, count)

    def _store(
        self, number: int, position: int, pool_offset: int, data: bytes | memoryview
    ) -> None:
        if not self._memmap.has_pages:
            self._write(position, pool_offset, data)
            return
        pfn, count = self._hold(number, position, pool_offset, len(data), Access.WRITE)
        try:
            self._write(position, pool_offset, data)
        finally:
            self._memmap.put_pages(pfn, count)

    def _write(self, position: int, pool_offset: int, data: bytes | memoryview) -> None:
        """Store bytes of an inode whose pages are held."""
        self._put(pool_offset, data)

    def _put(self, pool_offset: int, data: bytes | memoryview) -> None:
        self._medium.store(pool_offset, data)
        self._medium.flush(pool_offset, len(data))

    def _hold(
        self, number: int, position: int, pool_offset: int, length: int, access: Access
    ) -> tuple[int, int]:
        pfn = pool_offset >> PAGE_SHIFT
        count = ((pool_offset & (FRAME_BYTES - 1)) + length + FRAME_BYTES - 1) >> PAGE_SHIFT
        index = position >> (PAGE_SHIFT + self._order)
        self._memmap.get_pages(pfn, count, access, number, index)
        return pfn, count
