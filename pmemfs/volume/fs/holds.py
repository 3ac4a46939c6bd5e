"""Who holds which inode: the kernel, as often as it has looked it up, and each open file once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Holds(Protocol):
    """How often each inode is held. Where a mount may outlive its daemon, not in this process's
    memory: `dataplane/held` has that."""

    def add(self, number: int, count: int) -> None:
        """An inode is held so many times more."""

    def take(self, number: int, count: int) -> int:
        """An inode is held so many times less; how often still. Any number may be asked for."""

    def will_take(self, number: int) -> None:
        """The request under way takes one hold away, and that is all that it does to holds. If it
        has no answer when this process dies, the hold is gone nevertheless."""
        return

    def count(self, number: int) -> int:
        """How often an inode is held."""

    def counts(self) -> Iterable[tuple[int, int]]:
        """Every inode that is held, and how often. None may be held or dropped meanwhile."""

    @property
    def words(self) -> memoryview | None:
        """The counts as words in memory, one for each number, if they are stored like that."""
        return None

    def note_words(self) -> memoryview | None:
        """Where whoever raises `words` by itself has to note before how they were; see
        `dataplane/holdnotes`."""
        return None


class OwnHolds(Holds):
    """Those of a file system that ends with this process."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, number: int, count: int) -> None:
        self._counts[number] = self._counts.get(number, 0) + count

    def take(self, number: int, count: int) -> int:
        left = self._counts.get(number, 0) - count
        if left > 0:
            self._counts[number] = left
            return left
        self._counts.pop(number, None)
        return 0

    def count(self, number: int) -> int:
        return self._counts.get(number, 0)

    def counts(self) -> Iterable[tuple[int, int]]:
        return self._counts.items()
