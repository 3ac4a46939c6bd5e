"""Which stretches of a file a copy has to move: its data, and not its holes.

Invariants:
- stretches lie in order and apart from each other, within the size of the file;
- every byte of data is in one of them. What is in none of them is a hole and reads as zeroes;
- each begins at a whole frame, and ends at one or at the end of the file. So only the tail of the
  file is too short for direct I/O, which needs whole blocks.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB, align_up

MOST_BATCH_BYTES = 64 * MIB
"""What one pin holds. Two batches are pinned at a time: one is moved, the next one is prepared."""
MOST_BATCH_STRETCHES = 128
"""Each of them has a mapping of its own. A file of many small stretches needs few pins so."""


class Stretch(NamedTuple):
    """A range of a file."""

    start: int
    """In bytes from the beginning of the file."""
    length: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


def data_of(fd: int, size_bytes: int) -> Iterator[Stretch]:
    """Where a file has data, as its file system says by SEEK_DATA and SEEK_HOLE.

    What doesn't know holes (a device, some file systems) has data everywhere. It moves the
    position of the descriptor. Raises OSError.
    """
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # There is nothing but a hole, or somebody has made the file shorter.
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            start, end = position, size_bytes
        end = min(end, size_bytes)
        if start >= end:
            return
        yield Stretch(start, end - start)
        position = end


def in_frames(stretches: Iterable[Stretch], size_bytes: int) -> Iterator[Stretch]:
    """The same, widened to whole frames as far as the file goes; those that touch become one."""
    start = end = 0
    for stretch in stretches:
        widened = stretch.start // FRAME_BYTES * FRAME_BYTES
        if widened > end:
            if end > start:
                yield Stretch(start, end - start)
            start = widened
        end = max(end, min(align_up(stretch.end, FRAME_BYTES), size_bytes))
    if end > start:
        yield Stretch(start, end - start)


def in_batches(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    """Stretches that are in whole frames, cut and gathered into what is pinned at a time."""
    batch: list[Stretch] = []
    room = MOST_BATCH_BYTES
    for stretch in stretches:
        start = stretch.start
        while start < stretch.end:
            # From a multiple of the batch's size on, so that pieces of 2 MiB stay whole.
            boundary = start - start % MOST_BATCH_BYTES + MOST_BATCH_BYTES
            length = min(stretch.end, boundary, start + room) - start
            batch.append(Stretch(start, length))
            start += length
            room -= length
            if room == 0 or len(batch) == MOST_BATCH_STRETCHES:
                yield batch
                batch, room = [], MOST_BATCH_BYTES
    if batch:
        yield batch


def holes_between(stretches: Iterable[Stretch], size_bytes: int) -> Iterator[Stretch]:
    """What lies before, between and behind stretches, up to a size."""
    position = 0
    for stretch in stretches:
        if stretch.start > position:
            yield Stretch(position, stretch.start - position)
        position = stretch.end
    if size_bytes > position:
        yield Stretch(position, size_bytes - position)
