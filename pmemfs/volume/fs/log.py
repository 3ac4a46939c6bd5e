"""Reads the log of an inode, and believes nothing that is stored.

Invariant: whatever a pool holds, walking a log ends, touches nothing outside the data zone, and
either yields sound records or raises DamagedFileSystem. Without this, a pool that somebody made up
could hang the daemon or show it bytes of another user's file as records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pmemfs.errors import DamagedFileSystem
from pmemfs.media import log as media
from pmemfs.media.filesystem import Geometry
from pmemfs.media.inode import INLINE_OFFSET, SLOT_BYTES
from pmemfs.media.log import (
    FRAME_HEAD_BYTES,
    INLINE_RECORDS,
    MOST_SLOTS,
    NEXT_AT,
    RECORD_BYTES,
    RecordKind,
)
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.fs.extents import Run

_PADDING = int(RecordKind.PADDING)


@dataclass(slots=True)
class Log:
    """Where the log of an inode is."""

    head: int
    tail: int
    frames: list[int] = field(default_factory=list)
    """Offsets of its frames in the pool; empty while the log lies in the inode's slot."""
    slot_count: int = 0
    """Slots of records in it, dead records included."""

    @property
    def is_inline(self) -> bool:
        """Whether it lies in the inode's slot."""
        return not self.frames


def frames_needed(slot_count: int) -> int:
    """The most frames that a compacted log of so many slots takes; 0 if it fits into a slot.

    A record does not cross the end of a frame, so up to nine slots of each frame stay empty.
    """
    return -(-slot_count // (MOST_SLOTS - 9)) if slot_count > INLINE_RECORDS else 0


def end_of_area(position: int, slot_offset: int) -> int:
    """The end of the slot or frame that a log's position lies in.

    A position is the end of a record, so the end of a frame belongs to that frame, not to the next.
    """
    if slot_offset + INLINE_OFFSET <= position <= slot_offset + SLOT_BYTES:
        return slot_offset + SLOT_BYTES
    return ((position - 1) & -FRAME_BYTES) + FRAME_BYTES


def runs_of_frames(frames: list[int]) -> list[Run]:
    """Frames at offsets in the pool, as runs: frames that are neighbours make one run."""
    runs: list[Run] = []
    for frame in frames:
        pfn = frame >> PAGE_SHIFT
        if runs and pfn == sum(runs[-1]):
            runs[-1] = Run(runs[-1].pfn, runs[-1].frame_count + 1)
        else:
            runs.append(Run(pfn, 1))
    return runs


class LogReader:
    """Walks the log of one inode; `log` is complete once `areas` has ended."""

    def __init__(
        self, medium: Medium, geometry: Geometry, number: int, generation: int, slot_offset: int,
        head: int, tail: int,
    ) -> None:  # fmt: skip
        self._medium = medium
        self._geometry = geometry
        self._number = number
        self._generation = generation
        self._slot_offset = slot_offset
        self.log = Log(head, tail)

    def areas(self, start: int | None = None) -> Iterator[list[tuple[int, bytes]]]:
        """The records of the slot, or of one frame after the other: the kind and the bytes of each.

        It gives all records, or those from a position on at which one record ends and another
        begins. It gives the records before damage, and then raises DamagedFileSystem.
        """
        if self.log.head == self._slot_offset + INLINE_OFFSET:
            if not INLINE_OFFSET <= self.log.tail - self._slot_offset <= SLOT_BYTES:
                raise self._damaged(f"its log ends at {self.log.tail:#x}, outside its slot")
            area = bytes(self._medium.read(self._slot_offset, SLOT_BYTES))
            position = INLINE_OFFSET if start is None else start - self._slot_offset
            yield from self._area(area, self._slot_offset, position)
            return
        frame, position = self.log.head - FRAME_HEAD_BYTES, FRAME_HEAD_BYTES
        if start is not None:
            # Frames before that are not looked at, so `log.frames` does not have them either.
            frame = end_of_area(start, self._slot_offset) - FRAME_BYTES
            position = start - frame
        seen: set[int] = set()
        while True:
            area = self._frame(frame, seen)
            yield from self._area(area, frame, position)
            position = FRAME_HEAD_BYTES
            # A tail at the end of a frame belongs to that frame: the link after it may be garbage
            # that an append wrote before a crash took its commit away.
            if frame < self.log.tail <= frame + FRAME_BYTES:
                return
            frame = int.from_bytes(area[NEXT_AT : NEXT_AT + 8], "little")

    def _frame(self, offset: int, seen: set[int]) -> bytes:
        # All of this comes before the frame is read: an offset from a bad pool may lie anywhere,
        # and a circle of frames would never end.
        if offset % FRAME_BYTES or not self._geometry.is_usable(offset >> PAGE_SHIFT, 1):
            raise self._damaged(f"its log goes on at {offset:#x}, where no frame of a log can be")
        if offset in seen:
            raise self._damaged("its log goes in a circle")
        seen.add(offset)
        area = bytes(self._medium.read(offset, FRAME_BYTES))
        if not media.is_frame_of(area[:FRAME_HEAD_BYTES], self._number, self._generation, offset):
            raise self._damaged(f"its log goes on at {offset:#x}, where something else lies")
        self.log.frames.append(offset)
        return area

    def _area(self, area: bytes, offset: int, position: int) -> Iterator[list[tuple[int, bytes]]]:
        """The records in a slot or frame, up to the tail or to the end of the slot or frame."""
        records: list[tuple[int, bytes]] = []
        try:
            self._read_area(records, area, offset, position)
        except DamagedFileSystem:
            yield records
            # `check` and a repair keep what was sound before the damage.
            raise
        yield records

    def _read_area(
        self, records: list[tuple[int, bytes]], area: bytes, offset: int, position: int
    ) -> None:
        end = self.log.tail - offset
        if not 0 < end <= len(area):
            end = len(area)
        elif end % RECORD_BYTES or end < position:
            raise self._damaged("its log ends where no record ends")
        is_sound, number, generation = media.is_sound, self._number, self._generation
        while position < end:
            kind, slots = area[position], area[position + 1]
            after = position + slots * RECORD_BYTES
            if not slots or after > end:
                raise self._damaged(f"a record at {offset + position:#x} has no valid length")
            raw = area[position:after]
            # The checksum covers the inode and the place, so a record of another inode fails too.
            if not is_sound(raw, number, generation, offset + position):
                raise self._damaged(f"a record at {offset + position:#x} has a wrong checksum")
            self.log.slot_count += slots
            if kind == _PADDING:
                if end != len(area):
                    raise self._damaged(f"its log ends behind padding at {offset + position:#x}")
                return
            records.append((kind, raw))
            position = after

    def _damaged(self, why: str) -> DamagedFileSystem:
        return DamagedFileSystem(why=f"inode {self._number}: {why}")
