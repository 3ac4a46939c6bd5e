"""The log of an inode: records of 64-byte slots, in the inode's own slot or in frames of 4 KiB.

An inode is what its records say, read in order up to the tail. Invariants:
- a record never crosses the end of a frame. If the next record does not fit, a record PADDING says
  that the rest of the frame is unused;
- a record's checksum covers all its slots, its inode and its place. So a copy of a record that lies
  elsewhere does not count, nor does a record that a former inode of the slot has left, nor what
  lies behind the tail;
- a log in the inode's slot has no frames. When the slot is full, the log is written anew into a
  frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum, IntFlag
from struct import Struct

import google_crc32c

from pmemfs.media.layout import Layout, stored, structure
from pmemfs.pfn import FRAME_BYTES

RECORD_BYTES = 64
FRAME_HEAD_BYTES = 64
FRAME_MAGIC = 0x676F6C70
"""'plog'"""
INLINE_RECORDS = 6
MOST_SLOTS = (FRAME_BYTES - FRAME_HEAD_BYTES) // RECORD_BYTES
NAME_MAX_BYTES = 255
STORED_NAME_MAX_BYTES = NAME_MAX_BYTES + 16
"""Of a name in an encrypted directory, which has the name's SIV before it."""
TARGET_MAX_BYTES = 4095
XATTR_MAX_BYTES = 65536
PART_BYTES = 1700
"""A longer value is stored in several records, two of which fit into a frame."""


class RecordKind(IntEnum):
    """The kind of a record."""

    PADDING = 1
    ATTRIBUTES = 2
    EXTENT = 3
    HOLE = 4
    ENTRY = 5
    REMOVED = 6
    XATTR = 7
    XATTR_REMOVED = 8
    TARGET = 9
    PARENT = 10
    TRANSFORM = 11
    PIECE = 12


class InodeFlags(IntFlag):
    """Flags of an inode. A record with any other flag is damaged."""

    KEEPS_AHEAD = 1
    """Frames behind the size are wanted: fallocate with FALLOC_FL_KEEP_SIZE asked for them."""
    IMMUTABLE = 2
    """Of a file or directory: nothing in it changes. This flag and all below are of chattr(1)."""
    APPEND_ONLY = 4
    """Of a file or directory: it only gets more bytes or names, and nothing else in it changes."""
    NO_DUMP = 8
    """Programs that make backups are asked to leave this inode out."""
    NO_ACCESS_TIME = 16
    """Reading it does not change its time of access."""
    COMPRESSED = 1 << 16
    """What is written to it is compressed once it is cold. Of this flag and the next the record of
    attributes has nothing: they say what the inode's transformation is."""
    ENCRYPTED = 1 << 17
    """Its content and names are encrypted."""


@structure
class LogFrame:
    """The head of a frame of a log; 63 slots for records follow."""

    magic: int = stored("<u4", "0x676f6c70: a frame of a log", default=FRAME_MAGIC)
    checksum: int = stored(
        "<u4",
        "CRC-32C of the inode's number, its generation and the offset of this frame in the pool, "
        "8 bytes each, and magic",
    )
    inode: int = stored("<u8", "number of the inode that the log belongs to")
    next: int = stored("<u8", "offset in the pool of the log's next frame", unit="bytes")
    reserved: bytes = stored("V40", "zero", default=bytes(40))


@structure
class RecordHead:
    """The first 8 bytes of every record."""

    kind: int = stored("u1", "1 padding, 2 attributes, 3 extent, 4 hole, 5 entry, 6 removed, 7 "
                       "xattr, 8 xattr removed, 9 target, 10 parent, 11 transform, 12 "
                       "piece")  # fmt: skip
    slots: int = stored("u1", "64-byte slots that the record takes")
    reserved: int = stored("<u2", "zero")
    checksum: int = stored(
        "<u4",
        "CRC-32C of the inode's number, its generation and the offset of this record in the pool, "
        "8 bytes each, and all its slots, this field zero",
    )


@structure
class AttributesRecord:
    """ATTRIBUTES: all attributes at once; the last such record counts."""

    head: bytes = stored("V8", "the record's head", default=bytes(8))
    mode: int = stored("<u4", "type and permissions, as st_mode")
    link_count: int = stored("<u4", "names of the inode; 1 for a directory; 0: removed")
    uid: int = stored("<u4", "owner")
    gid: int = stored("<u4", "group")
    size_bytes: int = stored("<u8", "of a regular file, unless the live line has it", unit="bytes")
    accessed_ns: int = stored("<i8", "last access", unit="ns since 1970")
    modified_ns: int = stored("<i8", "last change of the content", unit="ns since 1970")
    changed_ns: int = stored("<i8", "last change of the inode", unit="ns since 1970")
    device: int = stored("<u4", "of a device node, as the kernel encodes it")
    epoch: int = stored("<u2", "counts truncations; see the live line")
    flags: int = stored("<u2", "1 frames behind the size are kept, 2 immutable, 4 append-only, 8 "
                        "not to be dumped, 16 a read changes no time of access")  # fmt: skip


