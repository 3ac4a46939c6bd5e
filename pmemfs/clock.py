"""The clock of all times that are stored with a file: the kernel's coarse one.

The kernel stamps the files of its own file systems with the time of its last tick. A finer clock is
ahead of that by up to a tick, so a file here would look newer than a file of tmpfs that was written
after it. Source: current_time() in fs/inode.c of Linux; clock_getres(2), CLOCK_REALTIME_COARSE.
"""

from __future__ import annotations

import time
from enum import IntEnum

NO_READ_COUNTS = (1 << 64) - 1
"""In place of the time of a change after which a read is an access: none ever is."""
DAY_NS = 24 * 3600 * 10**9
_CLOCK_REALTIME_COARSE = 5
"""Python has no name for it. Source: include/uapi/linux/time.h."""
_LONGEST_TICK_NS = 10**7
"""Between two ticks of the slowest kernel, HZ=100."""


class AccessTimes(IntEnum):
    """Which accesses change the time of access; see mount(8)."""

    NEVER = 0
    RELATIVE = 1
    """The first after a change, and after a day."""
    STRICT = 2


def coarse_ns() -> int:
    """The time of the kernel's last tick, in ns since 1970."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def not_before(now_ns: int, earlier_ns: int) -> int:
    """A time of now for what has had an earlier one, which may be finer and so ahead by a tick.

    What is ahead by more was set by somebody, or the clock was set back: then now counts.
    """
    return earlier_ns if 0 < earlier_ns - now_ns <= _LONGEST_TICK_NS else now_ns


class FileClock:
    """The times of now in one file system; none is before a time of now that the kernel has set.

    What utimensat(2) sets to now may be finer than a tick where a file of a file system with
    multigrain timestamps was stamped before (Linux 6.13), and what is changed afterwards must not
    look older.
    """

    def __init__(self) -> None:
        self._set_ns = 0

    def now_ns(self) -> int:
        """The time of what changes now."""
        now_ns = coarse_ns()
        return now_ns if now_ns >= self._set_ns else not_before(now_ns, self._set_ns)

    def was_set(self, time_ns: int) -> None:
        """Somebody has set a time of a file, maybe to now."""
        if self._set_ns < time_ns <= time.time_ns():
            self._set_ns = time_ns
