"""Brings inodes in memory up to date with what workers of a data plane have changed.

A worker commits by the same stored rules as `transaction`, and says which inodes it has changed.
Before anything here looks at an inode again, what the log has got since is replayed. Invariants:
- an inode keeps its object, because whoever compacts or compresses it has that object;
- after this an inode is what a reader of its whole log would make of it. The records are looked at
  as at the first reading, so damage is found here as well as there;
- an inode that is not in memory costs nothing here: it is read when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

from pmemfs.errors import DamagedFileSystem, MemoryFault
from pmemfs.media.inode import HEAD, InodeHead
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.log import Log, LogReader
from pmemfs.volume.fs.replay import Replay
from pmemfs.volume.fs.store import Store

_WORDS = HEAD.head_struct("tail")


class CatchUp:
    """Catches up with the workers of one file system."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def with_changes(self, numbers: Iterable[int] | None) -> None:
        """Workers have changed these inodes; None: they may have changed any.

        Raises nothing: of what is damaged nothing stays in memory, and nothing is written any more.
        """
        cache = self._store.cache
        for number in set(cache.known if numbers is None else numbers):
            if number in cache:
                cache.begin_anew(number)
                inode = cache.cached(number)
                if inode is not None:
                    self._bring_up_to_date(inode)

    def _bring_up_to_date(self, inode: Inode) -> None:
        store, log = self._store, inode.log
        try:
            # Nearly always it is as it was, and to look closer takes longer.
            raw = store.medium.read(inode.slot_offset, _WORDS.size)
            _, _, _, generation, _, start, end = _WORDS.unpack_from(raw)
            if (generation, start, end) == (inode.generation, log.head, log.tail):
                return
            head = store.table.head(inode.number)
            if head is None or head.generation != inode.generation:
                store.housekeeping.was_freed(inode)
            elif head.head != log.head:
                # Nothing is left of the log that was read, so only the number stands for it.
                store.cache.forget(inode.number)
            elif head.tail != log.tail:
                self._replay(inode, head)
        except (DamagedFileSystem, MemoryFault) as damage:
            # Half of the records may be in it.
            store.cache.forget(inode.number)
            store.become_read_only(str(damage))

    def _replay(self, inode: Inode, head: InodeHead) -> None:
        store, log = self._store, inode.log
        extent_count = inode.data_frames
        reader = LogReader(
            store.medium, store.ground.geometry, inode.number, inode.generation, inode.slot_offset,
            head.head, head.tail,
        )  # fmt: skip
        replay = Replay.going_on(inode, store.ground.geometry)
        for records in reader.areas(log.tail):
            replay.apply(records)
        replay.finish()
        # The first frame that was looked at is the last one of the log as it was.
        frames = log.frames[:-1] + reader.log.frames if log.frames else []
        inode.log = Log(head.head, head.tail, frames, log.slot_count + reader.log.slot_count)
        if inode.data_frames > extent_count:
            # Whoever has mapped them may have died before the size covered them.
            store.untrimmed.add(inode.number)
        store.tables.touched(inode.number, inode.state.reads_count_after_ns)
