"""What a file's content goes through between its callers and the pool: its transformation.

A file, directory, link or special file has one transformation at most, which its log names by a
one-byte ID. A new inode takes it over from its directory. Invariants:
- an inode whose ID this program does not know is refused by whatever needs its content or its
  names, and everything else is served. Without this, a reader would take coded bytes for plain
  ones, and a writer would mix both;
- a piece stands for up to `PIECE_FRAMES` frames of a file, from a multiple of that number on, and
  lies in fewer frames of the pool, one behind the other. So two pieces never overlap;
- a later record replaces a piece wholly or not at all: half a piece can't be read. An EXTENT or
  HOLE over a part of a piece is damage. To map a piece in several extents, a HOLE over all of it
  comes first.

What an encrypted inode stores, with keys of 64 bytes that HKDF-SHA512 makes of the master key (no
salt; the info is the text that stands here, and then the inode's nonce):
- content, "pmemfs content": AES-256-XTS in data units of one frame, whose tweak is the frame's
  index in the file as 16 bytes, little-endian. All bytes below the size are encrypted, zeroes too;
- names of a directory, "pmemfs names": AES-256-SIV of each name, without associated data: 16 bytes
  of SIV, and then as many bytes as the name has;
- the target of a link, "pmemfs values": AES-256-SIV, without associated data;
- attributes of users (`user.`), "pmemfs values": the name is a byte 1 and the AES-256-SIV of the
  whole name with the associated data of one byte 1; the value is the AES-256-SIV of the value with
  the stored name as associated data. Other attributes are stored as they are.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import google_crc32c

from pmemfs.media.layout import Layout, stored, structure
from pmemfs.media.log import RECORD_BYTES, RecordKind, head_of
from pmemfs.pfn import FRAME_BYTES

PIECE_FRAMES = 32
"""128 KiB: a larger piece hardly shrinks more, and a small read from it costs more."""
HOT_SECONDS = 3
"""A piece that was read in so many different seconds is hot, and better plain."""
TAG_BYTES = 16
"""What encryption adds to a name or value (the SIV, which is also its checksum)."""


class Transformation(IntEnum):
    """The stored ID of a transformation."""

    NONE = 0
    XTS = 1
    """Encrypted: the content by AES-256-XTS, names and values by AES-256-SIV."""
    ZSTD = 2
    LZ4 = 3


COMPRESSIONS = frozenset((int(Transformation.ZSTD), int(Transformation.LZ4)))
KNOWN_IDS = frozenset(map(int, Transformation))


class TransformState(NamedTuple):
    """The transformation of an inode; an inode without one has no such state."""

    id: int
    level: int = 0
    """Of compression; 0: the library's default."""
    key_id: bytes = bytes(16)
    """Which master key; zero unless encrypted."""
    nonce: bytes = bytes(16)
    """What makes the keys of this inode its own; zero unless encrypted."""

    @property
    def is_encrypted(self) -> bool:
        """Whether names, values and content are encrypted."""
        return self.id == Transformation.XTS

    @property
    def is_known(self) -> bool:
        """Whether this program knows the ID."""
        return self.id in KNOWN_IDS


class StoredPiece(NamedTuple):
    """A piece of a file that lies compressed in the pool."""

    pfn: int
    frame_count: int
    """Frames of the file that it stands for."""
    stored_frames: int
    """Frames of the pool that it takes, from `pfn` on."""
    stored_bytes: int
    checksum: int
    """CRC-32C of the stored bytes."""
    id: int


@structure
class TransformRecord:
    """TRANSFORM: the transformation of the inode; the last such record counts."""

    head: bytes = stored("V8", "the record's head", default=bytes(8))
    id: int = stored("u1", "0 none, 1 encrypted with XTS and SIV, 2 zstd, 3 lz4", since=4)
    level: int = stored("i1", "of compression; 0: the library's default", since=4)
    reserved0: bytes = stored("V6", "zero", since=4, default=bytes(6))
    key_id: bytes = stored("V16", "which master key; zero unless encrypted", since=4,
                           default=bytes(16))  # fmt: skip
    nonce: bytes = stored("V16", "random; the inode's keys are derived with it; zero unless "
                          "encrypted", since=4, default=bytes(16))  # fmt: skip
    reserved: bytes = stored("V16", "zero", since=4, default=bytes(16))


