"""Where the parts of a file system lie in the data zone, and its head.

    group 0: bitmap | inode bitmap | head | journal | first inodes | …
    group n: bitmap | inode bitmap | …

The data zone is divided into groups of 32768 frames (128 MiB). Each group has its own bitmaps, so a
pool can grow, and making a pool costs the same at any size. Invariants:
- a bit of the bitmap is set while its frame is used, and a bit of the inode bitmap while its frame
  holds inodes. Frames that a group keeps for itself are used whatever their bits say, so a damaged
  bitmap can't give a bitmap to a file;
- 64 bytes of a bitmap, one cache line, describe exactly one chunk of 512 frames (2 MiB).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import google_crc32c

from pmemfs.errors import DamagedFileSystem
from pmemfs.media.layout import Layout, replace, stored, structure
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"pmemfs fs\r\n\x1a\n\x00\x00\x00"
FORMAT_VERSION = 4
"""2: a record's checksum covers its inode and its place; 3: a live line checks itself; 4: inodes
have transformations."""

GROUP_FRAMES = 8 * FRAME_BYTES
CHUNK_FRAMES = 512
GROUP_CHUNKS = GROUP_FRAMES // CHUNK_FRAMES
CHUNK_LINE_BYTES = CHUNK_FRAMES // 8

HEAD_FRAME = 2
JOURNAL_FRAME = 3
FIRST_INODES_FRAME = 4
KEPT_IN_GROUP = 2
KEPT_IN_FIRST_GROUP = 4
LEAST_FRAMES = 16


@structure
class Head:
    """The head of a file system."""

    magic: bytes = stored("V16", "`MAGIC`: a file system of pmemfs", default=MAGIC)
    checksum: int = stored("<u4", "CRC-32C of magic, format version, features and uuid")
    format_version: int = stored("<u4", "of the file system", default=FORMAT_VERSION)
    features: int = stored("<u8", "an unknown bit set: refuse the file system")
    uuid: bytes = stored("V16", "of the pool that the file system belongs to", default=bytes(16))
    is_clean: int = stored("<u8", "1: unmounted, and every used frame has an owner")
    log_frames: int = stored(
        "<u4", "frames of the longest log so far; as many are kept free; u8 before", default=0,
        since=4,
    )  # fmt: skip
    has_compressed: int = stored(
        "<u4", "1: an inode has had a compression, so files may have to be compressed", default=0,
        since=4,
    )  # fmt: skip


HEAD = Layout(Head, 64)
_CLEAN_AT = HEAD.offset_of("is_clean")


def pack_head(head: Head) -> bytes:
    """The stored form, with the checksum computed."""
    blank = HEAD.pack(replace(head, checksum=0))
    return HEAD.pack(replace(head, checksum=google_crc32c.value(blank[:_CLEAN_AT])))


def validate_head(buffer: Buffer, uuid: bytes) -> Head:
    """The head in a buffer of 64 bytes. Raises DamagedFileSystem for the first of these that holds:

    1. the magic differs
    2. the checksum differs
    3. the format is another one
    4. a feature is unknown
    5. the head belongs to another pool
    """
    raw = bytes(buffer)
    head = HEAD.unpack(raw)
    blank = HEAD.pack(replace(head, checksum=0))
    for is_wrong, why in (
        (head.magic != MAGIC, "its head does not start with the magic of a file system"),
        (head.checksum != google_crc32c.value(blank[:_CLEAN_AT]), "its head's checksum is wrong"),
        (
            head.format_version != FORMAT_VERSION,
            f"its format is {head.format_version}, and this program knows only {FORMAT_VERSION}",
        ),
        (head.features != 0, f"it uses features that this program does not know ({head.features})"),
        (head.uuid != uuid, "it belongs to another pool"),
    ):
        if is_wrong:
            raise DamagedFileSystem(why=why)
    return head


def is_head_sound(buffer: Buffer) -> bool:
    """Whether a program wrote this head on purpose, be it this program or another."""
    raw = bytes(buffer)
    head = HEAD.unpack(raw)
    blank = HEAD.pack(replace(head, checksum=0))
    return head.magic == MAGIC and head.checksum == google_crc32c.value(blank[:_CLEAN_AT])


class Geometry(NamedTuple):
    """The frames of the data zone."""

    first_pfn: int
    frame_count: int

    @property
    def end_pfn(self) -> int:
        """The first frame behind the zone."""
        return self.first_pfn + self.frame_count

    @property
    def group_count(self) -> int:
        """How many groups there are; the last one may be shorter than the others."""
        return -(-self.frame_count // GROUP_FRAMES)

    def group_pfn(self, group: int) -> int:
        """The first frame of a group: its bitmap; the next is its inode bitmap."""
        return self.first_pfn + group * GROUP_FRAMES

    def frames_of(self, group: int) -> int:
        """How many frames a group has."""
        return min(GROUP_FRAMES, self.frame_count - group * GROUP_FRAMES)

    def kept_of(self, group: int) -> int:
        """How many frames at its start a group keeps for itself: bitmaps, and in group 0 more."""
        kept = KEPT_IN_FIRST_GROUP if group == 0 else KEPT_IN_GROUP
        return min(kept, self.frames_of(group))

    def offset_of(self, frame: int) -> int:
        """The offset in the pool, in bytes, of a frame counted from the start of the zone."""
        return (self.first_pfn + frame) << PAGE_SHIFT

    def is_usable(self, pfn: int, frame_count: int) -> bool:
        """Whether a run lies in the zone and in one group, and not in what the group keeps."""
        start = pfn - self.first_pfn
        if start < 0 or frame_count <= 0 or start + frame_count > self.frame_count:
            return False
        group, position = divmod(start, GROUP_FRAMES)
        if position < self.kept_of(group):
            return False
        return position + frame_count <= GROUP_FRAMES
