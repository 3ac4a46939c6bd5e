"""What the kernel is told to ask again, because it can't know that it has changed.

A handler waits until the kernel has been told, and only then answers. So no program that knows of
the change finds what was cached before. This is safe only for attributes, which the kernel forgets
without a lock. To forget an entry it takes the directory's lock, which this very request may hold.
To forget data it waits for writes of pages, which this process may have to answer. So no request
may ever wait for these two. Only a question on the control socket does, which locks or unlocks a
key; all other changes come through the kernel.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from pmemfs.volume.base import Later

T = TypeVar("T")
U = TypeVar("U")


class Notifier:
    """Tells the kernel of a mount. Before the mount is made there is nothing to tell."""

    def __init__(self) -> None:
        self.tell: Callable[[int], Awaitable[None] | None] = lambda ino: None
        """Let the kernel ask for an inode's attributes again. If this returns something, it has to
        be awaited. A door sets it, and the others."""
        self.forget_inode: Callable[[int], Awaitable[None] | None] = lambda ino: None
        """Let the kernel forget an inode's attributes and pages. No request may await it."""
        self.forget_name: Callable[[int, bytes], Awaitable[None] | None] = lambda ino, name: None
        """Let the kernel forget what a name in a directory leads to. No request may await it."""
        self.doubt_names: Callable[[], Awaitable[None] | None] = lambda: None
        """Let the kernel ask for every name again before it relies on it, also for those that were
        not there."""


def after(told: Awaitable[None] | None, answer: T) -> Later[T]:
    """An answer that is given only after the kernel has been told."""
    return answer if told is None else _after(told, answer)


async def _after(told: Awaitable[None], answer: T) -> T:
    await told
    return answer


def after_failing(told: Awaitable[None] | None, error: Exception) -> Later[NoReturn]:
    """As `after`, for an error: what changed before the failure has changed all the same."""
    if told is None:
        raise error
    return _after_failing(told, error)


async def _after_failing(told: Awaitable[None], error: Exception) -> NoReturn:
    await told
    raise error


def later(answer: Later[T], then: Callable[[T], U]) -> Later[U]:
    """Apply `then` to an answer, at once if the answer is there."""
    return _later(answer, then) if isinstance(answer, Coroutine) else then(answer)


async def _later(answer: Coroutine[Any, Any, T], then: Callable[[T], U]) -> U:
    return then(await answer)
