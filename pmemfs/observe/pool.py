"""What the label and the medium of a pool say."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from pmemfs.media.label import Mode, Scheme, State
from pmemfs.medium.mapped import MappedMedium
from pmemfs.observe.answers import PoolInfo, ZoneInfo
from pmemfs.pool import Pool
from pmemfs.text import printable


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
        # The label's validation lets any bytes pass here, and a terminal would obey some of them.
        software=printable(label.software),
        size_bytes=label.pool_size_bytes,
        page_size_bytes=label.page_size_bytes,
        page_count=label.data_size_bytes // label.page_size_bytes,
        alignment_bytes=label.alignment_bytes,
        generation=label.generation,
        mount_count=label.mount_count,
        created=iso_time(label.created_ns),
        mounted=iso_time(label.mounted_ns),
        zones={
            name: ZoneInfo(zone.offset_bytes, zone.size_bytes)
            for name, zone in pool.zones.in_order()
        },
        damaged_labels=[f"{r.where}: {r.problem}" for r in pool.damaged_copies],
    )


def iso_time(time_ns: int) -> str:
    """A stored time for people; "never" if it is 0 or makes no sense."""
    if time_ns == 0:
        return "never"
    try:
        return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return "never"
