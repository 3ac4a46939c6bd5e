"""The mount itself, on the side of the daemon: how it is made, served and ended."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3

from pmemfs.errors import MountFailed
from pmemfs.fuse.mountpoint import detach, source_name
from pmemfs.fuse.options import MountOptions
from pmemfs.mountinfo import Mount, mount_at

_MAX_BACKGROUND = 1024
"""The kernel's own 12 would hold back asynchronous direct I/O that is deeper than that."""


def make_mount(
    operations: pyfuse3.Operations, pool_path: str, mountpoint: str, options: MountOptions
) -> Mount:
    """Mount, but answer nothing yet. Raises MountFailed with what libfuse said."""
    _check_permissions(pool_path, mountpoint, options)
    words = {"default_permissions", "subtype=pmemfs", f"fsname={_escaped(source_name(pool_path))}"}
    words.update(options.kernel)
    words.update({"ro"} if options.read_only else {})
    words.update({"allow_other"} if options.allow_other else {})
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
    # libfuse leaves a mount whose connection was aborted. The device number tells it from a newer
    # one, but for one that got the same number again; that is of another pool, as this is locked.
    still_there = mount_at(mount.mountpoint)
    if still_there and (still_there.device, still_there.source) == (mount.device, mount.source):
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
    """A value for libfuse's option list, which is separated by commas."""
    return text.replace("\\", "\\\\").replace(",", "\\,")


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
