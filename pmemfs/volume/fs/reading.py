"""What a pool holds, as it is stored: reads inodes and the journal for a mount or a check.

Invariant: nothing here writes, and nothing that is stored is believed before it was looked at.
Without this, a check could damage a pool further, and a made-up pool could crash the daemon.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import suppress
from contextvars import ContextVar

from pmemfs.errors import DamagedFileSystem
from pmemfs.media.filesystem import JOURNAL_FRAME
from pmemfs.media.inode import (
    HEAD_WORD_AT,
    INLINE_OFFSET,
    LIVE_OFFSET,
    SIZE_LIMIT_BYTES,
    SLOT_BYTES,
    TAIL_WORD_AT,
    InodeHead,
)
from pmemfs.media.journal import read_journal
from pmemfs.media.live import LIVE_LINE, SIZE_SHIFT, key_of
from pmemfs.media.log import ATTRIBUTES, FRAME_HEAD_BYTES, RECORD_BYTES, RecordKind
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.log import LogReader, end_of_area
from pmemfs.volume.fs.replay import Replay
from pmemfs.volume.fs.table import InodeTable

_LIVE = LIVE_LINE.head_struct("accessed_ns")
_ACCESSED_AT = LIVE_LINE.offset_of("accessed_ns")
_OF_XATTRS = (RecordKind.XATTR, RecordKind.XATTR_REMOVED)
_NO_TIME_NS = 1 << 63
"""A word from here on is not a time of access."""


Steps = Generator[None, None, "Inode | None"]

may_read_in_steps: ContextVar[bool] = ContextVar("may_read_in_steps", default=False)
"""Whether the operation under way may be told to come again. Its first change ends that, because
half of it would happen twice."""


class NotRead(Exception):
    """An operation needs an inode that takes long to read, and has changed nothing yet.

    Read the inode with `read_on`, and begin the operation again.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class MayWait:
    """In this context an operation may raise NotRead, until it changes something."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = may_read_in_steps.set(True)

    def __exit__(self, *_: object) -> None:
        may_read_in_steps.reset(self._token)


class Reading:
    """An inode that is being read, one frame of its log at a time, because the log may be long.

    The inode must not change meanwhile.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self.inode: Inode | None = None
        """The inode, once `go_on` has said that there is no more; None if the slot is free."""

    def go_on(self, steps: int | None = None) -> bool:
        """Read on for so many steps, or to the end; whether there is more. Raises as they do."""
        for _ in itertools.count() if steps is None else range(steps):
            try:
                next(self._steps)
            except StopIteration as end:
                self.inode = end.value
                return False
        return True


def reading_inode(medium: Medium, table: InodeTable, number: int) -> Steps:
    """The steps of reading an inode as it is stored; their result is None if its slot is free.

    Raises DamagedFileSystem.
    """
    inode = yield from _reading_log(medium, table, number)
    if inode is not None:
        # An inode with a damaged live line is refused as a whole, before anything uses its size.
        stored_size(medium, inode)
    return inode


def _reading_log(medium: Medium, table: InodeTable, number: int) -> Steps:
    head = table.head(number)
    if head is None:
        return None
    inode, areas = _blank(medium, table, head)
    replay = Replay(inode, table.geometry)
    for records in areas:
        replay.apply(records)
        yield
    replay.finish()
    return inode


def read_inode(medium: Medium, table: InodeTable, number: int) -> Inode | None:
    """An inode as it is stored; None if its slot is free. Raises DamagedFileSystem."""
    reading = Reading(reading_inode(medium, table, number))
    reading.go_on()
    return reading.inode


def read_log(medium: Medium, table: InodeTable, number: int) -> Inode | None:
    """As `read_inode`, but a damaged live line is not refused."""
    reading = Reading(_reading_log(medium, table, number))
    reading.go_on()
    return reading.inode


def read_xattrs(medium: Medium, table: InodeTable, number: int) -> dict[bytes, bytes]:
    """The extended attributes of an inode as they are stored; none if its slot is free. The names
    of a directory are passed over, since there may be millions. Raises DamagedFileSystem."""
    head = table.head(number)
    if head is None:
        return {}
    inode, areas = _blank(medium, table, head)
    replay = Replay(inode, table.geometry)
    for records in areas:
        replay.apply(record for record in records if record[0] in _OF_XATTRS)
    return inode.xattrs


def readable_part(medium: Medium, table: InodeTable, number: int) -> Inode | None:
    """What can be read of a damaged inode, up to its first bad record; None if it has no head."""
    try:
        head = table.head(number)
    except DamagedFileSystem:
        return None
    if head is None:
        return None
    inode, areas = _blank(medium, table, head)
    replay = Replay(inode, table.geometry)
    with suppress(DamagedFileSystem):
        for records in areas:
            replay.apply(records)
    return inode


def _blank(
    medium: Medium, table: InodeTable, head: InodeHead
) -> tuple[Inode, Iterator[list[tuple[int, bytes]]]]:
    """An inode of which only the head is known, and the records that say the rest."""
    slot = table.slot_offset(head.number)
    reader = LogReader(
        medium, table.geometry, head.number, head.generation, slot, head.head, head.tail
    )
    inode = Inode(head.number, slot, head.generation, head.birth_ns, reader.log)
    return inode, reader.areas()


