"""The entries of a directory, in memory. There may be millions of them.

An entry is a number beside its name, not an object. Objects would take half as much memory again,
and Python's collector of cycles would walk all of them.
"""

from __future__ import annotations

import stat
from collections.abc import Container, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

_TYPE_BITS = 4
_DIRECTORY = stat.S_IFDIR >> 12
_TYPE_MASK = (1 << _TYPE_BITS) - 1


class Entry(NamedTuple):
    """What a name in a directory leads to."""

    inode: int
    type: int


class Entries(Mapping[bytes, Entry]):
    """Names and what they lead to, in the order in which they were added."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words: dict[bytes, int] = {}

    def __getitem__(self, name: bytes) -> Entry:
        word = self._words[name]
        return Entry(word >> _TYPE_BITS, word & _TYPE_MASK)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._words)

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, name: object) -> bool:
        return name in self._words

    def __repr__(self) -> str:
        return f"<{len(self)} entries>"

    @property
    def words(self) -> dict[bytes, int]:
        """For each name, `inode << 4 | type`; not to be changed by whoever asks."""
        return self._words

    def set(self, name: bytes, inode: int, type_: int) -> int:
        """Let a name lead to an inode; the type of the inode it led to before, 0 if it was new."""
        words = self._words
        before = words.get(name, 0)
        words[name] = inode << _TYPE_BITS | type_
        return before & _TYPE_MASK

    def remove(self, name: bytes) -> int:
        """Let a name lead nowhere; the type of the inode that it led to. Raises KeyError."""
        return self._words.pop(name) & _TYPE_MASK

    def copy(self) -> Entries:
        """A copy of the entries as they are now, which takes some 10 ms for a million."""
        other = Entries()
        other._words = self._words.copy()
        return other

    def leading_to(
        self, numbers: Container[int], first: int, count: int
    ) -> list[tuple[bytes, int]]:
        """The names that lead to some inodes, and to which, among `count` entries from one on."""
        some = islice(self._words.items(), first, first + count)
        return [(n, word >> _TYPE_BITS) for n, word in some if word >> _TYPE_BITS in numbers]

    def directories(self, first: int, count: int) -> list[tuple[bytes, int]]:
        """The names of directories, and their inodes, among `count` entries from one on."""
        some = islice(self._words.items(), first, first + count)
        return [
            (name, word >> _TYPE_BITS) for name, word in some if word & _TYPE_MASK == _DIRECTORY
        ]

    def discard(self, count: int) -> bool:
        """Free some of the entries' memory; whether there is more."""
        words = self._words
        for _ in range(min(count, len(words))):
            words.popitem()
        return bool(words)
