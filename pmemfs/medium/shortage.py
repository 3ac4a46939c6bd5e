"""Tries again what has found no memory in a sparse medium."""

from __future__ import annotations

import errno
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from pmemfs.errors import PmemfsError

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 4
"""So often memory is looked for. Others may take what is found."""


def with_memory(
    method: Callable[P, Awaitable[T]], find_memory: Callable[[], Awaitable[bool]]
) -> Callable[P, Awaitable[T]]:
    """A method that is called again if it finds no memory, and `find_memory` finds some. Raises as
    it does; what fails for want of memory must leave all as it was."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(TRIES):
            try:
                return await method(*args, **kwargs)
            except (OSError, PmemfsError) as error:
                if error.errno != errno.ENOSPC or not await find_memory():
                    raise
        return await method(*args, **kwargs)

    return call
