"""What `mount` says of the mount that it has made, to whoever asks by --json or -v."""

from __future__ import annotations

from typing import Any

from pmemfs.cli.find import ask, require_mount
from pmemfs.cli.output import note, print_json, warn
from pmemfs.errors import PmemfsError
from pmemfs.observe.answers import MountStatus


def report_mount(mountpoint: str, *, as_json: bool) -> None:
    """Ask the daemon, and say it. A daemon that doesn't answer is a warning: the mount is made."""
    mount = require_mount(mountpoint)
    entry: dict[str, Any] = {"pool": mount.source, "mountpoint": mount.mountpoint}
    try:
        status = ask(mount, "info", MountStatus)
    except PmemfsError as error:
        warn(str(error))
    else:
        entry |= {
            "pool": status.pool.path,
            "name": status.pool.name,
            "mode": status.pool.mode,
            "options": status.options,
            "read_only": status.read_only,
            "pid": status.pid,
            "engine": status.engine,
            "transport": status.transport,
            "transport_reason": status.transport_reason,
            "scheme": status.effective_scheme,
        }
        note(f"{status.pool.path} is mounted on {mount.mountpoint} by process {status.pid}")
        note(f"options: {'ro' if status.read_only else 'rw'},{status.options}")
        note(f"engine {status.engine}; {status.transport_reason}")
    if as_json:
        print_json(entry)
