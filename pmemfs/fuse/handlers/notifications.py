"""What the kernel is told to ask again, because it can't know that it has changed.

A handler awaits that the kernel has been told before it answers: then nobody who learns of the
change finds what was cached before. That is safe of attributes alone, which the kernel forgets
without a lock. To forget an entry it takes the lock of the directory, and to forget data it waits
for the pages' writes, which we may have to answer: neither may ever be awaited by a request, and
neither is needed so far, because all changes but these come through the kernel.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from pmemfs.volume.base import Later

T = TypeVar("T")
U = TypeVar("U")


class Notifier:
    """Tells the kernel of a mount. Before there is one, nobody has anything to forget."""

    def __init__(self) -> None:
        self.tell: Callable[[int], Awaitable[None] | None] = lambda ino: None
        """Let the kernel ask again what an inode is like; what is answered, if anything, is to be
        awaited. A door sets it."""


def after(told: Awaitable[None] | None, answer: T) -> Later[T]:
    """An answer that is to be given when the kernel has been told."""
    return answer if told is None else _after(told, answer)


async def _after(told: Awaitable[None], answer: T) -> T:
    await told
    return answer


def after_failing(told: Awaitable[None] | None, error: Exception) -> Later[NoReturn]:
    """As `after`, for an error: what changed before something failed has changed all the same."""
    if told is None:
        raise error
    return _after_failing(told, error)


async def _after_failing(told: Awaitable[None], error: Exception) -> NoReturn:
    await told
    raise error


def later(answer: Later[T], then: Callable[[T], U]) -> Later[U]:
    """What follows from an answer, at once where the answer is there."""
    return _later(answer, then) if isinstance(answer, Coroutine) else then(answer)


async def _later(answer: Coroutine[Any, Any, T], then: Callable[[T], U]) -> U:
    return then(await answer)
