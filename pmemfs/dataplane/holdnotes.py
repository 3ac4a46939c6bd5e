"""What the request under way does to the holds of inodes, until it has an answer.

A hold, and the answer that tells the caller of it, can't be stored at once. So the count that an
inode had is noted before it is raised. If the daemon dies before the answer is recorded, its
successor gives each inode the noted count back, and carries the request out anew. A file's last
request is the other way round: its handle and its hold can't go at once, so the count without the
hold is noted first, and the successor closes what the dead daemon was about to close. Invariants:
- notes count only while nobody else may have changed one of these counts: this process has the lock
  of names since they were made, and whatever changes a count otherwise forgets them first;
- they belong to one request, and are forgotten once its answer is recorded (`answers`).
"""

from __future__ import annotations

from collections.abc import Container

from pmemfs.dataplane import layouts
from pmemfs.dataplane.answers import operation_under_way

_HEAD_WORDS = layouts.HOLD_NOTES.size_bytes // 8
ROOM = 1 << layouts.HOLD_NOTES_SHIFT
_INODE_WORD = layouts.OPEN_PLACE.offset_of("inode") // 8
_NUMBER_WORD = layouts.OPEN_PLACE.offset_of("number") // 8
_PLACE_WORDS = layouts.OPEN_PLACE.size_bytes // 8


class HoldNotes:
    """The notes in `memory`, which may be read-only; then nothing may be noted or forgotten."""

    def __init__(self, memory: memoryview) -> None:
        self._words = memory.cast("Q")

    def begin(self) -> memoryview:
        """The words, for holds of the request that is under way: its number, how many notes there
        are, and from the eighth word on the notes."""
        words = self._words
        number, _ = operation_under_way.get()
        if words[0] != number:
            # Notes of another request must not become this one's.
            words[0] = words[1] = 0
            words[0] = number
        return words

    def note(self, inode: int, count: int) -> None:
        """If the request has no answer when this process dies, an inode is held so often."""
        words = self.begin()
        noted = words[1]
        if words[0] and noted < ROOM:
            at = _HEAD_WORDS + 2 * noted
            words[at], words[at + 1] = inode, count
            words[1] = noted + 1

    def forget_others(self) -> None:
        """A count changes that the notes may have, though not for the request under way."""
        words = self._words
        if words[0] and words[0] != operation_under_way.get()[0]:
            words[0] = 0

    def forget(self) -> None:
        """Others may change counts from now on."""
        self._words[0] = 0

    def take_back(self, counts: memoryview, opens: memoryview, answered: Container[int]) -> None:
        """Give counts what a dead daemon's request has noted, unless that was answered, and close
        what it has opened or was about to close. Ends as well if it is begun again in the middle.
        """
        words, places = self._words, opens.cast("Q")
        number, noted = words[0], min(words[1], ROOM)
        if number and noted and number not in answered:
            # With the hold of a file goes its handle.
            for place in range(1, places[0] + 1):
                at = place * _PLACE_WORDS
                if places[at + _INODE_WORD] and places[at + _NUMBER_WORD] == number:
                    places[at + _INODE_WORD] = 0
            for note in range(noted - 1, -1, -1):
                at = _HEAD_WORDS + 2 * note
                if words[at] < len(counts):
                    counts[words[at]] = words[at + 1]
        words[0] = 0
