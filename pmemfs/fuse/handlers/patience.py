"""Lets a request wait for what it needs from the pool, without holding up other requests.

An operation of the file system is one step to all other tasks, so nothing may wait in its middle.
An operation that meets an inode which takes long to read raises NotRead before it has changed
anything. Then the inode is read, a few frames of its log at a time, with other requests in between,
and the operation begins again.

An operation may find no room only because a daemon has died, which has left frames taken that
nobody owns; because the kernel has not said yet that it forgets what was just removed; or because
free frames of a sparse pool have the memory that it needs. Then these are waited or searched for
before it is told so. Invariants:
- all requests that need the same inode wait for one reading of it;
- one inode is read at a time, so other requests wait for one slice of reading at most, however many
  inodes are wanted.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from functools import partial
from types import CoroutineType
from typing import Any, ParamSpec, TypeVar

import trio

from pmemfs.medium.shortage import TRIES, Attempts, FindRoom
from pmemfs.volume.base import Later, Volume
from pmemfs.volume.fs.reading import MayWait, NotRead, may_read_in_steps

T = TypeVar("T")
P = ParamSpec("P")


class Patience:
    """Lets operations of one volume wait for inodes that take long to read, and for room.

    `find_room` looks for room that there will be in a moment, or can be made.
    """

    def __init__(self, volume: Volume, find_room: FindRoom) -> None:
        self._volume = volume
        self._find_room = find_room
        self._lock = trio.Lock()

    def begin(
        self, operation: Callable[P, Later[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Later[T]:
        """The answer of an operation: at once if all that it needs is in memory."""
        # As `MayWait` does, but without an object, because every request passes here.
        token = may_read_in_steps.set(True)
        try:
            answer = operation(*args, **kwargs)
        except NotRead as missing:
            return self._begin_again(partial(operation, *args, **kwargs), missing.number)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return self._begin_with_room(partial(operation, *args, **kwargs), error)
        finally:
            may_read_in_steps.reset(token)
        # CoroutineType and not Coroutine, because asking an ABC takes several calls.
        if isinstance(answer, CoroutineType):
            return self._wait(partial(operation, *args, **kwargs), answer)
        return answer

    async def _wait(self, step: Callable[[], Later[T]], answer: Coroutine[Any, Any, T]) -> T:
        try:
            with MayWait():
                return await answer
        except NotRead as missing:
            number = missing.number
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return await self._begin_with_room(step, error)
        return await self._begin_again(step, number)

    async def _begin_again(self, step: Callable[[], Later[T]], number: int) -> T:
        await self._read_on(number)
        answer = self.begin(step)
        return await answer if isinstance(answer, Coroutine) else answer

    async def _begin_with_room(self, step: Callable[[], Later[T]], error: OSError) -> T:
        attempts = Attempts()
        for _ in range(TRIES):
            if self._volume.may_find_room:
                while self._volume.search_on():
                    await trio.lowlevel.checkpoint()
            elif not await self._find_room(attempts):
                break
            try:
                with MayWait():
                    answer = step()
                    return await answer if isinstance(answer, Coroutine) else answer
            except NotRead as missing:
                return await self._begin_again(step, missing.number)
            except OSError as again:
                if again.errno != errno.ENOSPC:
                    raise
                error = again
        raise error

    async def _read_on(self, number: int) -> None:
        """Read on in an inode, after other tasks had their turn."""
        async with self._lock:
            while self._volume.read_on(number):
                await trio.lowlevel.checkpoint()
