"""The journal: words of several inodes that change together, and are redone after a crash.

It is one frame, which each operation that moves more than one word writes anew. Invariants:
- an entry is redone only if its word still has the old value. So a journal does nothing once it was
  carried out and its words have moved on;
- between two uses of the journal no word returns to an older value: a tail advances within a frame,
  and everything else that happens to it goes through the journal. Otherwise an old entry would
  match again, and the next mount would put back a tail that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap

import google_crc32c

from pmemfs.media.layout import Layout, stored, structure
from pmemfs.pfn import FRAME_BYTES


@structure
class JournalHead:
    """The head of the journal; entries follow."""

    checksum: int = stored("<u4", "CRC-32C of count, reserved bytes and entries")
    count: int = stored("<u4", "entries that follow; 0: the journal is empty")
    reserved: bytes = stored("V8", "zero", default=bytes(8))


@structure
class JournalEntry:
    """One word that changes."""

    offset: int = stored("<u8", "of the word in the pool: a head or tail of an inode", unit="bytes")
    old: int = stored("<u8", "its value before")
    new: int = stored("<u8", "its value after")


HEAD = Layout(JournalHead, 16)
ENTRY = Layout(JournalEntry, 24)
MOST_ENTRIES = (FRAME_BYTES - HEAD.size_bytes) // ENTRY.size_bytes


def pack_journal(words: Sequence[tuple[int, int, int]]) -> bytes:
    """The journal of words that change, each given as its offset, old value and new value."""
    assert 0 < len(words) <= MOST_ENTRIES
    raw = HEAD.struct.pack(0, len(words), b"") + b"".join(starmap(ENTRY.struct.pack, words))
    return int(google_crc32c.value(raw[4:])).to_bytes(4, "little") + raw[4:]


def read_journal(frame: bytes) -> list[JournalEntry]:
    """The entries of a journal; [] if it is empty or was torn, since then nothing was committed."""
    head = HEAD.unpack(frame[: HEAD.size_bytes])
    if not 0 < head.count <= MOST_ENTRIES:
        return []
    end = HEAD.size_bytes + head.count * ENTRY.size_bytes
    if head.checksum != google_crc32c.value(frame[4:end]):
        return []
    return [
        ENTRY.unpack(frame[at : at + ENTRY.size_bytes])
        for at in range(HEAD.size_bytes, end, ENTRY.size_bytes)
    ]
