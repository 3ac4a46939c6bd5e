"""What a new inode gets from its maker and from its directory.

In a set-group-ID directory these are the group and that bit; and a default access control list
counts instead of the umask. Source: inode(7), acl(5).
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping

from pmemfs.errors import system_error
from pmemfs.fuse.handlers import acl
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.volume.base import NewInode, Volume

CACHED = b"user.pmemfs.cached"
"""With this attribute a file is opened for the page cache, unless the value is "0". What is made in
a directory with it gets it, too. See docs/mmap.md."""

_CACHED_VALUES = (b"0", b"1")


def check_cached(name: bytes, value: bytes) -> None:
    """Raise OSError (EINVAL) for a value of `CACHED` that is neither yes nor no."""
    if name == CACHED and value not in _CACHED_VALUES:
        raise system_error(errno.EINVAL)


def new_inode(
    fs: Volume, parent: int, maker: Caller, mode: int, *, umask: int, rdev: int = 0,
    target: bytes = b"",
) -> NewInode:  # fmt: skip
    """What to make in a directory, for a type and mode. `umask` is 0 if the kernel has applied it.
    Raises OSError."""
    directory = fs.heritage(parent)
    gid = maker.gid
    if directory.mode & stat.S_ISGID:
        gid = directory.gid
        if stat.S_ISDIR(mode):
            mode |= stat.S_ISGID
    if stat.S_ISLNK(mode):
        return NewInode(mode, maker.uid, gid, rdev, target)
    if not directory.xattrs:
        return NewInode(mode & ~umask, maker.uid, gid, rdev, target)
    made = _inherited(directory.xattrs, umask, mode)
    return NewInode(made.mode, maker.uid, gid, rdev, target, made.xattrs)


def whiteout(fs: Volume, parent: int, maker: Caller) -> NewInode:
    """What RENAME_WHITEOUT of renameat2(2) leaves behind: for overlayfs, nothing is there."""
    return new_inode(fs, parent, maker, stat.S_IFCHR, umask=0)


def _inherited(xattrs: Mapping[bytes, bytes], umask: int, mode: int) -> acl.Inherited:
    """What a directory's attributes make of a mode."""
    default = xattrs.get(acl.DEFAULT)
    made = acl.Inherited(mode & ~umask) if default is None else acl.inherit(default, mode)
    cached = xattrs.get(CACHED)
    if cached is not None and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return made._replace(xattrs=(*made.xattrs, (CACHED, cached)))
    return made
