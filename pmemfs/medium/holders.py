"""Which processes have a source open, as far as /proc shows them to this user.

Nothing is asked of any mount: links and lists of /proc are read, and the names in them compared. So
it can't hang.
"""

from __future__ import annotations

import os

DELETED = " (deleted)"


def holders_of(path: str) -> list[int]:
    """The processes that have this file or device open or mapped, without this one."""
    wanted = os.path.realpath(path)
    return [
        pid
        for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
        if pid != os.getpid() and (_has_open(pid, wanted) or _has_mapped(pid, wanted))
    ]


def named(pids: list[int]) -> str:
    """Some processes, as the subject of a sentence: "process 12", "processes 12 and 40"."""
    *others, last = map(str, pids)
    return f"processes {', '.join(others)} and {last}" if others else f"process {last}"


def _has_open(pid: int, wanted: str) -> bool:
    directory = f"/proc/{pid}/fd"
    try:
        fds = os.listdir(directory)
    except OSError:
        # It has ended, or is another user's.
        return False
    for fd in fds:
        try:
            if os.readlink(f"{directory}/{fd}").removesuffix(DELETED) == wanted:
                return True
        except OSError:
            continue
    return False


def _has_mapped(pid: int, wanted: str) -> bool:
    """Whether a process has it in its memory: it may have closed the descriptor since."""
    ends = tuple(f" {wanted}{ending}\n" for ending in ("", DELETED))
    try:
        with open(f"/proc/{pid}/maps", errors="surrogateescape") as maps:
            return any(line.endswith(ends) for line in maps)
    except OSError:
        return False
