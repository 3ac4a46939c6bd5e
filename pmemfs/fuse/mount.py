"""The mount itself: where it may go, how it is made, and how it ends.

Everything here asks mountinfo before it touches a mountpoint: to look at a directory whose daemon
doesn't answer is to wait for it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3

from pmemfs.errors import BadMountPoint, MountFailed, UnmountFailed
from pmemfs.fuse.options import MountOptions
from pmemfs.mountinfo import Mount, mount_at

_MAX_BACKGROUND = 1024
"""The kernel's own 12 would hold back asynchronous direct I/O that is deeper than that."""


def prepare_mountpoint(path: str) -> str:
    """The absolute path of a directory that can be mounted on. Raises BadMountPoint.

    A dead mount of ours there ("Transport endpoint is not connected") is detached first.
    """
    resolved = os.path.realpath(path)
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
    try:
        os.statvfs(mount.mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


def detach(mountpoint: str) -> None:
    """Unmount lazily: at once for everybody who looks for it, later for who uses it."""
    _run_unmount(mountpoint, ["umount", "--lazy"], ["fusermount3", "-u", "-z"])


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount as umount(8) does. Raises UnmountFailed, such as where files are open."""
    if lazy:
        detach(mountpoint)
    else:
        _run_unmount(mountpoint, ["umount"], ["fusermount3", "-u"])


def make_mount(
    operations: pyfuse3.Operations, pool_path: str, mountpoint: str, options: MountOptions
) -> Mount:
    """Mount, but answer nothing yet. Raises MountFailed with what libfuse said."""
    _check_permissions(pool_path, mountpoint, options)
    words = {"default_permissions", "subtype=pmemfs", f"fsname={_escaped(pool_path)}"}
    words.update(options.kernel)
    words.update(word for word in ("ro", "allow_other") if word in options.as_text().split(","))
    with _stderr_caught() as caught:
        try:
            pyfuse3.init(operations, mountpoint, words)
        except RuntimeError as error:
            said = "; ".join(caught.read_text(errors="replace").split("\n")).strip("; ")
            why = said.removeprefix("fuse: ") or str(error)
            raise MountFailed(pool=pool_path, path=mountpoint, why=why) from None
    mount = mount_at(mountpoint)
    if mount is None:
        raise MountFailed(pool=pool_path, path=mountpoint, why="the mount is gone again")
    _allow_deep_queues(mount)
    return mount


async def serve() -> None:
    """Answer the kernel until somebody unmounts or `pyfuse3.terminate` is called."""
    try:
        await pyfuse3.main(min_tasks=2, max_tasks=64)
    except* OSError as group:
        # An aborted connection ends a mount as unmounting does.
        _, others = group.split(_ends_a_mount)
        if others:
            raise others from None


def _ends_a_mount(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENODEV, errno.ECONNABORTED)


def end_mount(mount: Mount) -> None:
    """Unmount if it's still there, and let go of the connection."""
    pyfuse3.close(unmount=True)
    # libfuse leaves a mount whose connection was aborted; the device number tells it from a newer.
    still_there = mount_at(mount.mountpoint)
    if still_there and still_there.device == mount.device:
        detach(mount.mountpoint)


def _check_permissions(pool_path: str, mountpoint: str, options: MountOptions) -> None:
    def refuse(why: str) -> MountFailed:
        return MountFailed(pool=pool_path, path=mountpoint, why=why)

    if not os.path.exists("/dev/fuse"):
        raise refuse("there is no /dev/fuse: load the kernel's fuse module ('modprobe fuse')")
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise refuse("only root can mount without fusermount3, of the package fuse3")
    if options.allow_other and not _users_may_allow_other():
        raise refuse("allow_other is for root, unless /etc/fuse.conf says user_allow_other")


def _users_may_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return "user_allow_other" in (line.strip() for line in lines)


def _allow_deep_queues(mount: Mount) -> None:
    """Raise the connection's limits of requests under way; where we may not, leave them."""
    connection = Path("/sys/fs/fuse/connections") / str(mount.minor)
    for name in ("max_background", "congestion_threshold"):
        try:
            (connection / name).write_text(str(_MAX_BACKGROUND))
        except OSError:
            return


def _escaped(text: str) -> str:
    """A value for libfuse's option list, which is ASCII and separated by commas."""
    ascii_text = text.encode("ascii", "backslashreplace").decode()
    return ascii_text.replace("\\", "\\\\").replace(",", "\\,")


def _run_unmount(mountpoint: str, as_root: list[str], as_user: list[str]) -> None:
    command = as_root if os.geteuid() == 0 else as_user
    done = subprocess.run([*command, "--", mountpoint], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason was given"]
        why = said[-1].split(": ", 1)[-1].removesuffix(".")
        raise UnmountFailed(path=mountpoint, why=why.removeprefix(f"{mountpoint}: "))


@contextmanager
def _stderr_caught() -> Iterator[Path]:
    """Keep what C libraries write to standard error, as libfuse does with its reasons."""
    with tempfile.NamedTemporaryFile() as caught:
        saved = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield Path(caught.name)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
