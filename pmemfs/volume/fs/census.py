"""What a check knows of every inode: some bytes each, and of directories where they are.

Invariant: nothing here writes, and an inode that was read once can be read again.
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
"""Beside the types of inodes: those of slots without one, and of what can't be read."""


class Census:
    """What is known of every inode, by the position of its slot among all slots."""

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
        """The directory above each directory, as that itself has it."""
        self.homes: dict[int, list[int]] = {}
        """The directories that have a name of each directory."""
        self.empty_directories: set[int] = set()
        """Of those that are removed, those without entries."""

    def add_frame(self, pfn: int) -> int:
        """Another frame of inodes; the position of its first slot."""
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
        """An inode, but for its live line; None for a free slot. Raises DamagedFileSystem."""
        return read_log(self._medium, self._table, number)

    def entries(self, directory: int) -> list[tuple[bytes, Entry]]:
        """What is in a directory that was read before."""
        inode = self.read(directory)
        return list(inode.entries.items()) if inode else []

    def position(self, number: int) -> int | None:
        """The position of an inode's slot; None where there is none of it."""
        if number == ROOT:
            return self.first[self._first_frame]
        first = self.first.get(number * SLOT_BYTES >> PAGE_SHIFT)
        if first is None:
            return None
        position = first + number % SLOTS_PER_FRAME
        return None if position == self.first[self._first_frame] else position

    def home(self, number: int) -> int | None:
        """The directory in which a directory counts as being."""
        homes = self.homes.get(number)
        if not homes:
            return None
        parent = self.parents.get(number)
        return parent if parent in homes else homes[0]

    def lacks_name(self, number: int, type_: int) -> bool:
        """Whether an inode of this type has fewer names, in what can be read, than it says."""
        position = self.position(number)
        if position is None or number == ROOT:
            return False
        if self.types[position] == DAMAGED:
            return True
        is_that = self.types[position] == type_
        return is_that and self.names[position] < max(self.links[position], 1)
