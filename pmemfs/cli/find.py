"""From what a user names, a mountpoint or a pool, to the daemon that serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pmemfs.control import check_private, socket_path
from pmemfs.control.client import ANSWER_TIMEOUT_SECONDS, call
from pmemfs.errors import NoAnswer, NotMounted
from pmemfs.fuse.mountpoint import resolve, source_name
from pmemfs.mountinfo import Mount, mount_at, mounts


def our_mounts() -> Iterator[Mount]:
    """Every mount of pmemfs, alive or dead."""
    return (mount for mount in mounts() if mount.is_ours)


def find_mount(target: str) -> Mount | None:
    """The mount on a mountpoint, or of a pool; None where there is none."""
    resolved = resolve(target)
    at = mount_at(resolved)
    if at and at.is_ours:
        return at
    name = source_name(resolved)
    return next((mount for mount in our_mounts() if mount.source == name), None)


def require_mount(target: str) -> Mount:
    """As `find_mount`. Raises NotMounted."""
    mount = find_mount(target)
    if mount is None:
        raise NotMounted(path=target, why="" if os.path.exists(target) else ": no such path")
    return mount


def ask(
    mount: Mount, method: str, *, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS, **params: Any
) -> Any:
    """Ask the daemon of a mount. Raises NoAnswer, and RemoteError with the daemon's sentence."""
    path = socket_path(mount)
    try:
        check_private(path.parent, mount.owner_uid)
        return call(path, method, timeout_seconds=timeout_seconds, **params)
    except NoAnswer as error:
        raise NoAnswer(path=mount.mountpoint, why=error.facts["why"]) from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise NoAnswer(path=mount.mountpoint, why=why) from None
