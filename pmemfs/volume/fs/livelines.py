"""The live lines of inodes: what either plane changes without a transaction.

    a size and its key, when the file was last written to, when the inode was last accessed

Invariants:
- all that is stored here is durable with the next fence, and none of it needs a record of a log.
  An append would cost a transaction otherwise;
- a reader who meets a damaged line reports it, and then nothing is written any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from pmemfs.clock import not_before
from pmemfs.errors import DamagedFileSystem, MemoryFault
from pmemfs.media.inode import LIVE_OFFSET
from pmemfs.media.live import LIVE_LINE, redo_check, size_word
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.ground import Ground
from pmemfs.volume.fs.inode import Inode, State
from pmemfs.volume.fs.reading import read_accessed, read_live, stored_size

_WRITTEN_AT = LIVE_LINE.offset_of("written_ns")
_ACCESSED_AT = LIVE_LINE.offset_of("accessed_ns")
_REDO_AT = LIVE_LINE.offset_of("redo_offset")
_REDO_BYTES = 8 + 16 + 8


class PageLocks(Protocol):
    """What keeps both planes from storing into one encrypted page at once."""

    def lock(self, pfn: int) -> None:
        """Lock the page of a frame, which no worker touches until it is unlocked."""

    def unlock(self, pfn: int) -> None:
        """Unlock a page."""

    def lock_redo(self, live_offset: int) -> None:
        """Lock the redo record of the live line at an offset in the pool."""

    def unlock_redo(self, live_offset: int) -> None:
        """Unlock a redo record, which is empty."""


class LiveLines:
    """The live lines of one file system."""

    def __init__(self, ground: Ground, locks: PageLocks | None = None) -> None:
        self._ground = ground
        self.locks = locks
        """The locks of encrypted pages and of redo records, if there is a data plane."""
        self._medium = ground.medium

    def size_of(self, inode: Inode) -> int:
        """The size of an inode in bytes. Raises OSError (EIO)."""
        try:
            return stored_size(self._medium, inode)
        except DamagedFileSystem as damage:
            raise self._ground.found_damage(str(damage)) from None

    def state_of(self, inode: Inode) -> State:
        """The attributes of an inode now, those of its live line included. Raises OSError (EIO)."""
        state = inode.state.copy()
        if not inode.is_file:
            accessed_ns = read_accessed(self._medium, inode)
        else:
            size_bytes, written_ns, accessed_ns = self._live_of(inode)
            if size_bytes is not None:
                state.size_bytes = size_bytes
            # Within one tick of the clock the write came later: `forget_written` has seen to that.
            if 0 < written_ns < 1 << 63 and state.changed_ns <= written_ns:
                state.modified_ns = not_before(written_ns, state.modified_ns)
                state.changed_ns = not_before(written_ns, state.modified_ns)
        if accessed_ns:
            state.accessed_ns = accessed_ns
        return state

    def seen_state_of(self, inode: Inode) -> State:
        """As `state_of`, for a caller who only looks: the result may be the inode's own state."""
        is_as_logged = not inode.is_file and not read_accessed(self._medium, inode)
        return inode.state if is_as_logged else self.state_of(inode)

    def accessed_ns(self, inode: Inode) -> int:
        """When an inode was last accessed; 0 if the time in its log counts."""
        return read_accessed(self._medium, inode)

    def set_live_size(self, inode: Inode, size_bytes: int) -> None:
        """Store a size that both planes see at once; it is durable with the next fence."""
        word = size_word(size_bytes, inode.keys_of_line()[0])
        self._medium.store(inode.slot_offset + LIVE_OFFSET, word.to_bytes(8, "little"))
        self._medium.flush(inode.slot_offset + LIVE_OFFSET, 8)

    def set_written_ns(self, inode: Inode, now_ns: int) -> None:
        """Store when a file was written to."""
        at = inode.slot_offset + LIVE_OFFSET + _WRITTEN_AT
        self._medium.store(at, now_ns.to_bytes(8, "little"))
        self._medium.flush(at, 8)

    def forget_written(self, inode: Inode) -> None:
        """Let the logged time of modification count from now on, not that of an earlier write."""
        if inode.is_file and self._live_of(inode)[1] >= inode.state.changed_ns:
            self.set_written_ns(inode, 0)
            self._medium.fence()

    def set_accessed_ns(self, inode: Inode, now_ns: int) -> None:
        """Store when an inode was accessed (0: the log says it); durable with the next fence."""
        at = inode.slot_offset + LIVE_OFFSET + _ACCESSED_AT
        self._medium.store(at, max(0, now_ns).to_bytes(8, "little"))
        self._medium.flush(at, 8)

    def write_back(self, slot_offset: int) -> None:
        """Begin to make the live line of a slot durable, whichever plane stored there last.

        This is the size and the time of writing, in the line's first words. A fence must follow.
        """
        self._medium.flush(slot_offset + LIVE_OFFSET, _ACCESSED_AT)

    # The edge block of an encrypted file that is being stored

    @contextmanager
    def redo_locked(self, inode: Inode) -> Iterator[None]:
        """While this context lasts, no worker notes a block of this file. It is empty at first,
        unless a power failure has left something."""
        locks, line = self.locks, inode.slot_offset + LIVE_OFFSET
        if locks is None:
            yield
            return
        locks.lock_redo(line)
        try:
            yield
        finally:
            locks.unlock_redo(line)

    def note_redo(self, inode: Inode, offset: int, block: bytes) -> None:
        """Note, durably, that a block is about to be stored at an offset in the pool."""
        check = redo_check(offset, block).to_bytes(8, "little")
        line = inode.slot_offset + LIVE_OFFSET
        self._medium.store(line + _REDO_AT + 8, block + check)
        # Last, and by itself: a line keeps the order of the stores into it, so the offset never
        # stands before an older block, which would be right for the same offset.
        self._medium.store(line + _REDO_AT, offset.to_bytes(8, "little"))
        self._medium.flush(line + _REDO_AT, _REDO_BYTES)
        self._medium.fence()

    def forget_redo(self, inode: Inode) -> None:
        """The block that was noted is durable. So is this with the next fence, before which nothing
        that is stored there later counts. Otherwise an old note would undo it."""
        at = inode.slot_offset + LIVE_OFFSET + _REDO_AT
        self._medium.store(at, bytes(8))
        self._medium.flush(at, 8)

    def redo_of(self, inode: Inode) -> tuple[int, bytes] | None:
        """The offset and the bytes of a block that was noted and not forgotten."""
        raw = bytes(self._medium.read(inode.slot_offset + LIVE_OFFSET + _REDO_AT, _REDO_BYTES))
        offset, block = int.from_bytes(raw[:8], "little"), raw[8:24]
        if not offset or redo_check(offset, block) != int.from_bytes(raw[24:], "little"):
            # What was torn had not been begun: the block itself is stored after the note is whole.
            return None
        is_mine = offset % len(block) == 0 and any(
            run.pfn <= offset >> PAGE_SHIFT < sum(run) for run in inode.runs()
        )
        return (offset, block) if is_mine else None

    def carry_out_redo(self, inode: Inode) -> None:
        """Store the block that was noted when the power failed, if there is one."""
        at = inode.slot_offset + LIVE_OFFSET + _REDO_AT
        if not any(self._medium.read(at, 8)):
            return
        with self.redo_locked(inode):
            redo = self.redo_of(inode)
            if redo is not None:
                offset, block = redo
                medium = self._ground.pool.medium
                # Bad memory in a file costs its reader an error, and is no damage of the rest.
                with suppress(MemoryFault):
                    medium.store(offset, block)
                    medium.flush(offset, len(block))
                medium.fence()
            self.forget_redo(inode)

    def with_redo(self, inode: Inode, offset: int, raw: bytes | memoryview) -> bytes | memoryview:
        """Bytes of the pool from an offset on, as they will be once the noted block is stored."""
        redo = self.redo_of(inode)
        at = redo[0] - offset if redo else -1
        if redo is None or not 0 <= at < len(raw):
            return raw
        return bytes(raw[:at]) + redo[1] + bytes(raw[at + len(redo[1]) :])

    def _live_of(self, inode: Inode) -> tuple[int | None, int, int]:
        """As `read_live`. Raises OSError (EIO)."""
        try:
            return read_live(self._medium, inode)
        except DamagedFileSystem as damage:
            raise self._ground.found_damage(str(damage)) from None
