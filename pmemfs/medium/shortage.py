"""Tries again what has found no room: no memory in a sparse medium, or no free frames."""

from __future__ import annotations

import errno
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from pmemfs.errors import PmemfsError

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 5
"""So often room is looked for. Others may take what is found."""


class Attempts:
    """What was looked for so far for one caller who has found no room, again and again."""

    def __init__(self) -> None:
        self.found_bytes = 0
        """Memory that was found last. What the attempt after that had got before it failed is found
        again, and is too little."""
        self.wait_count = 0
        """How many waits for frames there were."""
        self.removal_count = 0
        """How many names had been removed before the last of them."""


FindRoom = Callable[[Attempts], Awaitable[bool]]
"""Looks for room for a caller who has found none; whether it is worth trying again."""


def with_room(method: Callable[P, Awaitable[T]], find_room: FindRoom) -> Callable[P, Awaitable[T]]:
    """A method that is called again if it finds no room, and `find_room` finds some. Raises as it
    does; what fails for want of room must leave all as it was."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        attempts = None
        for _ in range(TRIES):
            try:
                return await method(*args, **kwargs)
            except (OSError, PmemfsError) as error:
                if error.errno != errno.ENOSPC:
                    raise
                attempts = attempts or Attempts()
                if not await find_room(attempts):
                    raise
        return await method(*args, **kwargs)

    return call
