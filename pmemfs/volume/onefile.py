"""What modes `block` and `cache` share: a root directory with one file, which is like a device.

Like a device, the file has one size: O_TRUNC and ftruncate succeed and change nothing (because dd
truncates what it writes to), a write at the end answers ENOSPC, and a read there is short. Nothing
can be created, renamed or removed. Owner, mode and times can be set and last as long as the mount,
as in /dev.
"""

from __future__ import annotations

import errno
import os
import stat

from pmemfs.clock import coarse_ns
from pmemfs.errors import system_error
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Label
from pmemfs.media.log import NAME_MAX_BYTES
from pmemfs.volume.base import Attributes, Volume

INODE = 2
"""The inode number of the file, and the `mapping` of its pages."""
KEPT = ("mode", "uid", "gid", "atime_ns", "mtime_ns", "ctime_ns")
"""Attributes that a user may set."""
_DT_REGULAR = 8


class Onlookers:
    """What serves the file beside this process. Here nothing does; the native engine overrides
    this."""

    @property
    def last_write_ns(self) -> int:
        """When an onlooker last wrote; 0 if none did since the mount."""
        return 0

    def kept(self, number: int) -> dict[str, int]:
        """What was kept of an inode's attributes, by name."""
        return {}

    def keep(self, number: int, attributes: dict[str, int]) -> None:
        """Remember attributes for the process that serves the file after this one."""

    def forget_last_write(self) -> None:
        """A user has set another time of modification, which counts until the next write."""


class OneFileVolume(Volume):
    """A root with one file, named as the pool. `onlookers` stand for the workers of a data
    plane."""

    read_only: bool = False
    size_bytes: int = 0
    """Of the file."""

    def __init__(
        self, label: Label, onlookers: Onlookers, *, uid: int = 0, gid: int = 0, mode: int = 0o600
    ) -> None:
        self.name = label.name
        self._name = os.fsencode(self.name)
        self._looking_on = onlookers
        created = label.created_ns
        device = Attributes(
            ino=INODE, generation=0, mode=stat.S_IFREG | mode, nlink=1, uid=uid, gid=gid, rdev=0,
            size_bytes=0, block_count=0, atime_ns=created, mtime_ns=created, ctime_ns=created,
            birth_ns=created, flags=0,
        )  # fmt: skip
        root = device._replace(ino=ROOT, mode=stat.S_IFDIR | 0o755, nlink=2)
        self._inodes = {
            inode.ino: inode._replace(**onlookers.kept(inode.ino)) for inode in (root, device)
        }

    # Names

    def lookup(self, parent: int, name: bytes) -> int:
        self._check_root(parent)
        if name == self._name:
            return INODE
        raise system_error(errno.ENAMETOOLONG if len(name) > NAME_MAX_BYTES else errno.ENOENT)

    def names(self, number: int) -> list[bytes]:
        self._check_root(number)
        return [self._name]

    def listed(
        self, number: int, key: bytes, *, follows: bool = False
    ) -> tuple[bytes, int, int] | None:
        self._check_root(number)
        return (key, INODE, _DT_REGULAR) if key == self._name else None

    def has_entry(self, number: int, name: bytes) -> int | None:
        return INODE if self.listed(number, name) else None

    def parent(self, number: int) -> int:
        self._check_root(number)
        return ROOT

    # Attributes

    def attributes(self, number: int) -> Attributes:
        kept = self._inodes.get(number)
        if kept is None:
            raise system_error(errno.ESTALE)
        if number == INODE and self._looking_on.last_write_ns >= kept.ctime_ns:
            self._note_write(self._looking_on.last_write_ns)
        return self._inodes[number]

    def set_attributes(
        self, number: int, *, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, size_bytes: int | None = None, atime_ns: int | None = None,
        mtime_ns: int | None = None, ctime_ns: int | None = None, is_touch: bool = False,
    ) -> None:  # fmt: skip
        kept = self.attributes(number)
        self._set(
            number,
            mode=kept.mode if mode is None else stat.S_IFMT(kept.mode) | stat.S_IMODE(mode),
            uid=kept.uid if uid is None else uid,
            gid=kept.gid if gid is None else gid,
            atime_ns=kept.atime_ns if atime_ns is None else atime_ns,
            mtime_ns=kept.mtime_ns if mtime_ns is None else mtime_ns,
            ctime_ns=coarse_ns(),
        )
        if mtime_ns is not None and number == INODE:
            self._looking_on.forget_last_write()

    def set_xattrs_and_mode(
        self, number: int, changes: dict[bytes, bytes | None], mode: int | None
    ) -> None:
        if changes:
            raise system_error(errno.EOPNOTSUPP)
        self.set_attributes(number, mode=mode)

    # Content

    def check_open(self, number: int, flags: int) -> None:
        if number == ROOT:
            raise system_error(errno.EISDIR)
        self.attributes(number)
        if self.read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise system_error(errno.EROFS)

    def note_stores(self, number: int) -> None:
        self._check_device(number)
        self._note_write(coarse_ns())

    # For the modes

    def _have_size(self, size_bytes: int) -> None:
        """The file has this size from now on."""
        self.size_bytes = size_bytes
        self._inodes[INODE] = self._inodes[INODE]._replace(
            size_bytes=size_bytes, block_count=size_bytes // 512
        )

    def _note_write(self, now_ns: int) -> None:
        self._set(INODE, mtime_ns=now_ns, ctime_ns=now_ns)

    def _set(self, number: int, **changes: int) -> None:
        """Change attributes, which last as long as the mount."""
        changed = self._inodes[number] = self._inodes[number]._replace(**changes)
        self._looking_on.keep(number, {name: getattr(changed, name) for name in KEPT})

    def _check_root(self, number: int) -> None:
        if number != ROOT:
            raise system_error(errno.ENOTDIR if number == INODE else errno.ESTALE)

    def _check_device(self, number: int) -> None:
        if number != INODE:
            raise system_error(errno.EISDIR if number == ROOT else errno.ESTALE)

    def _check_writable(self, number: int) -> None:
        self._check_device(number)
        if self.read_only:
            raise system_error(errno.EROFS)
