"""Which pins hold which frames of a volume, and what the volume tells them.

A pin is registered here before it takes its first reference, and is withdrawn after it has dropped
its last. Invariants:
- frames that leave a file, or move in it, are told to every pin that has them, in the same step.
  Otherwise a pin that is formed in steps would hold frames of another file without noticing;
- a volume takes no memory from under frames that are registered here. A store through a client's
  mapping would find a hole otherwise, and fault.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from pmemfs.ranges import Range

if TYPE_CHECKING:
    import trio


class Holder(Protocol):
    """A pin, as a volume knows it."""

    is_stale: bool
    """Whether a page of the pin has left its file, or has moved in it."""

    @property
    def who(self) -> str:
        """The program that has it, for people."""

    def become_stale(self) -> None:
        """A page of the pin has left its file, or has moved in it."""

    def was_renamed(self) -> None:
        """A name of a pinned file was removed or changed."""


class Held:
    """The frames of one range of one file that a pin holds."""

    __slots__ = ("_ends", "_starts", "holder", "inode")

    def __init__(self, holder: Holder, inode: int, ranges: Iterable[Range]) -> None:
        """`ranges` are pfns. They are disjoint, in any order."""
        ordered = sorted(ranges)
        self.holder = holder
        self.inode = inode
        self._starts = [start for start, _ in ordered]
        self._ends = [end for _, end in ordered]

    def overlap(self, start: int, end: int) -> Range | None:
        """The first frames of a range that are held."""
        at = bisect_right(self._ends, start)
        if at == len(self._starts) or self._starts[at] >= end:
            return None
        return max(start, self._starts[at]), min(end, self._ends[at])

    def overlaps(self, start: int, end: int) -> list[Range]:
        """All frames of a range that are held, in order."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        return [
            (max(start, self._starts[at]), min(end, self._ends[at])) for at in range(first, last)
        ]


class PinnedFrames:
    """What pins hold of one volume."""

    def __init__(self) -> None:
        self._of_inode: dict[int, dict[Held, None]] = {}
        self.memory_lock: trio.Lock | None = None
        """Held while memory is taken from under frames of which no pin was registered. Whoever
        registers one waits for it, before anybody relies on the memory. None: that never is."""
        self.let_go: Callable[[Held], None] = lambda held: None
        """Called when a pin has dropped its references on these frames."""
        self.note_any: Callable[[bool], None] = lambda has_any: None
        """Told whether any pin is registered, whenever that may have changed."""

    def add(self, held: Held) -> None:
        """A pin is about to take references on frames."""
        self._of_inode.setdefault(held.inode, {})[held] = None
        self.note_any(True)

    def remove(self, held: Held) -> None:
        """A pin has dropped all its references on frames."""
        of_inode = self._of_inode.get(held.inode)
        if of_inode is not None and held in of_inode:
            del of_inode[held]
            if not of_inode:
                del self._of_inode[held.inode]
            self.note_any(bool(self._of_inode))
            self.let_go(held)

    def has(self, inode: int) -> bool:
        """Whether a pin holds frames of an inode, or frames that have been its."""
        return inode in self._of_inode

    def holders_of(self, inode: int) -> list[str]:
        """The programs that hold frames of an inode, or frames that have been its, for people."""
        return sorted({held.holder.who for held in self._of_inode.get(inode, ())})

    def left(self, inode: int, runs: Iterable[tuple[int, int]]) -> None:
        """These runs (pfn, frame count) have left a file, or have moved in it."""
        of_inode = self._of_inode.get(inode)
        if of_inode:
            kept = list(runs)
            for held in of_inode:
                if not held.holder.is_stale and any(
                    held.overlap(pfn, pfn + count) for pfn, count in kept
                ):
                    held.holder.become_stale()

    def renamed(self, inode: int) -> None:
        """A name of an inode was removed or changed."""
        for held in self._of_inode.get(inode, ()):
            held.holder.was_renamed()

    def all_renamed(self) -> None:
        """A directory has another name, so any pinned file may have another path."""
        for inode in self._of_inode:
            self.renamed(inode)

    def find(self, inode: int, pfn: int, frame_count: int) -> tuple[Held, Range] | None:
        """A holder of frames that have been an inode's, and which of these frames it has."""
        for held in self._of_inode.get(inode, ()):
            found = held.overlap(pfn, pfn + frame_count)
            if found:
                return held, found
        return None

    def all_in(self, start_pfn: int, end_pfn: int) -> list[tuple[int, Range]]:
        """The inodes of which frames in a range of pfns are held, and which of these frames."""
        return [
            (inode, part)
            for inode in self._of_inode
            for part in self.held_of(inode, start_pfn, end_pfn)
        ]

    def held_of(self, inode: int, start_pfn: int, end_pfn: int) -> list[Range]:
        """All frames of a range of pfns that are held, in order and disjoint."""
        found: list[Range] = []
        for held in self._of_inode.get(inode, ()):
            found += held.overlaps(start_pfn, end_pfn)
        return _merged(found)


def _merged(ranges: list[Range]) -> list[Range]:
    """The same numbers in disjoint ranges."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
