"""Talking to a running daemon: JSON lines over a Unix socket, one for each mount.

A request is `{"method": NAME, "params": {…}, "version": V}`, its answer `{"result": …}` or
`{"error": {"message": SENTENCE, "exit_code": N}}`, with a `version` too: that of the program. A
command meets daemons of other versions, since an upgrade replaces the one and not the other. So
each side takes no notice of what it doesn't know and can do without: other members of requests and
answers, parameters that are null. What can't be done is one sentence that names both versions,
where they differ. So parameters that come later are null unless somebody asks for them, and members
that come later have defaults. The socket is named after the mount's device
number, which stat(2) of any file of the mount tells: /run/pmemfs/0:57.sock. So the daemon of a
mount is found without asking the mount, and a socket whose daemon died belongs to no mount.

`places` says where sockets lie, and whose they must be. Both sides look at who is at the other end:
a daemon answers its owner and root, a command believes the owner of the mount.
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

REQUEST_LIMIT_BYTES = 64 * 1024
ANSWER_LIMIT_BYTES = 4 << 20
"""The longest answer that is needed is `stat` of a machine with 1024 CPUs."""

_UCRED = struct.Struct("3i")
"""pid, uid, gid of the peer of a Unix socket, see unix(7)."""


class Connection(Protocol):
    """A socket, Python's or trio's."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """See getsockopt(2)."""


def peer_uid(connection: Connection) -> int:
    """The user at the other end, as the kernel noted when it connected or began to listen."""
    return _credentials(connection)[1]


def peer_pid(connection: Connection) -> int:
    """The process at the other end, as `peer_uid`."""
    return _credentials(connection)[0]


def _credentials(connection: Connection) -> tuple[int, int]:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid
