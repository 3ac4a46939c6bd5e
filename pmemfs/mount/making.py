"""The mount itself, on the side of the daemon: how it is made and ended."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from pmemfs.errors import MountFailed, UnmountFailed
from pmemfs.mount.flags import set_flags
from pmemfs.mount.mountpoint import detach, places_of
from pmemfs.mount.options import (
    LATE,
    ROOTS_OWN,
    MountOptions,
    is_context,
    late_words,
    selinux_is_enabled,
)
from pmemfs.mountinfo import DIRTY_PAGE_LIMITS, Mount, mount_at


def mount_by_helper(pool_path: str, mountpoint: str, options: MountOptions) -> tuple[int, Mount]:
    """Mount through fusermount3; the descriptor of the connection, which is to be answered on.

    Raises MountFailed. Source: the protocol of `_FUSE_COMMFD`, libfuse's lib/mount.c.
    """
    _check_permissions(pool_path, mountpoint, options)
    words = _mount_words(pool_path, options)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            ["fusermount3", "-o", ",".join(words), "--", mountpoint],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            said = "; ".join(os.fsdecode(done.stderr).strip().splitlines()) or "fusermount3 failed"
            why = said.removeprefix("fusermount3: ")
            raise MountFailed(pool=pool_path, path=mountpoint, why=why)
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    mount = _made_mount(pool_path, mountpoint, options)
    _allow_dirty_pages(mount)
    return fds[0], mount


def _mount_words(pool_path: str, options: MountOptions) -> list[str]:
    """What fusermount3 is to be told behind `-o`."""
    words = ["default_permissions", "subtype=pmemfs", f"fsname={_escaped(pool_path)}"]
    words += [word for word in options.kernel if word not in LATE and not is_context(word)]
    words += [word for word in options.kernel if is_context(word) and selinux_is_enabled()]
    words += ["ro"] if options.read_only else []
    return [*words, "allow_other"] if options.allow_other else words


def _made_mount(pool_path: str, mountpoint: str, options: MountOptions) -> Mount:
    """A mount that was just made, with all its flags. Raises MountFailed."""
    if os.geteuid() == 0:
        # Those that fusermount3 does not know, before anybody is answered.
        try:
            set_flags(mountpoint, late_words(options))
        except OSError as error:
            why = f"the kernel refuses its flags: {os.strerror(error.errno or 0).lower()}"
            raise MountFailed(pool=pool_path, path=mountpoint, why=why) from None
    mount = mount_at(mountpoint)
    if mount is None:
        raise MountFailed(pool=pool_path, path=mountpoint, why="the mount is gone again")
    return mount


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


def _check_permissions(pool_path: str, mountpoint: str, options: MountOptions) -> None:
    """Raise MountFailed where this user can't mount so."""

    def refuse(why: str) -> MountFailed:
        return MountFailed(pool=pool_path, path=mountpoint, why=why)

    if not os.path.exists("/dev/fuse"):
        raise refuse("there is no /dev/fuse: load the kernel's fuse module ('modprobe fuse')")
    if shutil.which("fusermount3") is None:
        raise refuse("there is no fusermount3: install the package fuse3")
    if os.geteuid() == 0:
        return
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise refuse(
            "this user may not open /dev/fuse; root's 'chmod 666 /dev/fuse' lets all users mount"
        )
    for word in ROOTS_OWN:
        if word in options.kernel:
            raise refuse(f"only root may ask for {word}")
    if options.allow_other and not _users_may_allow_other():
        raise refuse("allow_other is for root, unless /etc/fuse.conf says user_allow_other")


def _users_may_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return "user_allow_other" in (line.strip() for line in lines)


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
    """A value for fusermount3's list of options, which commas separate."""
    return text.replace("\\", "\\\\").replace(",", "\\,")
