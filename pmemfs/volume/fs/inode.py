"""An inode in memory: what the records of its log say, one after the other.

Invariants:
- `apply` takes a record only if what it says is possible by itself, since a pool may come from
  anybody;
- `records` says all that the inode is, so a log of only these records is the inode's log,
  compacted. An attribute that `records` forgot would vanish with the next compaction.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pmemfs.clock import NO_READ_COUNTS
from pmemfs.errors import DamagedFileSystem
from pmemfs.media import log as media
from pmemfs.media.filesystem import Geometry
from pmemfs.media.inode import EPOCH_MASK, ROOT, SIZE_LIMIT_BYTES
from pmemfs.media.live import line_key
from pmemfs.media.log import (
    ATTRIBUTES,
    EXTENT,
    MOST_SLOTS,
    NAME_MAX_BYTES,
    PARENT,
    RECORD_BYTES,
    TARGET_MAX_BYTES,
    XATTR_MAX_BYTES,
    InodeFlags,
    RecordKind,
)
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.fs.entries import Entries
from pmemfs.volume.fs.extents import ExtentMap, Run
from pmemfs.volume.fs.log import Log

TYPES = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
     stat.S_IFBLK)
)  # fmt: skip
"""Of inodes, as bits of their modes."""
_XATTR_NAME_MAX_BYTES = 255
_INDEX_LIMIT = SIZE_LIMIT_BYTES // FRAME_BYTES
_OF_ONE_SLOT = frozenset(
    (RecordKind.ATTRIBUTES, RecordKind.EXTENT, RecordKind.HOLE, RecordKind.PARENT)
)
_ENTRY = int(RecordKind.ENTRY)
_ATTRIBUTES_HEAD = media.head_of(RecordKind.ATTRIBUTES)
_NO_NAMES = frozenset((b"", b".", b".."))
_ENTRY_TYPES = frozenset(type_ >> 12 for type_ in TYPES)
_FLAGS_LIMIT = InodeFlags.NO_ACCESS_TIME << 1
# As plain numbers: an operation on a member of an enum is a call, and every operation asks these.
IMMUTABLE, APPEND_ONLY = int(InodeFlags.IMMUTABLE), int(InodeFlags.APPEND_ONLY)
KEEPS_AHEAD = int(InodeFlags.KEEPS_AHEAD)
FIXED = IMMUTABLE | APPEND_ONLY
"""An inode with one of these flags is not changed, except that bytes or names may be added to one
that is append-only."""
_NO_ACCESS_TIME = int(InodeFlags.NO_ACCESS_TIME)
FILE_TYPE, DIRECTORY_TYPE = stat.S_IFREG >> 12, stat.S_IFDIR >> 12


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
        "live_slots", "log", "next_fill_frame", "number", "parent", "run_start_frame",
        "slot_offset", "state", "subdirectory_count", "target", "used_at", "xattrs",
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
        self.entries = Entries()
        self.subdirectory_count = 0
        self.target = b""
        self.parent = 0
        self.line_keys = (-1, 0, 0)
        """A truncation epoch, its key, and the key of the epoch before: see `keys_of_line`."""
        self.live_slots = 1
        """Slots that a compacted log would need, extents not counted."""
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
        return self.live_slots + len(self.extents)

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
        return other

    def records(self) -> Iterator[bytes]:
        """The records of a log that says what this inode is, and no more."""
        if self.parent:
            yield media.pack_parent(self.parent)
        if self.target:
            yield from media.pack_values(RecordKind.TARGET, b"", self.target)
        for index, pfn, count in self.extents if self.extents.frame_count else ():
            yield media.pack_extent(index, pfn, count)
        if self.entries:
            for name, entry in self.entries.items():
                yield media.pack_entry(name, entry.inode, entry.type, self.state.modified_ns)
        for name, value in self.xattrs.items():
            yield from media.pack_values(RecordKind.XATTR, name, value)
        # Last, because each entry sets the times of its directory when the log is read.
        yield self.state.pack()

    def runs(self) -> list[Run]:
        """The frames of its data."""
        return [Run(extent.pfn, extent.frame_count) for extent in self.extents]

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
    return is_possible and name not in _NO_NAMES


def entry_slots(name: bytes) -> int:
    """The slots of an ENTRY."""
    return (26 + len(name) + RECORD_BYTES - 1) // RECORD_BYTES


def value_slots(name: bytes, value: bytes) -> int:
    """The slots of all records of a value."""
    whole, rest = divmod(len(value), media.PART_BYTES)
    slots = -(-(20 + len(name) + media.PART_BYTES) // RECORD_BYTES) * whole
    return slots + (-(-(20 + len(name) + rest) // RECORD_BYTES) if rest or not whole else 0)


class Replay:
    """Makes an inode of the records of its log. Raises DamagedFileSystem."""

    def __init__(self, inode: Inode, geometry: Geometry) -> None:
        self._inode = inode
        self._geometry = geometry
        self._has_state = False
        self._values: dict[bytes, bytearray] = {}

    def apply(self, records: Iterable[tuple[int, bytes]]) -> None:
        """Apply more records, each given as its kind and its bytes."""
        inode = self._inode
        add, unpack = inode.add_entry, media.unpack_entry
        for kind, raw in records:
            # Entries come first and without a call, because a directory can have millions of them.
            if kind != _ENTRY:
                self._apply(kind, raw)
                continue
            name, number, type_, time_ns = unpack(raw)
            if type_ not in _ENTRY_TYPES:
                raise self._damaged(f"{name!r} is of the type {type_}")
            if b"/" in name or b"\0" in name or name in _NO_NAMES:
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
            (inode.extents.frame_count and not is_file, "it has extents but is not a regular file"),
            (is_directory and not inode.parent, "it is a directory without a parent"),
            (inode.number == ROOT and not is_directory, "it is not a directory"),
            (stat.S_ISLNK(mode) != bool(inode.target), "a link has a target, and only a link"),
            (b"\0" in inode.target, "its target has a zero byte"),
            (flags >= _FLAGS_LIMIT, f"its flags, {flags:#x}, are not all known"),
            # No user could take them away: the kernel opens only these two types to set flags.
            (flags & FIXED and not (is_file or is_directory), "its type cannot have its flags"),
            (self._values, "a value is not whole"),
        ):
            if is_wrong:
                raise self._damaged(why)
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
        if kind == RecordKind.HOLE:
            self._inode.extents.unmap(index, count)
            return
        if not self._geometry.is_usable(pfn, count):
            raise self._damaged(f"{count} frames at {pfn:#x} are not for files")
        self._inode.extents.map(index, pfn, count)

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
        most = TARGET_MAX_BYTES if is_target else XATTR_MAX_BYTES
        self._refuse(total > most, f"the value of {name!r} is {total} bytes long")
        if kind == RecordKind.XATTR_REMOVED:
            gone = name not in self._inode.xattrs
            self._refuse(gone, f"{name!r} was removed, but was never there")
            self._inode.set_xattr(name, None)
            return
        if not is_target:
            self._refuse(not 0 < len(name) <= _XATTR_NAME_MAX_BYTES, f"{name!r} is no name")
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
