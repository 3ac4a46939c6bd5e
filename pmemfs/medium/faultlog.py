"""Faults in the log: one line a minute for each page.

A program that meets a bad page mostly meets it again. If it reads a damaged file in a loop, it must
not fill the disk that the log lies on.
"""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

_QUIET_SECONDS = 60
_MOST_PAGES = 4096
"""How many pages are remembered; with more, the oldest may be reported again within the minute."""

_said: dict[tuple[str, int], float] = {}


def report_fault(path: str, pfn: int, what: str) -> None:
    """Log that a page frame of a pool could not be touched, and what came of it."""
    now = time.monotonic()
    key = (path, pfn)
    last = _said.get(key)
    if last is not None and now - last < _QUIET_SECONDS:
        return
    _said.pop(key, None)
    while len(_said) >= _MOST_PAGES:
        del _said[next(iter(_said))]
    _said[key] = now
    log.error("%s: page frame %#x could not be touched; %s", path, pfn, what)
