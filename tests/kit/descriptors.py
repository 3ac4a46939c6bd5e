"""The descriptors of this process, for tests that none is left open."""

from __future__ import annotations

import gc
import os


def open_descriptors() -> set[str]:
    """All that are open."""
    return set(os.listdir("/proc/self/fd"))


def open_before() -> set[str]:
    """All that are open before something is tried. What earlier tests have left to the garbage
    collector is closed first, or it would be closed at any time meanwhile."""
    gc.collect()
    return open_descriptors()
