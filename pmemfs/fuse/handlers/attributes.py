"""Attributes: stat(2), chmod, chown, truncate, utimes and statfs."""

from __future__ import annotations

import stat
from typing import NamedTuple

from pmemfs.fuse.handlers import acl
from pmemfs.fuse.handlers.notifications import after_failing
from pmemfs.fuse.handlers.openfiles import OpenFiles
from pmemfs.fuse.handlers.privileges import Caller, mode_without, take_privileges
from pmemfs.fuse.published import PublishedAttributes
from pmemfs.volume.base import Attributes, Later, Room, Volume, looked_at

_TIME_LIMIT = (1 << 63) - 1


class Change(NamedTuple):
    """What SETATTR asks for; None means that a field stays as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    is_touch: bool = False
    """The times are the present, which any writer may set. pyfuse3 does not pass this on."""
    takes_privileges: bool = False
    """The caller may not keep set-user-ID and set-group-ID, whatever else changes."""

    @property
    def gives_away(self) -> bool:
        """Whether the owner or group should change."""
        return self.uid is not None or self.gid is not None


class AttributeHandlers:
    """The kernel's questions about attributes. `published` is for a data plane, if there is one."""

    def __init__(
        self, volume: Volume, files: OpenFiles, published: PublishedAttributes | None
    ) -> None:
        self._volume = volume
        self._files = files
        self._published = published

    def get(self, ino: int) -> Attributes:
        """The attributes of an inode; from now on a data plane answers those of a directory."""
        attributes = self._volume.attributes(ino)
        if self._published is not None and stat.S_ISDIR(attributes.mode):
            self._published.publish(attributes)
        return attributes

    def change(self, caller: Caller, ino: int, change: Change) -> Later[Attributes]:
        """Change an inode; its attributes after that. Raises OSError."""
        fs = self._volume
        mode = _mode_after(fs, ino, change, caller)
        if mode is not None and _set_mode_of_list(fs, ino, mode):
            mode = None
        fields = {
            "mode": mode,
            "uid": change.uid,
            "gid": change.gid,
            "size_bytes": change.size_bytes,
            "atime_ns": _kept(change.atime_ns),
            "mtime_ns": _kept(change.mtime_ns),
            "ctime_ns": _kept(change.ctime_ns),
        }
        wanted = {name: value for name, value in fields.items() if value is not None}
        try:
            if change == Change():
                # A chown(2) without user and group notes a change, even of an append-only inode.
                fs.set_attributes(ino, is_touch=True, **wanted)
            elif wanted:
                fs.set_attributes(ino, is_touch=change.is_touch, **wanted)
        except OSError as error:
            # Privileges may have been taken away before it failed, which the kernel does not know.
            return after_failing(self._files.tell(ino), error)
        if change.mode is not None or change.size_bytes is not None or change.gives_away:
            self._files.note_change(ino)
        return fs.attributes(ino)

    def room(self) -> Later[Room]:
        """How much room the volume has: statfs(2)."""
        return self._room_later() if self._volume.look_on() else self._volume.room()

    async def _room_later(self) -> Room:
        await looked_at(self._volume)
        return self._volume.room()


def _kept(time_ns: int | None) -> int | None:
    """A time, or the nearest time that can be stored: from the years 1677 to 2262."""
    return None if time_ns is None else min(max(time_ns, -_TIME_LIMIT), _TIME_LIMIT)


def _mode_after(fs: Volume, ino: int, change: Change, caller: Caller) -> int | None:
    """The permission bits that an inode should get; None if they stay."""
    wanted = None if change.mode is None else stat.S_IMODE(change.mode)
    before = fs.attributes(ino)
    takes = change.takes_privileges or change.gives_away
    # A chown(2) that names neither user nor group asks for no change, but takes privileges. The
    # kernel does the same before a fallocate by another user; see `ranges`.
    takes |= change == Change() and caller.uid in (0, before.uid)
    if stat.S_ISDIR(before.mode) or not (takes or change.size_bytes is not None):
        return wanted
    # A change of the content or owner takes capabilities, whoever the caller is.
    take_privileges(fs, ino, None)
    if not takes:
        return wanted
    mode = before.mode if wanted is None else wanted
    # A request that changes the size says itself whether the caller has CAP_FSETID.
    may_set_ids = change.size_bytes is None and caller.may_set_ids()
    after = stat.S_IMODE(mode_without(mode, before.gid, caller, may_set_ids=may_set_ids))
    return wanted if after == stat.S_IMODE(before.mode) and wanted is None else after


def _set_mode_of_list(fs: Volume, ino: int, mode: int) -> bool:
    """Change the mode of an inode with an access control list; whether it has such a list."""
    stored = fs.find_xattr(ino, acl.ACCESS)
    if not stored:
        return False
    changed = acl.pack(acl.with_mode(acl.parse(stored), mode))
    fs.set_xattrs_and_mode(ino, {acl.ACCESS: changed}, mode)
    return True
