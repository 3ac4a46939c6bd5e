"""Sockets that one task serves, and how it waits for their next message: asleep, or awake.

Who calls one operation after another sends the next request 10 to 100 us after the last answer,
and to fall asleep and wake takes as long, or longer where an idle CPU halts. So after a short
sleep, the next message is waited for awake, with `sched_yield` for whoever else wants the CPU; when
that was in vain, or other tasks have something to do, asleep. An idle mount uses no CPU.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from time import perf_counter

import trio

AWAKE_SECONDS = 100e-6
"""30 us gained less; see docs/performance.md."""
_TURN_SECONDS = 1e-3


class Inbox:
    """Sockets with messages."""

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        self._mine = {connection.fileno(): connection for connection in connections}
        self._muted: set[socket.socket] = set()
        self._messages = select.epoll()
        self._pays = False
        self._turn_ends = 0.0
        for connection in connections:
            self._messages.register(connection, select.EPOLLIN)

    def __bool__(self) -> bool:
        """Whether there is anything left to wait for."""
        return bool(self._mine)

    def close(self) -> None:
        """Watch nothing any more; the sockets stay open."""
        self._messages.close()

    def remove(self, connection: socket.socket) -> None:
        """Its other end has hung up."""
        self.mute(connection)
        del self._mine[connection.fileno()]

    def mute(self, connection: socket.socket) -> None:
        """Take nothing from a socket until `unmute`."""
        if connection not in self._muted:
            self._muted.add(connection)
            self._messages.unregister(connection)

    def unmute(self, connection: socket.socket) -> None:
        """Take messages again, unless the socket was removed."""
        if connection in self._muted and connection.fileno() in self._mine:
            self._muted.remove(connection)
            self._messages.register(connection, select.EPOLLIN)

    async def wait(self) -> None:
        """Let all others run until there is a message."""
        since = perf_counter()
        await trio.lowlevel.wait_readable(self._messages.fileno())
        now = perf_counter()
        self._pays = now - since < AWAKE_SECONDS
        self._turn_ends = now + _TURN_SECONDS

    def next(self, *, may_wait: bool) -> list[socket.socket]:
        """The sockets with messages; none when it is time to let others run.

        With `may_wait`, what follows soon is waited for.
        """
        if perf_counter() >= self._turn_ends:
            return []
        found = self._messages.poll(0)
        if not found and may_wait and self._pays:
            found = self._stay_awake()
        return [self._mine[number] for number, _ in found]

    def _stay_awake(self) -> list[tuple[int, int]]:
        until = perf_counter() + AWAKE_SECONDS
        while perf_counter() < until:
            os.sched_yield()
            found = self._messages.poll(0)
            if found:
                return found
        return []
