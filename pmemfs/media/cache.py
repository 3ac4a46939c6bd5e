"""Mode `cache`: where its parts lie in the data zone, its head, its tags.

    head | copy of the head | words of groups | tags | (to 2 MiB) | blocks

A block of the origin may lie in one set, which its number says. A set has `WAYS` tags, and each
belongs to one place for a block: the place of way w of set s is number w * set_count + s. So blocks
of neighbouring numbers, which have neighbouring sets, lie side by side where they have the same
way. Invariants:
- a tag is one aligned word, and says all of its block: which one it is, whether the origin has the
  same bytes, and by its check bits that it belongs to this place. A word of 0 is a free place; any
  other word without the right check bits is damage;
- where two tags of a set name one block, the newer sequence counts. `SEQUENCES` is far more than
  the two that a crash can leave, so a comparison modulo it can't go wrong;
- a group's word is durable, and not 0, before the first tag in the group says `DIRTY` or `ZERO`.
  Otherwise the search for dirty blocks, which reads only such groups, would forget one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import google_crc32c

from pmemfs.errors import DamagedCache
from pmemfs.media.layout import Layout, replace, stored, structure
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.units import MIB, align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

MAGIC = b"pmemfs cache\r\n\x1a\n"
FORMAT_VERSION = 1

WAYS = 16
TAG_BYTES = 8
SET_BYTES = WAYS * TAG_BYTES
"""Two cache lines."""
GROUP_SHIFT = 9
"""512 sets have one word that says since when they may have dirty blocks."""
GROUP_WORD_BYTES = 8
REGION_SHIFT = 9
"""512 blocks that follow each other have sets that follow each other."""

BLOCK_SHIFTS = (12, 13, 14, 15, 16)
"""Blocks of 4 KiB to 64 KiB."""
SEQUENCES = 32


class BitField(NamedTuple):
    """Some bits of a stored word."""

    name: str
    shift: int
    width: int
    meaning: str

    @property
    def mask(self) -> int:
        """The greatest value."""
        return (1 << self.width) - 1

    def of(self, word: int) -> int:
        """The value in a word."""
        return word >> self.shift & self.mask


STATE = BitField("state", 0, 3, "1 clean, 2 dirty, 3 zero")
SEQUENCE = BitField("sequence", 3, 5, "counts the places that the block has had, modulo 32")
BLOCK = BitField("block", 8, 40, "number of the block in the origin")
CHECK = BitField("check", 48, 16, "of the bits below it, the place and the seed; see `Ground`")
TAG_FIELDS = (STATE, SEQUENCE, BLOCK, CHECK)
_STATE_MASK = STATE.mask
_CHECK_SHIFT = CHECK.shift
_LOW_MASK = (1 << CHECK.shift) - 1
_WORD_MASK = (1 << 64) - 1

MIX = 0x9E37_79B9_7F4A_7C15
"""2^64 by the golden ratio, odd. Source: Knuth, TAOCP vol. 3, 6.4: multiplicative hashing."""
MIX_PLACE = 0xC2B2_AE3D_27D4_EB4F
"""Another odd number with well mixed bits. Source: the second prime of xxHash64."""


class TagState(IntEnum):
    """What a tag says of its block. A word of 0 is a free place."""

    CLEAN = 1
    """The origin has the same bytes."""
    DIRTY = 2
    """Only this place has the bytes."""
    ZERO = 3
    """The block reads as zeroes, which the origin does not have yet. The place holds nothing."""


_STATES = {int(state): state for state in TagState}


class Policy(IntEnum):
    """What a write does."""

    WRITE_BACK = 1
    """It is answered once the block is in the pool; the origin has it later."""
    WRITE_THROUGH = 2
    """It is answered once the pool and the origin have it."""
    WRITE_AROUND = 3
    """Only the origin gets it, and the pool forgets the block."""
    READ_ONLY = 4
    """It is refused."""

    @property
    def word(self) -> str:
        """As the command line and the reports write it."""
        return self.name.lower().replace("_", "-")


class Tag(NamedTuple):
    """What a tag says."""

    state: TagState
    sequence: int
    block: int

    @property
    def is_dirty(self) -> bool:
        """Whether the origin lacks what this tag stands for."""
        return self.state is not TagState.CLEAN


@structure
class CacheHead:
    """The head of a cache. Of its two copies the newer valid one counts, as with the label."""

    magic: bytes = stored("V16", "`MAGIC`: a cache of pmemfs", default=MAGIC)
    checksum: int = stored("<u4", "CRC-32C of the 4096 bytes with this field zero")
    format_version: int = stored("<u4", "of the cache", default=FORMAT_VERSION)
    sequence: int = stored("<u8", "counts the writes of the head")
    uuid: bytes = stored("V16", "of the pool that the cache belongs to", default=bytes(16))
    seed: int = stored("<u8", "random; mixed into the choice of sets and into check bits")
    set_count: int = stored("<u8", "sets", unit="sets")
    block_shift: int = stored("u1", "a block is 2^block_shift bytes", default=12)
    way_count: int = stored("u1", "tags of a set", default=WAYS)
    policy: int = stored(
        "u1", "1 write-back, 2 write-through, 3 write-around, 4 read-only", default=1
    )
    is_settled: int = stored("u1", "1: unmounted, and `dirty_blocks` and `origin_mark` are right")
    max_dirty_percent: int = stored("<u4", "of all places: more dirty blocks make writes wait")
    max_dirty_age_seconds: int = stored("<u4", "how old a dirty block may get; 0: any", unit="s")
    origin_timeout_seconds: int = stored("<u4", "how long a miss waits for the origin", unit="s")
    read_ahead_bytes: int = stored("<u4", "fetched ahead of a sequential reader", unit="bytes")
    reserved0: int = stored("<u4", "zero")
    bypass_bytes: int = stored(
        "<u8", "longer sequential reads leave no blocks behind; 0: they do", unit="bytes"
    )
    dirty_blocks: int = stored("<u8", "at the end of the last mount", unit="blocks")
    origin_bytes: int = stored("<u8", "the size that is served", unit="bytes")
    origin_mark: bytes = stored(
        "V32",
        "of the origin after our last write, see docs/origins.md; zero: not known; all bits set: "
        "the cache is being emptied",
        default=bytes(32),
    )
    origin_next_mark: bytes = stored(
        "V32",
        "of the origin after the first write of a mount, if it is known; 0: it is not",
        default=bytes(32),
    )
    origin_identity: str = stored("S512", "which origin this is", default="")
    origin: str = stored("S1024", "how the user named the origin; UTF-8", default="")
    reserved: bytes = stored("V2384", "zero; kept as found", default=bytes(2384))


HEAD = Layout(CacheHead, FRAME_BYTES)
_CHECKSUM_AT = HEAD.offset_of("checksum")
HEAD_COPIES = 2


def pack_head(head: CacheHead) -> bytes:
    """The stored form, with the checksum computed."""
    return HEAD.pack(replace(head, checksum=_checksum(HEAD.pack(head))))


def validate_head(buffer: Buffer, uuid: bytes, data_bytes: int) -> CacheHead:
    """The head in a buffer of 4096 bytes, of a cache in a data zone of that size. Raises
    DamagedCache for the first of these that holds:

    1. the magic differs
    2. the checksum differs
    3. the format is another one
    4. the head belongs to another pool
    5. the number of ways or the size of a block is not a known one
    6. the number of sets isn't the one that follows from the size of the data zone
    7. the policy is not a known number, or a share is above 100 %
    8. the size of the origin is 0, or needs block numbers that a tag can't hold
    9. the names of the origin aren't text
    """
    raw = bytes(buffer)
    head = HEAD.unpack(raw)
    _refuse(head.magic != MAGIC, "its head does not start with the magic of a cache")
    _refuse(head.checksum != _checksum(raw), "its head's checksum is wrong")
    _refuse(
        head.format_version != FORMAT_VERSION,
        f"its format is {head.format_version}, and this program knows only {FORMAT_VERSION}",
    )
    _refuse(head.uuid != uuid, "it belongs to another pool")
    _refuse(head.way_count != WAYS, f"its sets have {head.way_count} ways, not {WAYS}")
    _refuse(head.block_shift not in BLOCK_SHIFTS, f"its blocks have 2^{head.block_shift} bytes")
    expected = set_count_of(data_bytes, head.block_shift)
    _refuse(head.set_count != expected, f"it has {head.set_count} sets, not {expected}")
    _refuse(head.policy not in set(Policy), f"its policy is {head.policy}")
    _refuse(head.max_dirty_percent > 100, f"its dirty share is {head.max_dirty_percent} %")
    limit_bytes = BLOCK.mask + 1 << head.block_shift
    _refuse(not 0 < head.origin_bytes <= limit_bytes, f"its origin has {head.origin_bytes} bytes")
    for text in (head.origin, head.origin_identity):
        _refuse(not text.isprintable() or not text, "what it says of its origin is not text")
    return head


def _checksum(raw: bytes) -> int:
    before, after = raw[:_CHECKSUM_AT], raw[_CHECKSUM_AT + 4 :]
    return int(google_crc32c.value(before + bytes(4) + after))


def _refuse(is_wrong: bool, why: str) -> None:
    if is_wrong:
        raise DamagedCache(why=why)


class Ground(NamedTuple):
    """Where the parts of a cache lie, counted from the first byte of the pool."""

    data_offset: int
    set_count: int
    block_shift: int
    seed: int

    @property
    def group_count(self) -> int:
        """How many words say where dirty blocks may be."""
        return (self.set_count - 1 >> GROUP_SHIFT) + 1

    @property
    def place_count(self) -> int:
        """How many blocks fit."""
        return self.set_count * WAYS

    @property
    def groups_offset(self) -> int:
        """Of the words of groups."""
        return self.data_offset + HEAD_COPIES * FRAME_BYTES

    @property
    def tags_offset(self) -> int:
        """Of the tags."""
        return self.data_offset + _tags_at(self.set_count)

    @property
    def blocks_offset(self) -> int:
        """Of the first place."""
        return self.data_offset + _blocks_at(self.set_count)

    def tag_offset(self, set_number: int, way: int) -> int:
        """Where the tag of a way lies."""
        return self.tags_offset + set_number * SET_BYTES + way * TAG_BYTES

    def place_offset(self, set_number: int, way: int) -> int:
        """Where the block of a way lies."""
        return self.blocks_offset + (way * self.set_count + set_number << self.block_shift)

    def group_offset(self, group: int) -> int:
        """Where the word of a group lies."""
        return self.groups_offset + group * GROUP_WORD_BYTES

    def place_pfn(self, set_number: int, way: int) -> int:
        """The first frame of a place."""
        return self.place_offset(set_number, way) >> PAGE_SHIFT

    def set_of(self, block: int) -> int:
        """The set that a block may lie in. `set_of` in cache.pxi computes the same."""
        mixed = ((block >> REGION_SHIFT) ^ self.seed) * MIX & _WORD_MASK
        first = mixed * self.set_count >> 64
        return (first + (block & (1 << REGION_SHIFT) - 1)) % self.set_count

    def tag_word(self, tag: Tag, set_number: int, way: int) -> int:
        """The word of a tag at its place."""
        low = tag.block << BLOCK.shift | tag.sequence << SEQUENCE.shift | tag.state
        return self._check(low, set_number, way) << CHECK.shift | low

    def read_tag(self, word: int, set_number: int, way: int) -> Tag | None:
        """What a word says; None for a free place. Raises DamagedCache."""
        if not word:
            return None
        # Without `BitField.of`, because each request for a block comes here.
        low = word & _LOW_MASK
        state, block = _STATES.get(low & _STATE_MASK), low >> BLOCK.shift
        is_right = word >> CHECK.shift == self._check(low, set_number, way)
        if not is_right or state is None or self.set_of(block) != set_number:
            raise DamagedCache(why=f"the tag of set {set_number}, way {way}, is not one")
        return Tag(state, low >> SEQUENCE.shift & SEQUENCES - 1, block)

    def first_damaged(self, words: Sequence[int], set_number: int) -> int | None:
        """The first way of a set whose word has wrong check bits or no known state."""
        first, seed = set_number * WAYS, self.seed
        for way, word in enumerate(words):
            low = word & _LOW_MASK
            check = (low ^ (first + way ^ seed) * MIX_PLACE & _WORD_MASK) * MIX & _WORD_MASK
            is_tag = word >> _CHECK_SHIFT == check >> _CHECK_SHIFT and low & _STATE_MASK in _STATES
            if word and not is_tag:
                return way
        return None

    def _check(self, low: int, set_number: int, way: int) -> int:
        place = (set_number * WAYS + way ^ self.seed) * MIX_PLACE & _WORD_MASK
        return ((low ^ place) * MIX & _WORD_MASK) >> CHECK.shift


def is_newer(sequence: int, other: int) -> bool:
    """Which of two tags of one block counts."""
    return 0 < (sequence - other) % SEQUENCES < SEQUENCES // 2


def set_count_of(data_bytes: int, block_shift: int) -> int:
    """How many sets fit into a data zone of that size; 0 if not even one does."""
    low, high = 0, data_bytes // (WAYS << block_shift)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _blocks_at(middle) + (middle * WAYS << block_shift) <= data_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def ground_of(head: CacheHead, data_offset: int) -> Ground:
    """Where the parts of this cache lie, in a data zone that begins there."""
    return Ground(data_offset, head.set_count, head.block_shift, head.seed)


def _tags_at(set_count: int) -> int:
    group_count = (set_count - 1 >> GROUP_SHIFT) + 1
    return HEAD_COPIES * FRAME_BYTES + align_up(group_count * GROUP_WORD_BYTES, FRAME_BYTES)


def _blocks_at(set_count: int) -> int:
    return align_up(_tags_at(set_count) + set_count * SET_BYTES, 2 * MIB)
