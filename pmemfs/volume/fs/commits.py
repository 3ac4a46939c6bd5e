"""What the file system tells the part that knows later which operations were carried out.

A daemon that dies may have carried out what it has not answered. The next one is asked for that
again, and must know it: a second mkdir(2) would fail, and a second FALLOC_FL_INSERT_RANGE would
move the file twice. Invariant:
- an operation decides at most once, and before that it has done nothing that harms if it is done
  again. After that it only does what the next daemon does in any case, or what its answer says.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod


class Decides(enum.IntEnum):
    """By which commit an operation is carried out.

    An operation may commit other transactions before and after, as to take privileges from a file
    or to write a log anew. These decide nothing.
    """

    NAMES = 1
    ATTRIBUTES = 2
    XATTRS = 3
    RANGE = 4
    """Of a file, without anything that is left to do after the commit."""


class Commits(ABC):
    """Is told what decides."""

    @abstractmethod
    def decides(self, what: Decides, offset: int, value: int) -> None:
        """Once this word of the pool has this value, the operation under way is carried out. It
        is stored next."""


class NoCommits(Commits):
    """For a mount that ends with its daemon."""

    def decides(self, what: Decides, offset: int, value: int) -> None:
        return