@structure
class PieceRecord:
    """PIECE: from now on these frames of the file lie there compressed."""

    head: bytes = stored("V8", "the record's head", default=bytes(8))
    index: int = stored("<u8", "of the first frame in the file, a multiple of 32", unit="frames",
                        since=4)  # fmt: skip
    pfn: int = stored("<u8", "of the first stored frame in the pool", since=4)
    frame_count: int = stored("<u4", "frames of the file that it stands for, 1 to 32",
                              unit="frames", since=4)  # fmt: skip
    stored_frames: int = stored("<u4", "frames that it takes, fewer than it stands for",
                                unit="frames", since=4)  # fmt: skip
    stored_bytes: int = stored("<u4", "its length", unit="bytes", since=4)
    checksum: int = stored("<u4", "CRC-32C of the stored bytes", since=4)
    id: int = stored("u1", "how it is compressed, as in TRANSFORM: 2 zstd, 3 lz4", since=4)
    reserved: bytes = stored("V23", "zero", since=4, default=bytes(23))


TRANSFORM = Layout(TransformRecord, RECORD_BYTES)
PIECE = Layout(PieceRecord, RECORD_BYTES)

_TRANSFORM_HEAD = head_of(RecordKind.TRANSFORM)
_PIECE_HEAD = head_of(RecordKind.PIECE)


def pack_transform(state: TransformState | None) -> bytes:
    """A TRANSFORM; None says that the inode has no transformation any more."""
    id_, level, key_id, nonce = state or TransformState(Transformation.NONE)
    return TRANSFORM.struct.pack(_TRANSFORM_HEAD, id_, level, b"", key_id, nonce, b"")


def unpack_transform(raw: bytes) -> TransformState:
    """What a TRANSFORM says. Nothing is checked."""
    _, id_, level, _, key_id, nonce, _ = TRANSFORM.struct.unpack(raw)
    return TransformState(id_, level, key_id, nonce)


def pack_piece(index: int, piece: StoredPiece) -> bytes:
    """A PIECE."""
    return PIECE.struct.pack(_PIECE_HEAD, index, *piece, b"")


def unpack_piece(raw: bytes) -> tuple[int, StoredPiece]:
    """The index and the rest of what a PIECE says. Nothing is checked."""
    _, index, *values, _ = PIECE.struct.unpack(raw)
    return index, StoredPiece(*values)


def piece_checksum(stored_bytes: bytes) -> int:
    """What `StoredPiece.checksum` is for these bytes."""
    return int(google_crc32c.value(stored_bytes))


def why_impossible(state: TransformState) -> str:
    """Why no inode can have this transformation; "" if one can, or if the ID is not known."""
    if not state.is_known:
        return ""
    has_key, has_nonce = any(state.key_id), any(state.nonce)
    for is_wrong, why in (
        (state.is_encrypted and not (has_key and has_nonce), "it is encrypted, but has no key"),
        (not state.is_encrypted and (has_key or has_nonce), "it has a key, but is not encrypted"),
        (state.level and state.id not in COMPRESSIONS, "it has a level, but is not compressed"),
    ):
        if is_wrong:
            return why
    return ""


def why_impossible_piece(index: int, piece: StoredPiece) -> str:
    """Why no file can have this piece, wherever it lies; "" if one can."""
    if index % PIECE_FRAMES or not 0 < piece.frame_count <= PIECE_FRAMES:
        return f"a piece can't stand for {piece.frame_count} frames at frame {index}"
    if not 0 < piece.stored_frames < piece.frame_count:
        return f"a piece of {piece.frame_count} frames can't take {piece.stored_frames}"
    if (piece.stored_bytes + FRAME_BYTES - 1) // FRAME_BYTES != piece.stored_frames:
        return f"a piece of {piece.stored_bytes} bytes can't take {piece.stored_frames} frames"
    if piece.id in (Transformation.NONE, Transformation.XTS):
        return f"a piece can't be compressed with {piece.id}, which is no compression"
    return ""
