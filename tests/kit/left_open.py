"""Memory that tests leave open: a process that runs thousands of them may have few descriptors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from pmemfs.dataplane.tables import SharedMemory
from pmemfs.medium.mapped import MappedMedium

_media: dict[int, MappedMedium] = {}
_memories: set[tuple[int, int]] = set()
"""Descriptors of shared memories, and their inodes. The memory itself goes when nobody has it: who
looks for the memory of a mount looks into this process too."""


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
        _memories.add((fd, os.fstat(fd).st_ino))

    MappedMedium.__init__ = init  # type: ignore[method-assign]
    SharedMemory.__init__ = share  # type: ignore[method-assign]


def _follow_closing(medium: MappedMedium) -> None:
    real_close = medium.close

    def close() -> None:
        # Whoever comes after us must not close what has the number by then.
        if _media.pop(id(medium), None) is not None:
            real_close()

    medium.close = close  # type: ignore[method-assign]
    _media[id(medium)] = medium


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Close what is opened meanwhile and still open in the end."""
    media, memories = set(_media), set(_memories)
    yield
    for key in _media.keys() - media:
        # Views of it may be held by what nobody has collected yet.
        with suppress(BufferError, OSError):
            _media[key].close()
    for fd, inode in _memories - memories:
        _memories.remove((fd, inode))
        with suppress(OSError):
            # Another file may have the number by now.
            if os.fstat(fd).st_ino == inode:
                os.close(fd)
