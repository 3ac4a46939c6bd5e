"""What is known of a pool and of its mount, as frozen values that every report is made of."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import trio

from pmemfs.fuse.engine import EngineStatistics, PythonEngine
from pmemfs.fuse.options import MountOptions
from pmemfs.media.label import Mode, Scheme, State
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap, effective_scheme
from pmemfs.mountinfo import Mount
from pmemfs.pool import Pool


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """What the label and the medium say. Sizes and offsets in bytes."""

    path: str
    name: str
    uuid: str
    kind: str
    durability: str
    reserved: bool
    mode: str
    scheme: str
    state: str
    format_version: int
    software: str
    size_bytes: int
    page_size_bytes: int
    page_count: int
    alignment_bytes: int
    generation: int
    mount_count: int
    created: str
    mounted: str
    zones: dict[str, dict[str, int]]
    damaged_labels: list[str]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class MountStatus:
    """What the daemon of a mount says of itself."""

    pid: int
    mountpoint: str
    device: str
    read_only: bool
    options: str
    engine: str
    effective_scheme: str
    uptime_seconds: float
    io: EngineStatistics
    pool: PoolInfo

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def pool_info(pool: Pool, medium: MappedMedium) -> PoolInfo:
    """What is known of an open pool."""
    label = pool.label
    return PoolInfo(
        path=medium.name,
        name=label.name,
        uuid=str(uuid.UUID(bytes=label.uuid)),
        kind=medium.source.kind.value,
        durability=medium.durability.value,
        reserved=medium.reserved,
        mode=Mode(label.mode).word,
        scheme=Scheme(label.scheme).word,
        state=State(label.state).word,
        format_version=label.format_version,
        software=label.software,
        size_bytes=label.pool_size_bytes,
        page_size_bytes=label.page_size_bytes,
        page_count=label.data_size_bytes // label.page_size_bytes,
        alignment_bytes=label.alignment_bytes,
        generation=label.generation,
        mount_count=label.mount_count,
        created=_iso(label.created_ns),
        mounted=_iso(label.mounted_ns),
        zones={
            name: {"offset_bytes": zone.offset_bytes, "size_bytes": zone.size_bytes}
            for name, zone in pool.zones.in_order()
        },
        damaged_labels=[f"{r.where}: {r.problem}" for r in pool.damaged_copies],
    )


class MountObserver:
    """Answers questions about a mount, from the daemon's own objects."""

    def __init__(
        self,
        pool: Pool,
        medium: MappedMedium,
        memmap: Memmap,
        engine: PythonEngine,
        mount: Mount,
        options: MountOptions,
    ) -> None:
        self._pool = pool
        self._medium = medium
        self._memmap = memmap
        self._engine = engine
        self._mount = mount
        self._options = options
        self._started = time.monotonic()

    async def info(self) -> dict[str, Any]:
        """The status of the mount and its pool."""
        status = MountStatus(
            pid=os.getpid(),
            mountpoint=self._mount.mountpoint,
            device=self._mount.device,
            read_only=self._options.read_only,
            options=self._options.as_text(),
            engine="python",
            effective_scheme=effective_scheme(self._pool).word,
            uptime_seconds=round(time.monotonic() - self._started, 3),
            io=self._engine.statistics(),
            pool=pool_info(self._pool, self._medium),
        )
        return status.as_json()

    async def pages(self, hottest: int) -> dict[str, Any]:
        """The states of all pages, and the hottest ones. Raises NoPageStructures.

        Counted in a thread, while I/O goes on: a page that changes meanwhile counts as before or
        as after.
        """
        counts = await trio.to_thread.run_sync(self._memmap.counts)
        reports = await trio.to_thread.run_sync(self._memmap.hottest, hottest)
        return {
            "scheme": effective_scheme(self._pool).word,
            "page_size_bytes": self._pool.label.page_size_bytes,
            "generation": self._pool.label.generation,
            "counts": asdict(counts),
            "hottest": [report.as_json() for report in reports],
        }


def _iso(time_ns: int) -> str:
    """A stored time for people; a nonsensical one, or none, is "never"."""
    if time_ns == 0:
        return "never"
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return "never"
