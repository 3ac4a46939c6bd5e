"""The memory that extent tables lie in: knows what is taken of it and what is free."""

from __future__ import annotations

import errno
from collections.abc import Mapping

_LINE_BYTES = 64


class Arena:
    """Memory for tables, in blocks of 2^order lines of 64 bytes; two buddies make a larger block.

    Buddies are joined only when there is no other block left, so tables that come and go by the
    thousand find a block of their size at once. Source: Knuth, TAOCP vol. 1, 2.5, the buddy system.

    `size_bytes` is a power of two. `taken` says what was taken before, by offsets and sizes in
    bytes: an arena that gets what another one gave out goes on where that one was. Raises
    ValueError if no arena can have given that out.
    """

    def __init__(self, start: int, size_bytes: int, taken: Mapping[int, int] | None = None) -> None:
        self._start = start
        self._top = (size_bytes // _LINE_BYTES).bit_length() - 1
        self._free: list[list[int]] = [[] for _ in range(self._top + 1)]
        self._orders: dict[int, int] = {}
        end = 0
        for offset, taken_bytes in sorted((taken or {}).items()):
            block, order = (offset - start) // _LINE_BYTES, _order_of(taken_bytes)
            if block < end or block & (1 << order) - 1 or (offset - start) % _LINE_BYTES:
                raise ValueError(f"no {taken_bytes} bytes were given out at {offset}")
            self._free_between(end, block)
            self._orders[block] = order
            end = block + (1 << order)
        if end > 1 << self._top:
            raise ValueError("more was given out than there is")
        self._free_between(end, 1 << self._top)
        self._is_merged = True

    @property
    def taken_bytes(self) -> int:
        """How much is taken, in whole blocks."""
        return sum(_LINE_BYTES << order for order in self._orders.values())

    @property
    def taken(self) -> dict[int, int]:
        """What is taken: offsets and sizes in bytes, rounded up."""
        return {
            self._start + block * _LINE_BYTES: _LINE_BYTES << order
            for block, order in sorted(self._orders.items())
        }

    def take_all(self) -> list[int]:
        """Take everything that is free; the offsets of the blocks."""
        found = [(block, order) for order, free in enumerate(self._free) for block in free]
        self._orders |= dict(found)
        self._free = [[] for _ in self._free]
        return [self._start + block * _LINE_BYTES for block, _ in found]

    def take(self, size_bytes: int) -> int:
        """The offset of a free range. Raises OSError (ENOSPC)."""
        wanted = _order_of(size_bytes)
        order = self._order_from(wanted)
        if order > self._top and not self._is_merged:
            self._merge()
            order = self._order_from(wanted)
        if order > self._top:
            raise OSError(errno.ENOSPC, "the extent tables are full")
        block = self._free[order].pop()
        while order > wanted:
            order -= 1
            self._free[order].append(block + (1 << order))
        self._orders[block] = wanted
        return self._start + block * _LINE_BYTES

    def give_back(self, start: int) -> None:
        """Free a range that was taken."""
        block = (start - self._start) // _LINE_BYTES
        self._free[self._orders.pop(block)].append(block)
        self._is_merged = False

    def _free_between(self, block: int, end: int) -> None:
        """Free a range of lines, in blocks that are as large as possible."""
        while block < end:
            order = (end - block).bit_length() - 1
            if block:
                order = min(order, (block & -block).bit_length() - 1)
            self._free[order].append(block)
            block += 1 << order

    def _order_from(self, order: int) -> int:
        """The least order, from this one on, with a free block; above the highest if none has
        one."""
        while order <= self._top and not self._free[order]:
            order += 1
        return order

    def _merge(self) -> None:
        for order in range(self._top):
            size = 1 << order
            free = set(self._free[order])
            merged = [block for block in free if not block & size and block + size in free]
            free -= {buddy for block in merged for buddy in (block, block + size)}
            self._free[order] = list(free)
            self._free[order + 1] += merged
        self._is_merged = True


def _order_of(size_bytes: int) -> int:
    """The order of the smallest block for so many bytes."""
    return ((size_bytes - 1) // _LINE_BYTES).bit_length()