@structure
class ExtentRecord:
    """EXTENT: from now on these frames of the file lie there in the pool; HOLE: they are gone."""

    head: bytes = stored("V8", "the record's head", default=bytes(8))
    index: int = stored("<u8", "of the first frame in the file", unit="frames")
    pfn: int = stored("<u8", "of the first frame in the pool; 0 in a HOLE")
    frame_count: int = stored("<u8", "how many", unit="frames")
    reserved: bytes = stored("V32", "zero", default=bytes(32))


@structure
class EntryRecord:
    """ENTRY: from now on the name leads to the inode; REMOVED: the name is gone. Both set the
    directory's times of modification and change."""

    head: bytes = stored("V8", "the record's head", default=bytes(8))
    inode: int = stored("<u8", "number of the inode")
    time_ns: int = stored("<i8", "when", unit="ns since 1970")
    type: int = stored("u1", "of the inode, as d_type; 0 in a REMOVED")
    name_bytes: int = stored("<u2", "length of the name, which follows; u1 before", unit="bytes",
                             since=4)  # fmt: skip
    name: bytes = stored("V37", "its first bytes; the rest in the next slots", default=bytes(37))


@structure
class ValueRecord:
    """XATTR: a part of an attribute's value, whose first part replaces the old value; TARGET: a
    part of a symbolic link's target; XATTR_REMOVED: the attribute is gone."""

    head: bytes = stored("V8", "the record's head", default=bytes(8))
    total_bytes: int = stored("<u4", "length of the whole value", unit="bytes")
    offset: int = stored("<u4", "of this part in the value", unit="bytes")
    part_bytes: int = stored("<u2", "length of this part", unit="bytes")
    name_bytes: int = stored("<u2", "length of the name; 0 in a TARGET", unit="bytes")
    content: bytes = stored("V44", "name, then the part; the rest in the next slots",
                            default=bytes(44))  # fmt: skip


@structure
class ParentRecord:
    """PARENT: the directory that contains this directory."""

    head: bytes = stored("V8", "the record's head", default=bytes(8))
    inode: int = stored("<u8", "number of the directory above; the root is above itself")
    reserved: bytes = stored("V48", "zero", default=bytes(48))


FRAME = Layout(LogFrame, FRAME_HEAD_BYTES)
RECORD_HEAD = Layout(RecordHead, 8)
ATTRIBUTES = Layout(AttributesRecord, RECORD_BYTES)
EXTENT = Layout(ExtentRecord, RECORD_BYTES)
ENTRY = Layout(EntryRecord, RECORD_BYTES)
VALUE = Layout(ValueRecord, RECORD_BYTES)
PARENT = Layout(ParentRecord, RECORD_BYTES)
NEXT_AT = FRAME.offset_of("next")

_CHECKSUM_AT = RECORD_HEAD.offset_of("checksum")
_ENTRY_HEAD = ENTRY.head_struct("name_bytes")
_VALUE_HEAD = VALUE.head_struct("name_bytes")
_PLACE = Struct("<QQQ4s4x")
"""What a checksum covers first: number, generation, offset, 4 bytes, and the checksum as 0."""
_CHECKSUM = Struct("<I")
_crc = google_crc32c.value

# Python 3.11 looks a member of an enum up by a call, and every operation packs some records.
_ENTRY_KIND, _REMOVED_KIND = int(RecordKind.ENTRY), int(RecordKind.REMOVED)


def head_of(kind: int, slots: int = 1) -> bytes:
    """The head of a record that is not sealed yet."""
    return RECORD_HEAD.struct.pack(kind, slots, 0, 0)


_PARENT_HEAD = head_of(RecordKind.PARENT)


def pack_frame_head(number: int, generation: int, offset: int, after: int = 0) -> bytes:
    """The head of the frame at this offset, for an inode's log; the next frame is at `after`."""
    checksum = _frame_checksum(number, generation, offset)
    return FRAME.pack(LogFrame(checksum=checksum, inode=number, next=after))


