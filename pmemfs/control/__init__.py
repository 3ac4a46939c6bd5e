"""Talking to a running daemon: JSON lines over a Unix socket, one for each mount.

A request is `{"method": NAME, "params": {…}}`, its answer `{"result": …}` or
`{"error": {"message": SENTENCE, "exit_code": N}}`. The socket is named after the mount's device
number, which stat(2) of any file of the mount tells: /run/pmemfs/0:57.sock. So the daemon of a
mount is found without asking the mount, and a socket whose daemon died belongs to no mount.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pmemfs.mountinfo import Mount


def runtime_directory(uid: int) -> Path:
    """Where a user's daemons keep their sockets: the same from every session of that user."""
    if uid == 0:
        return Path("/run/pmemfs")
    session = Path(f"/run/user/{uid}")
    return session / "pmemfs" if session.is_dir() else Path(f"/tmp/pmemfs-{uid}")


def socket_path(mount: Mount, directory: Path | None = None) -> Path:
    """The control socket of a mount, whoever asks."""
    return (directory or runtime_directory(mount.owner_uid)) / f"{mount.device}.sock"


def check_private(directory: Path, uid: int) -> None:
    """Raise PermissionError unless a directory is a user's own and closed to the others' writing.

    It may lie where anybody could have made it.
    """
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise PermissionError(f"{directory} does not belong to user {uid} alone")
