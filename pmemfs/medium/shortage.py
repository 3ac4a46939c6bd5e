"""Tries again what has found no memory in a sparse medium."""

from __future__ import annotations

import errno
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from pmemfs.errors import PmemfsError

P = ParamSpec("P")
T = TypeVar("T")

FindMemory = Callable[[int], Awaitable[int]]
"""Looks for memory for whom the medium has found none; how much was found, in bytes, or 0: it is
not worth trying again. It takes what it has found for the same attempt before, or 0: what that has
got before it failed is found again, and is too little."""
TRIES = 4
"""So often memory is looked for. Others may take what is found."""


def with_memory(
    method: Callable[P, Awaitable[T]], find_memory: FindMemory
) -> Callable[P, Awaitable[T]]:
    """A method that is called again if it finds no memory, and `find_memory` finds some. Raises as
    it does; what fails for want of memory must leave all as it was."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        found_bytes = 0
        for _ in range(TRIES):
            try:
                return await method(*args, **kwargs)
            except (OSError, PmemfsError) as error:
                if error.errno != errno.ENOSPC:
                    raise
                found_bytes = await find_memory(found_bytes)
                if not found_bytes:
                    raise
        return await method(*args, **kwargs)

    return call
