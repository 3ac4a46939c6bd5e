"""The answers that the daemon gave last, in memory that outlives it: so nothing is done twice.

A daemon that takes over is given every request again that was not answered to the kernel, and the
dead one may have carried the request out. So each operation that must not be done twice leaves two
traces:

    decide     before it stores the word in the pool that makes it count: the word, and its value
    record     when it has an answer, which is sent after that: the answer, in a ring of records

Invariants:
- a trace counts once its `number` is stored, which comes last, and no more from the moment in which
  that is 0. So a daemon that dies in between leaves no half of one;
- nothing awaits between `decide` and the store of the word. So only one request is in doubt at a
  time, and the word in the pool tells what became of it;
- a long answer lies in a ring of bytes, and its record says where. That record goes before any of
  these bytes is used again;
- a request that decided and waits for something since then has a record, if another one decides.
  The record of a request that waits is never given to another request. All others are used again in
  their order: the kernel has long had such an answer, because thousands of others came after it.
"""

from __future__ import annotations

import enum
import mmap
import struct
import sys
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Self

from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import AnswerRecord
from pmemfs.errors import ForeignSharedMemory
from pmemfs.medium.sparse import data_ranges

COUNT = 1 << layouts.ANSWERS_SHIFT
DECISION_BYTES = layouts.DECISION.size_bytes
RECORD_BYTES = layouts.ANSWER_RECORD.size_bytes
LISTINGS_BYTES = layouts.LISTINGS_BYTES
AREA_BYTES = layouts.HOLD_NOTES_AT + layouts.HOLD_NOTES_BYTES + LISTINGS_BYTES
MOST_BYTES = layouts.ANSWER_RECORD.room_of("answer")
"""An answer that is longer is a listing, and does not fit into a record."""

_DECISION_WORDS = DECISION_BYTES // 8
_RECORD_WORDS = RECORD_BYTES // 8
_NOTES_WORD = layouts.HOLD_NOTES_AT // 8
_LISTINGS_AT = AREA_BYTES - LISTINGS_BYTES
# All behind the number, in the machine's own form, which stores each number whole.
_REST = struct.Struct(f"@QIIIIQ{MOST_BYTES}s")

assert _REST.size == RECORD_BYTES - 8
assert layouts.DECISION.offset_of("value") == 24
assert layouts.ANSWER_RECORD.offset_of("number") == 0
assert sys.byteorder == "little"

operation_under_way: ContextVar[tuple[int, int]] = ContextVar("operation_under_way", default=(0, 0))
"""The number and the opcode of the request that is being carried out, also after it has awaited
something. (0, 0) outside of requests."""


class AnswerState(enum.IntEnum):
    """What a record says of its request."""

    ANSWERED = 1
    CARRIED_OUT = 2
    """It has no answer yet."""


_ANSWERED, _CARRIED_OUT = int(AnswerState.ANSWERED), int(AnswerState.CARRIED_OUT)


