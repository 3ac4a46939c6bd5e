"""`pmemfs list`: every mount of pmemfs on this machine."""

from __future__ import annotations

from typing import Any

import click

from pmemfs.cli.find import ask, our_mounts
from pmemfs.cli.output import json_option, print_json, print_table
from pmemfs.errors import PmemfsError
from pmemfs.mountinfo import Mount
from pmemfs.units import format_size


@click.command(name="list")
@json_option
def list_mounts(as_json: bool) -> None:
    """List all mounts, and those whose daemon does not answer."""
    entries = [_describe(mount) for mount in our_mounts()]
    if as_json:
        print_json(entries)
        return
    print_table(
        ["NAME", "POOL", "MOUNTPOINT", "SIZE", "SCHEME", "ENGINE", "PID", "STATE"],
        [
            (
                entry.get("name", "-"),
                entry["pool"],
                entry["mountpoint"],
                format_size(entry["size_bytes"]) if "size_bytes" in entry else "-",
                entry.get("scheme", "-"),
                entry.get("engine", "-"),
                entry.get("pid", "-"),
                entry["state"],
            )
            for entry in entries
        ],
    )


def _describe(mount: Mount) -> dict[str, Any]:
    entry: dict[str, Any] = {"pool": mount.source, "mountpoint": mount.mountpoint}
    try:
        status = ask(mount, "info")
    except PmemfsError:
        return entry | {"state": "no answer"}
    return entry | {
        "pool": status["pool"]["path"],
        "name": status["pool"]["name"],
        "size_bytes": status["pool"]["size_bytes"],
        "scheme": status["effective_scheme"],
        "engine": status["engine"],
        "pid": status["pid"],
        "state": "read-only" if status["read_only"] else "mounted",
    }
