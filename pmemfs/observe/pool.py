"""What the label and the medium of a pool say."""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pmemfs.media.label import Mode, Scheme, State
from pmemfs.medium.mapped import MappedMedium
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
        # The gate lets any bytes pass here, and a terminal takes some of them for commands.
        software=label.software if label.software.isprintable() else ascii(label.software),
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


def _iso(time_ns: int) -> str:
    """A stored time for people; a nonsensical one, or none, is "never"."""
    if time_ns == 0:
        return "never"
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return "never"
