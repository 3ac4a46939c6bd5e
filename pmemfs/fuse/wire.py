"""The kernel's requests and answers as bytes. Source: include/uapi/linux/fuse.h of Linux 6.18."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from pmemfs.media.log import InodeFlags
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.fs.attributes import Attributes

LOOKUP = 1
FORGET = 2
GETATTR = 3
SETATTR = 4
UNLINK = 10
RENAME = 12
OPEN = 14
READ = 15
WRITE = 16
RELEASE = 18
FSYNC = 20
CREATE = 35
IOCTL = 39
BATCH_FORGET = 42
FALLOCATE = 43
RENAME2 = 45
LSEEK = 46
COPY_FILE_RANGE = 47
SYNCFS = 50
TMPFILE = 51
STATX = 52
COPY_FILE_RANGE_64 = 53

# len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
IN_HEADER = struct.Struct("<IIQQIIIHH")
# len, error, unique
OUT_HEADER = struct.Struct("<IiQ")
# valid, fh, size, lock_owner, seconds and nanoseconds of atime, mtime and ctime, mode, uid, gid
SETATTR_IN = struct.Struct("<I4xQQQqqqIIII4xII4x")
SETS_MODE, SETS_UID, SETS_GID, SETS_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
SETS_ATIME, SETS_MTIME, SETS_CTIME = 1 << 4, 1 << 5, 1 << 10
SETS_ATIME_NOW, SETS_MTIME_NOW = 1 << 7, 1 << 8
SETATTR_KILL_SUIDGID = 1 << 11
"""Of `valid`, as `WRITE_KILL_SUIDGID`; always of a change of the owner."""
# nlookup
FORGET_IN = struct.Struct("<Q")
# count, dummy; pairs follow
BATCH_FORGET_IN = struct.Struct("<II")
# nodeid, nlookup
FORGET_ONE = struct.Struct("<QQ")
# newdir; both names follow
RENAME_IN = struct.Struct("<Q")
# newdir, flags, padding; both names follow
RENAME2_IN = struct.Struct("<QII")
# flags, open_flags
OPEN_IN = struct.Struct("<II")
OPEN_KILL_SUIDGID = 1 << 0
"""Of open_flags: who empties the file may not keep its set-user-ID and set-group-ID bits."""
# flags, mode, umask, open_flags; the name follows
CREATE_IN = struct.Struct("<IIII")
# fh, offset, size, read_flags, lock_owner, flags, padding
READ_IN = struct.Struct("<QQIIQII")
# fh, offset, size, write_flags, lock_owner, flags, padding; the bytes follow
WRITE_IN = struct.Struct("<QQIIQII")
WRITE_CACHE = 1 << 0
"""Of write_flags: the kernel writes its page cache back, for nobody in particular."""
WRITE_KILL_SUIDGID = 1 << 2
"""Of write_flags: whoever writes may not keep the file's set-user-ID and set-group-ID bits."""
# size, padding
WRITE_OUT = struct.Struct("<II")
# fh, flags, release_flags, lock_owner
RELEASE_IN = struct.Struct("<QIIQ")
# fh, fsync_flags, padding
FSYNC_IN = struct.Struct("<QII")
# fh, flags, command, argument, in_size, out_size; in_size bytes follow
IOCTL_IN = struct.Struct("<QIIQII")
# result, flags, in_iovs, out_iovs; up to out_size bytes follow
IOCTL_OUT = struct.Struct("<iIII")
# fh, offset, length, mode, padding
FALLOCATE_IN = struct.Struct("<QQQII")
# fh, offset, whence, padding
LSEEK_IN = struct.Struct("<QQII")
# offset
LSEEK_OUT = struct.Struct("<Q")
# fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
COPY_IN = struct.Struct("<QQQQQQQ")
# nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec; attributes follow
_ENTRY_OUT = struct.Struct("<QQQQII")
# attr_valid, attr_valid_nsec, dummy; attributes follow
_ATTR_OUT = struct.Struct("<QII")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize,
# flags
_ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
# fh, open_flags, backing_id
_OPEN_OUT = struct.Struct("<QIi")
_FOPEN_DIRECT_IO = 1 << 0
_FOPEN_KEEP_CACHE = 1 << 1
# attr_valid, attr_valid_nsec, flags, spare
_STATX_OUT = struct.Struct("<QII16x")
# mask, blksize, attributes, nlink, uid, gid, mode, spare, ino, size, blocks, attributes_mask
_STATX_HEAD = struct.Struct("<IIQIIIHHQQQQ")
# seconds, nanoseconds, reserved
_STATX_TIME = struct.Struct("<qIi")
# rdev, dev, spare
_STATX_TAIL = struct.Struct("<IIII112x")
_STATX_BASIC_AND_BIRTH = 0x7FF | 0x800
FLAG_BITS = {
    InodeFlags.IMMUTABLE: 0x10,
    InodeFlags.APPEND_ONLY: 0x20,
    InodeFlags.NO_DUMP: 0x40,
    InodeFlags.NO_ACCESS_TIME: 0x80,
}
"""The flags of chattr(1) as FS_IOC_GETFLAGS has them; statx(2) has the same bits."""
_STATX_FLAGS = 0x10 | 0x20 | 0x40
"""But for the last one, for which it has none."""
NS = 1_000_000_000


