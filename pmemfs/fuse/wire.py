"""The kernel's protocol as data: opcodes, structures, flags, each of them once.

The door (`wiredoor`) takes apart what follows a structure: names, values, bytes.
Source: include/uapi/linux/fuse.h of Linux 6.18, version 7.45 of the protocol.
"""

from __future__ import annotations

import struct
from enum import IntEnum

MAJOR, MINOR = 7, 45
RESEND_MINOR = 40
"""From it on the kernel takes FUSE_NOTIFY_RESEND."""


class Opcode(IntEnum):
    """The operation of a request."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_INC_EPOCH = 8
"""From 7.44 on. Others refuse it with EINVAL."""


class Structure(struct.Struct):
    """A structure of the protocol: its name in linux/fuse.h, and its fields in order.

    A field is its name there with a code of `struct`. Padding is declared as reserved (`x`), and
    is neither packed nor unpacked.
    """

    def __new__(cls, name: str, **fields: str) -> Structure:
        return super().__new__(cls, "<" + "".join(fields.values()))  # type: ignore[call-arg]

    def __init__(self, name: str, **fields: str) -> None:
        super().__init__("<" + "".join(fields.values()))
        self.name = name
        self.offsets: dict[str, int] = {}
        """Offsets in bytes, by field."""
        at = 0
        for field, code in fields.items():
            self.offsets[field] = at
            at += struct.calcsize("<" + code)


IN_HEADER = Structure(
    "fuse_in_header", len="I", opcode="I", unique="Q", nodeid="Q", uid="I", gid="I", pid="I",
    total_extlen="H", padding="2x",
)  # fmt: skip
OUT_HEADER = Structure("fuse_out_header", len="I", error="i", unique="Q")
INIT_IN = Structure(
    "fuse_init_in", major="I", minor="I", max_readahead="I", flags="I", flags2="I", unused="44x"
)
INIT_OUT = Structure(
    "fuse_init_out", major="I", minor="I", max_readahead="I", flags="I", max_background="H",
    congestion_threshold="H", max_write="I", time_gran="I", max_pages="H", map_alignment="H",
    flags2="I", unused="28x",
)  # fmt: skip
FORGET_IN = Structure("fuse_forget_in", nlookup="Q")
BATCH_FORGET_IN = Structure("fuse_batch_forget_in", count="I", dummy="4x")
FORGET_ONE = Structure("fuse_forget_one", nodeid="Q", nlookup="Q")
INTERRUPT_IN = Structure("fuse_interrupt_in", unique="Q")
GETATTR_IN = Structure("fuse_getattr_in", getattr_flags="I", dummy="4x", fh="Q")
SETATTR_IN = Structure(
    "fuse_setattr_in", valid="I", padding="4x", fh="Q", size="Q", lock_owner="Q", atime="q",
    mtime="q", ctime="q", atimensec="I", mtimensec="I", ctimensec="I", mode="I", unused4="4x",
    uid="I", gid="I", unused5="4x",
)  # fmt: skip
MKNOD_IN = Structure("fuse_mknod_in", mode="I", rdev="I", umask="I", padding="4x")
MKDIR_IN = Structure("fuse_mkdir_in", mode="I", umask="I")
RENAME_IN = Structure("fuse_rename_in", newdir="Q")
RENAME2_IN = Structure("fuse_rename2_in", newdir="Q", flags="I", padding="4x")
LINK_IN = Structure("fuse_link_in", oldnodeid="Q")
OPEN_IN = Structure("fuse_open_in", flags="I", open_flags="I")
CREATE_IN = Structure("fuse_create_in", flags="I", mode="I", umask="I", open_flags="I")
READ_IN = Structure(
    "fuse_read_in", fh="Q", offset="Q", size="I", read_flags="I", lock_owner="Q", flags="I",
    padding="4x",
)  # fmt: skip
WRITE_IN = Structure(
    "fuse_write_in", fh="Q", offset="Q", size="I", write_flags="I", lock_owner="Q", flags="I",
    padding="4x",
)  # fmt: skip
WRITE_OUT = Structure("fuse_write_out", size="I", padding="4x")
STATFS_OUT = Structure(
    "fuse_kstatfs", blocks="Q", bfree="Q", bavail="Q", files="Q", ffree="Q", bsize="I",
    namelen="I", frsize="I", padding="4x", spare="24x",
)  # fmt: skip
RELEASE_IN = Structure(
    "fuse_release_in", fh="Q", flags="I", release_flags="I", lock_owner="Q"
)  # fmt: skip
FSYNC_IN = Structure("fuse_fsync_in", fh="Q", fsync_flags="I", padding="4x")
SETXATTR_IN = Structure(
    "fuse_setxattr_in", size="I", flags="I", setxattr_flags="I", padding="4x"
)  # fmt: skip
SHORT_SETXATTR_BYTES = 8
"""The length of SETXATTR_IN if INIT has not agreed on SETXATTR_EXT."""
GETXATTR_IN = Structure("fuse_getxattr_in", size="I", padding="4x")
GETXATTR_OUT = Structure("fuse_getxattr_out", size="I", padding="4x")
IOCTL_IN = Structure(
    "fuse_ioctl_in", fh="Q", flags="I", cmd="I", arg="Q", in_size="I", out_size="I"
)  # fmt: skip
IOCTL_OUT = Structure("fuse_ioctl_out", result="i", flags="I", in_iovs="I", out_iovs="I")
FALLOCATE_IN = Structure(
    "fuse_fallocate_in", fh="Q", offset="Q", length="Q", mode="I", padding="4x"
)  # fmt: skip
LSEEK_IN = Structure("fuse_lseek_in", fh="Q", offset="Q", whence="I", padding="4x")
LSEEK_OUT = Structure("fuse_lseek_out", offset="Q")
COPY_IN = Structure(
    "fuse_copy_file_range_in", fh_in="Q", off_in="Q", nodeid_out="Q", fh_out="Q", off_out="Q",
    len="Q", flags="Q",
)  # fmt: skip
COPY_OUT_64 = Structure("fuse_copy_file_range_out", bytes_copied="Q")
ENTRY_OUT = Structure(
    "fuse_entry_out", nodeid="Q", generation="Q", entry_valid="Q", attr_valid="Q",
    entry_valid_nsec="I", attr_valid_nsec="I",
)  # fmt: skip
"""Without `attr`, which follows."""
ATTR_OUT = Structure("fuse_attr_out", attr_valid="Q", attr_valid_nsec="I", dummy="4x")
"""Without `attr`, which follows."""
ATTR = Structure(
    "fuse_attr", ino="Q", size="Q", blocks="Q", atime="q", mtime="q", ctime="q", atimensec="I",
    mtimensec="I", ctimensec="I", mode="I", nlink="I", uid="I", gid="I", rdev="I", blksize="I",
    flags="I",
)  # fmt: skip
OPEN_OUT = Structure("fuse_open_out", fh="Q", open_flags="I", padding="4x")
DIRENT = Structure("fuse_dirent", ino="Q", off="Q", namelen="I", type="I")
STATX_IN = Structure(
    "fuse_statx_in", getattr_flags="I", reserved="4x", fh="Q", sx_flags="I", sx_mask="I"
)  # fmt: skip
STATX_OUT = Structure("fuse_statx_out", attr_valid="Q", attr_valid_nsec="I", flags="I", spare="16x")
"""Without `stat`, which follows."""
STATX = Structure(
    "fuse_statx", mask="I", blksize="I", attributes="Q", nlink="I", uid="I", gid="I", mode="H",
    spare0="2x", ino="Q", size="Q", blocks="Q", attributes_mask="Q",
    atime="qI4x", btime="qI4x", ctime="qI4x", mtime="qI4x",
    rdev_major="I", rdev_minor="I", dev_major="I", dev_minor="I", spare2="112x",
)  # fmt: skip
NOTIFY_INVAL_INODE_OUT = Structure("fuse_notify_inval_inode_out", ino="Q", off="q", len="q")
NOTIFY_INVAL_ENTRY_OUT = Structure(
    "fuse_notify_inval_entry_out", parent="Q", namelen="I", flags="I"
)  # fmt: skip
"""Without the name, which follows with a NUL."""

# Of INIT's flags
ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
EXPORT_SUPPORT = 1 << 4
BIG_WRITES = 1 << 5
DONT_MASK = 1 << 6
AUTO_INVAL_DATA = 1 << 12
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
HANDLE_KILLPRIV = 1 << 19
POSIX_ACL = 1 << 20
MAX_PAGES = 1 << 22
HANDLE_KILLPRIV_V2 = 1 << 28
SETXATTR_EXT = 1 << 29
INIT_EXT = 1 << 30
DIRECT_IO_ALLOW_MMAP = 1 << 36
OVER_IO_URING = 1 << 41

# Of SETATTR's `valid`
SETS_MODE, SETS_UID, SETS_GID, SETS_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3
SETS_ATIME, SETS_MTIME, SETS_CTIME = 1 << 4, 1 << 5, 1 << 10
SETS_ATIME_NOW, SETS_MTIME_NOW = 1 << 7, 1 << 8
SETATTR_KILL_SUIDGID = 1 << 11
"""As `WRITE_KILL_SUIDGID`; always set when the owner changes."""
OPEN_KILL_SUIDGID = 1 << 0
"""In OPEN's open_flags: the caller, who empties the file, may not keep its set-user-ID and
set-group-ID bits."""
WRITE_CACHE = 1 << 0
"""In WRITE's flags: the kernel writes its page cache back, on behalf of no particular caller."""
WRITE_KILL_SUIDGID = 1 << 2
"""In WRITE's flags: the writer may not keep the file's set-user-ID and set-group-ID bits."""
SETXATTR_ACL_KILL_SGID = 1 << 0
"""In SETXATTR's flags: the caller, who sets the access control list, may not keep set-group-ID."""
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
STATX_BASIC_AND_BIRTH = 0x7FF | 0x800
