"""What a change takes away: set-user-ID, set-group-ID, file capabilities.

The kernel leaves that to us, and says in a flag of the request that the caller may not keep the
bits (it has no CAP_FSETID). Which ones go is the same question on every file system: set-user-ID
always, set-group-ID where the group may execute the file, or where the caller is no member of it.
The python engine is not shown the flags: there, root may keep the bits, and of a write the one
counts who has opened the file. Source: inode(7); setattr_should_drop_sgid() in fs/attr.c of Linux;
FUSE_HANDLE_KILLPRIV_V2 in its include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

from pmemfs.volume.base import Volume

CAPABILITIES = b"security.capability"
"""The extended attribute that has them, see capabilities(7)."""
_CAP_FSETID = 4


class Caller(NamedTuple):
    """Who asks. The process is one of the daemon's PID namespace, or 0."""

    uid: int
    gid: int
    pid: int

    def is_member(self, gid: int) -> bool:
        """Whether somebody is in a group."""
        return self.gid == gid or str(gid) in self._status("Groups:").split()

    def may_set_ids(self) -> bool:
        """Whether somebody has CAP_FSETID, for requests whose flags do not say."""
        if self.uid != 0:
            return False
        effective = self._status("CapEff:")
        return not effective or bool(int(effective, 16) >> _CAP_FSETID & 1)

    def _status(self, name: str) -> str:
        """A line of /proc/PID/status, see proc(5); empty where it can't be read."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.removeprefix(name) for line in lines if line.startswith(name)), "")


def has_privileges(fs: Volume, ino: int, mode: int) -> bool:
    """Whether a write may change an inode's mode or attributes."""
    return bool(mode & (stat.S_ISUID | stat.S_ISGID)) or _has_capabilities(fs, ino)


def mode_without(mode: int, gid: int, caller: Caller, *, may_set_ids: bool = False) -> int:
    """The mode of a file without what a caller may not keep.

    `may_set_ids` says that the caller, in the group or not, keeps the set-group-ID of what the
    group can't execute.
    """
    if not mode & (stat.S_ISUID | stat.S_ISGID):
        return mode
    goes = bool(mode & stat.S_IXGRP) or not (may_set_ids or caller.is_member(gid))
    return mode & ~(stat.S_ISUID | (stat.S_ISGID if goes else 0))


def take_privileges(fs: Volume, ino: int, loser: Caller | None) -> bool:
    """Take away what a change of the content does; whether there was anything. Raises OSError.

    `loser` is who may not keep the bits; None where the caller may.
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
