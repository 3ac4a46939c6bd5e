"""Busy pages: the answer to Matthew Wilcox.

Pages leave a file at once, for every reader and writer. A page that is still held can't be given
out again before the last reference is dropped. Invariants:
- a run is freed only when its token is over, none of its pages is referenced, and no pin that is
  registered has it. Otherwise a write that is under way would land in the file that got the page
  next. A pin is registered also while page structures of a new generation don't know it yet;
- what a pin holds is parked under that pin, and looked at again when the pin lets go. A program may
  hold terabytes for hours, and to look at all of that each second would stop everything else;
- references are not persistent: a crash forgets all of them, and the search for leaks finds the
  frames that waited here.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from pmemfs.errors import MemoryFault
from pmemfs.medium.faultlog import report_fault
from pmemfs.memmap.base import Memmap
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.publication import Tables
from pmemfs.volume.pinned import Held, PinnedFrames

_RUN_FRAMES = 32
"""Giving back one frame takes as long as giving back this many at once, so a run counts as this."""
_STEP_FRAMES = 32768
"""How much one step gives back, so that a file of terabytes doesn't stop everything else."""


_Waiting = tuple[object | None, int, Run]
"""A token that must be over, the inode whose it was (0 for frames that no program can hold), and a
run that is not free yet."""


class BusyPages:
    """Runs that have left their file and are not free yet."""

    def __init__(
        self, allocator: Allocator, memmap: Memmap, tables: Tables, pinned: PinnedFrames
    ) -> None:
        self._allocator = allocator
        self._memmap = memmap
        self._tables = tables
        self._pinned = pinned
        self._waiting: deque[_Waiting] = deque()
        self._parked: dict[Held, list[_Waiting]] = {}
        self.frame_count = 0

    def add(self, runs: Iterable[Run], token: object | None, inode: int = 0) -> None:
        """Free these runs of an inode, each as soon as it is not busy."""
        left = _STEP_FRAMES
        for run in runs:
            if run.frame_count <= left and self._is_free(token, inode, run):
                self._free(run)
                left -= max(run.frame_count, _RUN_FRAMES)
            else:
                self.frame_count += run.frame_count
                for part in _parts(run):
                    self._wait(token, inode, part)

    def runs(self) -> list[Run]:
        """The runs that wait."""
        return [run for _, _, run in itertools.chain(self._waiting, *self._parked.values())]

    @property
    def has_unpinned(self) -> bool:
        """Whether anything waits that no pin holds: it will be free in a moment."""
        return bool(self._waiting)

    def collect(self, step_frames: int = _STEP_FRAMES) -> bool:
        """Free what is busy no more, as much as a step allows; whether there may be more."""
        left = len(self._waiting)
        while left:
            left -= 1
            token, inode, run = self._waiting.popleft()
            if self._is_free(token, inode, run):
                step_frames -= self._free_waiting(run)
                if step_frames <= 0:
                    return bool(self._waiting)
            else:
                self._wait(token, inode, run)
        return False

    def free_all(self) -> None:
        """Nothing is served any more: free everything, whoever still holds it.

        A program that has pages mapped keeps the pool from being mounted anew, so nobody gets them
        while it lives.
        """
        for held in list(self._parked):
            self._waiting.extend(self._parked.pop(held))
        while self._waiting:
            self._free_waiting(self._waiting.popleft()[2])

    def let_go(self, held: Held, *, may_write: bool) -> None:
        """A pin has dropped its references: free what was parked under it, now or later."""
        left = _STEP_FRAMES if may_write else 0
        for token, inode, run in self._parked.pop(held, ()):
            if left > 0 and self._is_free(token, inode, run):
                left -= self._free_waiting(run)
            else:
                self._wait(token, inode, run)

    # What these have in common

    def _wait(self, token: object | None, inode: int, run: Run) -> None:
        """Park what pins hold of a run, and look at the rest of it at the next `collect`."""
        start, end = run.pfn, run.pfn + run.frame_count
        while start < end:
            found = self._pinned.find(inode, start, end - start) if inode else None
            if found is None:
                self._waiting.append((token, inode, _run(start, end)))
                return
            held, (low, high) = found
            self._parked.setdefault(held, []).append((token, inode, _run(low, high)))
            if start < low:
                self._waiting.append((token, inode, _run(start, low)))
            start = high

    def _free_waiting(self, run: Run) -> int:
        """Free a run that has waited; as how many frames that counts."""
        self._free(run)
        self.frame_count -= run.frame_count
        return max(run.frame_count, _RUN_FRAMES)

    def _free(self, run: Run) -> None:
        # Clean before free: the next owner must not find the page dirty.
        with suppress(MemoryFault):
            self._memmap.clean(*run)
        self._allocator.free([run])

    def _is_free(self, token: object | None, inode: int, run: Run) -> bool:
        if token is not None and not self._tables.is_over(token):
            return False
        if inode and self._pinned.find(inode, *run):
            return False
        try:
            return not self._memmap.has_pages or not self._memmap.are_referenced(*run)
        except MemoryFault as fault:
            # Its references can't be read, so the frames wait.
            report_fault(fault.path, fault.pfn, f"{run.frame_count} frames stay busy")
            return False


def _run(start: int, end: int) -> Run:
    return Run(start, end - start)


def _parts(run: Run) -> Iterable[Run]:
    for start in range(0, run.frame_count, _STEP_FRAMES):
        yield Run(run.pfn + start, min(_STEP_FRAMES, run.frame_count - start))
