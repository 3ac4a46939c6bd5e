"""The flags of chattr(1), in the kernel's two numberings."""

from __future__ import annotations

from collections.abc import Mapping

from pmemfs.media.log import InodeFlags

CHATTR_BITS = {
    InodeFlags.IMMUTABLE: 0x10,
    InodeFlags.APPEND_ONLY: 0x20,
    InodeFlags.NO_DUMP: 0x40,
    InodeFlags.NO_ACCESS_TIME: 0x80,
    InodeFlags.COMPRESSED: 0x4,
    InodeFlags.ENCRYPTED: 0x800,
}
"""The bits of FS_IOC_GETFLAGS; statx(2) has the same ones."""
XFLAG_BITS = {
    InodeFlags.IMMUTABLE: 0x08,
    InodeFlags.APPEND_ONLY: 0x10,
    InodeFlags.NO_ACCESS_TIME: 0x40,
    InodeFlags.NO_DUMP: 0x80,
}
"""The bits of FS_IOC_FSGETXATTR."""


def bits_of(flags: int, bits: Mapping[InodeFlags, int]) -> int:
    """Flags of an inode in another numbering, which may lack some of the flags."""
    return sum(bit for flag, bit in bits.items() if flags & flag)
