"""`pmemfs list`: every mount of pmemfs on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from pmemfs.cli.find import DETACHED, Hidden, hidden_mounts, our_mounts, statuses
from pmemfs.cli.options import reporting
from pmemfs.cli.output import note, print_json, print_table
from pmemfs.cli.paths import A_DIRECTORY
from pmemfs.errors import NoAnswer, NotPermitted, PmemfsError
from pmemfs.mountinfo import Mount
from pmemfs.units import format_size
from pmemfs.unsaid import Unsaid

# What reads labels takes as long to load as the rest of a list, and only --all needs it.
if TYPE_CHECKING:
    from pmemfs.observe.answers import MountStatus
    from pmemfs.pool.search import Found


@click.command(name="list")
@click.option("--all", "is_all", is_flag=True, help="Look for pools that are not mounted, too.")
@click.option(
    "--dir",
    "directories",
    multiple=True,
    metavar="DIR",
    type=A_DIRECTORY,
    help="Look in this directory, too, as --all does; may be said several times.",
)
@reporting
def list_mounts(is_all: bool, directories: tuple[str, ...], as_json: bool) -> None:
    """List all mounts, and those whose daemon does not answer.

    What a row says of its pool is the word of the mount's owner, the user UID. A mount that was
    detached (umount -l) is listed as long as somebody uses it, and so is one that is mounted in
    another mount namespace only. Root sees those of all users.

    With --all, pools that are not mounted are listed too: /dev/pmem*, /dev/dax*, the files in
    /dev/shm and in each --dir. Only their labels are read, and nothing is written. -v says of every
    file that is left out why.
    """
    mounts = list(our_mounts())
    entries = list(map(_describe, mounts, statuses(mounts)))
    entries += [_describe(h.mount, h.status) | _whereabouts(h) for h in hidden_mounts()]
    if is_all or directories:
        known = {entry["pool"] for entry in entries}
        entries += [_found(found) for found in _pools(directories) if found.path not in known]
    if as_json:
        print_json(entries)
        return
    print_table(
        ["NAME", "POOL", "MOUNTPOINT", "UID", "SIZE", "MODE", "SCHEME", "ENGINE", "PID", "STATE"],
        [
            (
                entry.get("name") or "-",
                entry["pool"],
                entry["mountpoint"] or "-",
                entry["owner_uid"],
                format_size(entry["size_bytes"]) if _is_said(entry.get("size_bytes")) else "-",
                entry.get("mode") or "-",
                entry.get("scheme") or "-",
                entry.get("engine") or "-",
                entry.get("pid") or "-",
                entry["state"],
            )
            for entry in entries
        ],
        spare=["ENGINE", "SCHEME", "UID", "NAME", "PID", "MODE", "SIZE"],
    )


def _pools(directories: Sequence[str]) -> Iterator[Found]:
    """The pools that are found, usable or not."""
    from pmemfs.pool.search import search

    for found in search(directories):
        if found.is_pool:
            yield found
        else:
            note(f"{found.path}: {found.problem}")


def _found(found: Found) -> dict[str, Any]:
    entry: dict[str, Any] = {"pool": found.path, "mountpoint": "", "owner_uid": found.owner_uid}
    label = found.label
    if label is None:
        return entry | {"state": found.problem}
    import uuid

    from pmemfs.media.label import Mode, Scheme, State

    return entry | {
        "name": label.name,
        "uuid": str(uuid.UUID(bytes=label.uuid)),
        "size_bytes": label.pool_size_bytes,
        "mode": Mode(label.mode).word,
        "scheme": Scheme(label.scheme).word,
        "state": State(label.state).word,
    }


def _is_said(value: object) -> bool:
    return value is not None and not isinstance(value, Unsaid)


def _describe(mount: Mount, status: MountStatus | PmemfsError) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "pool": mount.source,
        "mountpoint": mount.mountpoint,
        "owner_uid": mount.owner_uid,
    }
    if isinstance(status, PmemfsError):
        if isinstance(status, NotPermitted):
            return entry | {"state": "no permission"}
        has_died = isinstance(status, NoAnswer) and status.is_final
        return entry | {"state": "its daemon died" if has_died else "no answer"}
    state = "read-only" if status.read_only else "mounted"
    return entry | {
        "pool": status.pool.path,
        "name": status.pool.name,
        "uuid": status.pool.uuid,
        "size_bytes": status.pool.size_bytes,
        "mode": status.pool.mode,
        "scheme": status.effective_scheme,
        "engine": status.engine,
        "pid": status.pid,
        "state": state,
    }


def _whereabouts(hidden: Hidden) -> dict[str, Any]:
    """Where a mount is that is not in this mount namespace."""
    place = hidden.place
    if place is None and hidden.status.is_detached:
        return {"state": DETACHED}
    return {
        "mountpoint": place.mountpoint if place else hidden.status.mountpoint,
        "namespace_pid": place.pid if place else None,
        "state": f"in the mount namespace of process {place.pid}"
        if place
        else "in another mount namespace",
    }
