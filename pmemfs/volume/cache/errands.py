"""What requests want of the origin, done apart from them.

Invariants:
- whoever asked waits no longer than the user said, and not at all once it is killed;
- the errand goes on without it, because the origin may touch pages until it answers, and whoever
  gave up could not hold them;
- it goes no further than that: a write that has failed for its program must not be stored later,
  over what the program has written since.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from pmemfs.errors import system_error
from pmemfs.volume.cache.link import OriginLink

_T = TypeVar("_T")


class Errands:
    """The errands of one cache, while `nursery` is there."""

    def __init__(self, link: OriginLink) -> None:
        self._link = link
        self.nursery: trio.Nursery | None = None

    async def run(self, work: Callable[[], Awaitable[_T]], *, is_long: bool = False) -> _T:
        """Do some work with the origin, and wait for it; if it `is_long`, for as long as the origin
        answers.

        Raises what it raises, and OSError (EIO) if the time is over.
        """
        if self.nursery is None:
            return await work()
        results: list[_T] = []
        failures: list[Exception] = []
        done, scope = trio.Event(), trio.CancelScope()

        async def carry_out() -> None:
            try:
                with scope:
                    results.append(await work())
            except Exception as error:
                failures.append(error)
            finally:
                done.set()

        self.nursery.start_soon(carry_out)
        try:
            while not done.is_set():
                with trio.move_on_after(self._link.timeout_seconds):
                    await done.wait()
                if not done.is_set() and not (is_long and not self._link.hangs):
                    raise self._link.note_timeout()
        finally:
            scope.cancel()
        if failures:
            raise failures[0]
        if not results:
            # The mount ends.
            raise system_error(errno.EIO)
        return results[0]
