"""Words in shared memory that tell clients of their pins without a question.

Each living pin has a place: one word. The word at place 0 is the mount's. Invariants:
- only the daemon writes. Clients have a descriptor that is open for reading, and the memory is
  sealed, so that they can't open it for writing either;
- a word is one aligned store, so a client sees all of its bits or none;
- a place gets another pin only after its pin has ended, and with it every client that looks there.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import mmap
import os

from pmemfs.errors import CannotPin

PLACES = 1 << 16
_WORD_BYTES = 8
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL | 0x10
"""The last one is F_SEAL_FUTURE_WRITE, which Python has no name for."""


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

    def __init__(self) -> None:
        size_bytes = PLACES * _WORD_BYTES
        fd = os.memfd_create("pmemfs-pins", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            self._memory = mmap.mmap(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)
        self._words = memoryview(self._memory).cast("Q")
        self._next = 1
        self._free: list[int] = []

    def take(self) -> int:
        """A place, whose word is 0. Raises CannotPin."""
        if self._free:
            place = self._free.pop()
        elif self._next < PLACES:
            place, self._next = self._next, self._next + 1
        else:
            raise CannotPin(errno.ENOSPC, what="more pages", why=f"there are {PLACES} pins already")
        self._words[place] = 0
        return place

    def mark(self, place: int, bits: int) -> None:
        """Set bits of a word."""
        # Plain: an operation on an enum takes longer than all else here.
        self._words[place] |= int(bits)

    def clear(self, place: int) -> None:
        """Let a word say nothing again."""
        self._words[place] = 0

    def give_back(self, place: int) -> None:
        """Let another pin have a place."""
        self._free.append(place)

    def close(self) -> None:
        """Let go of the memory. Clients that have it go on reading."""
        self._words.release()
        self._memory.close()
        os.close(self.fd)
