"""Who is changing which blocks of the origin: two writes to one block go one after the other.

An origin may end two writes to one range in any order. And a fetch must not begin while the origin
is given bytes that the cache does not have.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class OriginOrder:
    """Ranges of blocks of which the origin is being given bytes."""

    def __init__(self) -> None:
        self._changing: dict[tuple[int, int, int], trio.Event] = {}
        self._count = 0

    def is_changing(self, block: int) -> bool:
        """Whether somebody changes this block now."""
        return bool(self._changing) and self._found(block, block + 1) is not None

    @asynccontextmanager
    async def changing(self, first: int, count: int) -> AsyncIterator[None]:
        """While this lasts, nobody else changes these blocks of the origin."""
        await self.unchanging(first, count)
        self._count += 1
        key, over = (first, first + count, self._count), trio.Event()
        self._changing[key] = over
        try:
            yield
        finally:
            del self._changing[key]
            over.set()

    async def unchanging(self, first: int, count: int) -> None:
        """Wait until nobody changes these blocks. Nobody does when this returns."""
        while (over := self._found(first, first + count)) is not None:
            await over.wait()

    def _found(self, first: int, end: int) -> trio.Event | None:
        for (start, stop, _), over in self._changing.items():
            if start < end and first < stop:
                return over
        return None
