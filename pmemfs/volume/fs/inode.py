"""An inode in memory: what the records of its log say, one after the other.

Invariants:
- `records` says all that the inode is, so a log of only these records is the inode's log,
  compacted. An attribute that `records` forgot would vanish with the next compaction;
- a frame of a file is mapped by an extent, or lies in a piece, or is a hole. For the extents a
  piece is a hole, so code that takes a hole for zeroes asks `is_plain_range` first.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pmemfs.clock import NO_READ_COUNTS
from pmemfs.media import log as media
from pmemfs.media.inode import EPOCH_MASK
from pmemfs.media.live import line_key
from pmemfs.media.log import (
    ATTRIBUTES,
    MOST_SLOTS,
    NAME_MAX_BYTES,
    RECORD_BYTES,
    InodeFlags,
    RecordKind,
)
from pmemfs.media.transform import (
    KNOWN_IDS,
    PIECE_FRAMES,
    StoredPiece,
    TransformState,
    pack_piece,
    pack_transform,
)
from pmemfs.volume.fs.entries import Entries
from pmemfs.volume.fs.extents import ExtentMap, Run
from pmemfs.volume.fs.log import Log

TYPES = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
     stat.S_IFBLK)
)  # fmt: skip
"""Of inodes, as bits of their modes."""
_ATTRIBUTES_HEAD = media.head_of(RecordKind.ATTRIBUTES)
NO_NAMES = frozenset((b"", b".", b".."))
# As plain numbers: an operation on a member of an enum is a call, and every operation asks these.
IMMUTABLE, APPEND_ONLY = int(InodeFlags.IMMUTABLE), int(InodeFlags.APPEND_ONLY)
KEEPS_AHEAD = int(InodeFlags.KEEPS_AHEAD)
FIXED = IMMUTABLE | APPEND_ONLY
"""An inode with one of these flags is not changed, except that bytes or names may be added to one
that is append-only."""
_NO_ACCESS_TIME = int(InodeFlags.NO_ACCESS_TIME)
FILE_TYPE, DIRECTORY_TYPE = stat.S_IFREG >> 12, stat.S_IFDIR >> 12
_NO_PIECES: Mapping[int, StoredPiece] = MappingProxyType({})
"""Of nearly every file: one object for all of them, which nobody can change."""


@dataclass(slots=True)
class State:
    """The attributes of an inode, as one record has them."""

    mode: int
    link_count: int
    uid: int
    gid: int
    size_bytes: int
    accessed_ns: int
    modified_ns: int
    changed_ns: int
    device: int
    epoch: int
    flags: int

    @property
    def reads_count_after_ns(self) -> int:
        """For the data plane: `newest_ns`, or a time that no read comes after where chattr(1) has
        switched times of access off."""
        if self.flags & _NO_ACCESS_TIME:
            return NO_READ_COUNTS
        modified_ns, changed_ns = self.modified_ns, self.changed_ns
        return modified_ns if modified_ns > changed_ns else changed_ns

    @property
    def newest_ns(self) -> int:
        """The last change of the content or of the rest."""
        return max(self.modified_ns, self.changed_ns)

    def pack(self) -> bytes:
        """The record ATTRIBUTES, to be sealed."""
        return ATTRIBUTES.struct.pack(
            _ATTRIBUTES_HEAD, self.mode, self.link_count, self.uid, self.gid, self.size_bytes,
            self.accessed_ns, self.modified_ns, self.changed_ns, self.device, self.epoch,
            self.flags,
        )  # fmt: skip

    def copy(self) -> State:
        """The same attributes as an object of its own."""
        return State(
            self.mode, self.link_count, self.uid, self.gid, self.size_bytes, self.accessed_ns,
            self.modified_ns, self.changed_ns, self.device, self.epoch, self.flags,
        )  # fmt: skip

    def replaced(self, **changes: int) -> State:
        """A copy with some attributes changed."""
        copy = self.copy()
        for name, value in changes.items():
            setattr(copy, name, value)
        return copy


class Inode:
    """One inode."""

    __slots__ = (
        "birth_ns", "damage", "entries", "extents", "generation", "line_keys",
        "live_slots", "log", "next_fill_frame", "number", "parent", "piece_frames", "pieces",
        "run_start_frame", "slot_offset", "state", "subdirectory_count", "target", "transform",
        "unknown_id", "used_at", "xattrs",
    )  # fmt: skip

    def __init__(
        self, number: int, slot_offset: int, generation: int, birth_ns: int, log: Log,
        state: State | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self.slot_offset = slot_offset
        self.generation = generation
        self.birth_ns = birth_ns
        self.log = log
        self.state = state or State(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        self.xattrs: dict[bytes, bytes] = {}
        self.extents = ExtentMap()
        self.pieces = _NO_PIECES
        """What lies compressed, by the index of its first frame; `set_piece` changes it."""
        self.piece_frames = 0
        """Frames of the pool that the pieces take."""
        self.transform: TransformState | None = None
        """Its transformation, which `set_transform` changes."""
        self.unknown_id = 0
        """The ID of a transformation that this program does not know, here or in a piece."""
        self.entries = Entries()
        self.subdirectory_count = 0
        self.target = b""
        self.parent = 0
        self.line_keys = (-1, 0, 0)
        """A truncation epoch, its key, and the key of the epoch before: see `keys_of_line`."""
        self.live_slots = 1
        """Slots that a compacted log would need, extents and pieces not counted."""
        self.next_fill_frame = -1
        """The frame where the last write into a hole ended: the next one may go on there."""
        self.run_start_frame = 0
        """The frame where a sequence of writes began that each went on where the last one ended."""
        self.used_at = 0

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return self.state.mode >> 12 == FILE_TYPE

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.state.mode >> 12 == DIRECTORY_TYPE

    def keys_of_line(self) -> tuple[int, int]:
        """The key under which the live line counts, and the key before the last truncation."""
        epoch, key, key_before = self.line_keys
        if epoch != self.state.epoch:
            epoch = self.state.epoch
            key = line_key(self.number, self.generation, epoch)
            key_before = line_key(self.number, self.generation, epoch - 1 & EPOCH_MASK)
            self.line_keys = epoch, key, key_before
        return key, key_before

    @property
    def type(self) -> int:
        """The type, as d_type has it."""
        return self.state.mode >> 12

    @property
    def compacted_slots(self) -> int:
        """The slots that a compacted log would need."""
        return self.live_slots + len(self.extents) + len(self.pieces)

    @property
    def is_mostly_dead(self) -> bool:
        """Whether a compacted log would be less than half as long, and shorter by over a frame."""
        compacted = self.compacted_slots
        return self.log.slot_count - compacted > compacted + MOST_SLOTS

    def copy(self) -> Inode:
        """A copy of what the log says now, which later changes don't touch."""
        other = Inode(self.number, self.slot_offset, self.generation, self.birth_ns, self.log)
        other.state = self.state.copy()
        other.xattrs = self.xattrs.copy()
        other.extents = self.extents.copy()
        other.entries = self.entries.copy()
        other.target, other.parent = self.target, self.parent
        other.transform, other.unknown_id = self.transform, self.unknown_id
        if self.pieces:
            other.pieces, other.piece_frames = dict(self.pieces), self.piece_frames
        return other

    def records(self) -> Iterator[bytes]:
        """The records of a log that says what this inode is, and no more."""
        if self.parent:
            yield media.pack_parent(self.parent)
        # Before names and values, because it says how long these may be.
        if self.transform is not None:
            yield pack_transform(self.transform)
        if self.target:
            yield from media.pack_values(RecordKind.TARGET, b"", self.target)
        for index, pfn, count in self.extents if self.extents.frame_count else ():
            yield media.pack_extent(index, pfn, count)
        for index, piece in self.pieces.items() if self.piece_frames else ():
            yield pack_piece(index, piece)
        if self.entries:
            for name, entry in self.entries.items():
                yield media.pack_entry(name, entry.inode, entry.type, self.state.modified_ns)
        for name, value in self.xattrs.items():
            yield from media.pack_values(RecordKind.XATTR, name, value)
        # Last, because each entry sets the times of its directory when the log is read.
        yield self.state.pack()

    def runs(self) -> list[Run]:
        """The frames of its data, compressed or not."""
        runs = [Run(extent.pfn, extent.frame_count) for extent in self.extents]
        if self.pieces:
            runs += [Run(piece.pfn, piece.stored_frames) for piece in self.pieces.values()]
        return runs

    # Frames and pieces

    @property
    def end(self) -> int:
        """The index behind the last frame that is mapped or lies in a piece."""
        if not self.pieces:
            return self.extents.end
        last = max(self.pieces)
        return max(self.extents.end, last + self.pieces[last].frame_count)

    @property
    def data_frames(self) -> int:
        """The frames of the pool that its data takes."""
        return self.extents.frame_count + self.piece_frames

    def map(self, index: int, pfn: int, frame_count: int) -> None:
        """Map a range to a run, instead of the frames and whole pieces that were there."""
        if self.pieces:
            self._drop_pieces(index, frame_count)
        self.extents.map(index, pfn, frame_count)

    def unmap(self, index: int, frame_count: int) -> None:
        """Turn a range into a hole, instead of the frames and whole pieces that were there."""
        if self.pieces:
            self._drop_pieces(index, frame_count)
        self.extents.unmap(index, frame_count)

    def set_piece(self, index: int, piece: StoredPiece) -> None:
        """Have this piece from now on, instead of what was there."""
        self.unmap(index, piece.frame_count)
        if self.pieces is _NO_PIECES:
            self.pieces = {}
        assert isinstance(self.pieces, dict)
        self.pieces[index] = piece
        self.piece_frames += piece.stored_frames

    def pieces_in(self, index: int, frame_count: int) -> list[tuple[int, StoredPiece]]:
        """The pieces that a range touches, in order, each with the index of its first frame."""
        if not self.pieces:
            return []
        end = index + frame_count
        places: Iterable[int] = range(index - index % PIECE_FRAMES, end, PIECE_FRAMES)
        if frame_count > len(self.pieces) * PIECE_FRAMES:
            places = sorted(self.pieces)
        found = ((at, self.pieces[at]) for at in places if at in self.pieces)
        return [(at, p) for at, p in found if at < end and at + p.frame_count > index]

    def is_plain_range(self, index: int, frame_count: int) -> bool:
        """Whether no frame of a range lies in a piece, so that what is not mapped is zeroes."""
        return not self.pieces or not self.pieces_in(index, frame_count)

    def cut_piece(self, index: int, frame_count: int) -> int | None:
        """The first frame of a piece that a range has a part of, and not all; None if none is."""
        end = index + frame_count
        for at, piece in self.pieces_in(index, frame_count):
            if at < index or at + piece.frame_count > end:
                return at
        return None

    def _drop_pieces(self, index: int, frame_count: int) -> None:
        assert isinstance(self.pieces, dict)
        for at, piece in self.pieces_in(index, frame_count):
            assert index <= at <= index + frame_count - piece.frame_count, "half a piece"
            del self.pieces[at]
            self.piece_frames -= piece.stored_frames

    # The rest of what it is

    def add_entry(self, name: bytes, inode: int, type_: int) -> None:
        """Let a name lead to an inode of a type."""
        before = self.entries.set(name, inode, type_)
        self.subdirectory_count += (type_ == DIRECTORY_TYPE) - (before == DIRECTORY_TYPE)
        if not before:
            self.live_slots += entry_slots(name)

    def remove_entry(self, name: bytes) -> None:
        """Let a name lead nowhere. Raises KeyError."""
        type_ = self.entries.remove(name)
        self.subdirectory_count -= type_ == DIRECTORY_TYPE
        self.live_slots -= entry_slots(name)

    def set_state(self, state: State) -> None:
        """Have these attributes from now on."""
        self.state = state

    def set_transform(self, state: TransformState | None) -> None:
        """Have this transformation from now on, or none."""
        self.live_slots += (state is not None) - (self.transform is not None)
        self.transform = state
        self.look_for_unknown()

    def look_for_unknown(self) -> None:
        """Find out whether this program knows all transformations of this inode."""
        ids = {piece.id for piece in self.pieces.values()} - KNOWN_IDS
        if self.transform is not None and self.transform.id not in KNOWN_IDS:
            ids.add(self.transform.id)
        self.unknown_id = min(ids, default=0)

    @property
    def is_encrypted(self) -> bool:
        """Whether its content, names and values are encrypted."""
        return self.transform is not None and self.transform.is_encrypted

    def set_xattr(self, name: bytes, value: bytes | None) -> None:
        """Set or (None) remove an attribute."""
        before = self.xattrs.pop(name, None)
        if before is not None:
            self.live_slots -= value_slots(name, before)
        if value is not None:
            self.xattrs[name] = value
            self.live_slots += value_slots(name, value)


def is_name(name: bytes) -> bool:
    """Whether a directory may have an entry of this name."""
    is_possible = len(name) <= NAME_MAX_BYTES and b"/" not in name and b"\0" not in name
    return is_possible and name not in NO_NAMES


def entry_slots(name: bytes) -> int:
    """The slots of an ENTRY."""
    return (27 + len(name) + RECORD_BYTES - 1) // RECORD_BYTES


def value_slots(name: bytes, value: bytes) -> int:
    """The slots of all records of a value."""
    whole, rest = divmod(len(value), media.PART_BYTES)
    slots = -(-(20 + len(name) + media.PART_BYTES) // RECORD_BYTES) * whole
    return slots + (-(-(20 + len(name) + rest) // RECORD_BYTES) if rest or not whole else 0)
