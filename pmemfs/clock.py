"""The clock of all times that are stored with a file: the kernel's coarse clock.

The kernel stamps the files of its own file systems with the time of its last tick. A finer clock is
up to a tick ahead of that. With it, a file here would look newer than a file of tmpfs that was
written after it. Source: current_time() in fs/inode.c of Linux; clock_getres(2),
CLOCK_REALTIME_COARSE.
"""

from __future__ import annotations

import time
from enum import IntEnum

NO_READ_COUNTS = (1 << 64) - 1
"""Stands for a time of change after which no read counts as an access."""
DAY_NS = 24 * 3600 * 10**9
_CLOCK_REALTIME_COARSE = 5
"""Python has no name for this clock. Source: include/uapi/linux/time.h."""
LONGEST_TICK_NS = 10**7
"""The time between two ticks of the slowest kernel, with HZ=100."""


class AccessTimes(IntEnum):
    """Which accesses change the time of access; see mount(8)."""

    NEVER = 0
    RELATIVE = 1
    """The first access after a change, and one after a day."""
    STRICT = 2


def coarse_ns() -> int:
    """The time of the kernel's last tick, in ns since 1970."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def not_before(now_ns: int, earlier_ns: int) -> int:
    """The present, for a file with an earlier time that may be finer and so ahead by a tick.

    A time that is ahead by more was set by a user, or the clock was set back. Then the present
    counts.
    """
    return earlier_ns if 0 < earlier_ns - now_ns <= LONGEST_TICK_NS else now_ns


class FileClock:
    """The present in one file system; never before a "now" that the kernel has set on a file.

    utimensat(2) may set a time that is finer than a tick, if a file on a file system with
    multigrain timestamps was stamped before (Linux 6.13). A file that is changed after that must
    not look older.
    """

    def __init__(self) -> None:
        self.set_ns = 0
        """The latest "now" that was set, in ns since 1970."""

    def now_ns(self) -> int:
        """The time for a change that happens now."""
        now_ns = coarse_ns()
        return now_ns if now_ns >= self.set_ns else not_before(now_ns, self.set_ns)

    def was_set(self, time_ns: int) -> None:
        """A user has set a time of a file, perhaps to the present."""
        if self.set_ns < time_ns <= time.time_ns():
            self.set_ns = time_ns
