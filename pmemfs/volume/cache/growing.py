"""The end of an origin, and how a cache lets go of its last block when the origin has grown.

The last block may reach beyond the end, and there it has zeroes. Once the origin is larger, these
would be taken for its bytes. Invariants:
- workers write nothing meanwhile: they go by the size that they are shown;
- what was begun to be fetched under the old end is stale before the cache is without the block;
- between that and the new end nothing awaits.
"""

from __future__ import annotations

from functools import partial

from pmemfs.volume.cache.cleaning import Cleaner
from pmemfs.volume.cache.fencing import Fencing
from pmemfs.volume.cache.index import Index
from pmemfs.volume.cache.misses import Misses


class End:
    """Where the origin of one cache ends, for whoever fills a block."""

    def __init__(self) -> None:
        self.size_bytes = 0

    async def move(
        self, size_bytes: int, shift: int, index: Index, misses: Misses, cleaner: Cleaner,
        fencing: Fencing,
    ) -> None:  # fmt: skip
        """The origin has grown. The cache doesn't have the last block when this returns. Raises
        OSError if that is dirty and the origin does not take it."""
        block = self.size_bytes >> shift
        while self.size_bytes & (1 << shift) - 1:
            if await misses.forestall(block, 1):
                continue
            found = index.find(block)
            if found is None:
                break
            if found.tag.is_dirty:
                await cleaner.clean([block])
            else:
                await fencing.run(partial(index.clearing, [found]))
        self.size_bytes = size_bytes
