"""`pmemfs upgrade`: let this version of pmemfs serve a mount that another one serves."""

from __future__ import annotations

import time
from typing import NamedTuple

import click

from pmemfs.cli.find import ask, require_mount
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, say, warn
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.dataplane.layouts import SIGNATURE
from pmemfs.errors import NoAnswer, UpgradeFailed
from pmemfs.media import cache, filesystem, label
from pmemfs.mount.processes import bare_python_words, python_words
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import MountStatus, UpgradeBegun
from pmemfs.unsaid import json_values
from pmemfs.version import VERSION

_PATIENCE_SECONDS = 60
_POLL_SECONDS = 0.05


class Upgraded(NamedTuple):
    """What has become of the processes of a mount."""

    pid: int | None
    """Of the daemon."""
    data_plane_pid: int | None
    keeper_pid: int | None
    is_whole: bool
    """Whether the data plane is another one, too."""
    seconds: float


@click.command()
@click.argument("mountpoint", type=A_DIRECTORY)
@reporting
def upgrade(mountpoint: str, as_json: bool) -> None:
    """Let this version of pmemfs serve a mount that another one serves.

    The mount must be of the native engine, and not of '-o no_keeper'. Programs that use it notice a
    short pause. All of its processes are replaced by those of the program that runs this command:
    daemon, data plane and keeper. A warning says if the data plane could not be. A keeper that was
    killed is replaced as well. If the new daemon fails, the one of before serves again. A version
    that stores other formats, or whose processes share other memory, is refused: unmount and mount
    again.
    """
    mount = require_mount(mountpoint)
    began = time.monotonic()
    before = ask(
        mount, "upgrade", UpgradeBegun, timeout_seconds=_PATIENCE_SECONDS,
        daemon=python_words("pmemfs.daemons.mountd"),
        keeper=bare_python_words("pmemfs.daemons.keeperd"),
        knows={"memory": SIGNATURE, "label": label.FORMAT_VERSION,
               "fs": filesystem.FORMAT_VERSION, "cache": cache.FORMAT_VERSION},
    )  # fmt: skip
    status = _wait(mount, before, began + _PATIENCE_SECONDS)
    is_whole = status.data_plane_pid != before.data_plane_pid
    keeper_pid = status.kept.keeper_pid if status.kept else None
    # It may have been killed meanwhile, or the mount be about to end.
    keeper = f"keeper {keeper_pid}" if keeper_pid else "no keeper"
    seconds = round(time.monotonic() - began, 3)
    done = Upgraded(status.pid, status.data_plane_pid, keeper_pid, is_whole, seconds)
    if as_json:
        print_json(json_values(done))
    else:
        say(f"{mountpoint}: pmemfs {VERSION} serves it, daemon {done.pid}, data plane "
            f"{done.data_plane_pid}, {keeper}")  # fmt: skip
    if not is_whole:
        warn(f"{mountpoint}: daemon and keeper are those of this version, but the data plane is "
             f"still that of before; {status.log} says why, and another 'pmemfs upgrade' may "
             "replace it")  # fmt: skip


def _wait(mount: Mount, before: UpgradeBegun, deadline: float) -> MountStatus:
    """The status of the mount once another daemon serves it. Raises UpgradeFailed."""
    status = None
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        try:
            status = ask(mount, "info", MountStatus)
        except NoAnswer as error:
            if error.is_final:
                raise
        else:
            if status.kept is None or status.kept.daemon.times != before.daemon_deaths:
                why = (
                    f"the new daemon has died, and the mount is served as before; see {status.log}"
                )
                raise UpgradeFailed(path=mount.mountpoint, why=why)
            if status.kept.since_ns != before.since_ns and not status.kept.is_upgrading:
                return status
    if status and status.kept and status.kept.since_ns != before.since_ns:
        why = (
            f"the new daemon (pid {status.pid}) serves it, but has not replaced the data plane "
            f"after {_PATIENCE_SECONDS} s; see {status.log}"
        )
    else:
        why = f"no new daemon serves it after {_PATIENCE_SECONDS} s; 'pmemfs info' may tell more"
    raise UpgradeFailed(path=mount.mountpoint, why=why)
