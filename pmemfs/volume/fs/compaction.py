"""Long logs are written anew in steps, beside the operations that go on appending to them.

    a copy of what the inode is now          its records are written into new frames
    what was appended meanwhile              is copied behind them, until little is left
    one transaction                          lets the inode have the new log

Invariants:
- until that transaction, nobody looks at the new frames, and the old log is what counts: a crash
  leaves it, and frames of nobody, which are found as leaked;
- what was appended is copied from the log itself, in its order, so the new log says what the old
  one does;
- the inode that is compacted is the one in memory: if that goes, or its log is written anew by
  somebody else, the new frames are given back.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from pmemfs.media import log as media
from pmemfs.media.log import FRAME_HEAD_BYTES, MOST_SLOTS, RECORD_BYTES
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.log import Log, LogReader, runs_of_frames

if TYPE_CHECKING:
    from pmemfs.volume.fs.store import InodeStore

STEP_RECORDS = 1000
"""Records that are written in one step: some ms."""
_FEW_SLOTS = 256
"""What was appended and is not copied yet, when the new log takes over."""
_FRAMES_AT_ONCE = 16


class LogWriter:
    """Writes records into new frames, linked to each other. Raises OSError (ENOSPC)."""

    def __init__(self, store: InodeStore, inode: Inode) -> None:
        self._store = store
        self.inode = inode
        self._spare: list[int] = []
        self._frames = [self._next_frame()]
        self._content: list[bytes] = []
        self._room = MOST_SLOTS * RECORD_BYTES
        self._slot_count = 0

    def add(self, record: bytes) -> None:
        """A record more, to be sealed."""
        if len(record) > self._room:
            after = self._next_frame()
            if self._room:
                self._content.append(media.pack_padding())
            self._write(after)
            self._frames.append(after)
            self._content = []
            self._room = MOST_SLOTS * RECORD_BYTES
        self._content.append(record)
        self._room -= len(record)

    def finish(self) -> Log:
        """The log, written but for a fence; frames that it has no need of are given back."""
        frames = self._frames
        tail = frames[-1] + FRAME_HEAD_BYTES + self._write(0)
        self._store.allocator.free(runs_of_frames(self._spare))
        self._spare = []
        return Log(frames[0] + FRAME_HEAD_BYTES, tail, frames, self._slot_count)

    def let_go(self) -> None:
        """The frames are the inode's from now on."""
        self._frames = []

    def abandon(self) -> None:
        """Give all frames back that are still here."""
        self._store.allocator.free(runs_of_frames([*self._frames, *self._spare]))

    def _next_frame(self) -> int:
        if not self._spare:
            # Not from `take_frames`, which would let go of this very log to find some.
            runs = self._store.allocator.allocate(_FRAMES_AT_ONCE)
            self._spare = [pfn << PAGE_SHIFT for run in runs for pfn in range(run.pfn, sum(run))]
        return self._spare.pop(0)

    def _write(self, after: int) -> int:
        """Write the last frame, which leads to another one; the length of its records."""
        inode, frame, medium = self.inode, self._frames[-1], self._store.medium
        head = media.pack_frame_head(inode.number, inode.generation, frame, after)
        start = frame + FRAME_HEAD_BYTES
        raw = media.seal(self._content, inode.number, inode.generation, start)
        medium.store(frame, head + raw)
        medium.flush(frame, len(head) + len(raw))
        self._slot_count += len(raw) // RECORD_BYTES
        return len(raw)


class Compaction:
    """The log of one inode that is being written anew. Raises OSError (ENOSPC)."""

    def __init__(self, store: InodeStore, inode: Inode) -> None:
        self._store = store
        self.inode = inode
        self._copied_to = inode.log.tail
        self._copied_slots = inode.log.slot_count
        self._writer = LogWriter(store, inode)
        self._records = inode.copy().records()

    @property
    def is_of_inode_in_memory(self) -> bool:
        """Whether the inode is still what everybody changes."""
        return self._store.cached(self.inode.number) is self.inode

    def step(self) -> bool:
        """Write some records; whether there is more. Raises OSError and DamagedFileSystem."""
        # Or it would be forgotten as idle.
        self.inode.used_at = self._store.clock
        count = 0
        for record in islice(self._records, STEP_RECORDS):
            self._writer.add(record)
            count += 1
        if count == STEP_RECORDS:
            return True
        if self.inode.log.slot_count - self._copied_slots > _FEW_SLOTS:
            self._records = self._appended()
            return True
        for record in self._appended():
            self._writer.add(record)
        with self._store.change() as change:
            change.replace_log(self.inode, self._writer.finish())
            change.then(self._writer.let_go)
        return False

    def abandon(self) -> None:
        """Give the new frames back."""
        self._writer.abandon()

    def _appended(self) -> Iterator[bytes]:
        """What was appended to the log and is not copied yet."""
        store, inode = self._store, self.inode
        start, log = self._copied_to, inode.log
        self._copied_to, self._copied_slots = log.tail, log.slot_count
        if start == log.tail:
            return iter(())
        reader = LogReader(
            store.medium, store.geometry, inode.number, inode.generation, inode.slot_offset,
            log.head, log.tail,
        )  # fmt: skip
        return (raw for area in reader.areas(start) for _, raw in area)
