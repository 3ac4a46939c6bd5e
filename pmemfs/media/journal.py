"""The journal: words of several inodes that change together, redone after a crash.

One frame, used anew by each operation that moves more than one word. Invariants:
- an entry is redone only where its word still has the old value, so a journal that was carried out,
  and whose words have moved on since, does nothing;
- that is safe because between two uses of the journal a word never returns to an older value: a
  tail only advances within a frame, and whatever else happens to it goes through the journal.
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
    count: int = stored("<u4", "entries that follow; 0: none")
    reserved: bytes = stored("V8", "zero", default=bytes(8))


@structure
class JournalEntry:
    """One word that changes."""

    offset: int = stored("<u8", "of the word in the pool: a head or tail of an inode", unit="bytes")
    old: int = stored("<u8", "what it was")
    new: int = stored("<u8", "what it is to be")


HEAD = Layout(JournalHead, 16)
ENTRY = Layout(JournalEntry, 24)
MOST_ENTRIES = (FRAME_BYTES - HEAD.size_bytes) // ENTRY.size_bytes


def pack_journal(words: Sequence[tuple[int, int, int]]) -> bytes:
    """The journal of words that change: offset, old and new value of each."""
    assert 0 < len(words) <= MOST_ENTRIES
    raw = HEAD.struct.pack(0, len(words), b"") + b"".join(starmap(ENTRY.struct.pack, words))
    return int(google_crc32c.value(raw[4:])).to_bytes(4, "little") + raw[4:]


def read_journal(frame: bytes) -> list[JournalEntry]:
    """The entries of a journal; none where it is empty or was torn."""
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
