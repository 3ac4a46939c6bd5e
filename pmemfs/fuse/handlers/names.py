"""Names: looking them up, making, linking, renaming and removing them.

The kernel asks for the attributes of a directory after each change of its names: of those that
somebody looks at they are published anew, before the change is answered.
"""

from __future__ import annotations

import errno
import logging
import stat

from pmemfs.errors import system_error
from pmemfs.fuse.handlers.newinode import new_inode, whiteout
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.published import PublishedAttributes
from pmemfs.media.log import NAME_MAX_BYTES
from pmemfs.volume.base import Attributes, Volume
from pmemfs.volume.fs.names import RENAME_WHITEOUT

log = logging.getLogger(__name__)


class NameHandlers:
    """What the kernel asks of names. `published` is for a data plane, if there is one."""

    def __init__(self, volume: Volume, published: PublishedAttributes | None) -> None:
        self._volume = volume
        self._published = published

    def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """What a name leads to; None: nothing, and the kernel may remember that."""
        ino = self._find(parent, name)
        return None if ino is None else self.entry(ino)

    def forget(self, ino: int, count: int) -> None:
        """The kernel holds an inode so many times less. Raises nothing: it doesn't ask."""
        try:
            self._volume.drop(ino, count)
        except Exception:
            log.exception("inode %d could not be let go", ino)

    def make(
        self, caller: Caller, parent: int, name: bytes, mode: int, *, umask: int, rdev: int = 0,
        target: bytes = b"",
    ) -> Attributes:  # fmt: skip
        """MKNOD, MKDIR, SYMLINK, and CREATE before it opens; the type is in the mode."""
        new = new_inode(self._volume, parent, caller, mode, umask=umask, rdev=rdev, target=target)
        ino = self._volume.make(parent, name, new)
        self._changed(parent)
        return self.entry(ino)

    def make_unnamed(self, caller: Caller, parent: int, mode: int, *, umask: int) -> Attributes:
        """TMPFILE, before it opens."""
        new = new_inode(self._volume, parent, caller, mode, umask=umask)
        return self.entry(self._volume.make_unnamed(parent, new))

    def symlink(self, caller: Caller, parent: int, name: bytes, target: bytes) -> Attributes:
        """A symbolic link, whose mode nobody's umask changes."""
        return self.make(caller, parent, name, stat.S_IFLNK | 0o777, umask=0, target=target)

    def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        """Another name of an inode."""
        self._volume.link(ino, parent, name)
        self._changed(parent)
        return self.entry(ino)

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name that is not of a directory."""
        self._volume.unlink(parent, name)
        self._changed(parent)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        self._volume.rmdir(parent, name)
        self._changed(parent)

    def rename(
        self, caller: Caller, parent: int, name: bytes, target: int, new_name: bytes, flags: int
    ) -> None:
        """As renameat2(2)."""
        left = whiteout(self._volume, parent, caller) if flags & RENAME_WHITEOUT else None
        self._volume.rename(parent, name, target, new_name, flags, left)
        self._changed(parent)
        if target != parent:
            self._changed(target)

    def readlink(self, ino: int) -> bytes:
        """Where a symbolic link leads."""
        target = bytes(self._volume.target(ino))
        self._volume.note_read(ino)
        return target

    def entry(self, ino: int) -> Attributes:
        """What is answered to whoever looks an inode up: the kernel holds it from now on."""
        attributes = self._volume.attributes(ino)
        self._volume.hold(ino)
        return attributes

    def _find(self, parent: int, name: bytes) -> int | None:
        """The inode of a name, `.` and `..` among them; None if there is none."""
        if name == b".":
            # So the kernel asks for what somebody kept a handle of, if it does not know it. What
            # was removed is not to be found, though the kernel's FORGET may still be on the way.
            if not self._volume.attributes(parent).nlink:
                raise system_error(errno.ESTALE)
            return parent
        if name == b"..":
            return self._volume.parent(parent)
        if len(name) > NAME_MAX_BYTES:
            return self._volume.lookup(parent, name)
        # Whatever is made was looked up before, in vain: an error would cost as much as the rest.
        return self._volume.has_entry(parent, name)

    def _changed(self, parent: int) -> None:
        if self._published is not None and self._published.is_wanted(parent):
            self._published.publish(self._volume.attributes(parent))
