"""The mount itself, on the side of the daemon: how it is made, served and ended."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyfuse3

from pmemfs.errors import MountFailed, UnmountFailed
from pmemfs.fuse.mountpoint import detach, places_of, source_name
from pmemfs.fuse.options import MountOptions
from pmemfs.mountinfo import DIRTY_PAGE_LIMITS, Mount, mount_at

_MAX_BACKGROUND = 1024
"""The kernel's own 12 would hold back asynchronous direct I/O that is deeper than that."""
_ENDS = (errno.ENODEV, errno.ECONNABORTED, errno.EIO)
"""What libfuse's read answers when the mount is gone: unmounted, aborted, or no data plane."""


def make_mount(
    operations: pyfuse3.Operations, pool_path: str, mountpoint: str, options: MountOptions
) -> Mount:
    """Mount, but answer nothing yet. Raises MountFailed with what libfuse said."""
    _check_permissions(pool_path, mountpoint, options, needs_helper=os.geteuid() != 0)
    with _stderr_caught() as caught:
        try:
            pyfuse3.init(operations, mountpoint, set(_words(pool_path, options)))
        except RuntimeError as error:
            said = "; ".join(caught.read_text(errors="replace").split("\n")).strip("; ")
            why = said.removeprefix("fuse: ") or str(error)
            raise MountFailed(pool=pool_path, path=mountpoint, why=why) from None
    mount = _made(pool_path, mountpoint)
    _allow_deep_queues(mount)
    _allow_dirty_pages(mount)
    return mount


def mount_by_helper(pool_path: str, mountpoint: str, options: MountOptions) -> tuple[int, Mount]:
    """Mount through fusermount3; the descriptor of the connection, which is to be answered on.

    Raises MountFailed. Source: the protocol of `_FUSE_COMMFD`, libfuse's lib/mount.c.
    """
    _check_permissions(pool_path, mountpoint, options, needs_helper=True)
    words = _words(pool_path, options)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            ["fusermount3", "-o", ",".join(words), "--", mountpoint],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = "; ".join(done.stderr.strip().splitlines()) or "fusermount3 failed"
            why = said.removeprefix("fusermount3: ")
            raise MountFailed(pool=pool_path, path=mountpoint, why=why)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    mount = _made(pool_path, mountpoint)
    _allow_dirty_pages(mount)
    return fds[0], mount


def _words(pool_path: str, options: MountOptions) -> list[str]:
    words = ["default_permissions", "subtype=pmemfs", f"fsname={_escaped(source_name(pool_path))}"]
    words += [*options.kernel, *(["ro"] if options.read_only else [])]
    return [*words, "allow_other"] if options.allow_other else words


def _made(pool_path: str, mountpoint: str) -> Mount:
    mount = mount_at(mountpoint)
    if mount is None:
        raise MountFailed(pool=pool_path, path=mountpoint, why="the mount is gone again")
    return mount


async def serve_pyfuse3(*, may_wait: bool) -> None:
    """Answer requests until somebody unmounts, `pyfuse3.terminate` is called, or the data plane
    hangs up. `may_wait` says whether an answer may have to wait for anything."""
    # Where none has, one task does; handing over to others costs a tenth of each answer.
    task_count = 64 if may_wait else 1
    try:
        await pyfuse3.main(min_tasks=min(2, task_count), max_tasks=task_count)
    except* OSError as group:
        # An aborted connection ends a mount as unmounting does.
        _, others = group.split(_ends_a_mount)
        if others:
            raise others from None


def _ends_a_mount(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _ENDS


def detach_mount(mount: Mount) -> None:
    """Unmount wherever it's still there: at once for who looks for it, later for who uses it."""
    # libfuse leaves a mount whose connection was aborted.
    for place in reversed(places_of(mount)):
        covering = mount_at(place.mountpoint)
        if covering and covering.device == mount.device:
            try:
                detach(place.mountpoint)
            except UnmountFailed:
                # Where root has bound a user's mount, only root can take it away.
                if place.mountpoint == mount.mountpoint:
                    raise


def _check_permissions(
    pool_path: str, mountpoint: str, options: MountOptions, *, needs_helper: bool
) -> None:
    def refuse(why: str) -> MountFailed:
        return MountFailed(pool=pool_path, path=mountpoint, why=why)

    if not os.path.exists("/dev/fuse"):
        raise refuse("there is no /dev/fuse: load the kernel's fuse module ('modprobe fuse')")
    if needs_helper and shutil.which("fusermount3") is None:
        raise refuse("there is no fusermount3: install the package fuse3")
    if os.geteuid() == 0:
        return
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


def _allow_dirty_pages(mount: Mount) -> None:
    """Let stores through mappings fill as much of the page cache as any file system's may.

    The kernel gives a FUSE mount 1 % of what may be dirty, since a daemon that never writes back
    would keep those pages for ever. Ours writes back at the speed of memory, is locked in memory,
    and needs no other file system for it. Only root may change this.
    """
    limits = Path(DIRTY_PAGE_LIMITS.format(device=mount.device))
    for name, value in (("strict_limit", "0"), ("max_ratio", "100")):
        with suppress(OSError):
            (limits / name).write_text(value)


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
