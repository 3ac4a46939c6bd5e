"""Extended attributes, access control lists included. In a mode without them the answer is ENOSYS,
after which the kernel asks no more."""

from __future__ import annotations

import errno
import stat

from pmemfs.errors import system_error
from pmemfs.fuse.handlers import acl
from pmemfs.fuse.handlers.newinode import check_cached
from pmemfs.fuse.handlers.openfiles import OpenFiles
from pmemfs.fuse.handlers.privileges import CAPABILITIES, Caller
from pmemfs.volume.base import Volume
from pmemfs.volume.fs.xattrs import XATTR_CREATE, XATTR_REPLACE

_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)


class XattrHandlers:
    """The kernel's questions about extended attributes."""

    def __init__(self, volume: Volume, files: OpenFiles) -> None:
        self._volume = volume
        self._files = files

    def set(
        self, caller: Caller, ino: int, name: bytes, value: bytes, flags: int = 0, *,
        keeps_group_id: bool | None = None,
    ) -> None:  # fmt: skip
        """Do as setxattr(2) does. `keeps_group_id` says whether the caller, who sets an access
        control list, may keep set-group-ID; None if the request does not say."""
        self._check_name(name)
        if name not in _ACLS:
            check_cached(name, value)
            self._volume.set_xattr(ino, name, value, flags)
            if name == CAPABILITIES:
                self._files.note_change(ino)
            return
        is_there = self._volume.find_xattr(ino, name) is not None
        if flags & XATTR_CREATE and is_there:
            raise system_error(errno.EEXIST)
        if flags & XATTR_REPLACE and not is_there:
            raise system_error(errno.ENODATA)
        self._set_list(caller, ino, name, value, keeps_group_id)

    def get(self, ino: int, name: bytes) -> bytes:
        """The value of an attribute; ENODATA if it is not set."""
        self._check_name(name)
        value = self._volume.find_xattr(ino, name)
        if value is None:
            raise system_error(errno.ENODATA)
        return bytes(value)

    def names(self, caller: Caller, ino: int) -> list[bytes]:
        """The names of all attributes that the caller may see."""
        names = self._volume.list_xattrs(ino)
        if caller.uid != 0:
            names = [name for name in names if not name.startswith(b"trusted.")]
        return names

    def remove(self, ino: int, name: bytes) -> None:
        """Do as removexattr(2) does; removing a list that is not there is not an error."""
        self._check_name(name)
        if name not in _ACLS:
            self._volume.remove_xattr(ino, name)
        elif self._volume.find_xattr(ino, name):
            self._volume.set_xattrs_and_mode(ino, {name: None}, None)

    def _set_list(
        self, caller: Caller, ino: int, name: bytes, value: bytes, keeps_group_id: bool | None
    ) -> None:
        entries = acl.parse(value)
        attributes = self._volume.attributes(ino)
        if name == acl.DEFAULT:
            if not stat.S_ISDIR(attributes.mode):
                raise system_error(errno.EACCES)
            self._volume.set_xattrs_and_mode(ino, {name: value if entries else None}, None)
            return
        mode = acl.mode_of(entries, attributes.mode) if entries else attributes.mode
        if keeps_group_id is None and mode & stat.S_ISGID:
            keeps_group_id = caller.uid == 0 or caller.is_member(attributes.gid)
        if not keeps_group_id:
            mode &= ~stat.S_ISGID
        stored = acl.pack(entries) if acl.says_more_than_a_mode(entries) else None
        self._volume.set_xattrs_and_mode(ino, {name: stored}, stat.S_IMODE(mode))
        self._files.note_change(ino)

    def _check_name(self, name: bytes) -> None:
        """Refuse an attribute name that no file system has, as tmpfs and ext4 do."""
        if not self._volume.has_files:
            raise system_error(errno.ENOSYS)
        if name in _ACLS:
            return
        if not name.startswith(_NAMESPACES):
            raise system_error(errno.EOPNOTSUPP)
        if name in _NAMESPACES:
            raise system_error(errno.EINVAL)
