"""Names: looking them up, making, linking, renaming and removing them.

The kernel asks for a directory's attributes after each change of its names. If a program looks at
them, they are published anew before the change is answered.
"""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable

from pmemfs.errors import system_error
from pmemfs.fuse.handlers.newinode import new_inode, whiteout
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.published import PublishedAttributes
from pmemfs.media.log import NAME_MAX_BYTES
from pmemfs.volume.base import Attributes, StoredListing, Volume
from pmemfs.volume.fs.names import RENAME_WHITEOUT

log = logging.getLogger(__name__)

LookUpStored = Callable[[StoredListing, int, bytes], bytes | None]
"""Answers what a name in a directory, given its inode, leads to, and holds that; None if what is
stored doesn't say enough."""


class NameHandlers:
    """The kernel's questions about names. `published` is for a data plane, if there is one."""

    def __init__(self, volume: Volume, published: PublishedAttributes | None) -> None:
        self._volume = volume
        self._published = published

    def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """What a name leads to; None if it does not exist, which the kernel may remember."""
        ino = self._find(parent, name)
        return None if ino is None else self.entry(ino)

    def lookup_stored(self, parent: int, name: bytes, look_up: LookUpStored) -> bytes | None:
        """As `lookup`, from what is stored; None if that doesn't say enough, and then nothing has
        happened."""
        stored = self._volume.stored_listing(parent)
        return None if stored is None else look_up(stored, parent, name)

    def forget(self, ino: int, count: int) -> None:
        """The kernel holds an inode so many times less. Raises nothing, because the kernel does not
        wait for an answer."""
        try:
            self._volume.drop(ino, count)
        except Exception:
            log.exception("inode %d could not be dropped", ino)

    def make(
        self, caller: Caller, parent: int, name: bytes, mode: int, *, umask: int, rdev: int = 0,
        target: bytes = b"",
    ) -> Attributes:  # fmt: skip
        """Do MKNOD, MKDIR, SYMLINK, or CREATE before the open; the type is in the mode."""
        new = new_inode(self._volume, parent, caller, mode, umask=umask, rdev=rdev, target=target)
        ino = self._volume.make(parent, name, new)
        self._changed(parent)
        return self.entry(ino)

    def make_unnamed(self, caller: Caller, parent: int, mode: int, *, umask: int) -> Attributes:
        """Do TMPFILE, before the open."""
        new = new_inode(self._volume, parent, caller, mode, umask=umask)
        return self.entry(self._volume.make_unnamed(parent, new))

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Attributes:
        """Make a symbolic link; the umask does not change its mode."""
        return self.make(caller, parent, name, stat.S_IFLNK | 0o777, umask=0, target=target)

    def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        """Give an inode another name."""
        self._volume.link(ino, parent, name)
        self._changed(parent)
        return self.entry(ino)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove the name of anything but a directory."""
        self._volume.unlink(parent, name)
        self._changed(parent)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        self._volume.rmdir(parent, name)
        self._changed(parent)

    def rename(
        self, caller: Caller, parent: int, name: bytes, target: int, new_name: bytes, flags: int
    ) -> None:
        """Do as renameat2(2) does."""
        left = whiteout(self._volume, parent, caller) if flags & RENAME_WHITEOUT else None
        self._volume.rename(parent, name, target, new_name, flags, left)
        self._changed(parent)
        if target != parent:
            self._changed(target)

    def readlink(self, ino: int) -> bytes:
        """The path that a symbolic link leads to."""
        target = bytes(self._volume.target(ino))
        self._volume.note_read(ino)
        return target

    def entry(self, ino: int) -> Attributes:
        """The answer to a lookup of an inode, which the kernel holds from now on."""
        attributes = self._volume.attributes(ino)
        self._volume.hold(ino)
        return attributes

    def _find(self, parent: int, name: bytes) -> int | None:
        """The inode of a name, which may be `.` or `..`; None if it does not exist."""
        if name == b".":
            # The kernel asks this for a file handle whose inode it does not know. A removed inode
            # must not be found, even if the kernel's FORGET is still on the way.
            if not self._volume.attributes(parent).nlink:
                raise system_error(errno.ESTALE)
            return parent
        if name == b"..":
            return self._volume.parent(parent)
        if len(name) > NAME_MAX_BYTES:
            return self._volume.lookup(parent, name)
        # Each name that is made was looked up in vain before, so this case must be cheap: raising
        # an error would cost as much as all the rest.
        return self._volume.has_entry(parent, name)

    def _changed(self, parent: int) -> None:
        if self._published is not None and self._published.is_wanted(parent):
            self._published.publish(self._volume.attributes(parent))
