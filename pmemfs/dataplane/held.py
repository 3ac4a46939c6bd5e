"""What the kernel holds of a mount, in the memory that outlives the daemon.

`OpenPlaces` are the open files and directories, `LookupCounts` how often the kernel has looked each
inode up, and whoever else holds it. The control plane alone writes and reads both: the data plane
has no use for them. They lie here because the kernel never says them again, so whoever takes the
control plane's place has to find them. Invariants:
- a place is whole when its inode is stored, and free from the moment at which that is zero again;
- a handle stands for one open file for ever: a place that is used again has another handle.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Iterator
from typing import Self

from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import HandleKind, OpenPlace
from pmemfs.dataplane.sparse import data_ranges
from pmemfs.errors import system_error

PLACE_BYTES = layouts.OPEN_PLACE.size_bytes
_PLACE_WORDS = PLACE_BYTES // 8
_COUNTS_A_STEP = 512
_AFTER_INODE = struct.Struct("<QIIIII")

assert [f.name for f in layouts.OPEN_PLACE.fields[:7]] == [
    "inode", "handle", "flags", "kind", "uid", "gid", "pid",
]  # fmt: skip


class OpenPlaces:
    """Places for open files and directories, in memory that is zero where it was never used.

    The first place has a single word instead: how many of the others were ever used. `memory` may
    be read-only; then nothing may be taken or given back.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._words = memory.cast("Q")
        self._capacity = len(memory) // PLACE_BYTES
        self._used = self._words[0]
        inodes = self._words[_PLACE_WORDS : (self._used + 1) * _PLACE_WORDS : _PLACE_WORDS]
        self._free = [place for place, inode in enumerate(inodes.tolist(), 1) if not inode]
        # The lowest first, so that as little memory is touched as can be.
        self._free.reverse()

    @classmethod
    def of_this_process(cls) -> Self:
        """Places that end with this process."""
        return cls(memoryview(mmap.mmap(-1, PLACE_BYTES << layouts.OPEN_PLACES_SHIFT)))

    def check_room(self) -> None:
        """Raise OSError (ENFILE) where the next `take` would."""
        if not self._free and self._used + 1 >= self._capacity:
            raise system_error(errno.ENFILE)

    def take(self, kind: HandleKind, inode: int, flags: int, uid: int, gid: int, pid: int) -> int:
        """A new handle. Raises OSError (ENFILE)."""
        self.check_room()
        if self._free:
            place = self._free.pop()
        else:
            place = self._used = self._words[0] = self._used + 1
        at = place * _PLACE_WORDS
        before = self._words[at + 1]
        handle = before + self._capacity if before else place
        _AFTER_INODE.pack_into(self._memory, at * 8 + 8, handle, flags, kind, uid, gid, pid)
        self._words[at] = inode
        return handle

    def give_back(self, handle: int) -> None:
        """A handle that was taken stands for nothing any more."""
        place = handle % self._capacity
        self._words[place * _PLACE_WORDS] = 0
        self._free.append(place)

    def __iter__(self) -> Iterator[OpenPlace]:
        """What is open, by place."""
        for place in range(1, self._used + 1):
            at = place * PLACE_BYTES
            found = layouts.OPEN_PLACE.unpack(self._memory[at : at + PLACE_BYTES])
            if found.inode:
                yield found


class LookupCounts:
    """How often each inode is held, by its number. `fd` is of the file that `memory` maps, whose
    area of counts is from `start_bytes` to `end_bytes`.

    Which `Holds` of `volume/fs` this is, so that a file system can be given it.
    """

    def __init__(self, fd: int, memory: memoryview, start_bytes: int, end_bytes: int) -> None:
        self._fd = fd
        self._start = start_bytes
        self._end = end_bytes
        self._counts = memory[start_bytes:end_bytes].cast("Q")
        self._limit = len(self._counts)

    def add(self, number: int, count: int) -> None:
        """An inode, which there is, is held so many times more."""
        self._counts[number] += count

    def take(self, number: int, count: int) -> int:
        """An inode is held so many times less; how often still.

        The number may be anything that the kernel or a crafted peer says.
        """
        held = self.count(number)
        if held:
            held = self._counts[number] = max(0, held - count)
        return held

    def count(self, number: int) -> int:
        """How often an inode is held."""
        return self._counts[number] if 0 <= number < self._limit else 0

    def counts(self) -> Iterator[tuple[int, int]]:
        """Every inode that is held, and how often."""
        for start, end in data_ranges(self._fd, self._start, self._end):
            first = (start - self._start) // layouts.COUNT_BYTES
            last = (end - self._start) // layouts.COUNT_BYTES
            for at in range(first, last, _COUNTS_A_STEP):
                some = self._counts[at : min(at + _COUNTS_A_STEP, last)].tolist()
                # Most of what has memory is zero: a frame has the counts of 64 frames of the pool.
                if any(some):
                    yield from ((number, count) for number, count in enumerate(some, at) if count)
