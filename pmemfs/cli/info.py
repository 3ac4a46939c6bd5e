"""`pmemfs info`: what a pool is and what its mount does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from pmemfs.cli.find import DETACHED, ask, find_hidden, find_mount, require_mount
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_facts, print_json
from pmemfs.cli.paths import ANY_PATH
from pmemfs.errors import PmemfsError
from pmemfs.media.keyreport import KeyReport
from pmemfs.media.transformreport import CompressionReport
from pmemfs.mount.mountpoint import places_of
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import (
    Deaths,
    KeptStatus,
    MountStatus,
    NamesStatus,
    PinSummary,
    PoolInfo,
)
from pmemfs.pfn import FRAME_BYTES
from pmemfs.text import counted
from pmemfs.units import format_size
from pmemfs.unsaid import json_values
from pmemfs.volume.fs.space import Space

if TYPE_CHECKING:
    from pmemfs.media.cachereport import CacheReport, StoredCache
    from pmemfs.pool import Pool


@click.command()
@click.argument("target", type=ANY_PATH)
@reporting
def info(target: str, as_json: bool) -> None:
    """Show the pool TARGET, or the mount on TARGET.

    Of a pool of mode fs also its keys and what unlocks them, whether it is mounted or not. Of a
    cache also its hits and misses, what is dirty and since when, its settings, and how its origin
    is.
    """
    mount = find_mount(target)
    if mount is None and os.path.isdir(target):
        mount = require_mount(target)
    hidden = None if mount else find_hidden(target)
    status = ask(mount, "info", MountStatus) if mount else hidden and hidden.status
    pool, keys = (status.pool, status.keys) if status else _read_pool(target)
    # Wherever the mount appears: the daemon names one place.
    cache = _cache_of(mount, pool, target)
    places = [place.mountpoint for place in places_of(mount)] if mount else []
    if not as_json:
        where = ", ".join(places) or (hidden.sentence.removeprefix("on ") if hidden else "")
        print_facts([*_facts(pool, status, where, keys), *_cache_facts(cache)])
        return
    more = {"cache": _members(cache)} if cache else {}
    if status:
        print_json({**json_values(status), "mountpoints": places, **more})
    else:
        stored = [json_values(key) for key in keys or ()]
        print_json({"pool": json_values(pool), "keys": None if keys is None else stored, **more})


def _members(report: CacheReport | StoredCache) -> dict[str, Any]:
    # Imported here: it takes long to load, and only caches have such reports.
    from dataclasses import asdict

    return asdict(report)


def _cache_of(mount: Mount | None, pool: PoolInfo, target: str) -> CacheReport | StoredCache | None:
    """What is known of a cache; None of other pools, and of a head that is damaged."""
    if pool.mode != "cache":
        return None
    from pmemfs.cli.cache_asking import cache_report
    from pmemfs.cli.unmounted import read_stored

    return cache_report(mount) if mount else read_stored(target)


def _cache_facts(cache: CacheReport | StoredCache | None) -> Iterator[tuple[str, object]]:
    if cache is None:
        return
    from pmemfs.cli.cache_facts import mounted_facts, stored_facts
    from pmemfs.media.cachereport import StoredCache

    yield from stored_facts(cache) if isinstance(cache, StoredCache) else mounted_facts(cache)


def _read_pool(path: str) -> tuple[PoolInfo, tuple[KeyReport, ...] | None]:
    """What a pool says of itself, and its keys; None for the keys if its file system is damaged."""
    # Who asks a daemon does not wait for what reads a pool.
    from pmemfs.medium.mapped import MappedMedium
    from pmemfs.observe.pool import pool_info
    from pmemfs.pool import Pool

    medium = MappedMedium.open(path, read_only=True)
    try:
        pool = Pool.open(medium)
        return pool_info(pool, medium), _keys_in(pool)
    finally:
        medium.close()


def _keys_in(pool: Pool) -> tuple[KeyReport, ...] | None:
    from pmemfs.media.label import Mode

    if pool.label.mode != Mode.FS:
        return ()
    # Imported here: of another mode, a pool has no keys, and reading them loads a file system.
    from pmemfs.volume.fs.keystore import stored_keys

    try:
        return stored_keys(pool)
    except PmemfsError:
        return None


def _facts(
    pool: PoolInfo, status: MountStatus | None, where: str, keys: Iterable[KeyReport] | None
) -> Iterator[tuple[str, object]]:
    yield "pool", f"{pool.name} ({pool.path})"
    yield "uuid", pool.uuid
    # "nothing: lost with the power" is what JSON says of a tmpfs file.
    lost = pool.durability.removeprefix("nothing: ")
    is_lost = lost != pool.durability
    yield "source", f"{pool.kind}, {lost if is_lost else f'durable by {pool.durability}'}"
    yield "size", format_size(pool.size_bytes) + ("" if pool.reserved else ", sparse")
    for name, zone in pool.zones.items():
        yield f"  {name}", f"{format_size(zone.size_bytes)} at {zone.offset_bytes:#x}"
    yield "pages", f"{pool.page_count} of {format_size(pool.page_size_bytes)}"
    yield "page structures", _scheme(pool, status)
    yield "mode", pool.mode
    yield "state", _state(pool, is_mounted=status is not None)
    yield "mounts", f"{pool.mount_count}, last {pool.mounted}, generation {pool.generation}"
    yield "created", f"{pool.created}, format {pool.format_version}"
    yield "label written by", pool.software
    for damaged in pool.damaged_labels:
        yield "damaged", damaged
    if status:
        yield "mounted on", f"nothing any more: {where}" if where == DETACHED else where
        yield from _mount_facts(status)
    elif keys is None:
        yield "keys", "not readable: the file system is damaged; 'pmemfs check' says how"
    else:
        yield from _key_facts(keys)


def _state(pool: PoolInfo, *, is_mounted: bool) -> str:
    """A cache has dirty blocks as well, so the word alone would not say what is dirty."""
    if pool.state != "dirty":
        return pool.state
    return (
        "in use, clean once it is unmounted" if is_mounted else "dirty: its last mount was cut off"
    )


def _mount_facts(status: MountStatus) -> Iterator[tuple[str, object]]:
    io = status.io
    options = f" ({status.options})" if status.options else ""
    yield "options", ("ro" if status.read_only else "rw") + options
    pid = status.pid or "of another pid namespace"
    kept = status.kept
    died = _died(kept.daemon) if kept else ""
    yield "daemon", f"pid {pid}, engine {status.engine}{died}"
    if status.data_plane_pid:
        died = _died(kept.data_plane) if kept else ""
        yield "data plane", f"pid {status.data_plane_pid}, {status.transport_reason}{died}"
    yield "keeper", _keeper(kept)
    if status.log:
        yield "log", status.log
    of = " of this daemon" if kept and kept.daemon.times else ""
    yield "uptime", f"{status.uptime_seconds:.0f} s{of}"
    if status.pins and (status.pins.pin_count or status.pins.resting_bytes):
        yield "pins", _pins(status.pins)
    yield from _key_facts(status.keys)
    if status.fault_count:
        yield "faults", f"{status.fault_count} requests met memory that could not be touched"
    if status.space:
        yield from _space_facts(status.space)
    if status.names:
        yield "names", _names(status.names)
    if status.compression:
        yield "compressed", _compression(status.compression)
    yield "read", f"{io.reads} requests, {format_size(io.read_bytes)}"
    yield "written", f"{io.writes} requests, {format_size(io.written_bytes)}"
    yield "fsync", f"{io.fsyncs} requests"


def _names(names: NamesStatus) -> str:
    """What the data plane knows of them, and of how many requests it could not make use of that."""
    if not names.limit_bytes:
        return "all served by the daemon, as names_memory=0 says"
    if not names.is_on:
        return "served by the daemon for now"
    known = counted(names.known_inodes, "inode", "inodes")
    busy = counted(names.handed_over_busy, "request", "requests")
    short = ""
    if names.handed_over_short:
        short = f", and {names.handed_over_short} because this memory is too little"
    return (f"{known} known to the data plane, {format_size(names.used_bytes)} of "
            f"{format_size(names.limit_bytes)}; {busy} left to the daemon because it was busy "
            f"with others{short}")  # fmt: skip


def _compression(done: CompressionReport) -> str:
    """Of the files in memory only, because to look at all others takes long."""
    said = "nothing of the files in memory"
    if done.stored_bytes:
        ratio = done.packed_bytes / done.stored_bytes
        saved = format_size(done.packed_bytes - done.stored_bytes)
        said = (f"{format_size(done.packed_bytes)} of the files in memory in "
                f"{format_size(done.stored_bytes)}, {ratio:.2f} times: {saved} saved")  # fmt: skip
    pieces = counted(done.compressed_count, "piece", "pieces")
    return f"{said}; {pieces} compressed and {done.made_plain_count} made plain by this daemon"


def _key_facts(keys: Iterable[KeyReport]) -> Iterator[tuple[str, object]]:
    for key in keys:
        state = "unlocked" if key.is_unlocked else "locked"
        ways = ", ".join(way.kind for way in key.ways) or "nothing"
        yield "key", f"{key.name or key.key_id}, {state}; unlocked by {ways}"


def _keeper(kept: KeptStatus | None) -> str:
    if kept is None:
        return "none: the mount ends with each of its processes"
    if kept.keeper_pid is None:
        return (
            f"gone{_died(kept.keeper)}; the mount goes on, and ends with its daemon; "
            "'pmemfs upgrade' gives it another keeper"
        )
    pid = kept.keeper_pid or "of another pid namespace"
    return f"pid {pid}{_died(kept.keeper)}; {kept.promise}"


def _died(deaths: Deaths) -> str:
    if not deaths.times:
        return ""
    times = "once" if deaths.times == 1 else f"{deaths.times} times, last"
    return f"; died {times} at {deaths.last}"


def _space_facts(space: Space) -> Iterator[tuple[str, object]]:
    def size(frames: int) -> str:
        return format_size(frames * FRAME_BYTES)

    yield (
        "free",
        f"{size(space.free_frames)} of {size(space.total_frames)}, "
        f"{size(space.largest_free_frames)} of it in one piece",
    )
    if space.busy_frames:
        yield "busy", f"{size(space.busy_frames)} given back, and still in use"
    # Nobody has counted what is not in memory.
    yield (
        "in memory",
        f"{space.cached_inodes} inodes; {size(space.mapped_frames)} of files in "
        f"{space.cached_extents} extents, {size(space.aligned_frames)} of it aligned to 2MiB",
    )
    yield (
        "logs",
        f"{format_size(space.log_bytes)} of these, {format_size(space.dead_log_bytes)} of it dead",
    )


def _pins(pins: PinSummary) -> str:
    count = "1 pin" if pins.pin_count == 1 else f"{pins.pin_count} pins"
    of = "1 process" if pins.process_count == 1 else f"{pins.process_count} processes"
    rest = f", and {format_size(pins.resting_bytes)} rest" if pins.resting_bytes else ""
    return (
        f"{count} of {of}, {format_size(pins.held_bytes)}{rest}; 'pmemfs pages --pins' names them"
    )


def _scheme(pool: PoolInfo, status: MountStatus | None) -> str:
    effective = status.effective_scheme if status else pool.scheme
    said = effective
    if effective != pool.scheme:
        said = f"{effective} (the pool's {pool.scheme} is read-only)"
    zone = pool.zones.get("memmap")
    used = status.structures if status else None
    if zone and zone.size_bytes:
        touched = f"{format_size(used.pool_bytes)} of " if used else ""
        said += f", {touched}{format_size(zone.size_bytes)} in the pool"
    if used and effective == "on-demand":
        said += f", {format_size(used.dram_bytes)} in DRAM"
    return said
