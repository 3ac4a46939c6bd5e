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

from collections.abc import Callable, Iterator
from itertools import islice

from pmemfs.media import log as media
from pmemfs.media.log import FRAME_HEAD_BYTES, MOST_SLOTS, RECORD_BYTES
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.ground import Ground
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.inodecache import InodeCache
from pmemfs.volume.fs.log import Log, LogReader, runs_of_frames
from pmemfs.volume.fs.transaction import Transaction

STEP_RECORDS = 1000
"""Records that are written in one step: some ms."""
_FEW_SLOTS = 256
"""What was appended and is not copied yet, when the new log takes over."""
_FRAMES_AT_ONCE = 16


class LogWriter:
    """Writes records into new frames, linked to each other. Raises OSError (ENOSPC)."""

    def __init__(self, ground: Ground, inode: Inode) -> None:
        self._ground = ground
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
            full = self._frames[-1]
            # Before it is written to, since memory may be bad, and then it is given back.
            self._frames.append(after)
            self._write(full, after)
            self._content = []
            self._room = MOST_SLOTS * RECORD_BYTES
        self._content.append(record)
        self._room -= len(record)

    def finish(self) -> Log:
        """The log, written but for a fence; frames that it has no need of are given back."""
        frames = self._frames
        tail = frames[-1] + FRAME_HEAD_BYTES + self._write(frames[-1], 0)
        self._ground.allocator.free(runs_of_frames(self._spare))
        self._spare = []
        return Log(frames[0] + FRAME_HEAD_BYTES, tail, frames, self._slot_count)

    def let_go(self) -> None:
        """The frames are the inode's from now on."""
        self._frames = []

    def abandon(self) -> None:
        """Give all frames back that are still here."""
        self._ground.allocator.free(runs_of_frames([*self._frames, *self._spare]))

    def _next_frame(self) -> int:
        if not self._spare:
            # Not from `take_frames`, which would let go of this very log to find some.
            runs = self._ground.allocator.allocate(_FRAMES_AT_ONCE)
            self._spare = [pfn << PAGE_SHIFT for run in runs for pfn in range(run.pfn, sum(run))]
        return self._spare.pop(0)

    def _write(self, frame: int, after: int) -> int:
        """Write a frame, which leads to another one; the length of its records."""
        inode, medium = self.inode, self._ground.medium
        head = media.pack_frame_head(inode.number, inode.generation, frame, after)
        start = frame + FRAME_HEAD_BYTES
        raw = media.seal(self._content, inode.number, inode.generation, start)
        medium.store(frame, head + raw)
        medium.flush(frame, len(head) + len(raw))
        self._slot_count += len(raw) // RECORD_BYTES
        return len(raw)


class Compaction:
    """The log of one inode that is being written anew. Raises OSError (ENOSPC)."""

    def __init__(
        self, ground: Ground, cache: InodeCache, change: Callable[[], Transaction], inode: Inode
    ) -> None:
        self._ground = ground
        self._cache = cache
        self._change = change
        self.inode = inode
        self._copied_to = inode.log.tail
        self._copied_slots = inode.log.slot_count
        self._writer = LogWriter(ground, inode)
        self._records = inode.copy().records()

    @property
    def is_of_inode_in_memory(self) -> bool:
        """Whether the inode is still what everybody changes."""
        return self._cache.cached(self.inode.number) is self.inode

    def step(self) -> bool:
        """Write some records; whether there is more. Raises OSError and DamagedFileSystem."""
        # Or it would be forgotten as idle.
        self.inode.used_at = self._ground.clock
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
        with self._change() as change:
            change.replace_log(self.inode, self._writer.finish())
            change.then(self._writer.let_go)
        return False

    def abandon(self) -> None:
        """Give the new frames back."""
        self._writer.abandon()

    def _appended(self) -> Iterator[bytes]:
        """What was appended to the log and is not copied yet."""
        ground, inode = self._ground, self.inode
        start, log = self._copied_to, inode.log
        self._copied_to, self._copied_slots = log.tail, log.slot_count
        if start == log.tail:
            return iter(())
        reader = LogReader(
            ground.medium, ground.geometry, inode.number, inode.generation, inode.slot_offset,
            log.head, log.tail,
        )  # fmt: skip
        return (raw for area in reader.areas(start) for _, raw in area)
