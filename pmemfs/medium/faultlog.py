"""Faults in the log: of one page, one line a minute.

Who meets a bad page mostly meets it again, and a program that reads a damaged file in a loop is not
to fill the disk that the log lies on.
"""

from __future__ import annotations

import logging
import time

log = logging.getLogger(__name__)

_QUIET_SECONDS = 60
_MOST_PAGES = 4096
"""Of which something was said lately; with more, the oldest may be named again sooner."""

_said: dict[tuple[str, int], float] = {}


def report_fault(path: str, pfn: int, what: str) -> None:
    """Say that a page frame of a pool could not be touched, and what came of it."""
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
