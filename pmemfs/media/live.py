"""The live line of an inode: what changes with each write, by whichever plane.

It lies in the inode's slot, in the pool itself, so that what was written survives the death of all
processes without anybody having to log it. The size word is the size << 16, plus 16 bits that check
it: 15 bits of what `size_check` makes of the size and `line_key` of whose it is, which truncation
included, and one that makes the number of set bits even. Invariants:
- each word is changed by one aligned store (the size by compare-and-swap); the bytes are stored
  before the size that covers them;
- who raises a size changes its check bits by what the two sizes differ in, so nobody who writes has
  to know the key, and a word that was damaged stays one;
- a word is right under the key of the last truncation, or of the one before, whose successor a
  crash has kept from storing its own; any other word is damage. An odd number of flipped bits is
  always found.
"""

from __future__ import annotations

from struct import Struct

import google_crc32c

from pmemfs.media.layout import Layout, stored, structure

SIZE_SHIFT = 16
SIZE_FACTOR = 0x9E3779B97F4A7C15
"""It is odd, and mixes the bits of a size well: 2^64 divided by the golden ratio."""
_CHECK_MASK = (1 << SIZE_SHIFT) - 1
_MIXED_SHIFT = 64 - (SIZE_SHIFT - 1)
_MIXED_MASK = (1 << SIZE_SHIFT - 1) - 1
_WORD_MASK = (1 << 64) - 1
_WHOSE = Struct("<QQH")


@structure
class LiveLine:
    """The live line of an inode."""

    size_word: int = stored("<u8", "size in bytes << 16, plus check bits: size check ^ key")
    written_ns: int = stored("<u8", "of the last write; 0: none", unit="ns since 1970")
    accessed_ns: int = stored("<u8", "of the last access; 0: the log has it", unit="ns since 1970")
    reserved: bytes = stored("V40", "zero", default=bytes(40))


LIVE_LINE = Layout(LiveLine, 64)


def size_check(size_bytes: int) -> int:
    """The check bits of a size under the key 0."""
    mixed = (size_bytes * SIZE_FACTOR & _WORD_MASK) >> _MIXED_SHIFT
    return mixed << 1 | (mixed ^ size_bytes).bit_count() & 1


def line_key(number: int, generation: int, epoch: int) -> int:
    """The key of a live line: whose it is, and since which truncation."""
    # Of two neighbouring epochs the keys always differ; a test goes through all of them.
    mixed = int(google_crc32c.value(_WHOSE.pack(number, generation, epoch))) & _MIXED_MASK
    return mixed << 1 | mixed.bit_count() & 1


def size_word(size_bytes: int, key: int) -> int:
    """The word that says this size."""
    return size_bytes << SIZE_SHIFT | size_check(size_bytes) ^ key


def key_of(word: int) -> int:
    """The key under which a word is right."""
    return word & _CHECK_MASK ^ size_check(word >> SIZE_SHIFT)


def raised(word: int, size_bytes: int) -> int:
    """What a word becomes when the size is raised, as the data plane does it."""
    return size_word(size_bytes, key_of(word))