class Answers:
    """The ring, and the decision that stands before it. They lie in a file from `start_bytes` on,
    and `memory` is all of that file.

    `memory` may be read-only; then nothing may be stored.
    """

    def __init__(self, fd: int, memory: memoryview, start_bytes: int) -> None:
        self._memory = memory[start_bytes : start_bytes + AREA_BYTES]
        self._words = self._memory.cast("Q")
        self.places: dict[int, int] = {}
        """Where the records are (as an index of words), by the numbers of their requests."""
        self._waiting: dict[int, int] = {}
        """Those that were carried out and have no answer."""
        self._decided = 0
        """The number of the request that decided last, if it has no record yet."""
        self._sequence = 0
        self._next = _DECISION_WORDS
        for start, end in data_ranges(fd, start_bytes, start_bytes + layouts.HOLD_NOTES_AT):
            self._read(start - start_bytes, end - start_bytes)
        self._listings: deque[tuple[int, int]] = deque()
        """The long answers in their order: number, and where it begins in an endless ring."""
        self._listings_end = 0
        self._find_listings()

    @classmethod
    def of_this_process(cls) -> Self:
        """A ring that ends with this process."""
        return cls(-1, memoryview(mmap.mmap(-1, AREA_BYTES)), 0)

    def record(self, number: int, opcode: int, answer: bytes | memoryview, error: int = 0) -> None:
        """The request has this answer: an errno, or 0 and bytes."""
        # Every operation passes here, so this calls as little as possible.
        length = len(answer)
        at = self._put_listing(number, answer) if length > MOST_BYTES else 0
        word = self._take(number)
        _REST.pack_into(
            self._memory, word * 8 + 8, self._sequence, _ANSWERED, error, opcode, length, at,
            b"" if length > MOST_BYTES else answer,
        )  # fmt: skip
        self._words[word] = number
        # The caller is told of what it holds now, if not by this process, then by the next one.
        self._words[_NOTES_WORD] = 0
        # Only now may the other traces go: without any, it would be carried out again.
        if number == self._decided:
            self._words[0] = self._decided = 0
        if self._waiting and number in self._waiting:
            self._words[self._waiting.pop(number)] = 0

    def decide(self, number: int, opcode: int, offset: int, value: int) -> None:
        """The request is about to be carried out: this word of the pool gets this value next."""
        words = self._words
        if self._decided:
            # It has awaited something since, so it was carried out.
            self._carried_out(self._decided, words[1], words[2])
        words[0] = 0
        words[1] = opcode
        words[2] = offset
        words[3] = value
        words[0] = self._decided = number

    def find(self, number: int) -> AnswerRecord:
        """The record of a request in `places`."""
        return self._unpack(self.places[number])

    def answer_of(self, record: AnswerRecord) -> bytes:
        """The answer in the record of a request in `places`."""
        if record.length <= MOST_BYTES:
            return record.answer[: record.length]
        at = _LISTINGS_AT + record.offset % LISTINGS_BYTES
        return bytes(self._memory[at : at + record.length])

    def newest(self) -> list[AnswerRecord]:
        """All records, the newest first. Raises ForeignSharedMemory if one is not possible."""
        records = [self._unpack(word) for word in self.places.values()]
        for record in records:
            if record.state not in list(AnswerState) or record.length > LISTINGS_BYTES:
                raise ForeignSharedMemory(why=f"request {record.number} has no possible record")
        return sorted(records, key=lambda record: record.sequence, reverse=True)

    def settle(self, load_word: Callable[[int], int]) -> list[AnswerRecord]:
        """What a dead daemon has carried out and not answered; these requests come again.

        `load_word` gives a word of the pool. Nothing may have changed there since, other than by
        the journal.
        """
        number, opcode, offset, value = self._words[:4].tolist()
        if number and number not in self.places and load_word(offset) == value:
            self._carried_out(number, opcode, offset)
        self._words[0] = self._decided = 0
        return [self._unpack(word) for word in self._waiting.values()]

    def _carried_out(self, number: int, opcode: int, offset: int) -> None:
        """Record that a request was carried out which has no answer yet."""
        if number not in self._waiting:
            word = self._waiting[number] = self._take(number)
            at = word * 8 + 8
            _REST.pack_into(
                self._memory, at, self._sequence, _CARRIED_OUT, 0, opcode, 0, offset, b""
            )
            self._words[word] = number

    def _take(self, number: int) -> int:
        """The place for a new record, which has no number yet: that of the oldest record, other
        than those of requests that wait."""
        word = self._next
        if self._waiting:
            while word in self._waiting.values():
                word = _after(word)
        self._next = _after(word)
        before = self._words[word]
        if before:
            self._words[word] = 0
            self.places.pop(before, None)
        self.places[number] = word
        self._sequence += 1
        return word

    def _put_listing(self, number: int, answer: bytes | memoryview) -> int:
        """Store a long answer, in place of the oldest ones; where it begins in the endless ring."""
        start, length = self._listings_end, len(answer)
        if start % LISTINGS_BYTES + length > LISTINGS_BYTES:
            start += -start % LISTINGS_BYTES
        end = self._listings_end = start + length
        while self._listings and self._listings[0][1] + LISTINGS_BYTES < end:
            older, _ = self._listings.popleft()
            word = self.places.pop(older, None)
            if word is not None:
                self._words[word] = 0
        at = _LISTINGS_AT + start % LISTINGS_BYTES
        self._memory[at : at + length] = answer
        self._listings.append((number, start))
        return start

    def _find_listings(self) -> None:
        """Find the long answers of a dead daemon."""
        found = []
        for number, word in self.places.items():
            # The state and the errno, the opcode and the length.
            length = self._words[word + 3] >> 32
            if length > MOST_BYTES:
                start = self._words[word + 4]
                found.append((start, number))
                self._listings_end = max(self._listings_end, start + length)
        self._listings.extend((number, start) for start, number in sorted(found))

    def _unpack(self, word: int) -> AnswerRecord:
        at = word * 8
        return layouts.ANSWER_RECORD.unpack(self._memory[at : at + RECORD_BYTES])

    def _read(self, start: int, end: int) -> None:
        """Note the records of a dead daemon that lie in a range, or begin or end in it."""
        first = max(0, start - DECISION_BYTES) // RECORD_BYTES
        last = min(end // RECORD_BYTES + 1, COUNT)
        for word in range(_word_of(first), _word_of(last), _RECORD_WORDS):
            number, sequence = self._words[word], self._words[word + 1]
            state = self._words[word + 2] & 0xFFFF_FFFF
            if number and state != _CARRIED_OUT:
                self.places[number] = word
                self._waiting.pop(number, None)
            elif number not in self.places and number:
                self.places[number] = self._waiting[number] = word
            if sequence > self._sequence:
                self._sequence = sequence
                self._next = _after(word)


def _word_of(place: int) -> int:
    return _DECISION_WORDS + place * _RECORD_WORDS


def _after(word: int) -> int:
    word += _RECORD_WORDS
    return word if word < _word_of(COUNT) else _DECISION_WORDS
