"""From what a user names, a mountpoint or a pool, to the daemon that serves it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pmemfs.control import runtime_directory, socket_path
from pmemfs.control.client import call
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


def ask(mount: Mount, method: str, **params: Any) -> Any:
    """Ask the daemon of a mount. Raises NoAnswer, and RemoteError with the daemon's sentence."""
    try:
        return call(daemon_socket(mount), method, **params)
    except NoAnswer as error:
        raise NoAnswer(path=mount.mountpoint, why=str(error)) from None


def daemon_socket(mount: Mount) -> Path:
    """Where the daemon of a mount listens: root's directory or this user's."""
    candidates = [Path("/run/pmemfs"), runtime_directory()]
    paths = [socket_path(mount, directory) for directory in candidates]
    return next((path for path in paths if os.path.exists(path)), paths[-1])
