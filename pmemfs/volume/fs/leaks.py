"""The search for what a crash has left: frames that are used and nobody's, inodes without a name.

It runs in steps beside the work of the mount. Invariants:
- a frame is freed only if its bit was set when the search began, no inode has it, and it wasn't
  given out since;
- an inode is read as it is at that moment: what it got since was given out since.
"""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pmemfs.errors import DamagedFileSystem
from pmemfs.media.filesystem import CHUNK_FRAMES, FIRST_INODES_FRAME, GROUP_CHUNKS
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.masks import ALL, bits, chunk_parts, runs_of
from pmemfs.volume.fs.transaction import log_runs

if TYPE_CHECKING:
    from pmemfs.volume.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

_STEP_SECONDS = 0.005
_RUNS_A_STEP = 1000


class FrameSet:
    """A set of frames, as a mask for each chunk that has any."""

    def __init__(self, first_pfn: int) -> None:
        self._first_pfn = first_pfn
        self._masks: dict[int, int] = {}

    def add(self, runs: Iterable[Run]) -> list[Run]:
        """Add runs; those parts of them that were there before."""
        known = []
        for run in runs:
            for chunk, bit, count in chunk_parts(run, self._first_pfn):
                mask, before = bits(bit, count), self._masks.get(chunk, 0)
                known += self._runs(chunk, before & mask)
                after = before | mask
                # One object for all whole chunks: there may be very many of them.
                self._masks[chunk] = ALL if after == ALL else after
        return known

    def meeting(self, runs: Iterable[Run]) -> list[Run]:
        """The parts of runs that are in the set."""
        found = []
        for run in runs:
            for chunk, bit, count in chunk_parts(run, self._first_pfn):
                found += self._runs(chunk, self._masks.get(chunk, 0) & bits(bit, count))
        return found

    def mask(self, chunk: int) -> int:
        """The frames of a chunk that are in the set."""
        return self._masks.get(chunk, 0)

    def add_mask(self, chunk: int, mask: int) -> None:
        """Add frames of a chunk."""
        if mask:
            self._masks[chunk] = self._masks.get(chunk, 0) | mask

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Chunks that have any, in no order, and their masks."""
        yield from self._masks.items()

    def __bool__(self) -> bool:
        return bool(self._masks)

    def _runs(self, chunk: int, mask: int) -> list[Run]:
        start = self._first_pfn + chunk * CHUNK_FRAMES
        return [Run(start + bit, count) for bit, count in runs_of(mask)]


class LeakSearch:
    """One search, from the mount on."""

    def __init__(self, filesystem: FileSystem) -> None:
        self._fs = filesystem
        self._owned = FrameSet(filesystem.geometry.first_pfn)
        filesystem.allocator.given_out = []
        self._steps = self._search()
        self.freed_frames = self.freed_inodes = 0

    def step(self) -> bool:
        """Search on for some milliseconds; whether there is more to do."""
        deadline = time.monotonic() + _STEP_SECONDS
        while time.monotonic() < deadline:
            try:
                if next(self._steps, None) is None:
                    self._say()
                    return False
            except DamagedFileSystem as damage:
                self._fs.become_read_only(str(damage))
                return False
            except OSError:
                if self._fs.damage:
                    return False
                raise
        return True

    def _search(self) -> Iterator[int]:
        fs = self._fs
        for pfn in fs.table.frames():
            self._owned.add([Run(pfn, 1)])
            for number in fs.table.numbers_in(pfn):
                # Between two steps all of them may be removed, and the frame be a file's.
                if not fs.table.has_inodes(Run(pfn, 1)):
                    break
                yield from self._look_at(number)
                yield number
        self._owned.add([Run(fs.geometry.first_pfn + FIRST_INODES_FRAME, 1)])
        for group in range(fs.geometry.group_count):
            yield from self._free_leaked(group)
            yield group
        fs.allocator.given_out = None

    def _look_at(self, number: int) -> Iterator[int]:
        fs = self._fs
        try:
            while fs.read_on(number):
                yield number
        except OSError as error:
            if error.errno == errno.ESTALE:
                # Removed meanwhile.
                return
            raise
        inode = fs.inode(number)
        if inode.state.link_count == 0 and not fs.is_held(number):
            fs.remove(inode)
            self.freed_inodes += 1
            return
        if not fs.is_held(number):
            fs.trim_ahead(number)
        elif inode.is_file:
            # Perhaps only looked up, so that no close will do it.
            fs.untrimmed.add(number)
        # What becomes of the inode meanwhile does not matter: it gives back what it has, or gets
        # what is given out since.
        runs = iter((*inode.runs(), *log_runs(inode.log)))
        while some := tuple(itertools.islice(runs, _RUNS_A_STEP)):
            self._owned.add(some)
            yield number

    def _free_leaked(self, group: int) -> Iterator[int]:
        self._owned.add(self._fs.busy.runs())
        for chunk in range(GROUP_CHUNKS):
            yield self._free_leaked_of(group, chunk)

    def _free_leaked_of(self, group: int, chunk: int) -> int:
        """Free what is leaked of a chunk; how many frames."""
        allocator, geometry = self._fs.allocator, self._fs.geometry
        # Before each look at the bitmap, since others have their turn in between.
        if allocator.given_out:
            self._owned.add(allocator.given_out)
            allocator.given_out = []
        used = allocator.managed(group)[chunk] & ~allocator.group(group).masks[chunk]
        leaked = used & ~self._owned.mask(group * GROUP_CHUNKS + chunk)
        start = geometry.group_pfn(group) + chunk * CHUNK_FRAMES
        for bit, count in runs_of(leaked):
            allocator.free([Run(start + bit, count)])
            self.freed_frames += count
        return chunk

    def _say(self) -> None:
        if self.freed_frames or self.freed_inodes:
            log.info(
                "after a crash: %d frames of nobody and %d inodes without a name were freed",
                self.freed_frames, self.freed_inodes,
            )  # fmt: skip
