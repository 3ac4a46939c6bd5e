"""Extended attributes of inodes: xattr(7).

Attributes of the namespace `pmemfs.` are the file system's own. The kernel's requests never name
them, they are in no list, and no limit counts them.
"""

from __future__ import annotations

import errno
import stat

from pmemfs.errors import system_error
from pmemfs.media import log as media
from pmemfs.media.keys import RESERVED_XATTRS
from pmemfs.media.log import XATTR_MAX_BYTES, RecordKind
from pmemfs.volume.fs.commits import Decides
from pmemfs.volume.fs.inode import FIXED, Inode
from pmemfs.volume.fs.store import Store

XATTR_CREATE = 1
XATTR_REPLACE = 2
_XATTR_NAME_MAX_BYTES = 255
_XATTR_LIST_MAX_BYTES = 65536
_USER = b"user."
_KERNELS = (b"trusted.", b"security.", b"system.")


class Xattrs:
    """Operations on extended attributes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sealing = store.sealing

    def get_xattr(self, number: int, name: bytes) -> bytes:
        """The value of an attribute. Raises OSError (ENODATA)."""
        value = self.find_xattr(number, name)
        if value is None:
            raise system_error(errno.ENODATA)
        return value

    def find_xattr(self, number: int, name: bytes) -> bytes | None:
        """The value of an attribute; None if it is not set."""
        inode = self._store.inode(number)
        if inode.transform is not None and name.startswith(_USER):
            self._store.refuse_unserved(inode)
            return self._sealing.plain_value(inode, name)
        return inode.xattrs.get(name)

    def list_xattrs(self, number: int) -> list[bytes]:
        """The names of all attributes that users may know."""
        inode = self._store.inode(number)
        if inode.unknown_id:
            # What a user has set may be stored in whatever form; the kernel asks for the others.
            return [name for name in inode.xattrs if name.startswith(_KERNELS)]
        names = self._sealing.xattr_names(inode)
        return [name for name in names if not name.startswith(RESERVED_XATTRS)]

    def set_xattr(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute. Raises OSError: EEXIST, ENODATA, E2BIG, ERANGE, ENOSPC."""
        inode = self._store.inode(number)
        there = self.find_xattr(number, name)
        if flags & XATTR_CREATE and there is not None:
            raise system_error(errno.EEXIST)
        if flags & XATTR_REPLACE and there is None:
            raise system_error(errno.ENODATA)
        if there == value:
            # As on ext4, that is no change, and leaves ctime as it is.
            self._store.refuse(inode, FIXED)
            return
        self.set_xattrs_and_mode(number, {name: value}, None)

    def remove_xattr(self, number: int, name: bytes) -> None:
        """Remove an attribute. Raises OSError (ENODATA)."""
        if self.find_xattr(number, name) is None:
            raise system_error(errno.ENODATA)
        self.set_xattrs_and_mode(number, {name: None}, None)

    def set_xattrs_and_mode(
        self, number: int, changes: dict[bytes, bytes | None], mode: int | None
    ) -> None:
        """Set and (None) remove attributes, and set permission bits, in one transaction.

        Raises OSError: as `check_xattr`, ENOSPC, EPERM.
        """
        inode = self._store.inode(number)
        self._store.refuse(inode, FIXED)
        if inode.transform is not None and any(name.startswith(_USER) for name in changes):
            self._store.refuse_unserved(inode)
        for name, value in changes.items():
            check_xattr(name, value or b"")
        changes = self._sealed(inode, changes)
        for name, value in changes.items():
            if value is not None and name not in inode.xattrs:
                listed_bytes = sum(len(other) + 1 for other in self.list_xattrs(number))
                if listed_bytes + len(name) + 1 > _XATTR_LIST_MAX_BYTES:
                    raise system_error(errno.ENOSPC)
        state = self._store.state_of(inode)
        state.changed_ns = self._store.times.now_ns()
        if mode is not None:
            state.mode = stat.S_IFMT(state.mode) | stat.S_IMODE(mode)
        # What takes no more room than before works on a full pool, too.
        is_urgent = all(
            value is None or (name in inode.xattrs and len(value) <= len(inode.xattrs[name]))
            for name, value in changes.items()
        )
        with self._store.change(urgent=is_urgent, decides=Decides.XATTRS) as change:
            for name, value in changes.items():
                if value is not None:
                    change.append(inode, *media.pack_values(RecordKind.XATTR, name, value))
                elif name in inode.xattrs:
                    change.append(inode, media.pack_xattr_removed(name))
            change.append(inode, state.pack())

            def apply() -> None:
                for name, value in changes.items():
                    inode.set_xattr(name, value)
                inode.set_state(state)

            change.then(apply)

    def _sealed(
        self, inode: Inode, changes: dict[bytes, bytes | None]
    ) -> dict[bytes, bytes | None]:
        """Attributes as they are stored."""
        if inode.transform is None:
            return changes
        sealing = self._sealing
        removed = (name for name, value in changes.items() if value is None)
        kept = ((name, value) for name, value in changes.items() if value is not None)
        return {
            **{sealing.stored_xattr(inode, name): None for name in removed},
            **dict(sealing.sealed_xattr(inode, name, value) for name, value in kept),
        }


def is_xattr(name: bytes, value: bytes) -> bool:
    """Whether an attribute is possible."""
    return 0 < len(name) <= _XATTR_NAME_MAX_BYTES and len(value) <= XATTR_MAX_BYTES


def check_xattr(name: bytes, value: bytes) -> None:
    """Raise OSError (ERANGE, E2BIG) for an attribute that is not possible."""
    if not 0 < len(name) <= _XATTR_NAME_MAX_BYTES:
        raise system_error(errno.ERANGE)
    if len(value) > XATTR_MAX_BYTES:
        raise system_error(errno.E2BIG)
