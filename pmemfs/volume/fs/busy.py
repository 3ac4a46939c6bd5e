"""Busy pages: the answer to Matthew Wilcox.

Pages leave a file at once, for every reader and writer. A page that is still held can't be given
out again before the last reference is dropped. Invariants:
- a run is freed only when its token is over and none of its pages is referenced. Otherwise a write
  that is under way would land in the file that got the page next;
- references are not persistent: a crash forgets all of them, and the search for leaks finds the
  frames that waited here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import suppress

from pmemfs.errors import MemoryFault
from pmemfs.medium.faultlog import report_fault
from pmemfs.memmap.base import Memmap
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.publication import Tables

_RUN_FRAMES = 32
"""Giving back one frame takes as long as giving back this many at once, so a run counts as this."""
_STEP_FRAMES = 32768
"""How much one step gives back, so that a file of terabytes doesn't stop everything else."""


class BusyPages:
    """Runs that have left their file and are not free yet."""

    def __init__(self, allocator: Allocator, memmap: Memmap, tables: Tables) -> None:
        self._allocator = allocator
        self._memmap = memmap
        self._tables = tables
        self._waiting: deque[tuple[object | None, Run]] = deque()
        self.frame_count = 0

    def add(self, runs: Iterable[Run], token: object | None) -> None:
        """Free these runs, each as soon as it is not busy."""
        left = _STEP_FRAMES
        for run in runs:
            if run.frame_count <= left and self._is_free(token, run):
                self._free(run)
                left -= max(run.frame_count, _RUN_FRAMES)
            else:
                self.frame_count += run.frame_count
                self._waiting.extend((token, part) for part in _parts(run))

    def runs(self) -> list[Run]:
        """The runs that wait."""
        return [run for _, run in self._waiting]

    def collect(self, step_frames: int = _STEP_FRAMES) -> bool:
        """Free what is busy no more, as much as a step allows; whether there may be more."""
        for _ in range(len(self._waiting)):
            token, run = self._waiting.popleft()
            if self._is_free(token, run):
                self._free(run)
                self.frame_count -= run.frame_count
                step_frames -= max(run.frame_count, _RUN_FRAMES)
                if step_frames <= 0:
                    return bool(self._waiting)
            else:
                self._waiting.append((token, run))
        return False

    def _free(self, run: Run) -> None:
        # Clean before free: the next owner must not find the page dirty.
        with suppress(MemoryFault):
            self._memmap.clean(*run)
        self._allocator.free([run])

    def _is_free(self, token: object | None, run: Run) -> bool:
        if token is not None and not self._tables.is_over(token):
            return False
        try:
            return not self._memmap.has_pages or not self._memmap.are_referenced(*run)
        except MemoryFault as fault:
            # Its references can't be read, so the frames wait.
            report_fault(fault.path, fault.pfn, f"{run.frame_count} frames stay busy")
            return False


def _parts(run: Run) -> Iterable[Run]:
    for start in range(0, run.frame_count, _STEP_FRAMES):
        yield Run(run.pfn + start, min(_STEP_FRAMES, run.frame_count - start))
