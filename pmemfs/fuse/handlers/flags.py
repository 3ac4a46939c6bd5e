"""The flags of chattr(1) in the numberings that the kernel has for them."""

from __future__ import annotations

from collections.abc import Mapping

from pmemfs.media.log import InodeFlags

CHATTR_BITS = {
    InodeFlags.IMMUTABLE: 0x10,
    InodeFlags.APPEND_ONLY: 0x20,
    InodeFlags.NO_DUMP: 0x40,
    InodeFlags.NO_ACCESS_TIME: 0x80,
}
"""As FS_IOC_GETFLAGS has them; statx(2) has the same bits."""
XFLAG_BITS = {
    InodeFlags.IMMUTABLE: 0x08,
    InodeFlags.APPEND_ONLY: 0x10,
    InodeFlags.NO_ACCESS_TIME: 0x40,
    InodeFlags.NO_DUMP: 0x80,
}
"""As FS_IOC_FSGETXATTR has them."""


def bits_of(flags: int, bits: Mapping[InodeFlags, int]) -> int:
    """Flags of an inode in another numbering, which may lack some of them."""
    return sum(bit for flag, bit in bits.items() if flags & flag)
