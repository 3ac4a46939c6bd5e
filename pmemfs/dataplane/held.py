"""What the kernel holds of a mount, in memory that outlives the daemon.

`OpenPlaces` are the open files and directories. `LookupCounts` say how often the kernel has looked
each inode up, and how often the inode is held otherwise. Workers that change names write them, too,
under the lock of names. They lie here because the kernel never says them again, so a process that
takes the control plane's place has to find them. Invariants:
- a place is whole once its inode is stored, and free as soon as that is 0 again. So a daemon that
  dies while it fills a place leaves a free place, not half of an open file;
- a handle stands for one open file for ever: a place that is used again gets another handle;
- a place whose owner is a worker is given back by workers alone, until this process adopts it.
"""

from __future__ import annotations

import errno
import mmap
import struct
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Self

from pmemfs.dataplane import layouts
from pmemfs.dataplane.answers import operation_under_way
from pmemfs.dataplane.holdnotes import HoldNotes
from pmemfs.dataplane.layouts import HandleKind, OpenPlace
from pmemfs.errors import ForeignSharedMemory, system_error
from pmemfs.medium.sparse import data_ranges

PLACE_BYTES = layouts.OPEN_PLACE.size_bytes
_PLACE_WORDS = PLACE_BYTES // 8
_COUNTS_A_STEP = 512
_INODE_WORD = layouts.OPEN_PLACE.offset_of("inode") // 8
_OWNER_WORD = layouts.OPEN_PLACE.offset_of("owner") // 8
_NUMBER_WORD = layouts.OPEN_PLACE.offset_of("number") // 8
# In the machine's own form each number is stored whole. The inode comes last, because it makes the
# place count.
_PLACE = struct.Struct("@QIIIIIIQQ")

assert _PLACE.size == layouts.OPEN_PLACE.offset_of("inode") + 8
assert sys.byteorder == "little"


