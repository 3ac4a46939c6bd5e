"""Makes an inode of the records of its log, and refuses records that no program writes.

Invariants:
- a record is taken only if what it says is possible by itself and after those before it, since a
  pool may come from anybody. What is wrong with the inode as a whole is said at the end;
- an ID of a transformation that this program does not know is no damage: the inode is read, and
  refused to whoever needs its content.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import Self

from pmemfs.errors import DamagedFileSystem
from pmemfs.media import log as media
from pmemfs.media.filesystem import Geometry
from pmemfs.media.inode import ROOT, SIZE_LIMIT_BYTES
from pmemfs.media.log import (
    ATTRIBUTES,
    EXTENT,
    NAME_MAX_BYTES,
    PARENT,
    RECORD_BYTES,
    STORED_NAME_MAX_BYTES,
    TARGET_MAX_BYTES,
    XATTR_MAX_BYTES,
    InodeFlags,
    RecordKind,
)
from pmemfs.media.transform import (
    TAG_BYTES,
    Transformation,
    unpack_piece,
    unpack_transform,
    why_impossible,
    why_impossible_piece,
)
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.fs.inode import FIXED, NO_NAMES, TYPES, Inode, State, value_slots

_XATTR_NAME_MAX_BYTES = 255
_INDEX_LIMIT = SIZE_LIMIT_BYTES // FRAME_BYTES
_OF_ONE_SLOT = frozenset(
    (RecordKind.ATTRIBUTES, RecordKind.EXTENT, RecordKind.HOLE, RecordKind.PARENT,
     RecordKind.TRANSFORM, RecordKind.PIECE)
)  # fmt: skip
_ENTRY = int(RecordKind.ENTRY)
_ENTRY_TYPES = frozenset(type_ >> 12 for type_ in TYPES)
_FLAGS_LIMIT = InodeFlags.NO_ACCESS_TIME << 1


class Replay:
    """Makes an inode of the records of its log. Raises DamagedFileSystem."""

    def __init__(self, inode: Inode, geometry: Geometry) -> None:
        self._inode = inode
        self._geometry = geometry
        self._has_state = False
        self._has_plain_names = True
        """Whether names and values are those that users gave, and not what encryption made."""
        self._values: dict[bytes, bytearray] = {}

    @classmethod
    def going_on(cls, inode: Inode, geometry: Geometry) -> Self:
        """For what was added to the log of an inode that was read before."""
        replay = cls(inode, geometry)
        replay._has_state = True
        transform = inode.transform
        replay._has_plain_names = transform is None or (
            transform.is_known and not transform.is_encrypted
        )
        # `finish` counts these.
        inode.live_slots -= bool(inode.parent)
        inode.live_slots -= value_slots(b"", inode.target) if inode.target else 0
        return replay

    def apply(self, records: Iterable[tuple[int, bytes]]) -> None:
        """Apply more records, each given as its kind and its bytes."""
        inode, is_plain = self._inode, self._has_plain_names
        add, unpack = inode.add_entry, media.unpack_entry
        for kind, raw in records:
            # Entries come first and without a call, because a directory can have millions of them.
            if kind != _ENTRY:
                self._apply(kind, raw)
                is_plain = self._has_plain_names
                continue
            name, number, type_, time_ns = unpack(raw)
            if type_ not in _ENTRY_TYPES:
                raise self._damaged(f"{name!r} is of the type {type_}")
            if not is_plain:
                self._refuse(not self._is_coded_name(name), f"{name!r} is no name")
            elif b"/" in name or b"\0" in name or name in NO_NAMES or len(name) > NAME_MAX_BYTES:
                raise self._damaged(f"{name!r} is no name")
            add(name, number, type_)
            inode.state.modified_ns = inode.state.changed_ns = time_ns

    def _apply(self, kind: int, raw: bytes) -> None:
        if kind in _OF_ONE_SLOT and len(raw) != RECORD_BYTES:
            raise self._damaged(f"a record of the kind {kind} takes {len(raw)} bytes")
        if kind == RecordKind.REMOVED:
            self._remove(raw)
        elif kind == RecordKind.ATTRIBUTES:
            self._attributes(raw)
        elif kind == RecordKind.EXTENT or kind == RecordKind.HOLE:
            self._extent(kind, raw)
        elif kind in (RecordKind.XATTR, RecordKind.XATTR_REMOVED, RecordKind.TARGET):
            self._value(kind, raw)
        elif kind == RecordKind.PARENT:
            self._inode.parent = PARENT.unpack(raw).inode
        elif kind == RecordKind.PIECE:
            self._piece(raw)
        elif kind == RecordKind.TRANSFORM:
            self._transform(raw)
        else:
            self._refuse(True, f"a record is of the unknown kind {kind}")

    def finish(self) -> None:
        """The log has ended: refuse it unless what it said makes an inode."""
        inode, mode = self._inode, self._inode.state.mode
        is_directory, is_file, flags = inode.is_directory, inode.is_file, inode.state.flags
        for is_wrong, why in (
            (not self._has_state, "it has no attributes"),
            (mode > 0o177777 or stat.S_IFMT(mode) not in TYPES, "its mode is of no type"),
            (inode.state.size_bytes >= SIZE_LIMIT_BYTES, "the size in its log is impossible"),
            (inode.entries and not is_directory, "it has entries but is not a directory"),
            (inode.data_frames and not is_file, "it has extents but is not a regular file"),
            (inode.pieces and inode.is_encrypted, "it is encrypted, and has compressed pieces"),
            (is_directory and not inode.parent, "it is a directory without a parent"),
            (inode.number == ROOT and not is_directory, "it is not a directory"),
            (inode.number == ROOT and inode.is_encrypted, "it is the root, and encrypted"),
            (stat.S_ISLNK(mode) != bool(inode.target), "a link has a target, and only a link"),
            (self._has_plain_names and b"\0" in inode.target, "its target has a zero byte"),
            (flags >= _FLAGS_LIMIT, f"its flags, {flags:#x}, are not all known"),
            # No user could take them away: the kernel opens only these two types to set flags.
            (flags & FIXED and not (is_file or is_directory), "its type cannot have its flags"),
            (self._values, "a value is not whole"),
        ):
            if is_wrong:
                raise self._damaged(why)
        if inode.pieces:
            inode.look_for_unknown()
        if inode.parent:
            inode.live_slots += 1
        if inode.target:
            inode.live_slots += value_slots(b"", inode.target)

    def _attributes(self, raw: bytes) -> None:
        values = ATTRIBUTES.struct.unpack(raw)
        self._inode.state = State(*values[1:])
        self._has_state = True

    def _extent(self, kind: int, raw: bytes) -> None:
        _, index, pfn, count, _ = EXTENT.struct.unpack(raw)
        if not (0 < count <= _INDEX_LIMIT and index <= _INDEX_LIMIT - count):
            raise self._damaged(f"{count} frames at frame {index} are not possible in a file")
        self._refuse_cut(index, count)
        if kind == RecordKind.HOLE:
            self._inode.unmap(index, count)
            return
        if not self._geometry.is_usable(pfn, count):
            raise self._damaged(f"{count} frames at {pfn:#x} are not for files")
        self._inode.map(index, pfn, count)

    def _piece(self, raw: bytes) -> None:
        index, piece = unpack_piece(raw)
        why = why_impossible_piece(index, piece)
        self._refuse(bool(why), why)
        is_far = index > _INDEX_LIMIT - piece.frame_count
        self._refuse(is_far, f"a piece at frame {index} is not possible in a file")
        if not self._geometry.is_usable(piece.pfn, piece.stored_frames):
            raise self._damaged(f"{piece.stored_frames} frames at {piece.pfn:#x} are not for files")
        self._refuse_cut(index, piece.frame_count)
        self._inode.set_piece(index, piece)

    def _refuse_cut(self, index: int, frame_count: int) -> None:
        """Refuse a record that would leave a part of a piece, which nobody could read."""
        cut = self._inode.cut_piece(index, frame_count) if self._inode.pieces else None
        self._refuse(cut is not None, f"only a part of its piece at frame {cut} was replaced")

    def _transform(self, raw: bytes) -> None:
        inode, state = self._inode, unpack_transform(raw)
        why = why_impossible(state)
        self._refuse(bool(why), why)
        # What is stored plain can't be read as if it were encrypted, nor the other way round. What
        # a newer program may change, nobody knows here.
        is_known = state.is_known and (inode.transform is None or inode.transform.is_known)
        changed = is_known and state.is_encrypted != inode.is_encrypted
        changed = changed and bool(inode.entries or inode.target)
        self._refuse(changed, "its transformation was changed while it had names or a target")
        self._has_plain_names = state.is_known and not state.is_encrypted
        inode.set_transform(state if state.id != Transformation.NONE else None)

    def _is_coded_name(self, name: bytes) -> bool:
        """Whether a name is possible that is not as its user gave it."""
        least = TAG_BYTES + 1 if self._inode.is_encrypted else 1
        return least <= len(name) <= STORED_NAME_MAX_BYTES

    def _remove(self, raw: bytes) -> None:
        inode = self._inode
        name, _, _, time_ns = media.unpack_entry(raw)
        if name not in inode.entries:
            raise self._damaged(f"{name!r} was removed, but was never there")
        inode.remove_entry(name)
        inode.state.modified_ns = inode.state.changed_ns = time_ns

    def _value(self, kind: int, raw: bytes) -> None:
        """Take a value, or a part of a value: a long value is stored in parts, in order."""
        name, part, offset, total = media.unpack_value(raw)
        is_target = kind == RecordKind.TARGET
        more = 0 if self._has_plain_names else TAG_BYTES
        most = more + (TARGET_MAX_BYTES if is_target else XATTR_MAX_BYTES)
        self._refuse(total > most, f"the value of {name!r} is {total} bytes long")
        if kind == RecordKind.XATTR_REMOVED:
            gone = name not in self._inode.xattrs
            self._refuse(gone, f"{name!r} was removed, but was never there")
            self._inode.set_xattr(name, None)
            return
        if not is_target:
            longest = _XATTR_NAME_MAX_BYTES + 2 * more
            self._refuse(not 0 < len(name) <= longest, f"{name!r} is no name")
        value = bytearray() if offset == 0 else self._values.get(name)
        if value is None or len(value) != offset or offset + len(part) > total:
            raise self._damaged(f"a part of the value of {name!r} is missing")
        value += part
        if len(value) < total:
            self._refuse(not part, f"a part of the value of {name!r} is empty")
            self._values[name] = value
            return
        self._values.pop(name, None)
        if is_target:
            self._inode.target = bytes(value)
        else:
            self._inode.set_xattr(name, bytes(value))

    def _refuse(self, condition: bool, why: str) -> None:
        if condition:
            raise self._damaged(why)

    def _damaged(self, why: str) -> DamagedFileSystem:
        return DamagedFileSystem(why=f"inode {self._inode.number}: {why}")
