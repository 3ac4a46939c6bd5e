"""Sockets that one task serves, and how it waits for their next message: asleep or awake.

A program that calls one operation after another sends its next request 10 to 100 us after the last
answer. Falling asleep and waking takes as long, and longer if an idle CPU halts. So after a short
sleep this task waits awake for the next message, with `sched_yield` for other threads that want the
CPU. It falls asleep if that was in vain, or if other tasks have work. An idle mount uses no CPU.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

import trio

AWAKE_SECONDS = 100e-6
"""30 us gained less; see docs/performance.md."""
_TURN_SECONDS = 1e-3


class Gate(Protocol):
    """What this process is in whenever its code runs, and out of while it waits."""

    def enter(self) -> None:
        """Go on, as the only one."""

    def leave(self) -> None:
        """Let others change what is served."""


class Inbox:
    """Sockets that may have messages."""

    def __init__(self, connections: Sequence[socket.socket], gate: Gate | None = None) -> None:
        """Within the `gate` nobody else changes what this process serves."""
        self._gate = gate
        self._mine = {connection.fileno(): connection for connection in connections}
        self._muted: set[socket.socket] = set()
        self._messages = select.epoll()
        self._pays = False
        self._turn_ends = 0.0
        for connection in connections:
            self._messages.register(connection, select.EPOLLIN)

    def __bool__(self) -> bool:
        """Whether a socket is left to wait for."""
        return bool(self._mine)

    def close(self) -> None:
        """Stop watching; the sockets stay open."""
        self._messages.close()

    def remove(self, connection: socket.socket) -> None:
        """Take a socket out whose other end has hung up."""
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
        """Let all other tasks run until there is a message."""
        since = perf_counter()
        await trio.lowlevel.wait_readable(self._messages.fileno())
        now = perf_counter()
        self._pays = now - since < AWAKE_SECONDS
        self._turn_ends = now + _TURN_SECONDS

    def next(self, *, may_wait: bool) -> list[socket.socket]:
        """The sockets that have messages; [] when it is time to let other tasks run.

        With `may_wait` this may wait awake for a message that comes soon.
        """
        if perf_counter() >= self._turn_ends:
            return []
        found = self._messages.poll(0)
        if not found and may_wait and self._pays:
            found = self._stay_awake()
        return [self._mine[number] for number, _ in found]

    def _stay_awake(self) -> list[tuple[int, int]]:
        until = perf_counter() + AWAKE_SECONDS
        if self._gate:
            self._gate.leave()
        try:
            while perf_counter() < until:
                os.sched_yield()
                found = self._messages.poll(0)
                if found:
                    return found
        finally:
            if self._gate:
                self._gate.enter()
        return []
