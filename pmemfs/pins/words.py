"""Words in shared memory that tell clients of their pins without a question.

Each living pin has a place: one word, and behind all of these another one for its marks, which
only daemons read. The word at place 0 is the mount's. Invariants:
- only the daemon writes. Clients have a descriptor that is open for reading, and no permission to
  open the memory for writing;
- a word is one aligned store, so a client sees all of its bits or none;
- a place gets another pin only after its pin has ended, and with it every client that looks there;
- clients go on looking at this memory when their daemon has died. So the next daemon goes on with
  it, and knows by it which pins are stale.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import mmap
import os
from collections.abc import Set

from pmemfs.errors import CannotPin

PLACES = 1 << 16
_WORD_BYTES = 8
_MARKS_AT = PLACES * _WORD_BYTES
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
"""F_SEAL_FUTURE_WRITE would keep the next daemon from writing, too."""
_FOR_READING = 0o400


class PinWord(enum.IntFlag):
    """What the word of a pin says."""

    STALE = 1
    """A page of the pin has left its file, or has moved in it."""
    RENAMED = 2
    """A name of a pinned file was removed or changed."""
    ENDED = 4
    """The pin has ended."""


MOUNT_ENDED = 1
"""What the mount's word says when the daemon has ended in order."""


class Words:
    """The words of one mount."""

    def __init__(self, memory_fd: int | None = None) -> None:
        """New words; or those that a dead daemon has left, whose descriptor is this object's now.

        Raises OSError.
        """
        self.memory_fd = _new_memory() if memory_fd is None else memory_fd
        """For the daemon that takes the place of this one."""
        self._memory = mmap.mmap(self.memory_fd, 2 * _MARKS_AT)
        self.fd = os.open(f"/proc/self/fd/{self.memory_fd}", os.O_RDONLY | os.O_CLOEXEC)
        """For clients."""
        self._words = memoryview(self._memory)[:_MARKS_AT].cast("Q")
        self._marks = memoryview(self._memory)[_MARKS_AT:].cast("Q")
        self._next = 1
        self._free: list[int] = []

    def take_again(self, places: Set[int]) -> None:
        """These places belong to pins that a dead daemon has left, and the others to none."""
        self._next = max(places, default=0) + 1
        self._free = [place for place in range(1, self._next) if place not in places]

    def take(self) -> int:
        """A place, whose word is 0. Raises CannotPin."""
        if self._free:
            place = self._free.pop()
        elif self._next < PLACES:
            place, self._next = self._next, self._next + 1
        else:
            raise CannotPin(errno.ENOSPC, what="more pages", why=f"there are {PLACES} pins already")
        self._words[place] = self._marks[place] = 0
        return place

    def read(self, place: int) -> int:
        """The word of a pin."""
        return self._words[place]

    def mark(self, place: int, bits: int) -> None:
        """Set bits of a word."""
        # Plain: an operation on an enum takes longer than all else here.
        self._words[place] |= int(bits)

    def clear(self, place: int) -> None:
        """Let a word say nothing again."""
        self._words[place] = 0

    def marks(self, place: int) -> int:
        """What is noted of the marks of a pin."""
        return self._marks[place]

    def note_marks(self, place: int, word: int) -> None:
        """Note the marks of a pin, for the daemon that takes the place of this one."""
        self._marks[place] = word

    def give_back(self, place: int) -> None:
        """Let another pin have a place."""
        self._free.append(place)

    def close(self) -> None:
        """Let go of the memory. Clients that have it go on reading."""
        self._words.release()
        self._marks.release()
        self._memory.close()
        os.close(self.fd)
        os.close(self.memory_fd)


def _new_memory() -> int:
    fd = os.memfd_create("pmemfs-pins", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 2 * _MARKS_AT)
        os.fchmod(fd, _FOR_READING)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd
