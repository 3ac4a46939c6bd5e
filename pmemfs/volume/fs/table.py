"""The inodes of a file system: where each one lies, and which slots are free.

No table of inodes can run full: any frame holds inodes if its bit is set in its group's inode
bitmap, and an inode's number says where it lies. Invariants:
- a frame's slots are free and durable before its bit is set. Otherwise a crash could turn the bytes
  of an old file into inodes;
- a slot that is given out is free in the pool, whatever the list here says: the list is only a
  hint.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterator

from pmemfs.errors import DamagedFileSystem
from pmemfs.media.filesystem import FIRST_INODES_FRAME, GROUP_FRAMES, Geometry
from pmemfs.media.inode import (
    HEAD,
    HEAD_WORD_AT,
    ROOT,
    SLOT_BYTES,
    SLOTS_PER_FRAME,
    TAIL_WORD_AT,
    InodeHead,
    is_sound_head,
    read_free_slot,
)
from pmemfs.media.layout import replace
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.masks import first_bit

_SCAN_FRAMES = 64
"""How many frames are searched for free slots before a new frame is taken."""
_KEPT_SLOTS = 4096


class InodeTable:
    """The slots of inodes."""

    def __init__(self, medium: Medium, geometry: Geometry, allocator: Allocator) -> None:
        self._medium = medium
        self.geometry = geometry
        self._allocator = allocator
        self._root_offset = geometry.offset_of(FIRST_INODES_FRAME)
        self._free: list[int] = []
        self._unseen = self.frames()
        self._withheld: set[int] = set()
        self.reserved: Callable[[], Collection[int]] = tuple
        """The free slots that workers may take, which are in no list here."""
        self.pending_words: dict[int, int] = {}
        """What the journal would change, on a pool that may only be read."""

    def slot_offset(self, number: int) -> int:
        """Where an inode lies in the pool. Raises DamagedFileSystem if no inode can lie there."""
        if number == ROOT:
            return self.geometry.offset_of(FIRST_INODES_FRAME)
        offset = number * SLOT_BYTES
        pfn = offset >> PAGE_SHIFT
        if not self.geometry.is_usable(pfn, 1) or not self._has_inodes(pfn):
            raise DamagedFileSystem(why=f"inode {number} would lie where no inodes are")
        if self.number_at(offset) != number:
            raise DamagedFileSystem(why=f"inode {number} would lie where the root lies")
        return offset

    def is_possible(self, number: int) -> bool:
        """Whether the place of this inode is one that holds inodes."""
        try:
            self.slot_offset(number)
        except DamagedFileSystem:
            return False
        return True

    def number_at(self, offset: int) -> int:
        """The number of the inode in a slot."""
        return ROOT if offset == self._root_offset else offset // SLOT_BYTES

    def head(self, number: int) -> InodeHead | None:
        """The head of an inode; None if its slot is free. Raises DamagedFileSystem."""
        offset = self.slot_offset(number)
        head = HEAD.unpack(bytes(self._medium.read(offset, HEAD.size_bytes)))
        # A read-only mount can't carry out the journal, so it reads as if that had been done.
        if self.pending_words:
            words = self.pending_words
            tail = words.get(offset + TAIL_WORD_AT, head.tail)
            head = replace(head, head=words.get(offset + HEAD_WORD_AT, head.head), tail=tail)
        if head.tail == 0:
            return None
        if not is_sound_head(head):
            raise DamagedFileSystem(why=f"inode {number}: its head's checksum is wrong")
        if head.number != number:
            raise DamagedFileSystem(why=f"inode {number}: its head says that it is {head.number}")
        return head

    def take(self) -> tuple[int, int]:
        """A free slot: its offset, and the generation for its next inode. Raises OSError."""
        while True:
            while self._free:
                offset = self._free.pop()
                generation = read_free_slot(self._medium.read(offset, HEAD.size_bytes))
                if (
                    generation is not None
                    and offset not in self._withheld
                    and self._has_inodes(offset >> PAGE_SHIFT)
                ):
                    return offset, generation
            if not self._look_for_free():
                self._add_frame()

    def give_back(self, offset: int) -> None:
        """A slot has become free, or was taken and not used."""
        self._withheld.discard(offset)
        self._free.append(offset)

    def withhold(self, offset: int) -> None:
        """A slot has become free, but must not be given out before `give_back`."""
        self._withheld.add(offset)

    def frames(self) -> Iterator[int]:
        """The pfn of every frame that holds inodes; it may miss what comes or goes meanwhile.

        The first such frame holds inodes whatever its bit says. Bits of frames that a group keeps
        for itself, or that lie behind the zone, count for nothing.
        """
        for group in range(self.geometry.group_count):
            bits = self.marked(group) | (1 << FIRST_INODES_FRAME if group == 0 else 0)
            bits &= (1 << self.geometry.frames_of(group)) - (1 << self.geometry.kept_of(group))
            while bits:
                position = first_bit(bits)
                bits &= bits - 1
                pfn = self.geometry.group_pfn(group) + position
                if self._has_inodes(pfn):
                    yield pfn

    def marked(self, group: int) -> int:
        """The inode bitmap of a group, as it is stored."""
        offset = (self.geometry.group_pfn(group) + 1) << PAGE_SHIFT
        if self.geometry.frames_of(group) < 2 or self._medium.is_hole(offset, FRAME_BYTES):
            return 0
        return int.from_bytes(self._medium.read(offset, FRAME_BYTES), "little")

    def has_inodes(self, run: Run) -> bool:
        """Whether any frame of a run holds inodes. The run lies in one group."""
        pfn, count = run
        if pfn <= self.geometry.first_pfn + FIRST_INODES_FRAME < pfn + count:
            return True
        at, bit = self._bit(pfn)
        raw = self._medium.read(at, (bit + count + 7) >> 3)
        return bool(int.from_bytes(raw, "little") >> bit & (1 << count) - 1)

    def looks_like_inodes(self, pfn: int) -> bool:
        """Whether an unmarked frame holds inodes, at least one of them in use."""
        is_used = False
        raw = bytes(self._medium.read(pfn << PAGE_SHIFT, FRAME_BYTES))
        for at in range(0, FRAME_BYTES, SLOT_BYTES):
            head = HEAD.unpack(raw[at : at + HEAD.size_bytes])
            if head.magic == 0 and head.tail == 0:
                continue
            if not is_sound_head(head):
                return False
            if head.number != self.number_at((pfn << PAGE_SHIFT) + at):
                return False
            is_used = is_used or head.tail != 0
        return is_used

    def mark_frame(self, pfn: int, *, is_marked: bool) -> None:
        """Say whether a frame holds inodes; durable with the next fence."""
        self._set_bit(pfn, is_marked)

    def numbers_in(self, pfn: int) -> list[int]:
        """The inodes in the used slots of a frame."""
        raw = bytes(self._medium.read(pfn << PAGE_SHIFT, FRAME_BYTES))
        return [
            self.number_at((pfn << PAGE_SHIFT) + at)
            for at in range(0, FRAME_BYTES, SLOT_BYTES)
            if raw[at + TAIL_WORD_AT : at + TAIL_WORD_AT + 8] != bytes(8)
        ]

    def empty_frames(self, kept_slots: int | None = None) -> list[int]:
        """Frames that can be dropped: all of their slots are free, and many others are free, too.

        `kept_slots` says how many free slots should stay; by default enough that a frame isn't
        dropped and made again all the time.
        """
        kept_slots = _KEPT_SLOTS if kept_slots is None else kept_slots
        if len(self._free) < 2 * kept_slots:
            return []
        by_frame: dict[int, set[int]] = {}
        for offset in self._free:
            by_frame.setdefault(offset >> PAGE_SHIFT, set()).add(offset)
        first = self.geometry.first_pfn + FIRST_INODES_FRAME
        # The list is only a hint, so the frame itself is asked, too.
        empty = [
            pfn
            for pfn, slots in by_frame.items()
            if len(slots) == SLOTS_PER_FRAME and pfn != first and not self.numbers_in(pfn)
        ]
        return empty[: (len(self._free) - kept_slots) // SLOTS_PER_FRAME]

    def drop_frames(self, pfns: list[int]) -> list[Run]:
        """Let go of empty frames; their runs. The journal must not name their words any more.

        Their bits in the inode bitmap are clear and durable before the frames can be given out;
        otherwise a crash would show a file's bytes as inodes.
        """
        for pfn in pfns:
            self._set_bit(pfn, False)
        gone = set(pfns)
        self._free = [offset for offset in self._free if offset >> PAGE_SHIFT not in gone]
        self._medium.fence()
        return [Run(pfn, 1) for pfn in sorted(gone)]

    def _look_for_free(self) -> bool:
        """Find free slots in frames that were not searched since the mount."""
        reserved = set(self.reserved())
        for _ in range(_SCAN_FRAMES):
            pfn = next(self._unseen, None)
            if pfn is None:
                return False
            start = pfn << PAGE_SHIFT
            used = {self.slot_offset(number) for number in self.numbers_in(pfn)}
            slots = range(start, start + FRAME_BYTES, SLOT_BYTES)
            used |= reserved
            self._free += [offset for offset in reversed(slots) if offset not in used]
            if self._free:
                return True
        return False

    def _add_frame(self) -> None:
        [run] = self._allocator.allocate(1)
        offset = run.pfn << PAGE_SHIFT
        try:
            # The order is the invariant: free slots, durably, and then the bit.
            self._medium.store(offset, bytes(FRAME_BYTES))
            self._medium.persist(offset, FRAME_BYTES)
            self._set_bit(run.pfn, True)
        except OSError as error:
            # ENOSPC comes before the bit is set. After another error the bit may be set, so the
            # frame must not go to a file.
            if error.errno == errno.ENOSPC:
                self._allocator.free([run])
            raise
        self._free += reversed(range(offset, offset + FRAME_BYTES, SLOT_BYTES))

    def _has_inodes(self, pfn: int) -> bool:
        if pfn == self.geometry.first_pfn + FIRST_INODES_FRAME:
            return True
        at, bit = self._bit(pfn)
        return bool(self._medium.read(at, 1)[0] >> bit & 1)

    def _set_bit(self, pfn: int, value: bool) -> None:
        at, bit = self._bit(pfn)
        byte = self._medium.read(at, 1)[0] & ~(1 << bit) | value << bit
        self._medium.store(at, bytes([byte]))
        self._medium.flush(at, 1)

    def _bit(self, pfn: int) -> tuple[int, int]:
        frame = pfn - self.geometry.first_pfn
        # The inode bitmap is the second frame of the group.
        bitmap_pfn = self.geometry.first_pfn + frame - frame % GROUP_FRAMES + 1
        position = frame % GROUP_FRAMES
        return (bitmap_pfn << PAGE_SHIFT) + position // 8, position % 8
