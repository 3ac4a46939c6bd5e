"""Attributes and times of inodes, as stat(2), chattr(1) and utimensat(2) know them."""

from __future__ import annotations

import errno
import stat
from functools import partial

from pmemfs.clock import DAY_NS, AccessTimes
from pmemfs.errors import system_error
from pmemfs.media import log as media
from pmemfs.media.log import InodeFlags
from pmemfs.volume.base import Attributes, Heritage
from pmemfs.volume.fs.commits import Decides
from pmemfs.volume.fs.fileframes import FileFrames
from pmemfs.volume.fs.inode import DIRECTORY_TYPE, FIXED, IMMUTABLE
from pmemfs.volume.fs.properties import Properties, record_change, shown_flags
from pmemfs.volume.fs.store import Store

CHATTR = int(FIXED | InodeFlags.NO_DUMP | InodeFlags.NO_ACCESS_TIME)
"""The flags that chattr(1) sets and lsattr(1) shows."""
_TIME_LIMIT = (1 << 63) - 1


class InodeAttributes:
    """What can be asked of an inode itself, and changed in it."""

    def __init__(self, store: Store, frames: FileFrames, properties: Properties) -> None:
        self._store = store
        self._frames = frames
        self._properties = properties
        self._lines = store.lines
        self._sealing = store.sealing
        self._inode, self._state_of = store.inode, store.state_of
        self.access_times = AccessTimes.RELATIVE
        """Which reads count as an access; with `notes_directories`, reads of directories too."""
        self.notes_directories = True

    def attributes(self, number: int) -> Attributes:
        """The attributes of an inode. Raises OSError."""
        inode = self._inode(number)
        state = self._lines.seen_state_of(inode)
        log, nlink = inode.log, state.link_count
        if state.mode >> 12 == DIRECTORY_TYPE:
            size_bytes = log.slot_count * media.RECORD_BYTES
            nlink += nlink and 1 + inode.subdirectory_count
        else:
            size_bytes = len(inode.target) or state.size_bytes
            if inode.transform is not None and inode.target:
                size_bytes = self._sealing.target_bytes(inode)
        flags = state.flags if inode.transform is None else state.flags | shown_flags(inode)
        block_count = (inode.extents.frame_count + inode.piece_frames + len(log.frames)) * 8
        # By position, in the order of `Attributes`: keywords would cost twice as much.
        return Attributes(
            number, inode.generation, state.mode, nlink, state.uid, state.gid,
            state.device, size_bytes, block_count,
            state.accessed_ns, state.modified_ns, state.changed_ns, inode.birth_ns, flags,
        )  # fmt: skip

    def heritage(self, number: int) -> Heritage:
        """What a new inode takes over from its directory. Raises OSError."""
        inode = self._inode(number)
        return Heritage(inode.state.mode, inode.state.gid, self._sealing.plain_xattrs(inode))

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
        """Change the attributes that are given.

        `is_touch` says that the times are the present, which a user with write permission may set.
        Raises OSError: EINVAL and EISDIR for a size, EPERM.
        """
        inode = self._inode(number)
        if any(value is not None for value in (mode, uid, gid, size_bytes)):
            is_touch = False
        self._store.refuse(inode, IMMUTABLE if is_touch else FIXED)
        for time_ns in (atime_ns, mtime_ns):
            self._store.times.was_set(time_ns or 0)
        now_ns = self._store.times.now_ns()
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
            self._frames.truncate(inode, size_bytes, changes)
        else:
            state = self._state_of(inode).replaced(**changes)
            with self._store.change(urgent=True, decides=Decides.ATTRIBUTES) as change:
                change.append(inode, state.pack())
                change.then(partial(inode.set_state, state))
        self.times_were_set(number, atime_ns=atime_ns, mtime_ns=mtime_ns)

    def times_were_set(self, number: int, *, atime_ns: int | None, mtime_ns: int | None) -> None:
        """Let the times (not None) that `set_attributes` has stored count, not those of the live
        line. Done twice, this does no harm."""
        inode = self._inode(number)
        if mtime_ns is not None:
            self._lines.forget_written(inode)
        if atime_ns is not None and self._lines.accessed_ns(inode):
            # Zero would mean "see the log", which the data plane can't; it compares this word.
            self._lines.set_accessed_ns(inode, atime_ns)
            self._store.medium.fence()

    def set_flags(self, number: int, flags: InodeFlags) -> object | None:
        """Set these flags of chattr(1), and take the other flags of chattr(1) away. Raises OSError:
        EPERM, and for the flags of a transformation EOPNOTSUPP, EBUSY.

        The result is that of `Tables.changed`: until it is over, a worker may still be writing.
        """
        inode = self._inode(number)
        changed = (inode.state.flags ^ int(flags)) & CHATTR
        transform = self._properties.wanted_by(inode, flags)
        if flags & IMMUTABLE and (changed or transform != inode.transform):
            # An inode that stays immutable keeps its other flags, too.
            self._store.refuse(inode, IMMUTABLE)
        state = self._state_of(inode)
        state.flags ^= changed
        state.changed_ns = self._store.times.now_ns()
        with self._store.change() as change:
            record_change(self._store, change, inode, transform, state)
        return self._store.tables.changed(number)

    def note_read(self, number: int) -> bool:
        """A program reads a file, link or directory: note the access, if the mount notes those.

        The result says whether the time of access has changed.
        Source: relatime_need_update() in fs/inode.c of Linux.
        """
        inode = self._inode(number)
        is_noted = self.access_times and (self.notes_directories or not inode.is_directory)
        is_noted = is_noted and not inode.state.flags & InodeFlags.NO_ACCESS_TIME
        if self._store.read_only or not is_noted:
            return False
        state, now_ns = self._state_of(inode), self._store.times.now_ns()
        is_due = state.accessed_ns <= state.newest_ns or now_ns - state.accessed_ns >= DAY_NS
        is_due |= self.access_times is AccessTimes.STRICT
        if not is_due or now_ns == state.accessed_ns:
            return False
        self._lines.set_accessed_ns(inode, now_ns)
        self._store.tables.touched(number, state.newest_ns)
        return True

    def show_accessed(self, number: int) -> int:
        """Put the time of access into the live line, for the data plane, which notes reads itself.

        The result is `State.reads_count_after_ns`.
        """
        inode = self._inode(number)
        if not self._store.read_only and not self._lines.accessed_ns(inode):
            self._lines.set_accessed_ns(inode, inode.state.accessed_ns)
        return self._state_of(inode).reads_count_after_ns

    def target(self, number: int) -> bytes:
        """The path that a symbolic link leads to. Raises OSError (EINVAL)."""
        inode = self._inode(number)
        if not inode.target:
            raise system_error(errno.EINVAL)
        if inode.transform is not None:
            self._store.refuse_unserved(inode)
            return self._sealing.plain_target(inode)
        return inode.target
