"""Callers that occupy all that the rings of a mount have room for: as many statfs(2) on each CPU.

While all of them wait for the daemon, the kernel hands the data plane nothing else. The daemon
starts this with a path on the mount and a number, and answers when it likes. It is a process of its
own, because a thread of the daemon would wait for the daemon. It imports only built-in modules,
because it is started while requests wait.
"""

import _thread
import posix
import sys

_STACK_BYTES = 64 * 1024


def call(path: str, cpu: int, is_over: _thread.LockType) -> None:
    """Wait on one CPU for one answer."""
    try:
        posix.sched_setaffinity(0, [cpu])
        posix.statvfs(path)
    except OSError:
        # The mount is gone, or the CPU.
        pass
    finally:
        is_over.release()


def main() -> None:
    """Make all calls, and end when all are answered."""
    path, count = sys.argv[-2], int(sys.argv[-1])
    _thread.stack_size(_STACK_BYTES)
    waiting = []
    for cpu in posix.sched_getaffinity(0):
        for _ in range(count):
            is_over = _thread.allocate_lock()
            is_over.acquire()
            _thread.start_new_thread(call, (path, cpu, is_over))
            waiting.append(is_over)
    for is_over in waiting:
        is_over.acquire()


if __name__ == "__main__":
    main()
