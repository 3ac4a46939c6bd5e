"""What a change takes away: set-user-ID, set-group-ID, file capabilities.

The kernel leaves this to the server, and a flag of the request says that the caller may not keep
the bits (because it lacks CAP_FSETID). Which bits go is the same on every file system: set-user-ID
always; set-group-ID if the group may execute the file, or if the caller is not in the group.
pyfuse3 does not pass the flags on, so with the python engine root may keep the bits, and for a
write it counts who has opened the file. Source: inode(7); setattr_should_drop_sgid() in fs/attr.c
of Linux; FUSE_HANDLE_KILLPRIV_V2 in its include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

from pmemfs.volume.base import Volume

CAPABILITIES = b"security.capability"
"""The extended attribute with the capabilities, see capabilities(7)."""
_CAP_FSETID = 4


class Caller(NamedTuple):
    """The process that asks; its pid is of the daemon's PID namespace, or 0."""

    uid: int
    gid: int
    pid: int

    def is_member(self, gid: int) -> bool:
        """Whether the caller is in a group."""
        return self.gid == gid or str(gid) in self._status("Groups:").split()

    def may_set_ids(self) -> bool:
        """Whether the caller has CAP_FSETID, for requests whose flags do not say."""
        if self.uid != 0:
            return False
        effective = self._status("CapEff:")
        return not effective or bool(int(effective, 16) >> _CAP_FSETID & 1)

    def _status(self, name: str) -> str:
        """A line of /proc/PID/status, see proc(5); "" if it can't be read."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.removeprefix(name) for line in lines if line.startswith(name)), "")


def has_privileges(fs: Volume, ino: int, mode: int) -> bool:
    """Whether a write may take something from an inode's mode or attributes."""
    return bool(mode & (stat.S_ISUID | stat.S_ISGID)) or _has_capabilities(fs, ino)


def mode_without(mode: int, gid: int, caller: Caller, *, may_set_ids: bool = False) -> int:
    """The mode of a file without the bits that a caller may not keep.

    With `may_set_ids` the caller keeps set-group-ID even if it is not in the group, unless the
    group may execute the file.
    """
    if not mode & (stat.S_ISUID | stat.S_ISGID):
        return mode
    goes = bool(mode & stat.S_IXGRP) or not (may_set_ids or caller.is_member(gid))
    return mode & ~(stat.S_ISUID | (stat.S_ISGID if goes else 0))


def take_privileges(fs: Volume, ino: int, loser: Caller | None) -> bool:
    """Take away what a change of the content takes; whether there was anything. Raises OSError.

    `loser` is the caller if it may not keep the bits, and None if it may.
    """
    attributes = fs.attributes(ino)
    mode = attributes.mode
    kept = mode_without(mode, attributes.gid, loser) if loser else mode
    capable = _has_capabilities(fs, ino)
    if kept == mode and not capable:
        return False
    fs.set_xattrs_and_mode(ino, {CAPABILITIES: None} if capable else {}, stat.S_IMODE(kept))
    return True


def _has_capabilities(fs: Volume, ino: int) -> bool:
    return bool(fs.find_xattr(ino, CAPABILITIES))