def entry_out(attributes: Attributes, valid_seconds: int) -> bytes:
    """The answer to whoever looks something up or makes it: struct fuse_entry_out."""
    return _ENTRY_OUT.pack(
        attributes.ino, attributes.generation, valid_seconds, valid_seconds, 0, 0
    ) + _attr(attributes)


def no_entry_out(valid_seconds: int) -> bytes:
    """There is no such name, and the kernel may remember that."""
    return _ENTRY_OUT.pack(0, 0, valid_seconds, 0, 0, 0) + bytes(_ATTR.size)


def attr_out(attributes: Attributes, valid_seconds: int) -> bytes:
    """What an inode is like: struct fuse_attr_out."""
    return _ATTR_OUT.pack(valid_seconds, 0, 0) + _attr(attributes)


def open_out(handle: int, *, cached: bool) -> bytes:
    """A file is open: struct fuse_open_out."""
    return _OPEN_OUT.pack(handle, _FOPEN_KEEP_CACHE if cached else _FOPEN_DIRECT_IO, 0)


def statx_out(attributes: Attributes, valid_seconds: int) -> bytes:
    """All that is known of an inode: struct fuse_statx_out."""
    head = _STATX_HEAD.pack(
        _STATX_BASIC_AND_BIRTH, FRAME_BYTES, bits_of(attributes.flags, FLAG_BITS) & _STATX_FLAGS,
        attributes.nlink, attributes.uid, attributes.gid, attributes.mode, 0, attributes.ino,
        attributes.size_bytes, attributes.block_count, _STATX_FLAGS,
    )  # fmt: skip
    times = (attributes.atime_ns, attributes.birth_ns, attributes.ctime_ns, attributes.mtime_ns)
    return (
        _STATX_OUT.pack(valid_seconds, 0, 0)
        + head
        + b"".join(_STATX_TIME.pack(time // NS, time % NS, 0) for time in times)
        + _STATX_TAIL.pack(os.major(attributes.rdev), os.minor(attributes.rdev), 0, 0)
    )


def bits_of(flags: InodeFlags, bits: Mapping[InodeFlags, int]) -> int:
    """Flags of an inode in another numbering, which may lack some of them."""
    return sum(bit for flag, bit in bits.items() if flags & flag)


def _attr(attributes: Attributes) -> bytes:
    """struct fuse_attr."""
    seconds, nanoseconds = zip(
        *(divmod(time, NS) for time in
          (attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns)),
        strict=True,
    )  # fmt: skip
    return _ATTR.pack(
        attributes.ino, attributes.size_bytes, attributes.block_count, *seconds, *nanoseconds,
        attributes.mode, attributes.nlink, attributes.uid, attributes.gid, attributes.rdev,
        FRAME_BYTES, 0,
    )  # fmt: skip
