"""Memory that tests leave open: a process that runs thousands of them may have few descriptors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from pmemfs.dataplane.tables import SharedMemory
from pmemfs.medium.mapped import MappedMedium

_open: dict[int, Any] = {}


def follow() -> None:
    """From now on know which media and shared memories this process has open."""
    real_init, real_share = MappedMedium.__init__, SharedMemory.__init__

    @wraps(real_init)
    def init(medium: MappedMedium, *arguments: Any, **options: Any) -> None:
        real_init(medium, *arguments, **options)
        _follow_closing(medium)

    @wraps(real_share)
    def share(memory: SharedMemory, fd: int, **options: Any) -> None:
        real_share(memory, fd, **options)
        # Two over one descriptor would close it twice.
        if fd not in [other.fd for other in _open.values() if isinstance(other, SharedMemory)]:
            _follow_closing(memory)

    MappedMedium.__init__ = init  # type: ignore[method-assign]
    SharedMemory.__init__ = share  # type: ignore[method-assign]


def _follow_closing(opened: Any) -> None:
    real_close = opened.close

    def close() -> None:
        # Whoever comes after us must not close what has the number by then.
        if _open.pop(id(opened), None) is not None:
            real_close()

    opened.close = close
    _open[id(opened)] = opened


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Close what is opened meanwhile and still open in the end."""
    before = set(_open)
    yield
    for key in _open.keys() - before:
        # Views of it may be held by what nobody has collected yet.
        with suppress(BufferError, OSError):
            _open[key].close()
