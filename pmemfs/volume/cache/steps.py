"""Changes of what is stored, as generators that yield wherever the caller has to fence.

Where fences are for cache lines, `carry_out` does it at once. Where they are msync, which takes
milliseconds, a caller that must not wait lets a thread fence, and then goes on:

    for _ in steps:
        await trio.to_thread.run_sync(medium.fence)
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from pmemfs.medium.base import Medium

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Its value is what has become of the change."""


def carry_out(steps: Steps[T], medium: Medium) -> T:
    """Carry out a change, with each fence in this thread."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        medium.fence()
