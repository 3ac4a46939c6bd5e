"""Reading the log of an inode, with nothing believed that is stored.

Invariant: whatever a pool holds, walking a log ends, touches nothing outside the data zone, and
either yields sound records or raises DamagedFileSystem.
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
    """Offsets of its frames in the pool; none while it is in the inode's slot."""
    slot_count: int = 0
    """Slots of records in it, the dead ones included."""

    @property
    def is_inline(self) -> bool:
        """Whether it lies in the inode's slot."""
        return not self.frames


def frames_needed(slot_count: int) -> int:
    """How many frames a compacted log of so many slots takes, at most; none in an inode's slot.

    A record does not cross the end of a frame, so of a frame up to nine slots are left over.
    """
    return -(-slot_count // (MOST_SLOTS - 9)) if slot_count > INLINE_RECORDS else 0


def end_of_area(position: int, slot_offset: int) -> int:
    """The end of the slot or frame that a position behind a record lies in."""
    if slot_offset + INLINE_OFFSET <= position <= slot_offset + SLOT_BYTES:
        return slot_offset + SLOT_BYTES
    return ((position - 1) & -FRAME_BYTES) + FRAME_BYTES


def runs_of_frames(frames: list[int]) -> list[Run]:
    """Frames at offsets in the pool, as runs: those that are neighbours are one."""
    runs: list[Run] = []
    for frame in frames:
        pfn = frame >> PAGE_SHIFT
        if runs and pfn == sum(runs[-1]):
            runs[-1] = Run(runs[-1].pfn, runs[-1].frame_count + 1)
        else:
            runs.append(Run(pfn, 1))
    return runs


class LogReader:
    """Walks the log of one inode; `log` is complete when `areas` has ended."""

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

        All of them, or those from a position in its frames on, where one ends and another begins.
        What comes before damage is given before it is raised. Raises DamagedFileSystem.
        """
        if self.log.head == self._slot_offset + INLINE_OFFSET:
            if not INLINE_OFFSET <= self.log.tail - self._slot_offset <= SLOT_BYTES:
                raise self._damaged(f"its log ends at {self.log.tail:#x}, outside its slot")
            area = bytes(self._medium.read(self._slot_offset, SLOT_BYTES))
            yield from self._area(area, self._slot_offset, INLINE_OFFSET)
            return
        frame, position = self.log.head - FRAME_HEAD_BYTES, FRAME_HEAD_BYTES
        if start is not None:
            frame = end_of_area(start, self._slot_offset) - FRAME_BYTES
            position = start - frame
        seen: set[int] = set()
        while True:
            area = self._frame(frame, seen)
            yield from self._area(area, frame, position)
            position = FRAME_HEAD_BYTES
            if frame < self.log.tail <= frame + FRAME_BYTES:
                return
            frame = int.from_bytes(area[NEXT_AT : NEXT_AT + 8], "little")

    def _frame(self, offset: int, seen: set[int]) -> bytes:
        if offset % FRAME_BYTES or not self._geometry.is_usable(offset >> PAGE_SHIFT, 1):
            raise self._damaged(f"its log goes on at {offset:#x}, where no frame of it can be")
        if offset in seen:
            raise self._damaged("its log goes in a circle")
        seen.add(offset)
        area = bytes(self._medium.read(offset, FRAME_BYTES))
        if not media.is_frame_of(area[:FRAME_HEAD_BYTES], self._number, self._generation, offset):
            raise self._damaged(f"its log goes on at {offset:#x}, where another thing is")
        self.log.frames.append(offset)
        return area

    def _area(self, area: bytes, offset: int, position: int) -> Iterator[list[tuple[int, bytes]]]:
        """The records in a slot or frame, up to its end or the tail."""
        records: list[tuple[int, bytes]] = []
        try:
            self._read_area(records, area, offset, position)
        except DamagedFileSystem:
            yield records
            raise
        yield records

    def _read_area(
        self, records: list[tuple[int, bytes]], area: bytes, offset: int, position: int
    ) -> None:
        end = self.log.tail - offset
        if not 0 < end <= len(area):
            end = len(area)
        elif end % RECORD_BYTES or end < position:
            raise self._damaged("its log ends where no record does")
        is_sound, number, generation = media.is_sound, self._number, self._generation
        while position < end:
            kind, slots = area[position], area[position + 1]
            after = position + slots * RECORD_BYTES
            if not slots or after > end:
                raise self._damaged(f"a record at {offset + position:#x} has no valid length")
            raw = area[position:after]
            if not is_sound(raw, number, generation, offset + position):
                raise self._damaged(f"a record at {offset + position:#x} has a wrong checksum")
            self.log.slot_count += slots
            if kind == _PADDING:
                if end != len(area):
                    raise self._damaged(f"the tail is behind a padding at {offset + position:#x}")
                return
            records.append((kind, raw))
            position = after

    def _damaged(self, why: str) -> DamagedFileSystem:
        return DamagedFileSystem(why=f"inode {self._number}: {why}")
