"""The two copies of a pool's label: how they are found and how they are written.

Invariants:
- a label is written to the copy that is not in force, made durable, and then written to the other
  copy. So at every instant one copy is valid, and a torn write loses nothing;
- what a killed process has written last may not be durable yet, although it can be read. So the
  copy in force is made durable as it is before the other one is overwritten;
- nothing is believed that `validate` refuses. What is left of a damaged label in front is only a
  hint where the copy may lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pmemfs.errors import InvalidLabel, MemoryFault
from pmemfs.media.label import LAYOUT, Label, has_magic, pack, validate
from pmemfs.media.zones import LABEL_BYTES
from pmemfs.medium.base import Medium


class LabelReading(NamedTuple):
    """What was found at the place of a copy of the label."""

    where: str
    offset_bytes: int
    label: Label | None
    problem: InvalidLabel | None
    has_magic: bool


def read_labels(medium: Medium) -> tuple[LabelReading, LabelReading]:
    """Both copies, each with its label if it is valid.

    The second copy lies where the first says that the pool ends. If the first is damaged, its size
    is only a hint (the medium may have grown since), and the end of the medium is another. If there
    is a copy at both places, one pool was about to overwrite another, and the newer copy counts.
    """
    first = _read_label(medium, "label", 0)
    if first.label:
        ends_bytes = [first.label.pool_size_bytes]
    else:
        hint = _size_in(medium)
        ends_bytes = [hint, medium.size_bytes] if hint <= medium.size_bytes else [medium.size_bytes]
    copies = [_read_label(medium, "label copy", end - LABEL_BYTES) for end in reversed(ends_bytes)]
    return first, newest(copies)


def _size_in(medium: Medium) -> int:
    """The pool's size as a damaged label in front still says it; the medium's size if that can't be
    read."""
    try:
        size_bytes: int = LAYOUT.unpack(bytes(medium.read(0, LABEL_BYTES))).pool_size_bytes
    except MemoryFault:
        return medium.size_bytes
    return size_bytes


def _read_label(medium: Medium, where: str, offset_bytes: int) -> LabelReading:
    if not 0 <= offset_bytes <= medium.size_bytes - LABEL_BYTES:
        problem = InvalidLabel(why="it lies behind the end of the medium")
        return LabelReading(where, offset_bytes, None, problem, False)
    try:
        raw = bytes(medium.read(offset_bytes, LABEL_BYTES))
    except MemoryFault as fault:
        # There may be a pool here, so this must not be reported as "no pool".
        return LabelReading(where, offset_bytes, None, InvalidLabel(why=str(fault)), True)
    try:
        return LabelReading(where, offset_bytes, validate(raw), None, True)
    except InvalidLabel as problem:
        return LabelReading(where, offset_bytes, None, problem, has_magic(raw))


def newest(readings: Sequence[LabelReading]) -> LabelReading:
    """The copy in force: the valid copy with the highest sequence number."""
    return max(readings, key=lambda reading: reading.label.sequence if reading.label else -1)


def write_labels(medium: Medium, label: Label, *, in_force: LabelReading) -> None:
    """Write both copies, and the copy in force last."""
    if in_force.label:
        medium.persist(in_force.offset_bytes, LABEL_BYTES)
    copy_offset_bytes = label.pool_size_bytes - LABEL_BYTES
    offsets = [copy_offset_bytes, 0]
    # The copy in force may lie elsewhere: that of a smaller pool which `create` overwrites. It is
    # found only through the label at 0, so that label stays until the new copy is durable.
    if in_force.offset_bytes == copy_offset_bytes:
        offsets.reverse()
    for offset_bytes in offsets:
        write_label(medium, label, offset_bytes)


def write_label(medium: Medium, label: Label, offset_bytes: int) -> None:
    """Write one copy of the label, durably."""
    medium.store(offset_bytes, pack(label))
    medium.persist(offset_bytes, LABEL_BYTES)


def stray_sequence(medium: Medium, label: Label) -> int:
    """The sequence of a label at the end of a medium that is larger than the pool; 0 without one.

    If the label in front were torn, this stray label would be found. The pool's own copy must win
    then, so its sequence has to be higher.
    """
    if medium.size_bytes <= label.pool_size_bytes:
        return 0
    stray = _read_label(medium, "", medium.size_bytes - LABEL_BYTES).label
    return stray.sequence if stray else 0
