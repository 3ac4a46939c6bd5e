"""Writes long logs anew in steps, while operations go on appending to them.

    a copy of what the inode is now          its records are written into new frames
    what was appended meanwhile              is copied behind them, until little is left
    one transaction                          gives the inode the new log

Invariants:
- until that transaction no reader looks at the new frames, and the old log counts. A crash leaves
  the old log and frames that nobody owns, which the search for leaks finds;
- appended records are copied from the log itself, in order, so the new log says what the old one
  says. An entry that was removed and added again would be lost in another order;
- the inode that is compacted is the one in memory. If it is forgotten, or something else writes its
  log anew, the new frames are given back.
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
"""How many records one step writes: some ms."""
_FEW_SLOTS = 256
"""The new log takes over once no more than this was appended that is not copied yet."""
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
        """Add a record, not sealed yet."""
        if len(record) > self._room:
            after = self._next_frame()
            if self._room:
                self._content.append(media.pack_padding())
            full = self._frames[-1]
            # It joins the list before the write, because bad memory may make the write fail, and
            # then `abandon` must give it back, too.
            self._frames.append(after)
            self._write(full, after)
            self._content = []
            self._room = MOST_SLOTS * RECORD_BYTES
        self._content.append(record)
        self._room -= len(record)

    def finish(self) -> Log:
        """The log, whole except for a fence; frames that it does not need are given back."""
        frames = self._frames
        tail = frames[-1] + FRAME_HEAD_BYTES + self._write(frames[-1], 0)
        self._ground.allocator.free(runs_of_frames(self._spare))
        self._spare = []
        return Log(frames[0] + FRAME_HEAD_BYTES, tail, frames, self._slot_count)

    def let_go(self) -> None:
        """The frames belong to the inode from now on."""
        self._frames = []

    def abandon(self) -> None:
        """Give back all frames that still belong to this writer."""
        self._ground.allocator.free(runs_of_frames([*self._frames, *self._spare]))

    def _next_frame(self) -> int:
        if not self._spare:
            # `take_frames` would abandon this very compaction to find room.
            runs = self._ground.allocator.allocate(_FRAMES_AT_ONCE)
            self._spare = [pfn << PAGE_SHIFT for run in runs for pfn in range(run.pfn, sum(run))]
        return self._spare.pop(0)

    def _write(self, frame: int, after: int) -> int:
        """Write a frame that leads to the frame `after`; the length of its records."""
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
        """Whether operations still change this object, and not one that was read anew."""
        return self._cache.cached(self.inode.number) is self.inode

    def step(self) -> bool:
        """Write some records; whether there is more. Raises OSError and DamagedFileSystem."""
        # Otherwise housekeeping would forget the inode as idle.
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
        # The rest was copied just now, and nothing awaits before the commit, so the new log lacks
        # nothing. The transaction's fence makes the new frames durable before the journal.
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
