"""How a daemon and the process that compresses for it talk: one request at a time on a socket.

    daemon     length (u4), ID (u1), level (i1), reserved; then the plain bytes
    process    length (u4); then the compressed bytes

A process of its own compresses, and not a thread, because it runs only when no other process wants
the CPU. A thread that waits for its turn while it has the interpreter's lock would stop its daemon.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

from pmemfs.transform.codec import codec_of

REQUEST = struct.Struct("<IBb2x")
ANSWER = struct.Struct("<I")
_MOST_BYTES = 1 << 20
"""Far more than a piece has."""


def yield_to_all() -> None:
    """Let this process run only while a CPU has nothing else to do."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
    # Where the kernel groups processes by session, a policy counts only within a session, and all
    # processes of a session together weigh as much as those of another. So this one has a session
    # of its own, of the least weight. Source: sched(7), "The autogroup feature".
    with suppress(OSError):
        os.setsid()
        with open("/proc/self/autogroup", "w", encoding="ascii") as autogroup:
            autogroup.write("19")


def serve_packing(connection: socket.socket) -> None:
    """Compress what the other end sends until that end closes. Raises OSError."""
    while head := _received(connection, REQUEST.size):
        length, kind, level = REQUEST.unpack(head)
        codec = codec_of(kind)
        if length > _MOST_BYTES or codec is None:
            return
        packed = codec.compress(_received(connection, length), level)
        connection.sendall(ANSWER.pack(len(packed)) + packed)


def _received(connection: socket.socket, length: int) -> bytes:
    """So many bytes, or none if the other end has closed."""
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        count = connection.recv_into(view[done:])
        if not count:
            return b""
        done += count
    return bytes(data)