def is_unnamed(medium: Medium, table: InodeTable, number: int) -> bool:
    """Whether an inode has lost its last name. Raises nothing: of a damaged inode it says no.

    This looks at the end of the log first, where that would stand, because it is asked of all that
    the kernel knows when a mount ends.
    """
    with suppress(DamagedFileSystem):
        head = table.head(number)
        if head is None:
            return False
        slot = table.slot_offset(number)
        last = _last_area(medium, table, slot, head)
        if last is None:
            inode = read_log(medium, table, number)
            return inode is not None and inode.state.link_count == 0
        return last == 0
    return False


def _last_area(medium: Medium, table: InodeTable, slot: int, head: InodeHead) -> int | None:
    """How many names an inode has, as the slot or frame says where its log ends; None if that does
    not tell."""
    end = end_of_area(head.tail, slot)
    is_inline = end == slot + SLOT_BYTES
    if not is_inline and not table.geometry.is_usable((end - FRAME_BYTES) >> PAGE_SHIFT, 1):
        return None
    position = slot + INLINE_OFFSET if is_inline else end - FRAME_BYTES + FRAME_HEAD_BYTES
    raw = bytes(medium.read(position, max(0, head.tail - position)))
    names, at = None, 0
    while at < len(raw):
        kind, length = raw[at], raw[at + 1] * RECORD_BYTES
        if not length:
            return None
        if kind == RecordKind.ATTRIBUTES and length == RECORD_BYTES <= len(raw) - at:
            names = ATTRIBUTES.unpack(raw[at : at + length]).link_count
        elif names is None and kind in (RecordKind.ENTRY, RecordKind.REMOVED):
            # A directory without a name gets no entries and loses none.
            names = 1
        at += length
    return names


def is_directory_still(medium: Medium, table: InodeTable, number: int) -> bool:
    """Whether a damaged inode is a directory, as far as it can be read."""
    inode = readable_part(medium, table, number)
    if inode is None:
        return False
        # A log that was written anew has its attributes last, so damage may hide them.
    has_attributes = inode.state.mode != 0
    return inode.is_directory if has_attributes else bool(inode.parent or inode.entries)


def stored_size(medium: Medium, inode: Inode) -> int:
    """The size of an inode in bytes; for a file, the live line's size if that counts.

    Raises DamagedFileSystem.
    """
    size_bytes = read_live(medium, inode)[0] if inode.is_file else None
    return inode.state.size_bytes if size_bytes is None else size_bytes


def read_live(medium: Medium, inode: Inode) -> tuple[int | None, int, int]:
    """The live line of a file: its size, or None if the log has the size; the last write; the last
    access, as `read_accessed`.

    Raises DamagedFileSystem.
    """
    raw = medium.read(inode.slot_offset + LIVE_OFFSET, _LIVE.size)
    word, written_ns, accessed_ns = _LIVE.unpack(raw)
    size_bytes, key = word >> SIZE_SHIFT, key_of(word)
    # The key of the epoch before is right too: a crash between a truncation's commit and the store
    # of its line leaves it, and then the log's size counts. Any other key is damage.
    right_key, older_key = inode.keys_of_line()
    if key not in (right_key, older_key) or size_bytes >= SIZE_LIMIT_BYTES:
        why = "its live line is damaged, so its size is not known"
        raise DamagedFileSystem(why=f"inode {inode.number}: {why}")
    return (
        size_bytes if key == right_key else None,
        written_ns,
        accessed_ns if accessed_ns < _NO_TIME_NS else 0,
    )


def read_accessed(medium: Medium, inode: Inode) -> int:
    """When an inode was last accessed, as its live line says; 0 if the log says it."""
    raw = medium.read(inode.slot_offset + LIVE_OFFSET + _ACCESSED_AT, 8)
    accessed_ns = int.from_bytes(raw, "little")
    return accessed_ns if accessed_ns < _NO_TIME_NS else 0


def unfinished_words(medium: Medium, table: InodeTable) -> dict[int, int]:
    """The words that the journal would still change, by offset. Raises DamagedFileSystem."""
    journal = table.geometry.offset_of(JOURNAL_FRAME)
    words = {}
    seen = set()
    for entry in read_journal(bytes(medium.read(journal, FRAME_BYTES))):
        # An operation never changes a word twice. If a pool had a word twice, redoing the journal
        # would leave a word that matches an entry again, at each mount.
        if entry.offset in seen or not _is_word_of_an_inode(table, entry.offset):
            raise DamagedFileSystem(why=f"the journal would change a word at {entry.offset:#x}")
        seen.add(entry.offset)
        if int.from_bytes(medium.read(entry.offset, 8), "little") == entry.old != entry.new:
            words[entry.offset] = entry.new
    return words


def _is_word_of_an_inode(table: InodeTable, offset: int) -> bool:
    slot = offset & -SLOT_BYTES
    if offset - slot not in (HEAD_WORD_AT, TAIL_WORD_AT):
        return False
    try:
        return table.slot_offset(table.number_at(slot)) == slot
    except DamagedFileSystem:
        return False
