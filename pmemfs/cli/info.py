"""`pmemfs info`: what a pool is and what its mount does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from pmemfs.cli.find import ask, find_mount
from pmemfs.cli.output import json_option, print_facts, print_json
from pmemfs.medium.mapped import MappedMedium
from pmemfs.observe.pool import pool_info
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool
from pmemfs.units import format_size


@click.command()
@click.argument("target")
@json_option
def info(target: str, as_json: bool) -> None:
    """Show the pool TARGET, or the mount on TARGET."""
    mount = find_mount(target)
    status = ask(mount, "info") if mount else {"pool": _read_pool(target)}
    if as_json:
        print_json(status)
    else:
        print_facts(_facts(status))


def _read_pool(path: str) -> dict[str, Any]:
    medium = MappedMedium.open(path, read_only=True)
    try:
        return pool_info(Pool.open(medium), medium).as_json()
    finally:
        medium.close()


def _facts(status: dict[str, Any]) -> Iterator[tuple[str, object]]:
    pool = status["pool"]
    yield "pool", f"{pool['name']} ({pool['path']})"
    yield "uuid", pool["uuid"]
    yield "source", f"{pool['kind']}, durable by {pool['durability']}"
    yield "size", format_size(pool["size_bytes"]) + ("" if pool["reserved"] else ", sparse")
    for name, zone in pool["zones"].items():
        yield f"  {name}", f"{format_size(zone['size_bytes'])} at {zone['offset_bytes']:#x}"
    yield "pages", f"{pool['page_count']} of {format_size(pool['page_size_bytes'])}"
    yield "page structures", _scheme(status)
    yield "mode", pool["mode"]
    yield "state", pool["state"] + (" until it is unmounted" if "pid" in status else "")
    yield (
        "mounts",
        f"{pool['mount_count']}, last {pool['mounted']}, generation {pool['generation']}",
    )
    yield "created", f"{pool['created']}, format {pool['format_version']}"
    yield "label written by", pool["software"]
    for damaged in pool["damaged_labels"]:
        yield "damaged", damaged
    if "pid" in status:
        yield from _mount_facts(status)


def _mount_facts(status: dict[str, Any]) -> Iterator[tuple[str, object]]:
    io = status["io"]
    yield "mounted on", status["mountpoint"]
    yield "options", ("ro" if status["read_only"] else "rw") + f" ({status['options']})"
    yield "daemon", f"pid {status['pid']}, engine {status['engine']}"
    if status["data_plane_pid"]:
        yield "data plane", f"pid {status['data_plane_pid']}, {status['transport_reason']}"
    yield "uptime", f"{status['uptime_seconds']:.0f} s"
    if status["fault_count"]:
        yield "faults", f"{status['fault_count']} requests met memory that could not be touched"
    if status["space"]:
        yield from _space_facts(status["space"])
    yield "read", f"{io['reads']} requests, {format_size(io['read_bytes'])}"
    yield "written", f"{io['writes']} requests, {format_size(io['written_bytes'])}"
    yield "fsync", f"{io['fsyncs']} requests"


def _space_facts(space: dict[str, int]) -> Iterator[tuple[str, object]]:
    def frames(name: str) -> str:
        return format_size(space[f"{name}_frames"] * FRAME_BYTES)

    yield (
        "free",
        f"{frames('free')} of {frames('total')}, {frames('largest_free')} of it in one piece",
    )
    if space["busy_frames"]:
        yield "busy", f"{frames('busy')} given back, and still in use"
    # Nobody has counted what is not in memory.
    yield (
        "in memory",
        f"{space['cached_inodes']} inodes; {frames('mapped')} of files in "
        f"{space['cached_extents']} extents, {frames('aligned')} of it aligned to 2MiB",
    )
    yield (
        "logs",
        f"{format_size(space['log_bytes'])} of these, "
        f"{format_size(space['dead_log_bytes'])} of it dead",
    )


def _scheme(status: dict[str, Any]) -> str:
    scheme: str = status["pool"]["scheme"]
    effective = status.get("effective_scheme", scheme)
    return scheme if effective == scheme else f"{effective} (the pool's {scheme} is read-only)"
