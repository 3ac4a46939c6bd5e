"""`pmemfs umount`: unmount, and come back when the pool is clean."""

from __future__ import annotations

import os

import click

from pmemfs.cli.find import ask, may_ask, require_mount
from pmemfs.cli.mount import reporting_mount_failure
from pmemfs.cli.paths import any_path
from pmemfs.control.client import daemon_pidfd
from pmemfs.control.places import socket_path
from pmemfs.errors import NoAnswer, NotClean, NotPermitted, PmemfsError, SourceBusy
from pmemfs.media.label import State
from pmemfs.medium.mapped import MappedMedium
from pmemfs.mount.mountpoint import places_of, resolve, unmount
from pmemfs.mount.processes import has_ended
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import MountStatus
from pmemfs.pool import Pool

_TIMEOUT_SECONDS = 60


@click.command()
@click.argument("target", metavar="{MOUNTPOINT|POOL}", shell_complete=any_path)
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when nobody uses it any more.")
def umount(target: str, lazy: bool) -> int:
    """Unmount MOUNTPOINT, or POOL wherever it is mounted.

    A pool that is mounted on several directories stays on the others if one of them is unmounted.
    umount(8) and fusermount3 -u do as well; this waits until the daemon has ended, and fails if
    it did not leave the pool clean. That only the owner of a mount is told: root opens no file
    that another user's daemon names.

    Exit codes: 0 unmounted, 2 bad usage, 32 anything else.
    """

    def attempt() -> int:
        mount = require_mount(target)
        if not may_ask(mount):
            # fusermount3 says something else.
            raise NotPermitted(path=mount.mountpoint, uid=mount.owner_uid)
        # A pool is unmounted wherever it appears; a mountpoint, as it is told.
        is_mountpoint = mount.mountpoint == resolve(target)
        places = [mount] if is_mountpoint else places_of(mount)
        if lazy:
            _unmount_all(places, lazy=True)
            return 0
        is_ours = mount.owner_uid == os.geteuid()
        pidfd = daemon_pidfd(socket_path(mount), owner_uid=mount.owner_uid)
        pool_path = _writable_pool(mount) if is_ours and pidfd is not None else None
        _unmount_all(places)
        # Elsewhere, the same mount goes on.
        if pidfd is not None and not places_of(mount):
            if not has_ended(pidfd, _TIMEOUT_SECONDS):
                raise NoAnswer(path=target, why=f"it has not ended after {_TIMEOUT_SECONDS} s")
            if pool_path and not _is_clean(pool_path):
                raise NotClean(path=target)
        return 0

    return reporting_mount_failure(attempt)


def _unmount_all(places: list[Mount], *, lazy: bool = False) -> None:
    for place in reversed(places):
        unmount(place.mountpoint, lazy=lazy)


def _writable_pool(mount: Mount) -> str | None:
    """The pool of a mount that may write to it; None where it can't, or nobody answers."""
    try:
        status = ask(mount, "info", MountStatus)
    except PmemfsError:
        return None
    return None if status.read_only else status.pool.path


def _is_clean(pool_path: str) -> bool:
    """Whether a pool was left clean, or is mounted again already."""
    try:
        medium = MappedMedium.open(pool_path, read_only=True)
    except SourceBusy:
        return True
    try:
        return Pool.open(medium).label.state == State.CLEAN
    finally:
        medium.close()
