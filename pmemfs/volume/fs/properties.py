"""What a file is transformed with, as users set it: compression, and encryption of a directory.

Invariants:
- what is set counts for what is written or made from now on; it changes no byte that is stored;
- an inode becomes encrypted when it is made, or as an empty directory. Otherwise plain names would
  be taken for encrypted ones;
- nothing is encrypted and compressed: what is encrypted does not shrink, and the length of what was
  compressed first tells of its content.
"""

from __future__ import annotations

import errno
import os

from pmemfs.errors import system_error
from pmemfs.media.inode import ROOT
from pmemfs.media.log import InodeFlags
from pmemfs.media.transform import (
    COMPRESSIONS,
    Transformation,
    TransformState,
    pack_transform,
)
from pmemfs.volume.fs.inode import IMMUTABLE, Inode, State
from pmemfs.volume.fs.store import Store
from pmemfs.volume.fs.transaction import Transaction

_COMPRESSED, _ENCRYPTED = int(InodeFlags.COMPRESSED), int(InodeFlags.ENCRYPTED)
_NONCE_BYTES = 16


class Properties:
    """The transformations of the inodes of one file system."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def transform_of(self, number: int) -> TransformState | None:
        """The transformation of an inode; None if it has none. Raises OSError."""
        return self._store.inode(number).transform

    def set_transform(self, number: int, id_: int, level: int = 0) -> None:
        """Set how a file is compressed, or (NONE) that it is not; of a directory, how what is made
        in it is.

        Raises OSError: EINVAL for what is no compression, EOPNOTSUPP for what is encrypted or is
        no file or directory, EPERM, EBUSY if a program has pages of the file, ENOSPC.
        """
        inode = self._store.inode(number)
        state = TransformState(id_, level) if id_ in COMPRESSIONS else None
        if state is None and (id_ != Transformation.NONE or level):
            raise system_error(errno.EINVAL)
        self._store.refuse(inode, IMMUTABLE)
        self._check_change(inode, state)
        if state != inode.transform:
            self._set(inode, state)

    def encrypt(self, number: int, key_id: bytes) -> None:
        """Let all that is made in an empty directory from now on be encrypted with a key.

        Raises OSError: ENOTDIR, ENOTEMPTY, EPERM (also for the root), EOPNOTSUPP if it is
        compressed, EEXIST if it is encrypted with another key, ENOSPC.
        """
        inode = self._store.inode(number)
        if not inode.is_directory:
            raise system_error(errno.ENOTDIR)
        if inode.is_encrypted:
            if inode.transform is not None and inode.transform.key_id == key_id:
                return
            raise OSError(errno.EEXIST, "it is encrypted with another key")
        self._store.refuse(inode, IMMUTABLE)
        self._store.refuse_unserved(inode)
        if number == ROOT:
            why = "the root of a file system stays plain, so that a repair can put lost files there"
            raise OSError(errno.EPERM, why)
        if inode.transform is not None:
            why = "what is made in it is to be compressed, and what is encrypted does not shrink"
            raise OSError(errno.EOPNOTSUPP, f"{why}: set compression=none first")
        if inode.entries:
            raise OSError(errno.ENOTEMPTY, "it has files, which would stay readable")
        if any(name.startswith(b"user.") for name in inode.xattrs):
            raise OSError(errno.ENOTEMPTY, "it has user attributes, which would stay readable")
        state = TransformState(Transformation.XTS, 0, key_id, os.urandom(_NONCE_BYTES))
        self._set(inode, state)

    def wanted_by(self, inode: Inode, flags: int) -> TransformState | None:
        """The transformation of an inode once it has these flags of chattr(1). Raises OSError
        (EOPNOTSUPP, EBUSY) if it can't have them."""
        if bool(flags & _ENCRYPTED) != inode.is_encrypted:
            why = "only an empty directory becomes encrypted, by 'pmemfs encrypt', and for good"
            raise OSError(errno.EOPNOTSUPP, why)
        was = bool(shown_flags(inode) & _COMPRESSED)
        if bool(flags & _COMPRESSED) == was:
            return inode.transform
        state = None if was else TransformState(Transformation.ZSTD)
        self._check_change(inode, state)
        return state

    def _check_change(self, inode: Inode, state: TransformState | None) -> None:
        """Raise OSError if an inode can't get this compression (None: no compression any more)."""
        if not (inode.is_file or inode.is_directory):
            raise system_error(errno.EOPNOTSUPP)
        if inode.is_encrypted and state is not None:
            why = "what is encrypted does not shrink, and its length would tell of its content"
            raise OSError(errno.EOPNOTSUPP, why)
        if inode.is_encrypted:
            raise OSError(errno.EOPNOTSUPP, "what is encrypted stays so: copy it elsewhere")
        self._store.refuse_unserved(inode)
        holders = self._store.ground.pinned.holders_of(inode.number)
        if holders and state != inode.transform:
            raise OSError(errno.EBUSY, f"it is mapped by {', '.join(holders)}")

    def _set(self, inode: Inode, transform: TransformState | None) -> None:
        state = self._store.state_of(inode)
        state.changed_ns = self._store.times.now_ns()
        with self._store.change() as change:
            record_change(self._store, change, inode, transform, state)


def record_change(
    store: Store, change: Transaction, inode: Inode, transform: TransformState | None,
    state: State,
) -> None:  # fmt: skip
    """Give an inode another transformation and these attributes in a transaction."""
    if transform is not None and not transform.is_encrypted:
        store.ground.note_compression()
    if transform != inode.transform:
        change.append(inode, pack_transform(transform))
    change.append(inode, state.pack())

    def apply() -> None:
        inode.set_state(state)
        if transform != inode.transform:
            inode.set_transform(transform)
            store.cache.note_compressed(inode)

    change.then(apply)


def inherited(directory: Inode) -> TransformState | None:
    """The transformation of an inode that is made in a directory."""
    state = directory.transform
    if state is None or not state.is_encrypted:
        return state
    return state._replace(nonce=os.urandom(_NONCE_BYTES))


def shown_flags(inode: Inode) -> int:
    """The flags that lsattr(1) shows of a transformation."""
    state = inode.transform
    if state is None:
        return 0
    if state.is_encrypted:
        return _ENCRYPTED
    return _COMPRESSED if state.id in COMPRESSIONS else 0
