"""The live line of an inode: what changes with each write, in whichever plane it happens.

The line lies in the inode's slot, in the pool itself. So what was written survives the death of all
processes, and nothing needs to be logged for it. The size word is the size << 16, plus 16 bits that
check it. 15 of these mix what `size_check` makes of the size with the inode's `line_key`, which
stands for the inode and its last truncation. The 16th makes the number of set bits even.
Invariants:
- each word is changed by one aligned store (the size by compare-and-swap), and bytes are stored
  before the size that covers them, so a reader never sees a size over bytes that are not there;
- a writer who raises a size changes the check bits by what the checks of both sizes differ in. So a
  writer needs no key, and a damaged word stays damaged whoever raises it;
- a word is right under the key of the last truncation, or under the key before it if a crash came
  before the new word was stored. Any other word is damage. An odd number of flipped bits is always
  found;
- a redo record is whole if `redo_check` says so, and then it is carried out again: its block of 16
  bytes is stored at its offset. It is durable before the block is touched, and gone before the next
  one. Otherwise a power failure would tear a block that is encrypted as one, and bytes beside those
  that were written would be lost with it.
"""

from __future__ import annotations

from struct import Struct

import google_crc32c

from pmemfs.media.layout import Layout, stored, structure

SIZE_SHIFT = 16
SIZE_FACTOR = 0x9E3779B97F4A7C15
"""Odd, and mixes the bits of a size well: 2^64 divided by the golden ratio."""
_CHECK_MASK = (1 << SIZE_SHIFT) - 1
REDO_BYTES = 16
_MIXED_SHIFT = 64 - (SIZE_SHIFT - 1)
_MIXED_MASK = (1 << SIZE_SHIFT - 1) - 1
_WORD_MASK = (1 << 64) - 1
_WHOSE = Struct("<QQH")
_REDO = Struct("<QQ")


@structure
class LiveLine:
    """The live line of an inode."""

    size_word: int = stored("<u8", "size in bytes << 16, plus check bits: size check ^ key")
    written_ns: int = stored("<u8", "of the last write; 0: never", unit="ns since 1970")
    accessed_ns: int = stored("<u8", "of the last access; 0: the log has it", unit="ns since 1970")
    redo_offset: int = stored("<u8", "in the pool, of the edge block of an encrypted file that is "
                              "being stored; 0: none", unit="bytes", since=4)  # fmt: skip
    redo_block: bytes = stored("V16", "its new bytes", since=4, default=bytes(16))
    redo_check: int = stored("<u8", "`redo_check` of the two; else it was torn", since=4)
    reserved: bytes = stored("V8", "zero", default=bytes(8))


LIVE_LINE = Layout(LiveLine, 64)


def size_check(size_bytes: int) -> int:
    """The check bits of a size under the key 0."""
    mixed = (size_bytes * SIZE_FACTOR & _WORD_MASK) >> _MIXED_SHIFT
    return mixed << 1 | (mixed ^ size_bytes).bit_count() & 1


def line_key(number: int, generation: int, epoch: int) -> int:
    """The key of a live line, which stands for its inode and its last truncation."""
    # The keys of two neighbouring epochs always differ; a test goes through all of them.
    mixed = int(google_crc32c.value(_WHOSE.pack(number, generation, epoch))) & _MIXED_MASK
    return mixed << 1 | mixed.bit_count() & 1


def size_word(size_bytes: int, key: int) -> int:
    """The word that says this size."""
    return size_bytes << SIZE_SHIFT | size_check(size_bytes) ^ key


def key_of(word: int) -> int:
    """The key under which a word is right."""
    return word & _CHECK_MASK ^ size_check(word >> SIZE_SHIFT)


def raised(word: int, size_bytes: int) -> int:
    """The word after the size was raised, computed as the data plane does it: without the key."""
    return size_word(size_bytes, key_of(word))


def redo_check(offset: int, block: bytes) -> int:
    """What `redo_check` is for a redo record: the offset and the block's two words, mixed."""
    low, high = _REDO.unpack(block)
    return _mix(_mix(_mix(offset) ^ low) ^ high)


def _mix(word: int) -> int:
    return (word ^ word >> 32) * SIZE_FACTOR & _WORD_MASK