def is_frame_of(raw: bytes, number: int, generation: int, offset: int) -> bool:
    """Whether 64 bytes at an offset are the head of a frame of this inode's log."""
    head = FRAME.unpack(raw)
    is_sound = head.checksum == _frame_checksum(number, generation, offset)
    return is_sound and head.magic == FRAME_MAGIC and head.inode == number


def _frame_checksum(number: int, generation: int, offset: int) -> int:
    return int(_crc(_PLACE.pack(number, generation, offset, b"plog")))


def seal(records: Iterable[bytes], number: int, generation: int, offset: int) -> bytes:
    """Records of an inode's log in the form in which they are stored, one behind the other.

    The checksum is computed here, because it covers the offset of each record. Whatever packs a
    record leaves its checksum 0, and a record that is copied gets a new one.
    """
    sealed = bytearray()
    for raw in records:
        at = len(sealed)
        sealed += raw
        place = _PLACE.pack(number, generation, offset + at, raw)
        checksum = _crc(place + raw[_CHECKSUM_AT + 4 :])
        _CHECKSUM.pack_into(sealed, at + _CHECKSUM_AT, checksum)
    return bytes(sealed)


def is_sound(raw: bytes, number: int, generation: int, offset: int) -> bool:
    """Whether the bytes are a record of this inode that belongs at this offset."""
    checksum = _crc(_PLACE.pack(number, generation, offset, raw) + raw[_CHECKSUM_AT + 4 :])
    return bool(_CHECKSUM.unpack_from(raw, _CHECKSUM_AT)[0] == checksum)


def record(kind: int, raw: bytearray) -> bytes:
    """A record with its head, filled up to whole slots, not sealed yet."""
    raw += bytes(-len(raw) % RECORD_BYTES)
    raw[0] = kind
    raw[1] = len(raw) // RECORD_BYTES
    return bytes(raw)


def pack_padding() -> bytes:
    """A record that says that the rest of its frame is unused."""
    return record(RecordKind.PADDING, bytearray(RECORD_BYTES))


def pack_extent(index: int, pfn: int, frame_count: int) -> bytes:
    """An EXTENT."""
    raw = EXTENT.struct.pack(b"", index, pfn, frame_count, b"")
    return record(RecordKind.EXTENT, bytearray(raw))


def pack_hole(index: int, frame_count: int) -> bytes:
    """A HOLE."""
    raw = EXTENT.struct.pack(b"", index, 0, frame_count, b"")
    return record(RecordKind.HOLE, bytearray(raw))


def pack_entry(name: bytes, inode: int, type_: int, time_ns: int) -> bytes:
    """An ENTRY, or a REMOVED if `type_` is 0."""
    slots = (_ENTRY_HEAD.size + len(name) + RECORD_BYTES - 1) // RECORD_BYTES
    head = head_of(_ENTRY_KIND if type_ else _REMOVED_KIND, slots)
    raw = _ENTRY_HEAD.pack(head, inode, time_ns, type_, len(name)) + name
    return raw.ljust(slots * RECORD_BYTES, b"\0")


def pack_parent(inode: int) -> bytes:
    """A PARENT."""
    return PARENT.struct.pack(_PARENT_HEAD, inode, b"")


def pack_values(kind: RecordKind, name: bytes, value: bytes) -> list[bytes]:
    """The records of an XATTR or TARGET, one for each part of the value."""
    records = []
    for offset in range(0, len(value) or 1, PART_BYTES):
        part = value[offset : offset + PART_BYTES]
        head = _VALUE_HEAD.pack(b"", len(value), offset, len(part), len(name))
        records.append(record(kind, bytearray(head + name + part)))
    return records


def pack_xattr_removed(name: bytes) -> bytes:
    """An XATTR_REMOVED."""
    head = _VALUE_HEAD.pack(b"", 0, 0, 0, len(name))
    return record(RecordKind.XATTR_REMOVED, bytearray(head + name))


def unpack_entry(raw: bytes) -> tuple[bytes, int, int, int]:
    """Name, inode, type and time of an ENTRY or REMOVED; a name that is too long is cut off."""
    _, inode, time_ns, type_, name_bytes = _ENTRY_HEAD.unpack_from(raw)
    return raw[_ENTRY_HEAD.size : _ENTRY_HEAD.size + name_bytes], inode, type_, time_ns


def unpack_value(raw: bytes) -> tuple[bytes, bytes, int, int]:
    """Name, part, offset and total length of a value; what exceeds the record is cut off."""
    _, total_bytes, offset, part_bytes, name_bytes = _VALUE_HEAD.unpack_from(raw)
    start = _VALUE_HEAD.size + name_bytes
    return raw[_VALUE_HEAD.size : start], raw[start : start + part_bytes], offset, total_bytes
