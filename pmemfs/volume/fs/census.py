"""What a check remembers of every inode: some bytes each, and where directories lie.

Invariant: nothing here writes, so an inode that was read once can be read again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from pmemfs.media.filesystem import FIRST_INODES_FRAME
from pmemfs.media.inode import ROOT, SLOT_BYTES, SLOTS_PER_FRAME
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.fs.entries import Entry
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.reading import read_log
from pmemfs.volume.fs.table import InodeTable

FREE, DAMAGED = 0, 255
"""Types beside those of inodes: for a slot without an inode, and for an inode that can't be
read."""


class Census:
    """What is known of every inode, in the order of the slots."""

    def __init__(self, medium: Medium, table: InodeTable) -> None:
        self._medium = medium
        self._table = table
        self._first_frame = table.geometry.first_pfn + FIRST_INODES_FRAME
        self.first: dict[int, int] = {}
        """The position of the first slot of each frame of inodes, by pfn."""
        self.types = bytearray()
        self.links = array("I")
        self.names = array("I")
        self.parents: dict[int, int] = {}
        """The directory above each directory, as the lower one says it."""
        self.homes: dict[int, list[int]] = {}
        """For each directory, the directories that have a name for it."""
        self.empty_directories: set[int] = set()
        """Removed directories without entries."""

    def add_frame(self, pfn: int) -> int:
        """Add a frame of inodes; the position of its first slot."""
        self.first[pfn] = len(self.types)
        self.types.extend(bytes(SLOTS_PER_FRAME))
        self.links.extend([0] * SLOTS_PER_FRAME)
        self.names.extend([0] * SLOTS_PER_FRAME)
        return self.first[pfn]

    def numbers(self) -> Iterator[int]:
        """The numbers of all slots."""
        for pfn in self.first:
            yield from self.numbers_of(pfn)

    def numbers_of(self, pfn: int) -> Iterator[int]:
        """The numbers of the slots of a frame."""
        start = pfn << PAGE_SHIFT
        return map(self._table.number_at, range(start, start + FRAME_BYTES, SLOT_BYTES))

    def read(self, number: int) -> Inode | None:
        """An inode without its live line; None if the slot is free. Raises DamagedFileSystem."""
        return read_log(self._medium, self._table, number)

    def entries(self, directory: int) -> list[tuple[bytes, Entry]]:
        """The entries of a directory that was read before."""
        inode = self.read(directory)
        return list(inode.entries.items()) if inode else []

    def position(self, number: int) -> int | None:
        """The position of an inode's slot; None if the inode can't exist."""
        if number == ROOT:
            return self.first[self._first_frame]
        first = self.first.get(number * SLOT_BYTES >> PAGE_SHIFT)
        if first is None:
            return None
        position = first + number % SLOTS_PER_FRAME
        return None if position == self.first[self._first_frame] else position

    def home(self, number: int) -> int | None:
        """The directory that a directory counts as lying in."""
        homes = self.homes.get(number)
        if not homes:
            return None
        parent = self.parents.get(number)
        return parent if parent in homes else homes[0]

    def lacks_name(self, number: int, type_: int) -> bool:
        """Whether an inode of this type has fewer names than it counts, as far as can be read."""
        position = self.position(number)
        if position is None or number == ROOT:
            return False
        if self.types[position] == DAMAGED:
            return True
        is_that = self.types[position] == type_
        return is_that and self.names[position] < max(self.links[position], 1)
