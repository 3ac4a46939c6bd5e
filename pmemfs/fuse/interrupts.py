"""Ends the waiting of callers that are being killed.

A caller that is killed stays until its request is answered, because the request is in our hands.
The kernel says that a signal has come (INTERRUPT), not which one. A signal that the program catches
must not break its read off, since programs don't expect that of files. So only a caller that is
about to die gets EINTR. Source: request_wait_answer in fs/fuse/dev.c of Linux.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import trio

_LOOK_SECONDS = 0.1
_KILLED = 1 << signal.SIGKILL - 1
_EARLY = 64


class Waiting(Protocol):
    """What a request waits in, or for."""

    def cancel(self) -> None:
        """Let it wait no more."""


class Interrupts:
    """The requests of one mount that wait, by their numbers."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Waiting, int]] = {}
        self._early: OrderedDict[int, None] = OrderedDict()
        """Interrupts that came before their requests, on another way."""

    @contextmanager
    def waiting(
        self, unique: int, pid: int, nursery: trio.Nursery
    ) -> Iterator[trio.CancelScope]:  # fmt: skip
        """While this lasts, the request waits; its scope is cancelled if its caller is killed."""
        with trio.CancelScope() as scope:
            self.begin(unique, pid, scope, nursery)
            try:
                yield scope
            finally:
                self.end(unique)

    def begin(self, unique: int, pid: int, waiting: Waiting, nursery: trio.Nursery) -> None:
        """From now on the request waits; that is cancelled if its caller is killed."""
        self._waiting[unique] = waiting, pid
        if unique in self._early:
            del self._early[unique]
            nursery.start_soon(self._follow, unique)

    def end(self, unique: int) -> None:
        """The request waits no more."""
        # A read that a data plane has handed over before its death waits twice.
        self._waiting.pop(unique, None)

    def arrived(self, unique: int, nursery: trio.Nursery) -> None:
        """A signal has come for the caller of a request."""
        if unique in self._waiting:
            nursery.start_soon(self._follow, unique)
            return
        self._early[unique] = None
        if len(self._early) > _EARLY:
            self._early.popitem(last=False)

    async def _follow(self, unique: int) -> None:
        """Look until the request is answered, since the kernel tells only of the first signal."""
        while unique in self._waiting:
            waiting, pid = self._waiting[unique]
            if is_dying(pid):
                waiting.cancel()
                return
            await trio.sleep(_LOOK_SECONDS)


def is_dying(pid: int) -> bool:
    """Whether a thread has been killed. The kernel turns every fatal signal into SIGKILL."""
    try:
        # No blocking: this is a file of the kernel.
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        # It is gone, or in a pid namespace that can't be seen from here.
        return True
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in ("SigPnd", "ShdPnd") and int(value, 16) & _KILLED:
            return True
    return False
