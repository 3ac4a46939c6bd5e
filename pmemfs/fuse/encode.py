"""Typed answers in the kernel's bytes; `wire` has the structures."""

from __future__ import annotations

import os

from pmemfs.dataplane.listing import StoredInodes, hold_listed
from pmemfs.fuse import wire
from pmemfs.fuse.handlers.directories import Taken
from pmemfs.fuse.handlers.flags import CHATTR_BITS, bits_of
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.base import Attributes, StoredListing
from pmemfs.volume.fs.inode import is_name

CACHE_SECONDS = 3600
"""Names and attributes may be cached for long, because they change only through the mount."""
NS = 1_000_000_000
_STATX_FLAGS = 0x4 | 0x10 | 0x20 | 0x40 | 0x800
"""The flags of chattr(1) that statx(2) has: all except NO_ACCESS_TIME."""
_NO_ENTRY = wire.ENTRY_OUT.pack(0, 0, CACHE_SECONDS, 0, 0, 0) + bytes(wire.ATTR.size)
_NO_ATTRIBUTES = bytes(wire.ENTRY_OUT.size + wire.ATTR.size)
_ATTR_HEAD = wire.ATTR_OUT.pack(CACHE_SECONDS, 0)


def entry_out(attributes: Attributes | None) -> bytes:
    """The answer to a lookup, or to an operation that makes an inode.

    With None there is no such name, and the kernel may remember that.
    """
    if attributes is None:
        return _NO_ENTRY
    head = wire.ENTRY_OUT.pack(
        attributes.ino, attributes.generation, CACHE_SECONDS, CACHE_SECONDS, 0, 0
    )
    return head + _attr(attributes)


def attr_out(attributes: Attributes) -> bytes:
    """The attributes of an inode: struct fuse_attr_out."""
    return _ATTR_HEAD + _attr(attributes)


def open_out(handle: int, *, cached: bool) -> bytes:
    """The answer to an open: struct fuse_open_out.

    Direct writes of one file may run in parallel, because the data plane needs no order among them.
    A close has nothing to flush, because each write is in the pool when it is answered.
    """
    direct = wire.FOPEN_DIRECT_IO | wire.FOPEN_PARALLEL_DIRECT_WRITES | wire.FOPEN_NOFLUSH
    return wire.OPEN_OUT.pack(handle, wire.FOPEN_KEEP_CACHE if cached else direct)


def statx_out(attributes: Attributes) -> bytes:
    """All that is known of an inode: struct fuse_statx_out."""
    times = (attributes.atime_ns, attributes.birth_ns, attributes.ctime_ns, attributes.mtime_ns)
    return wire.STATX_OUT.pack(CACHE_SECONDS, 0, 0) + wire.STATX.pack(
        wire.STATX_BASIC_AND_BIRTH, FRAME_BYTES,
        bits_of(attributes.flags, CHATTR_BITS) & _STATX_FLAGS,
        attributes.nlink, attributes.uid, attributes.gid, attributes.mode, attributes.ino,
        attributes.size_bytes, attributes.block_count, _STATX_FLAGS,
        *(part for time in times for part in divmod(time, NS)),
        os.major(attributes.rdev), os.minor(attributes.rdev), 0, 0,
    )  # fmt: skip


def dirent(ino: int, position: int, kind: int, name: bytes) -> bytes:
    """A name in a listing: struct fuse_dirent, padded to eight bytes."""
    return wire.DIRENT.pack(ino, position, len(name), kind) + name + bytes(-len(name) % 8)


def direntplus(attributes: Attributes | None, rest: bytes) -> bytes:
    """A name that counts as looked up. With None it is one of the dots, which never count so."""
    return (_NO_ATTRIBUTES if attributes is None else entry_out(attributes)) + rest


def look_up_stored(stored: StoredListing, directory: int, name: bytes) -> bytes | None:
    """The answer to a lookup; as `LookUpStored`."""
    if name not in stored.words:
        return _NO_ENTRY if is_name(name) else None
    inodes = StoredInodes(stored.memory, stored.first_pfn, stored.sparse_fd)
    found = inodes.look_up(directory, stored.words, name, CACHE_SECONDS)
    if found is None or stored.has_faulted():
        return None
    stored.hold(int.from_bytes(found[:8], "little"))
    return found


def take_stored(
    answer: bytearray, room: int, stored: StoredListing, directory: int, names: list[bytes],
    position: int,
) -> Taken:  # fmt: skip
    """Add names that count as looked up to an answer, which may have `room` bytes; as `TakeStored`,
    with what `direntplus` packs."""
    before = len(answer)
    inodes = StoredInodes(stored.memory, stored.first_pfn, stored.sparse_fd)
    after, is_full = inodes.pack(
        directory, stored.words, names, position, answer, room, CACHE_SECONDS
    )
    if stored.has_faulted():
        # The long way meets the bad memory as well, and says so.
        del answer[before:]
        return Taken(position, has_taken=False, is_full=False)
    hold_listed(stored.counts, stored.note_words(), answer, before)
    return Taken(after, len(answer) > before, is_full)


def _attr(attributes: Attributes) -> bytes:
    """struct fuse_attr."""
    (ino, _, mode, nlink, uid, gid, rdev, size_bytes, block_count, accessed_ns, modified_ns,
     changed_ns, *_) = attributes  # fmt: skip
    atime, atime_ns = divmod(accessed_ns, NS)
    mtime, mtime_ns = divmod(modified_ns, NS)
    ctime, ctime_ns = divmod(changed_ns, NS)
    return wire.ATTR.pack(
        ino, size_bytes, block_count, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode,
        nlink, uid, gid, rdev, FRAME_BYTES, 0,
    )  # fmt: skip
