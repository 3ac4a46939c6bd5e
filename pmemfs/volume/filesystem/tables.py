"""What the file system tells whoever serves I/O by published extents.

Invariant: the file system gives a run of frames to nobody while a token that `changed` or `gone`
has answered for it is not over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Tables(ABC):
    """Where extents of open files are published."""

    @abstractmethod
    def changed(self, number: int) -> object | None:
        """The size of an inode has changed, or extents have gone; not: have been added.

        Answers a token for `is_over`; None if nobody can have seen what went.
        """

    @abstractmethod
    def gone(self, number: int) -> object | None:
        """The inode is no more. Answers as `changed`."""

    @abstractmethod
    def is_over(self, token: object) -> bool:
        """Whether nobody can see any more what went with this token."""


class NoTables(Tables):
    """Nothing is published."""

    def changed(self, number: int) -> object | None:
        return None

    def gone(self, number: int) -> object | None:
        return None

    def is_over(self, token: object) -> bool:
        return True
