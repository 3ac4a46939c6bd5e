"""Notices to the kernel, sent through the data plane, because only it has the connection.

A thread of the data plane that serves no queue writes each notice and sends back the errno, in
order. So sending a notice holds up no request, and the sender can wait until the kernel knows.
`handlers/notifications` says what may be waited for.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Generator
from typing import Any

import trio

from pmemfs.fuse import wire

_ERRNO_BYTES = 4
_WHOLE = wire.OUT_HEADER.size + wire.NOTIFY_INVAL_INODE_OUT.size


class Told:
    """A notice. Awaiting it ends once the kernel has been told."""

    def __init__(self) -> None:
        self._is_over = trio.Event()

    def end(self) -> None:
        """The kernel knows now, or never will."""
        self._is_over.set()

    def __await__(self) -> Generator[Any, Any, None]:
        return self._is_over.wait().__await__()


class Notices:
    """The notices of one mount. If the socket has no room, they are sent once it has."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unsent: deque[bytes] = deque()
        self._under_way: deque[Told] = deque()
        self._has_hung_up = False

    def tell(self, ino: int) -> Told:
        """Let the kernel ask for the attributes of an inode again."""
        # An offset below 0 means: only attributes, and no data.
        notice = wire.NOTIFY_INVAL_INODE_OUT.pack(ino, -1, 0)
        told = Told()
        self._under_way.append(told)
        self._unsent.append(wire.OUT_HEADER.pack(_WHOLE, wire.NOTIFY_INVAL_INODE, 0) + notice)
        self._send()
        return told

    async def serve(self) -> None:
        """Learn which notices the kernel has got, until the data plane hangs up."""
        while not self._has_hung_up:
            await trio.lowlevel.wait_readable(self._connection)
            try:
                # The errno says whether the kernel knew the inode. Either way it is told now.
                errno = self._connection.recv(_ERRNO_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                errno = b""
            if not errno:
                self._hang_up()
                return
            self._under_way.popleft().end()
            self._send()

    def _send(self) -> None:
        if self._has_hung_up:
            self._hang_up()
        while self._unsent:
            try:
                self._connection.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                # The notices that fill the socket will be answered, and then there is room.
                return
            except (BrokenPipeError, ConnectionResetError):
                self._hang_up()
                return
            self._unsent.popleft()

    def _hang_up(self) -> None:
        self._has_hung_up = True
        self._unsent.clear()
        while self._under_way:
            self._under_way.popleft().end()
