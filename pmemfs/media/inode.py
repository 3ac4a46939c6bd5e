"""The inode: a slot of 512 bytes, eight to a frame. Its number says where it lies.

    head (64) | live line (64) | the first six records of its log (384)

Invariants:
- the head's fields up to `birth_ns` never change while the slot is used, and `checksum` covers just
  them. `head` and `tail` change by one aligned store each, or together through the journal; a
  checksum over them could not change in the same store;
- if `tail` is 0, the slot is free, and `generation` is that of its last inode;
- the size in the live line counts for regular files only. If the line's key is that of the
  truncation epoch in the log's last attributes, the line has the size, and either plane may have
  stored it. If the key is that of the epoch before, the log has the size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c

from pmemfs.media.layout import Layout, stored, structure
from pmemfs.pfn import FRAME_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

SLOT_BYTES = 512
SLOTS_PER_FRAME = FRAME_BYTES // SLOT_BYTES
LIVE_OFFSET = 64
INLINE_OFFSET = 128
ROOT = 1
"""The number of the root directory, which lies in the first slot of the first inodes."""

MAGIC = 0x6F6E6970
"""'pino'"""
EPOCH_MASK = (1 << 16) - 1
SIZE_LIMIT_BYTES = 1 << 47


@structure
class InodeHead:
    """The head of an inode's slot."""

    magic: int = stored("<u4", "0x6f6e6970: a slot that was used at least once", default=MAGIC)
    checksum: int = stored("<u4", "CRC-32C of the fields up to `birth_ns`, this one zero")
    number: int = stored("<u8", "of the inode: offset of the slot in the pool / 512; root: 1")
    generation: int = stored("<u8", "counts the inodes that this slot has had")
    birth_ns: int = stored("<i8", "when it was made", unit="ns since 1970")
    head: int = stored("<u8", "of the log's first record, in the pool", unit="bytes")
    tail: int = stored("<u8", "behind the log's last record; 0: the slot is free", unit="bytes")
    reserved: bytes = stored("V16", "zero", default=bytes(16))


HEAD = Layout(InodeHead, 64)
HEAD_WORD_AT = HEAD.offset_of("head")
TAIL_WORD_AT = HEAD.offset_of("tail")
_CONSTANT = HEAD.head_struct("birth_ns")
_WORDS = HEAD.head_struct("tail")
_GENERATION_MASK = (1 << 64) - 1


def pack_head(number: int, generation: int, birth_ns: int, head: int, tail: int) -> bytes:
    """The head of an inode, with the checksum computed."""
    checksum = google_crc32c.value(_CONSTANT.pack(MAGIC, 0, number, generation, birth_ns))
    return HEAD.struct.pack(MAGIC, checksum, number, generation, birth_ns, head, tail, b"")


def read_free_slot(raw: Buffer) -> int | None:
    """The generation for the next inode of a slot; None if the slot is not free."""
    magic, _, _, generation, _, _, tail = _WORDS.unpack_from(raw)
    if tail:
        return None
    return generation + 1 & _GENERATION_MASK if magic == MAGIC else 1


def is_sound_head(head: InodeHead) -> bool:
    """Whether the magic and the checksum of a head are right."""
    raw = _CONSTANT.pack(head.magic, 0, head.number, head.generation, head.birth_ns)
    return head.magic == MAGIC and head.checksum == int(google_crc32c.value(raw))
