"""Searches for what a crash has left: used frames that nobody owns, and inodes without a name.

The search runs in steps between the operations of the mount. Invariants:
- a frame is freed only if its bit was set when the search began, no inode owns it, and it was not
  given out since. Freeing any other frame would take it from a file;
- what a program has pinned is not free yet, though no inode owns it: the pin of a removed file
  outlives the daemon. So it waits in `busy` until the pin ends;
- an inode counts with what it has at the moment when it is read. Frames that it gets later were
  given out since, so the search leaves them alone.
"""

from __future__ import annotations

import errno
import itertools
import logging
import time
from collections.abc import Iterator

from pmemfs.errors import DamagedFileSystem
from pmemfs.media.filesystem import CHUNK_FRAMES, FIRST_INODES_FRAME, GROUP_CHUNKS
from pmemfs.ranges import without
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.fileframes import FileFrames
from pmemfs.volume.fs.masks import FrameSet, runs_of
from pmemfs.volume.fs.store import Store
from pmemfs.volume.fs.transaction import log_runs

log = logging.getLogger(__name__)

_STEP_SECONDS = 0.005
_RUNS_A_STEP = 1000


class LeakSearch:
    """One search, begun at the mount."""

    def __init__(self, store: Store, frames: FileFrames) -> None:
        self._store = store
        self._frames = frames
        self._owned = FrameSet(store.ground.geometry.first_pfn)
        store.allocator.given_out = []
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
                self._store.become_read_only(str(damage))
                return False
            except OSError:
                if self._store.ground.damage:
                    return False
                raise
        return True

    def _search(self) -> Iterator[int]:
        store = self._store
        for pfn in store.table.frames():
            self._owned.add([Run(pfn, 1)])
            for number in store.table.numbers_in(pfn):
                # Between two steps all inodes here may be removed, and the frame given to a file.
                if not store.table.has_inodes(Run(pfn, 1)):
                    break
                yield from self._look_at(number)
                yield number
        self._owned.add([Run(store.ground.geometry.first_pfn + FIRST_INODES_FRAME, 1)])
        for group in range(store.ground.geometry.group_count):
            yield from self._free_leaked(group)
            yield group
        store.allocator.given_out = None

    def _look_at(self, number: int) -> Iterator[int]:
        store = self._store
        try:
            while store.read_on(number):
                yield number
        except OSError as error:
            if error.errno == errno.ESTALE:
                # It was removed meanwhile.
                return
            raise
        inode = store.inode(number)
        if inode.state.link_count == 0 and not store.is_held(number):
            store.remove(inode)
            self.freed_inodes += 1
            return
        if not store.is_held(number):
            self._frames.trim_ahead(number)
        elif inode.is_file:
            # Perhaps it was only looked up and never opened, so no close will trim it.
            store.untrimmed.add(number)
        # The inode may change from here on: frames that it gives back are freed as usual, and
        # frames that it gets are in `given_out`.
        runs = iter((*inode.runs(), *log_runs(inode.log)))
        while some := tuple(itertools.islice(runs, _RUNS_A_STEP)):
            self._owned.add(some)
            yield number

    def _free_leaked(self, group: int) -> Iterator[int]:
        # Busy frames have left their file but may still be written to.
        self._owned.add(self._store.busy.runs())
        # What workers may take has no owner yet.
        reserves = self._store.ground.reserves
        self._owned.add(reserves.runs() if reserves else ())
        for chunk in range(GROUP_CHUNKS):
            yield self._free_leaked_of(group, chunk)

    def _free_leaked_of(self, group: int, chunk: int) -> int:
        """Free the leaked frames of a chunk; its number."""
        allocator, geometry = self._store.allocator, self._store.ground.geometry
        # Taken anew before each look at the bitmap, because operations run between two steps.
        if allocator.given_out:
            self._owned.add(allocator.given_out)
            allocator.given_out = []
        used = allocator.managed(group)[chunk] & ~allocator.group(group).masks[chunk]
        leaked = used & ~self._owned.mask(group * GROUP_CHUNKS + chunk)
        start = geometry.group_pfn(group) + chunk * CHUNK_FRAMES
        for bit, count in runs_of(leaked):
            self._free(start + bit, start + bit + count)
        return chunk

    def _free(self, start: int, end: int) -> None:
        """Free leaked frames, those that are pinned once they are not."""
        store, held = self._store, self._store.ground.pinned.all_in(start, end)
        for inode, (low, high) in held:
            store.busy.add([Run(low, high - low)], None, inode)
        for low, high in without([(start, end)], sorted(part for _, part in held)):
            # After a takeover from a dead daemon, their pages may be referenced.
            store.busy.add([Run(low, high - low)], None)
            self.freed_frames += high - low

    def _say(self) -> None:
        if self.freed_frames or self.freed_inodes:
            log.info(
                "after a crash: freed %d frames that nobody owned and %d inodes without a name",
                self.freed_frames, self.freed_inodes,
            )  # fmt: skip
