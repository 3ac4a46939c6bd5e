"""Where a mount may go, and how it ends from outside. Loads no pyfuse3, for the commands.

Everything here asks mountinfo before it touches a mountpoint: to look at a directory whose daemon
doesn't answer is to wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import time

from pmemfs.errors import BadMountPoint, UnmountFailed
from pmemfs.mountinfo import Mount, mount_at, mounts

_ENDING = (errno.ECONNABORTED, errno.EPIPE, errno.ECANCELED)
"""What who asks is told while a mount is ending whose daemon has died."""
_ENDING_SECONDS = 5


def source_name(pool_path: str) -> str:
    """How mountinfo names the pool of a mount: in ASCII, as libfuse's options are."""
    return pool_path.encode("ascii", "backslashreplace").decode()


def mounts_of_pool(path: str) -> list[Mount]:
    """The mounts of the pool at an absolute path, as far as their word can be taken for it.

    Any user can mount something under the name of any pool. So a mount counts only if it is
    root's, or of who asks, or of the owner of the pool's file.
    """
    believed = {0, os.geteuid()}
    with contextlib.suppress(OSError):
        believed.add(os.stat(path).st_uid)
    name = source_name(path)
    return [m for m in mounts() if m.is_ours and m.source == name and m.owner_uid in believed]


def places_of(mount: Mount) -> list[Mount]:
    """Wherever the same mount appears: a bind mount shows it on other directories, too.

    The device number tells it from a newer one, but for one that got the same number again; that is
    of another pool, because nobody else can have this one open.
    """
    is_it = (mount.device, mount.source)
    return [m for m in mounts() if (m.device, m.source) == is_it]


def resolve(path: str) -> str:
    """As os.path.realpath, but a mountpoint is not looked at: its daemon might not answer."""
    parent, name = os.path.split(path.rstrip("/"))
    if name not in ("", ".", ".."):
        candidate = os.path.join(os.path.realpath(parent), name)
        if mount_at(candidate):
            return candidate
    return os.path.realpath(path)


def prepare_mountpoint(path: str) -> str:
    """The absolute path of a directory that can be mounted on. Raises BadMountPoint.

    A dead mount of ours there ("Transport endpoint is not connected") is detached first.
    """
    if not path:
        # As a path it would be the current directory: most likely a variable that is not set.
        raise BadMountPoint(path="''", why="a directory has a name")
    resolved = resolve(path)
    existing = mount_at(resolved)
    if existing and existing.is_ours:
        if not is_dead(existing):
            raise BadMountPoint(path=path, why=f"{existing.source} is mounted there")
        detach(resolved)
    try:
        status = os.stat(resolved)
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        raise BadMountPoint(path=path, why=why) from None
    if not stat.S_ISDIR(status.st_mode):
        raise BadMountPoint(path=path, why="it is not a directory")
    return resolved


def is_dead(mount: Mount) -> bool:
    """Whether the daemon of a mount of ours is gone. Waits for one that is only slow.

    Asked by statvfs, which always goes to the daemon: attributes may be cached, and outlive it.
    """
    deadline = time.monotonic() + _ENDING_SECONDS
    while True:
        try:
            os.statvfs(mount.mountpoint)
        except OSError as error:
            if error.errno not in _ENDING or time.monotonic() > deadline:
                return error.errno == errno.ENOTCONN
        else:
            return False
        time.sleep(0.02)


def detach(mountpoint: str) -> None:
    """Unmount lazily: at once for everybody who looks for it, later for who uses it.

    Raises UnmountFailed.
    """
    _run_unmount(mountpoint, ["umount", "--lazy"], ["fusermount3", "-u", "-z"])


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount as umount(8) does. Raises UnmountFailed, such as where files are open."""
    if lazy:
        detach(mountpoint)
    else:
        _run_unmount(mountpoint, ["umount"], ["fusermount3", "-u"])


def _run_unmount(mountpoint: str, as_root: list[str], as_user: list[str]) -> None:
    command = as_root if os.geteuid() == 0 else as_user
    done = subprocess.run([*command, "--", mountpoint], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason was given"]
        why = said[-1].split(": ", 1)[-1].removesuffix(".")
        raise UnmountFailed(path=mountpoint, why=why.removeprefix(f"{mountpoint}: "))
