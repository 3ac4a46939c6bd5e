"""Talking to a running daemon: JSON lines over a Unix socket, one for each mount.

A request is `{"method": NAME, "params": {…}}`, its answer `{"result": …}` or
`{"error": {"message": SENTENCE, "exit_code": N}}`. The socket is named after the mount's device
number, which stat(2) of any file of the mount tells: /run/pmemfs/0:57.sock. So the daemon of a
mount is found without asking the mount, and a socket whose daemon died belongs to no mount.
"""

from __future__ import annotations

import os
from pathlib import Path

from pmemfs.mountinfo import Mount


def runtime_directory() -> Path:
    """Where this user's daemons keep their sockets."""
    if os.geteuid() == 0:
        return Path("/run/pmemfs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "pmemfs" if base else Path(f"/tmp/pmemfs-{os.geteuid()}")


def socket_path(mount: Mount, directory: Path | None = None) -> Path:
    """The control socket of a mount."""
    return (directory or runtime_directory()) / f"{mount.device}.sock"