class OpenPlaces:
    """Places for open files and directories, in memory that is 0 where it was never used.

    The first place has only one word, which says how many other places were ever used. `memory`
    may be read-only; then nothing may be taken or given back. Raises ForeignSharedMemory, also
    while this is iterated over, if no `OpenPlaces` can have stored what is there.
    """

    def __init__(self, memory: memoryview, reserved: Collection[int] = ()) -> None:
        """`reserved` are handles that workers may take by themselves."""
        self._memory = memory
        self._words = memory.cast("Q")
        self._capacity = len(memory) // PLACE_BYTES
        self._used = self._words[0]
        if self._used >= self._capacity:
            raise ForeignSharedMemory(why=f"{self._used} places for open files were never used")
        # The handles that come next. Those of the lowest places come first, so that as little
        # memory as possible is touched.
        self._free: list[int] = []
        kept = {handle % self._capacity for handle in reserved}
        for place in range(self._used, 0, -1):
            at = place * _PLACE_WORDS
            if not self._words[at + _INODE_WORD] and place not in kept:
                last = self._words[at]
                # A daemon that died before it had filled a new place has left no handle there.
                self._free.append(last + self._capacity if last else place)

    @classmethod
    def of_this_process(cls) -> Self:
        """Places that end with this process."""
        return cls(memoryview(mmap.mmap(-1, PLACE_BYTES << layouts.OPEN_PLACES_SHIFT)))

    def check_room(self) -> None:
        """Raise OSError (ENFILE) if the next `take` would raise it."""
        if not self._free and self._used + 1 >= self._capacity:
            raise system_error(errno.ENFILE)

    def take(self, kind: int, inode: int, flags: int, uid: int, gid: int, pid: int) -> int:
        """A new handle; `kind` is a HandleKind. Raises OSError (ENFILE).

        The place says which request is under way, so that the handle is found if the request has no
        answer when this process dies.
        """
        if self._free:
            handle = self._free.pop()
        else:
            self.check_room()
            handle = self._used = self._words[0] = self._used + 1
        at = handle % self._capacity * PLACE_BYTES
        number, _ = operation_under_way.get()
        self._words[handle % self._capacity * _PLACE_WORDS + _OWNER_WORD] = 0
        _PLACE.pack_into(self._memory, at, handle, flags, kind, uid, gid, pid, 0, number, inode)
        return handle

    def will_close(self, handle: int) -> None:
        """The request under way closes this handle, also if this process dies meanwhile, once it
        has noted what becomes of the hold (`LookupCounts.will_take`)."""
        number, _ = operation_under_way.get()
        self._words[handle % self._capacity * _PLACE_WORDS + _NUMBER_WORD] = number

    def give_back(self, handle: int) -> None:
        """Free the place of a handle, which stands for nothing from now on."""
        self._words[handle % self._capacity * _PLACE_WORDS + _INODE_WORD] = 0
        self._free.append(handle + self._capacity)

    def reserve(self, count: int) -> list[int]:
        """Handles for workers, at most so many; the lowest place last, to be taken first."""
        handles = [self._free.pop() for _ in range(min(count, len(self._free)))]
        while len(handles) < count and self._used + 1 < self._capacity:
            self._used = self._words[0] = self._used + 1
            handles.append(self._used)
        return handles[::-1]

    def unreserve(self, handles: Iterable[int]) -> None:
        """Take handles back that no worker has opened anything with."""
        self._free += handles

    def adopt(self, handle: int, kind: int) -> OpenPlace | None:
        """What a worker has opened with a handle, which is this process's from now on; None if it
        stands for nothing of this HandleKind."""
        at = handle % self._capacity * _PLACE_WORDS
        words = self._words
        if not 0 < handle % self._capacity <= self._used or words[at] != handle:
            return None
        if not words[at + _INODE_WORD] or not words[at + _OWNER_WORD]:
            return None
        place = self._unpack(handle % self._capacity)
        if place.kind != kind:
            return None
        words[at + _OWNER_WORD] = 0
        return place

    def files_of_workers(self) -> list[int]:
        """The handles with which workers have opened files, and that nobody has adopted."""
        words = self._words
        return [
            words[at]
            for at in range(_PLACE_WORDS, (self._used + 1) * _PLACE_WORDS, _PLACE_WORDS)
            if words[at + _INODE_WORD]
            and words[at + _OWNER_WORD]
            and self._unpack(at // _PLACE_WORDS).kind == HandleKind.FILE
        ]

    def __iter__(self) -> Iterator[OpenPlace]:
        """The open places, in their order."""
        for place in range(1, self._used + 1):
            found = self._unpack(place)
            if found.inode:
                if found.kind not in list(HandleKind):
                    raise ForeignSharedMemory(why=f"nothing that is open has the kind {found.kind}")
                yield found

    def _unpack(self, place: int) -> OpenPlace:
        at = place * PLACE_BYTES
        return layouts.OPEN_PLACE.unpack(self._memory[at : at + PLACE_BYTES])


class LookupCounts:
    """How often each inode is held, by its number. `fd` is the file that `memory` maps; its area of
    counts goes from `start_bytes` to `end_bytes`. `notes` has what is added for a request.

    This serves as the `Holds` of `volume/fs`, so a file system can be given it.
    """

    def __init__(
        self, fd: int, memory: memoryview, start_bytes: int, end_bytes: int, notes: HoldNotes
    ) -> None:
        self._fd = fd
        self._notes = notes
        self._start = start_bytes
        self._end = end_bytes
        self._counts = memory[start_bytes:end_bytes].cast("Q")
        self._limit = len(self._counts)

    @property
    def words(self) -> memoryview:
        """The counts, a word for each number."""
        return self._counts

    def note_words(self) -> memoryview:
        """As `Holds.note_words`."""
        return self._notes.begin()

    def add(self, number: int, count: int) -> None:
        """Hold an existing inode so many times more."""
        held = self._counts[number]
        self._notes.note(number, held)
        self._counts[number] = held + count

    def take(self, number: int, count: int) -> int:
        """Hold an inode so many times less; how often it is still held.

        The number may be anything that the kernel or a crafted peer says.
        """
        if not 0 <= number < self._limit:
            return 0
        held = self._counts[number]
        if held:
            self._notes.forget_others()
            held = self._counts[number] = max(0, held - count)
        return held

    def will_take(self, number: int) -> None:
        """As `Holds.will_take`."""
        held = self._counts[number]
        if held:
            self._notes.note(number, held - 1)

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
                # Most counts in memory are 0: one frame has the counts for 64 frames of the pool.
                if any(some):
                    yield from ((number, count) for number, count in enumerate(some, at) if count)
