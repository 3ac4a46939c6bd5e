"""A process that waits to take the place of its daemon, with all modules loaded.

To start Python and load what a daemon needs takes longer than all else in a takeover. So a daemon
forks before it has opened anything, and the keeper gets the end of a socket: by that it tells the
process to go on as the next daemon (`daemons/keeperd`). Invariants:
- it is forked by a process of one thread, that has opened nothing of a mount. It holds no
  descriptor but its socket, and what it does with the memory that it shares with its daemon is to
  let it be: only pages that the daemon changes are there twice;
- it ends when nobody has the other end of its socket any more, and no other way: signals are for
  those who serve the mount.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from typing import NamedTuple

from pmemfs.control.prepared import STARTER_FD, keep_only
from pmemfs.control.starter import ENDING_SIGNALS
from pmemfs.units import KIB

_MESSAGE_BYTES = 4 * KIB
_COMM = "/proc/self/comm"
NAME = "pmemfs-standby"
"""What ps(1) and top(1) call it, since its command line is that of its daemon."""


class Standby(NamedTuple):
    """A process that waits, as its daemon has it."""

    pid: int
    fds: tuple[int, int]
    """The end of its socket, and a pidfd."""

    def close(self) -> None:
        """Leave it to who else has the end of its socket. If nobody has, it ends."""
        for fd in self.fds:
            os.close(fd)


class TakeOver(NamedTuple):
    """What a process that has waited is told."""

    fd: int
    """Its connection to the keeper."""


def fork() -> Standby | TakeOver | None:
    """Fork a process that waits. In that process this returns when it is told to take over.

    None if the system allows no more processes, or descriptors.
    """
    # What is loaded now stays to the end, so the garbage collector need not walk it, which would
    # also copy its pages.
    gc.freeze()
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        return None
    with ours, theirs:
        try:
            pid = os.fork()
            if pid:
                return Standby(pid, (os.dup(ours.fileno()), os.pidfd_open(pid)))
        except OSError:
            return None
        ours.close()
        return _wait(theirs.detach())


def _wait(fd: int) -> TakeOver:
    """Return when somebody says so; end when nobody can any more."""
    os.setsid()
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    keep_only(fd, null)
    # Imported here: a daemon that takes nothing over does without it.
    import pmemfs.fuse.takeover  # noqa: F401

    gc.freeze()
    name = _called(NAME)
    with socket.socket(fileno=os.dup(STARTER_FD)) as end:
        message, fds, _, _ = socket.recv_fds(end, _MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if not message:
        os._exit(0)
    os.close(STARTER_FD)
    _called(name)
    return TakeOver(fds[0])


def _called(name: str) -> str:
    """Give this process another name; the one that it had."""
    with open(_COMM, "r+") as file:
        before = file.read().strip()
        file.seek(0)
        file.write(name)
    return before
