"""What the file system tells whoever answers requests by what is published.

Invariants:
- `touched` is said of an inode before anybody can have learned of its change from elsewhere;
- the file system gives a run of frames to nobody while a token that `changed` or `gone` has
  answered for it is not over.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Tables(ABC):
    """Where extents of open files are published."""

    @abstractmethod
    def touched(self, number: int, changed_ns: int) -> None:
        """Attributes of an inode have changed, but for the size and the times in a live line.

        `changed_ns` is the later one of its times of modification and of change, or
        NO_READ_COUNTS.
        """

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

    def touched(self, number: int, changed_ns: int) -> None:
        return

    def changed(self, number: int) -> object | None:
        return None

    def gone(self, number: int) -> object | None:
        return None

    def is_over(self, token: object) -> bool:
        return True
