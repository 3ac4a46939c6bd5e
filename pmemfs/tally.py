"""Counts of a mount that go on when another process counts.

Invariants:
- what was reported never goes back, because who scrapes counters takes that for a new mount. So a
  total is in the memory before anybody is told it;
- the memory may be any number of counts behind what the process has counted: to write each would
  cost each request. Whoever owns a tally asks for totals now and then, which is all that a death
  loses.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

_WORDS = 32
_WORD_BYTES = 8


class Tally:
    """Words of memory: those of an engine first, and then those of a cache."""

    ENGINE, CACHE = 0, 16

    def __init__(self, fd: int = -1) -> None:
        """`fd` is the memory of an earlier process's tally, whose totals this one adds to;
        -1: there was none."""
        if fd < 0:
            fd = os.memfd_create("pmemfs-tally", os.MFD_CLOEXEC)
            os.ftruncate(fd, _WORDS * _WORD_BYTES)
        self.fd = fd
        self._words = memoryview(mmap.mmap(fd, _WORDS * _WORD_BYTES)).cast("Q")
        self._before = list(self._words)

    def totals(self, first: int, counts: Iterable[int]) -> list[int]:
        """What this process and those before it have counted, from that word on."""
        found = []
        for number, count in enumerate(counts, first):
            self._words[number] = total = max(0, self._before[number] + count)
            found.append(total)
        return found
