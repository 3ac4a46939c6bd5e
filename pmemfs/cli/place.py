"""From a path that lies on a mount to that mount. `find` does it for mountpoints and pools."""

from __future__ import annotations

import os
from typing import Any

from pmemfs.cli.find import Report, ask
from pmemfs.control.client import RemoteError
from pmemfs.errors import NoSuchSource, NotMounted, PmemfsError
from pmemfs.medium.source import check_path
from pmemfs.mountinfo import Mount, mount_of_device
from pmemfs.observe.answers import MountStatus


def find_place(path: str, *, follows: bool = True) -> tuple[Mount, os.stat_result]:
    """The mount that a path lies on, and what stat(2) says of the path, or lstat(2) unless it
    `follows` symbolic links. Raises NoSuchSource, NotMounted, Silent."""
    check_path(path)
    try:
        status = os.stat(path, follow_symlinks=follows)
    except OSError as error:
        raise NoSuchSource(path=path, why=(error.strerror or str(error)).lower()) from None
    mount = mount_of_device(status.st_dev)
    if mount is None or not mount.is_ours:
        raise NotMounted(path=path, what="in a pmemfs mount: it is on another file system")
    return mount, status


def ask_of_files(
    mount: Mount, refusal: type[PmemfsError], method: str, shape: type[Report], *,
    timeout_seconds: float | None = None, **params: Any,
) -> Report:  # fmt: skip
    """As `ask`, for what only the daemon of mode fs has heard of: of another mode, it raises the
    refusal."""
    try:
        return ask(mount, method, shape, timeout_seconds=timeout_seconds, **params)
    except RemoteError as error:
        if error.kind == RemoteError.__name__:
            # Only now, because for this answer a daemon of mode fs reads all bitmaps.
            pool = ask(mount, "info", MountStatus).pool
            if pool.mode != "fs":
                raise refusal(path=pool.path, mode=pool.mode) from None
        raise
