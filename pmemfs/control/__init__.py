"""Talking to a running daemon: JSON lines over a Unix socket, one socket for each mount.

A request is `{"method": NAME, "params": {…}, "version": V}`. Its answer is `{"result": …}` or
`{"error": {"message": SENTENCE, "exit_code": N, "kind": NAME, "errno": N}}`, with the `version` of
the program, too. Both may have the `mount`: a number that tells it from all others. A daemon
refuses a request for another mount, and one that names none may be for any.

A command may meet a daemon of another version, because an upgrade replaces only the programs on
disk. So each side ignores what it doesn't know and can do without: other members of requests and
answers, and parameters that are null. If something can't be done, one sentence says so and names
both versions if they differ. Hence a new parameter is null unless the user asks for it, and a new
member has a default.

A socket is named after the mount's device number, which stat(2) of any file of the mount tells:
/run/pmemfs/0:57.sock. So a daemon is found without asking its mount, which may hang, and the socket
of a daemon that died belongs to no mount. The kernel gives the number of a mount that has ended to
another one, which `channel` notices by `mount`.

`places` says where sockets lie and whom they must belong to. Both sides look who is at the other
end: a daemon answers its owner and root, and a command believes only the owner of the mount.
"""

from __future__ import annotations

import os
import select
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

REQUEST_LIMIT_BYTES = 1 << 20
"""A pin of 8,000 files whose paths are long has to fit."""
ANSWER_LIMIT_BYTES = 4 << 20
"""The longest answer that has to fit is `stat` of a machine with 1024 CPUs."""

MOST_DESCRIPTORS = 3
"""How many descriptors an answer carries at most."""

_SO_PEERPIDFD = 77
_UCRED = struct.Struct("3i")
"""pid, uid, gid of the peer of a Unix socket, see unix(7)."""


class Connection(Protocol):
    """A socket, Python's or trio's."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """See getsockopt(2)."""

    def fileno(self) -> int:
        """The descriptor; -1: it is closed."""


class Peer:
    """Who asks: the process that made a connection. There is one object for each connection."""

    __slots__ = ("__weakref__", "_connection", "pid", "uid")

    def __init__(self, pid: int, uid: int, connection: Connection | None = None) -> None:
        self._connection = connection
        self.pid = pid
        """0 if it is in another pid namespace."""
        self.uid = uid

    def is_gone(self) -> bool:
        """Whether it waits for no answer any more, because it has given up or was ended."""
        if self._connection is None:
            return False
        fd = self._connection.fileno()
        if fd < 0:
            return True
        poll = select.poll()
        # A peer that only says no more has not hung up.
        poll.register(fd, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))


class WithDescriptors:
    """A result that carries descriptors. The server sends copies of them and closes them."""

    __slots__ = ("descriptors", "result")

    def __init__(self, result: Any, descriptors: Sequence[int]) -> None:
        self.result = result
        self.descriptors = descriptors


def close_all(descriptors: Iterable[int]) -> None:
    """Close what was to go with an answer, or came with one that is of no use."""
    for fd in descriptors:
        os.close(fd)


def peer_of(connection: Connection) -> Peer:
    """The process at the other end, as the kernel noted when it connected."""
    pid, uid = _credentials(connection)[:2]
    return Peer(pid, uid, connection)


def peer_uid(connection: Connection) -> int:
    """The user at the other end, as the kernel noted when that side connected or listened."""
    return _credentials(connection)[1]


def peer_pid(connection: Connection) -> int:
    """The process at the other end, as `peer_uid` has it; 0 if it is in another pid namespace."""
    return _credentials(connection)[0]


def peer_pidfd(connection: Connection) -> int:
    """A pidfd of the process at the other end. Raises OSError where that is gone.

    Unlike a number, it is also one of a process of another pid namespace, since Linux 6.5.
    """
    import socket

    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError:
        return os.pidfd_open(peer_pid(connection))
    return int.from_bytes(raw, sys.byteorder)


def _credentials(connection: Connection) -> tuple[int, int]:
    # Whoever has a connection has loaded this. A command that finds no daemon has none.
    import socket

    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid
