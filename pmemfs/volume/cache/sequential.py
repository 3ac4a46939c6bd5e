"""Notices readers that go through the origin from front to back.

What is fetched ahead is what such a reader asks for next. After a long way its blocks aren't kept
any more: a scan would throw out all that is hot, and never comes back to what it has read.
Only reads that miss come here. So a reader whose way leads through blocks that the cache has is
noticed anew behind them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

_STREAMS = 64
"""As many readers are remembered."""
_AHEAD_AFTER = 2
"""So many reads that follow each other are a sequence."""


class _Stream(NamedTuple):
    read_count: int
    block_count: int
    ahead_blocks: int


class Advice(NamedTuple):
    """How to serve a read that misses."""

    ahead_blocks: int
    """So many blocks behind it should be fetched as well."""
    is_bypassing: bool
    """Whether its blocks should not be kept."""


_NEITHER = Advice(0, False)


class Readers:
    """The sequential readers of one cache."""

    def __init__(self, block_shift: int) -> None:
        self._shift = block_shift
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        """By the block that each reader is expected to miss next."""
        self.read_ahead_bytes = 0
        """The most that is fetched ahead; 0: nothing."""
        self.bypass_bytes = 0
        """The length from which on a sequence is a scan; 0: none is."""

    def missed(self, first: int, count: int) -> Advice:
        """A read of so many blocks has missed at least the first one."""
        stream = self._streams.pop(first, None)
        if stream is None:
            self._expect(first + count, _Stream(1, count, 0))
            return _NEITHER
        read_count, block_count = stream.read_count + 1, stream.block_count + count
        is_scan = bool(self.bypass_bytes) and block_count << self._shift > self.bypass_bytes
        ahead = 0
        if read_count >= _AHEAD_AFTER and not is_scan:
            # Twice as far each time, as the kernel does, so that a short sequence costs little.
            most = self.read_ahead_bytes >> self._shift
            ahead = min(most, max(2 * stream.ahead_blocks, 2 * count))
        self._expect(first + count + ahead, _Stream(read_count, block_count + ahead, ahead))
        return Advice(ahead, is_scan)

    def is_scan(self, first: int, count: int) -> bool:
        """Whether a read of so many blocks would go on with a scan."""
        stream = self._streams.get(first) if self.bypass_bytes else None
        return stream is not None and stream.block_count + count << self._shift > self.bypass_bytes

    def _expect(self, block: int, stream: _Stream) -> None:
        self._streams[block] = stream
        if len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
