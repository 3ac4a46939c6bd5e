"""`pmemfs list`: every mount of pmemfs on this machine."""

from __future__ import annotations

from typing import Any

import click

from pmemfs.cli.find import ask_all, our_mounts
from pmemfs.cli.output import json_option, print_json, print_table
from pmemfs.errors import PmemfsError
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import MountStatus
from pmemfs.units import format_size


@click.command(name="list")
@json_option
def list_mounts(as_json: bool) -> None:
    """List all mounts, and those whose daemon does not answer.

    What a row says of its pool is the word of the mount's owner, the user UID.
    """
    mounts = list(our_mounts())
    entries = list(map(_describe, mounts, ask_all(mounts, "info", MountStatus)))
    if as_json:
        print_json(entries)
        return
    print_table(
        ["NAME", "POOL", "MOUNTPOINT", "UID", "SIZE", "SCHEME", "ENGINE", "PID", "STATE"],
        [
            (
                entry.get("name", "-"),
                entry["pool"],
                entry["mountpoint"],
                entry["owner_uid"],
                format_size(entry["size_bytes"]) if "size_bytes" in entry else "-",
                entry.get("scheme", "-"),
                entry.get("engine", "-"),
                entry.get("pid", "-"),
                entry["state"],
            )
            for entry in entries
        ],
    )


def _describe(mount: Mount, status: MountStatus | PmemfsError) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "pool": mount.source,
        "mountpoint": mount.mountpoint,
        "owner_uid": mount.owner_uid,
    }
    if isinstance(status, PmemfsError):
        return entry | {"state": "no answer"}
    return entry | {
        "pool": status.pool.path,
        "name": status.pool.name,
        "size_bytes": status.pool.size_bytes,
        "scheme": status.effective_scheme,
        "engine": status.engine,
        "pid": status.pid,
        "state": "read-only" if status.read_only else "mounted",
    }
