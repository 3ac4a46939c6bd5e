"""Where a mount may go, and how it ends from outside. Loads no pyfuse3, for the commands.

Everything here asks mountinfo before it touches a mountpoint: to look at a directory whose daemon
doesn't answer is to wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence

from pmemfs.errors import BadMountPoint, UnmountFailed, UnmountHangs
from pmemfs.mountinfo import Mount, mount_at, mounts, mounts_of
from pmemfs.reach import PATIENCE_SECONDS, check_answers, look

_ENDING = (errno.ECONNABORTED, errno.EPIPE, errno.ECANCELED)
"""What who asks is told while a mount is ending whose daemon has died."""
_ENDING_SECONDS = 5
_UNMOUNT_SECONDS = 60


def mounts_of_pool(path: str) -> list[Mount]:
    """The mounts of the pool at an absolute path, as far as their word can be taken for it."""
    return mounts_of(path, believed_owners(path))


def believed_owners(path: str) -> set[int]:
    """Whose mounts can be of the pool at a path.

    Any user can mount something under the name of any pool. So a mount counts only if it is
    root's, or of who asks, or of the owner of the pool's file.
    """
    owners = {0, os.geteuid()}
    with contextlib.suppress(OSError):
        owners.add(os.stat(path).st_uid)
    return owners


def places_of(mount: Mount) -> list[Mount]:
    """Wherever the same mount appears: a bind mount shows it on other directories, too.

    The device number tells it from a newer one, but for one that got the same number again; that is
    of another pool, because nobody else can have this one open.
    """
    is_it = (mount.device, mount.source)
    return [m for m in mounts() if (m.device, m.source) == is_it]


def resolve(path: str) -> str:
    """As os.path.realpath, but a mountpoint is not looked at: its daemon might not answer.

    Raises Silent where another mount that is on the way does not answer.
    """
    parent, name = os.path.split(path.rstrip("/"))
    if name not in ("", ".", ".."):
        check_answers(parent or ".")
        candidate = os.path.join(os.path.realpath(parent), name)
        if mount_at(candidate):
            return candidate
    check_answers(path)
    return os.path.realpath(path)


def prepare_mountpoint(path: str, has_daemon: Callable[[Mount], bool]) -> str:
    """The absolute path of a directory that can be mounted on. Raises BadMountPoint and Silent.

    A dead mount of ours there ("Transport endpoint is not connected") is detached first.
    `has_daemon` says of a mount whether its daemon surely lives, without looking at the mount.
    """
    if not path:
        # As a path it would be the current directory: most likely a variable that is not set.
        raise BadMountPoint(path="''", why="a directory has a name")
    resolved = resolve(path)
    existing = mount_at(resolved)
    if existing and existing.is_ours:
        if has_daemon(existing) or not is_dead(existing):
            why = f"{existing.source} is mounted there; unmount it first, or name another directory"
            raise BadMountPoint(path=path, why=why)
        detach(resolved)
    if existing:
        check_answers(resolved)
    _refuse_hiding(path, resolved)
    try:
        status = os.stat(resolved)
    except OSError as error:
        why = os.strerror(error.errno or 0).lower()
        advice = f"; make it with 'mkdir {path}'" if isinstance(error, FileNotFoundError) else ""
        raise BadMountPoint(path=path, why=f"{why}{advice}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise BadMountPoint(path=path, why="it is not a directory; name one that is")
    return resolved


def _refuse_hiding(path: str, resolved: str) -> None:
    """Raise BadMountPoint where a mount would hide what its own daemon opens: it would wait for
    itself."""
    # Who only looks for mounts starts no processes of one.
    from pmemfs.mount.processes import needed_paths

    for needed in needed_paths():
        if os.path.commonpath((resolved, needed)) == resolved:
            raise BadMountPoint(path=path, why=f"it would hide {needed}, which the daemon needs")


def is_dead(mount: Mount) -> bool:
    """Whether the daemon of a mount of ours is gone. One that does not answer is not.

    Asked by statfs, which always goes to the daemon: attributes may be cached, and outlive it.
    """
    deadline = time.monotonic() + _ENDING_SECONDS
    while True:
        try:
            look(mount.mountpoint, seconds=PATIENCE_SECONDS, whole=True)
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
    """Unmount as umount(8) does.

    Raises UnmountFailed, such as where files are open, and UnmountHangs.
    """
    if lazy:
        detach(mountpoint)
    else:
        _run_unmount(mountpoint, ["umount"], ["fusermount3", "-u"])


def _run_unmount(mountpoint: str, as_root: list[str], as_user: list[str]) -> None:
    command = as_root if os.geteuid() == 0 else as_user
    said = run_patiently([*command, "--", mountpoint], _UNMOUNT_SECONDS)
    if said is None:
        raise UnmountHangs(path=mountpoint, seconds=_UNMOUNT_SECONDS)
    if said:
        why = said[-1].split(": ", 1)[-1].removesuffix(".")
        raise UnmountFailed(path=mountpoint, why=why.removeprefix(f"{mountpoint}: "))


def run_patiently(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> list[str] | None:
    """Run a program that may have to wait for a daemon: the lines that it failed with, and none if
    it succeeded. None: it has not ended in so many seconds."""
    import subprocess

    running = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=environment,
    )  # fmt: skip
    try:
        _, text = running.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # Nobody waits for its end: it may not come while the daemon is stopped.
        running.kill()
        return None
    if not running.returncode:
        return []
    # It names paths, which need not be text.
    return os.fsdecode(text).strip().splitlines() or ["no reason was given"]
