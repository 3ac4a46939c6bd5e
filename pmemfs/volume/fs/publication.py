"""What the file system tells the part that publishes inodes to the data plane.

Invariants:
- `touched` is called before any program can learn of the change in another way. Otherwise the data
  plane could answer with older attributes than a program has seen already;
- a run of frames is given out again only once the token that `changed` or `gone` returned for it is
  over. Until then a worker may still write by a table that names these frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod


class Tables(ABC):
    """Where the extents of open files are published."""

    @abstractmethod
    def touched(self, number: int, changed_ns: int) -> None:
        """Attributes of an inode have changed, other than the size and times of its live line.

        `changed_ns` is the later of its times of modification and of change, or NO_READ_COUNTS.
        """

    def rewritten(self, number: int) -> None:
        """The log of an inode is about to be replaced by another one, or to end with the inode.

        Who knows an inode by its log has to read the log anew then, although it may seem to go on
        where it ended.
        """
        return

    @abstractmethod
    def changed(self, number: int) -> object | None:
        """The size of an inode has changed, or it has lost extents. Added extents don't count.

        The result is a token for `is_over`, or None if no worker can have seen what was lost.
        """

    @abstractmethod
    def gone(self, number: int) -> object | None:
        """The inode does not exist any more. The result is as for `changed`."""

    @abstractmethod
    def is_over(self, token: object) -> bool:
        """Whether no worker can see any more what was withdrawn with this token."""


class NoTables(Tables):
    """For a mount without a data plane: nothing is published."""

    def touched(self, number: int, changed_ns: int) -> None:
        return

    def changed(self, number: int) -> object | None:
        return None

    def gone(self, number: int) -> object | None:
        return None

    def is_over(self, token: object) -> bool:
        return True
