"""Carries out changes of the index, each of whose steps ends with a fence.

On cache lines a fence costs nothing, and is done by this thread. On media whose fence is msync, it
takes as long as a device does, so it is done by another thread, once for all changes that wait for
one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

import trio

from pmemfs.errors import SetBusy
from pmemfs.medium.base import Durability, Medium
from pmemfs.volume.cache.steps import Steps

T = TypeVar("T")

_PAUSE_SECONDS = 0.0002


class Fencing:
    """The fences of one medium."""

    def __init__(self, medium: Medium) -> None:
        self._medium = medium
        self.is_quick = medium.durability is not Durability.MSYNC
        """Whether a fence may be done by this thread."""
        self._lock = trio.Lock()
        self._begun = 0
        self._failure: OSError | None = None

    async def run(self, begin: Callable[[], Steps[T]]) -> T:
        """Carry out a change, from its beginning whenever a worker is just changing the set."""
        while True:
            try:
                if self.is_quick:
                    return self.run_now(begin())
                # A change that were cancelled half way would leave an old tag beside the new one.
                with trio.CancelScope(shield=True), closing(begin()) as steps:
                    return await self._run(steps)
            except SetBusy:
                await trio.sleep(_PAUSE_SECONDS)

    def run_now(self, steps: Steps[T]) -> T:
        """Carry out a change in this thread. Raises SetBusy."""
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            self._medium.fence()

    async def fence(self) -> None:
        """Wait until everything that was flushed before is durable. Raises OSError."""
        if self.is_quick:
            self._medium.fence()
            return
        needed = self._begun + 1
        async with self._lock:
            # Whoever had the lock may have begun after us, and then that fence was ours as well.
            if self._begun < needed:
                self._begun += 1
                try:
                    await trio.to_thread.run_sync(self._medium.fence)
                except OSError as error:
                    self._failure = error
            if self._failure:
                raise self._failure

    async def _run(self, steps: Steps[T]) -> T:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            await self.fence()
