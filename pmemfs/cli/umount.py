"""`pmemfs umount`: unmount, and come back when the pool is clean."""

from __future__ import annotations

import select

import click

from pmemfs.cli.find import daemon_socket, require_mount
from pmemfs.cli.mount import reporting_mount_failure
from pmemfs.control.client import daemon_pidfd
from pmemfs.errors import NoAnswer
from pmemfs.fuse.mountpoint import unmount

_TIMEOUT_SECONDS = 60


@click.command()
@click.argument("target")
@click.option("-l", "--lazy", is_flag=True, help="Detach now, end when nobody uses it any more.")
def umount(target: str, lazy: bool) -> int:
    """Unmount TARGET, a mountpoint or a pool.

    umount(8) and fusermount3 -u do as well; this waits until the daemon has ended.
    """

    def attempt() -> int:
        mount = require_mount(target)
        pidfd = daemon_pidfd(daemon_socket(mount))
        unmount(mount.mountpoint, lazy=lazy)
        if pidfd is not None and not lazy and not _has_ended(pidfd):
            raise NoAnswer(path=target, why=f"it has not ended after {_TIMEOUT_SECONDS} s")
        return 0

    return reporting_mount_failure(attempt)


def _has_ended(pidfd: int) -> bool:
    """Wait for a process to end; whether it did."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(_TIMEOUT_SECONDS * 1000))
