"""An answer that comes later, without a task that waits for it.

A task for each request costs more than all that is done for a block that is fetched. So whoever
answers many requests at once gives each of them its answer here. It can be awaited as well, so
callers that know only of coroutines take it for one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import trio
from trio.lowlevel import Abort

from pmemfs.errors import system_error

T = TypeVar("T")


class Coming(Coroutine[Any, Any, T]):
    """An answer, or the error that comes instead. The first one counts."""

    __slots__ = ("_changes", "_error", "_told", "_value", "is_there")

    def __init__(self) -> None:
        self.is_there = False
        self._changes: list[Callable[[T], T]] = []
        self._error: Exception | None = None
        self._told: Callable[[Coming[T]], None] | None = None
        self._value: T

    def then(self, change: Callable[[T], T]) -> Coming[T]:
        """Let the answer go through a function first, which may raise instead."""
        self._changes.append(change)
        return self

    def when_there(self, told: Callable[[Coming[T]], None]) -> None:
        """Have a function called once, when `result` is there. Nobody else may be waiting."""
        if self.is_there:
            told(self)
        else:
            self._told = told

    def give(self, value: T) -> None:
        """This is the answer, unless there is one."""
        if self.is_there:
            return
        try:
            for change in self._changes:
                value = change(value)
        except Exception as error:
            self.fail(error)
            return
        self._value = value
        self._end()

    def fail(self, error: Exception) -> None:
        """There is no answer, but this error, unless there is an answer."""
        if not self.is_there:
            self._error = error
            self._end()

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self.fail(system_error(errno.EINTR))

    def result(self) -> T:
        """The answer. Raises the error."""
        if self._error is not None:
            raise self._error
        return self._value

    def _end(self) -> None:
        self.is_there = True
        told, self._told = self._told, None
        if told is not None:
            told(self)

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        if not self.is_there:
            task = trio.lowlevel.current_task()
            self._told = lambda _: trio.lowlevel.reschedule(task)
            await trio.lowlevel.wait_task_rescheduled(self._give_up)
        return self.result()

    def _give_up(self, _: object) -> Abort:
        self._told = None
        return Abort.SUCCEEDED

    def send(self, value: Any) -> NoReturn:
        """It has no steps of its own."""
        raise RuntimeError("this answer is awaited, or told by `when_there`")

    def throw(self, *error: Any) -> NoReturn:
        """As `send`."""
        self.send(None)

    def close(self) -> None:
        """Nothing has to be let go."""


class Waiter(Protocol):
    """Somebody who is told what comes, as `Coming` is."""

    def give(self, value: Any) -> None:
        """It has come."""

    def fail(self, error: Exception) -> None:
        """It will not come."""


Bring = Callable[[int, int, Waiter], int]
"""Begins to bring the blocks of a range, by offset and length in bytes; of how many the waiter will
be told. 0: this is not the way for them."""


def gathered(parts: Sequence[Coming[T]], join: Callable[[list[T]], T]) -> Coming[T]:
    """One answer out of some, when all of them are there; the first error counts."""
    whole: Coming[T] = Coming()
    left = len(parts)

    def told(_: Coming[T]) -> None:
        nonlocal left
        left -= 1
        if left:
            return
        try:
            whole.give(join([part.result() for part in parts]))
        except Exception as error:
            whole.fail(error)

    for part in parts:
        part.when_there(told)
    return whole
