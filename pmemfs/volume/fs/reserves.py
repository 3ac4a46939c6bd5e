"""What workers of a data plane take by themselves: free slots and frames, handed out in advance.

They lie on stacks in memory that the planes share (`dataplane/names.pxd`). A worker takes from the
top, and puts back there what it has freed. Invariants:
- what lies on a stack is marked as used in the pool, has no owner, and is in no list of this
  process. So nothing is given out twice. Whoever looks for leaks takes it for owned;
- the bits of frames are durable before a worker can find these on the stack. Otherwise a crash
  could leave a file whose frames are given to a second one;
- a frame on the stack has memory, because a worker can't be told that there is none;
- where room is scarce, the stacks are empty: what they have counts as free.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import Protocol

from pmemfs.medium.base import Medium
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.log import runs_of_frames
from pmemfs.volume.fs.table import InodeTable

_STEP = 256
"""So many slots or frames are handed out while nothing else is served: about a ms."""
_WANTED_FRAMES = 1024
_WANTED_SLOTS = 1024
_MOST = 3
"""Beyond so many times as much as is wanted, what workers have freed is taken back."""
_SHORT_NS = 10**9
"""For so long after a sparse medium found no memory, workers are given nothing."""
_FRAMES_SHARE = 8
_SLOTS_SHARE = 16
"""At most one of so many free frames is handed out, and one slot for so many of them."""


class Stack(Protocol):
    """A stack of numbers that workers take from, and put back to."""

    @property
    def count(self) -> int:
        """How many numbers are on it."""

    def push(self, numbers: Sequence[int]) -> None:
        """Put numbers on top, the last one topmost."""

    def pop(self, count: int) -> list[int]:
        """Take so many numbers from the top, or all there are; the topmost first."""

    def numbers(self) -> list[int]:
        """All that are on it."""


class Reserves:
    """The slots and frames of one file system that workers may take."""

    def __init__(
        self, medium: Medium, allocator: Allocator, table: InodeTable, slots: Stack, frames: Stack
    ) -> None:
        self._medium = medium
        self._allocator = allocator
        self._table = table
        self._slots = slots
        self._frames = frames
        self._shortages = self._short_at_ns = 0
        table.reserved = slots.numbers

    @property
    def frame_count(self) -> int:
        """How many frames are handed out."""
        return self._frames.count

    def runs(self) -> list[Run]:
        """These frames."""
        return [Run(pfn, 1) for pfn in self._frames.numbers()]

    def keep_some(self) -> bool:
        """Hand out some of what is missing, or take back some of what is too much; whether there
        is more to do. Nothing may be read-only. Raises OSError."""
        frame_count, slot_count = self.wanted()
        has_more = self._give_frames(frame_count) | self._give_slots(slot_count)
        for stack, wanted, take in (
            (self._frames, frame_count, self._take_frames),
            (self._slots, slot_count, self._take_slots),
        ):
            if stack.count > _MOST * wanted:
                # More than the excess, so that there is peace for a while.
                take(_STEP)
                has_more = True
        return has_more

    def exchange_frames(self) -> None:
        """Take back the frames that are handed out, and hand out some that lie side by side."""
        count = self._frames.count
        self._take_frames(count)
        self._give_frames(min(count, _STEP))

    def drain(self) -> bool:
        """Take back all that is handed out; whether that was anything."""
        taken = self._take_frames(self._frames.count) + self._take_slots(self._slots.count)
        return taken > 0

    def wanted(self) -> tuple[int, int]:
        """How many frames and slots should be handed out."""
        allocator = self._allocator
        enough = max(_WANTED_FRAMES * _FRAMES_SHARE, _WANTED_SLOTS * _SLOTS_SHARE)
        free = allocator.free_up_to(enough + allocator.reserve) + self._frames.count
        free = max(0, free - allocator.reserve)
        return min(_WANTED_FRAMES, free // _FRAMES_SHARE), min(_WANTED_SLOTS, free // _SLOTS_SHARE)

    def _give_frames(self, wanted: int) -> bool:
        stack = self._frames
        missing = min(wanted - stack.count, _STEP)
        if missing <= 0 or self._is_short():
            return False
        try:
            runs = self._allocator.allocate(missing)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        try:
            for run in runs:
                self._medium.reserve(run.pfn << PAGE_SHIFT, run.frame_count << PAGE_SHIFT)
        except OSError:
            # There is no memory for them: whoever asks for it next is told so.
            self._allocator.free(runs)
            return False
        self._medium.fence()
        pfns = [pfn for run in runs for pfn in range(run.pfn, run.pfn + run.frame_count)]
        # The lowest comes to the top, so what is taken in a row is one run.
        stack.push(pfns[::-1])
        return stack.count < wanted

    def _is_short(self) -> bool:
        """Whether the medium has just found no memory: then what there is goes to who asks."""
        shortages = self._medium.shortage_count
        if shortages != self._shortages:
            self._shortages, self._short_at_ns = shortages, time.monotonic_ns()
        return bool(shortages) and time.monotonic_ns() - self._short_at_ns < _SHORT_NS

    def _give_slots(self, wanted: int) -> bool:
        table, stack = self._table, self._slots
        slots: list[int] = []
        if self._is_short():
            return False
        try:
            for _ in range(min(wanted - stack.count, _STEP)):
                slots.append(table.take()[0])
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        finally:
            stack.push(slots[::-1])
        return stack.count < wanted

    def _take_frames(self, count: int) -> int:
        pfns = sorted(self._frames.pop(count))
        self._allocator.free(runs_of_frames([pfn << PAGE_SHIFT for pfn in pfns]))
        return len(pfns)

    def _take_slots(self, count: int) -> int:
        slots = self._slots.pop(count)
        for slot in slots:
            self._table.give_back(slot)
        return len(slots)
