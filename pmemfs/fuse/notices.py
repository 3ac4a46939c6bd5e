"""Notices to the kernel, sent through the data plane, because only it has the connection.

A thread of the data plane that serves no queue writes each notice and sends back its number and the
errno, in order. So sending a notice holds up no request, and the sender can wait until the kernel
knows. `handlers/notifications` says what may be waited for.

A data plane that dies may take a notice with it that was not answered; a daemon that dies leaves
answers that its successor has not waited for. So each notice has a number that no other one of the
mount has.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time
from collections import deque
from collections.abc import Generator
from typing import Any

import trio

from pmemfs.fuse import wire
from pmemfs.fuse.handlers.notifications import Notifier

_NUMBER = struct.Struct("<Q")
_ANSWER_BYTES = 2 * _NUMBER.size


class Told:
    """A notice. Awaiting it ends once the kernel has been told."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self._is_over = trio.Event()

    @property
    def is_over(self) -> bool:
        """Whether the kernel has been told, or never will be."""
        return self._is_over.is_set()

    def end(self) -> None:
        """The kernel knows now, or never will."""
        self._is_over.set()

    def __await__(self) -> Generator[Any, Any, None]:
        return self._is_over.wait().__await__()


class Notices:
    """The notices of one mount. If the socket has no room, they are sent once it has."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._numbers = itertools.count(time.time_ns())
        self._unsent: deque[bytes] = deque()
        self._under_way: dict[int, Told] = {}
        self._has_hung_up = False

    def speak_for(self, notifier: Notifier) -> None:
        """Be what handlers tell the kernel through."""
        notifier.tell, notifier.forget_inode = self.tell, self.forget_inode
        notifier.forget_name, notifier.doubt_names = self.forget_name, self.doubt_names

    def tell(self, ino: int) -> Told:
        """Let the kernel ask for the attributes of an inode again."""
        # An offset below 0 means: only attributes, and no data.
        return self._tell(wire.NOTIFY_INVAL_INODE, wire.NOTIFY_INVAL_INODE_OUT.pack(ino, -1, 0))

    def forget_inode(self, ino: int) -> Told:
        """Let the kernel forget an inode's attributes and pages."""
        # A length of 0 means: to the end.
        return self._tell(wire.NOTIFY_INVAL_INODE, wire.NOTIFY_INVAL_INODE_OUT.pack(ino, 0, 0))

    def forget_name(self, parent: int, name: bytes) -> Told:
        """Let the kernel forget what a name leads to."""
        entry = wire.NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), 0)
        return self._tell(wire.NOTIFY_INVAL_ENTRY, entry + name + b"\0")

    def doubt_names(self) -> Told:
        """Let the kernel ask for each name again before it relies on it, if it knows how to."""
        return self._tell(wire.NOTIFY_INC_EPOCH, b"")

    def _tell(self, code: int, notice: bytes) -> Told:
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(notice), code, 0)
        number = next(self._numbers)
        told = self._under_way[number] = Told(_NUMBER.pack(number) + header + notice)
        self._unsent.append(told.message)
        self._send()
        return told

    def tell_again(self) -> None:
        """The data plane was killed: say all that it has not answered once more. What it has said
        is said twice, which does no harm."""
        self._unsent = deque(told.message for told in self._under_way.values())
        self._send()

    async def serve(self) -> None:
        """Learn which notices the kernel has got, until the data plane hangs up."""
        while not self._has_hung_up:
            await trio.lowlevel.wait_readable(self._connection)
            try:
                # The errno says whether the kernel knew the inode. Either way it is told now.
                answer = self._connection.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                answer = b""
            if not answer:
                self._hang_up()
                return
            if len(answer) < _ANSWER_BYTES:
                # A data plane that has gone wrong must not end its daemon.
                continue
            told = self._under_way.pop(_NUMBER.unpack_from(answer)[0], None)
            if told is not None:
                told.end()
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
        for told in self._under_way.values():
            told.end()
        self._under_way.clear()
