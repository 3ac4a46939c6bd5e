"""What a write takes away: set-user-ID, set-group-ID of what can be executed, file capabilities.

A direct write the kernel passes on without having done so. Whether the writer may keep the bits
(CAP_FSETID) it says in a flag of the request. pyfuse3 does not show that: what comes by it counts
who has opened the file, and root may. Source: inode(7); fs/fuse/file.c of Linux,
FUSE_WRITE_KILL_SUIDGID.
"""

from __future__ import annotations

import stat

from pmemfs.volume.filesystem.filesystem import FileSystem

CAPABILITIES = b"security.capability"
"""The extended attribute that has them, see capabilities(7)."""


def has_privileges(fs: FileSystem, ino: int, mode: int) -> bool:
    """Whether a write may change an inode's mode or attributes."""
    return _without(mode) != mode or _has_capabilities(fs, ino)


def take_privileges(fs: FileSystem, ino: int, *, may_keep: bool) -> bool:
    """Take away what a write does; whether there was anything. Raises OSError."""
    mode = fs.attributes(ino).mode
    kept = mode if may_keep else _without(mode)
    capable = _has_capabilities(fs, ino)
    if kept == mode and not capable:
        return False
    fs.set_xattrs_and_mode(ino, {CAPABILITIES: None} if capable else {}, stat.S_IMODE(kept))
    return True


def _without(mode: int) -> int:
    taken = stat.S_ISUID
    if mode & stat.S_IXGRP:
        taken |= stat.S_ISGID
    return mode & ~taken


def _has_capabilities(fs: FileSystem, ino: int) -> bool:
    return bool(fs.find_xattr(ino, CAPABILITIES))
