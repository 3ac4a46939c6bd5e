"""Attributes, extended attributes and times of inodes."""

from __future__ import annotations

import errno
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass

from pmemfs.clock import DAY_NS, AccessTimes
from pmemfs.errors import system_error
from pmemfs.media import log as media
from pmemfs.media.log import XATTR_MAX_BYTES, InodeFlags, RecordKind
from pmemfs.volume.fs.inode import FIXED, Inode, State
from pmemfs.volume.fs.reading import read_accessed
from pmemfs.volume.fs.store import InodeStore

XATTR_CREATE = 1
XATTR_REPLACE = 2
_XATTR_NAME_MAX_BYTES = 255
_XATTR_LIST_MAX_BYTES = 65536
CHATTR = FIXED | InodeFlags.NO_DUMP | InodeFlags.NO_ACCESS_TIME
"""The flags that chattr(1) sets and lsattr(1) shows."""
_TIME_LIMIT = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) tells of an inode. Blocks have 512 bytes; times are in ns since 1970."""

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size_bytes: int
    block_count: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    birth_ns: int
    flags: InodeFlags


class AttributeOperations(InodeStore, ABC):
    """What can be asked and changed of an inode itself."""

    access_times = AccessTimes.RELATIVE
    """Which reads are noted; with `notes_directories`, of directories too."""
    notes_directories = True

    def attributes(self, number: int) -> Attributes:
        """The attributes of an inode. Raises OSError."""
        inode = self.inode(number)
        state = self.state_of(inode)
        size_bytes = len(inode.target) or state.size_bytes
        return Attributes(
            ino=number,
            generation=inode.generation,
            mode=state.mode,
            nlink=inode.link_count,
            uid=state.uid,
            gid=state.gid,
            rdev=state.device,
            size_bytes=inode.log.slot_count * media.RECORD_BYTES
            if inode.is_directory
            else size_bytes,
            block_count=(inode.extents.frame_count + len(inode.log.frames)) * 8,
            atime_ns=state.accessed_ns,
            mtime_ns=state.modified_ns,
            ctime_ns=state.changed_ns,
            birth_ns=inode.birth_ns,
            flags=InodeFlags(state.flags),
        )

    def set_attributes(
        self,
        number: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size_bytes: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
        is_touch: bool = False,
    ) -> None:
        """Change what is given. `is_touch`: the times are now, which who may write may set.

        Raises OSError: EINVAL and EISDIR for a size, EPERM.
        """
        inode = self.inode(number)
        if any(value is not None for value in (mode, uid, gid, size_bytes)):
            is_touch = False
        self.refuse(inode, InodeFlags.IMMUTABLE if is_touch else FIXED)
        for time_ns in (atime_ns, mtime_ns):
            self.times.was_set(time_ns or 0)
        now_ns = self.times.now_ns()
        wanted = {
            "uid": uid,
            "gid": gid,
            "accessed_ns": atime_ns,
            "modified_ns": mtime_ns,
            "changed_ns": now_ns if ctime_ns is None else ctime_ns,
        }
        changes = {name: value for name, value in wanted.items() if value is not None}
        for name in ("accessed_ns", "modified_ns", "changed_ns"):
            if name in changes:
                changes[name] = min(max(changes[name], -_TIME_LIMIT), _TIME_LIMIT)
        if mode is not None:
            changes["mode"] = stat.S_IFMT(inode.state.mode) | stat.S_IMODE(mode)
        if size_bytes is not None:
            changes.setdefault("modified_ns", now_ns)
            self.truncate(inode, size_bytes, changes)
        else:
            state = self.state_of(inode).replaced(**changes)
            with self.change(urgent=True) as change:
                change.append(inode, state.pack())
                change.then(lambda: self._set_state(inode, state))
        if mtime_ns is not None:
            self.forget_written(inode)
        if atime_ns is not None and read_accessed(self.medium, inode):
            # Not zero, since the data plane compares it.
            self.set_accessed_ns(inode, atime_ns)
            self.medium.fence()

    def set_flags(self, number: int, flags: InodeFlags) -> object | None:
        """Set those of chattr(1), and take the others of these away. Raises OSError (EPERM).

        Answers what `Tables.changed` does: until that is over, somebody may still be writing.
        """
        inode = self.inode(number)
        changed = (inode.state.flags ^ flags) & CHATTR
        if flags & InodeFlags.IMMUTABLE and changed:
            # Of what stays immutable, the other flags stay too.
            self.refuse(inode, InodeFlags.IMMUTABLE)
        state = self.state_of(inode)
        state.flags ^= changed
        state.changed_ns = self.times.now_ns()
        with self.change() as change:
            change.append(inode, state.pack())
            change.then(lambda: self._set_state(inode, state))
        return self.tables.changed(number)

    @abstractmethod
    def truncate(self, inode: Inode, size_bytes: int, changes: dict[str, int]) -> None:
        """Set the size of a file, and other attributes with it. Raises OSError."""

    def note_read(self, number: int) -> bool:
        """Somebody reads a file, a link or a directory: it was accessed, if the mount notes that.

        Answers whether the time of access has changed.
        Source: relatime_need_update() in fs/inode.c of Linux.
        """
        inode = self.inode(number)
        is_noted = self.access_times and (self.notes_directories or not inode.is_directory)
        is_noted = is_noted and not inode.state.flags & InodeFlags.NO_ACCESS_TIME
        if self.read_only or not is_noted:
            return False
        state, now_ns = self.state_of(inode), self.times.now_ns()
        is_due = state.accessed_ns <= state.newest_ns or now_ns - state.accessed_ns >= DAY_NS
        is_due |= self.access_times is AccessTimes.STRICT
        if not is_due or now_ns == state.accessed_ns:
            return False
        self.set_accessed_ns(inode, now_ns)
        self.tables.touched(number, state.newest_ns)
        return True

    def show_accessed(self, number: int) -> int:
        """Have the time of access in the live line, for who notes reads without asking.

        Answers after which time a read counts, as `State.reads_count_after_ns`.
        """
        inode = self.inode(number)
        if not self.read_only and not read_accessed(self.medium, inode):
            self.set_accessed_ns(inode, inode.state.accessed_ns)
        return self.state_of(inode).reads_count_after_ns

    def target(self, number: int) -> bytes:
        """Where a symbolic link leads. Raises OSError (EINVAL)."""
        inode = self.inode(number)
        if not inode.target:
            raise system_error(errno.EINVAL)
        return inode.target

    # Extended attributes

    def get_xattr(self, number: int, name: bytes) -> bytes:
        """The value of an attribute. Raises OSError (ENODATA)."""
        value = self.find_xattr(number, name)
        if value is None:
            raise system_error(errno.ENODATA)
        return value

    def find_xattr(self, number: int, name: bytes) -> bytes | None:
        """The value of an attribute; None where there is none."""
        return self.inode(number).xattrs.get(name)

    def list_xattrs(self, number: int) -> list[bytes]:
        """The names of all attributes."""
        return list(self.inode(number).xattrs)

    def set_xattr(self, number: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute. Raises OSError: EEXIST, ENODATA, E2BIG, ERANGE, ENOSPC."""
        inode = self.inode(number)
        if flags & XATTR_CREATE and name in inode.xattrs:
            raise system_error(errno.EEXIST)
        if flags & XATTR_REPLACE and name not in inode.xattrs:
            raise system_error(errno.ENODATA)
        self.set_xattrs_and_mode(number, {name: value}, None)

    def remove_xattr(self, number: int, name: bytes) -> None:
        """Remove an attribute. Raises OSError (ENODATA)."""
        if name not in self.inode(number).xattrs:
            raise system_error(errno.ENODATA)
        self.set_xattrs_and_mode(number, {name: None}, None)

    def set_xattrs_and_mode(
        self, number: int, changes: dict[bytes, bytes | None], mode: int | None
    ) -> None:
        """Set and (None) remove attributes, and permission bits with them, all in one.

        Raises OSError: as `check_xattr`, ENOSPC, EPERM.
        """
        inode = self.inode(number)
        self.refuse(inode, FIXED)
        for name, value in changes.items():
            check_xattr(name, value or b"")
            if value is not None and name not in inode.xattrs:
                listed_bytes = sum(len(other) + 1 for other in inode.xattrs)
                if listed_bytes + len(name) + 1 > _XATTR_LIST_MAX_BYTES:
                    raise system_error(errno.ENOSPC)
        state = self.state_of(inode)
        state.changed_ns = self.times.now_ns()
        if mode is not None:
            state.mode = stat.S_IFMT(state.mode) | stat.S_IMODE(mode)
        is_urgent = all(
            value is None or (name in inode.xattrs and len(value) <= len(inode.xattrs[name]))
            for name, value in changes.items()
        )
        with self.change(urgent=is_urgent) as change:
            for name, value in changes.items():
                if value is not None:
                    change.append(inode, *media.pack_values(RecordKind.XATTR, name, value))
                elif name in inode.xattrs:
                    change.append(inode, media.pack_xattr_removed(name))
            change.append(inode, state.pack())

            def apply() -> None:
                for name, value in changes.items():
                    inode.set_xattr(name, value)
                self._set_state(inode, state)

            change.then(apply)

    def _set_state(self, inode: Inode, state: State) -> None:
        inode.state = state


def check_xattr(name: bytes, value: bytes) -> None:
    """Raise OSError (ERANGE, E2BIG) for an attribute that nobody may have."""
    if not 0 < len(name) <= _XATTR_NAME_MAX_BYTES:
        raise system_error(errno.ERANGE)
    if len(value) > XATTR_MAX_BYTES:
        raise system_error(errno.E2BIG)
