"""What is said of a cache: declared once, for the daemon and for the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OriginReport:
    """The origin of a cache, and how it is."""

    name: str
    identity: str
    size_bytes: int
    state: str
    """`present`, `away`, `failing`, or `absent` for a mount without it."""
    last_error: str
    errors: int
    """Calls that it has failed."""
    retries: int
    timeouts: int
    """Requests that were answered with EIO because their time was over."""
    read_bytes: int
    written_bytes: int
    write_back_failures: int


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What a user may set, while it is mounted, too."""

    policy: str
    max_dirty_percent: int
    max_dirty_age_seconds: int
    """0: any age."""
    origin_timeout_seconds: int
    read_ahead_bytes: int
    bypass_bytes: int
    """0: scans leave blocks behind as well."""


@dataclass(frozen=True, slots=True)
class CacheReport:
    """The figures of a mounted cache. Counts are of blocks, unless their names say otherwise."""

    block_bytes: int
    place_count: int
    settings: CacheSettings
    origin: OriginReport
    read_hits: int
    write_hits: int
    """Blocks that were written and needed nothing from the origin."""
    misses: int
    """Blocks that a reader, or a write of a part, had to wait for."""
    joined: int
    """Misses that waited for a fetch that was under way already."""
    fetched: int
    read_ahead: int
    """Blocks that were fetched before anybody asked for them."""
    bypassed: int
    """Blocks of long scans, which were not kept."""
    without_place: int
    """Blocks that were not kept because their set had no room."""
    inserted: int
    evicted: int
    dirty: int
    oldest_dirty_ns: int
    """Since when the oldest of them may be dirty, in ns since 1970; 0: none is."""
    cleaned: int
    full_set_waits: int
    """Writes that waited because their set was full of dirty blocks."""
    limit_waits: int
    """Writes that waited because too many blocks were dirty."""
    is_searching: bool
    """The mount before this one did not end, so what it has left dirty is being counted."""


MOST_DIFFERING = 16


@dataclass(frozen=True, slots=True)
class Verified:
    """What a comparison of clean blocks with the origin has found."""

    compared: int
    differing: int
    first_differing: tuple[int, ...]
    """Where the first of those that differ begin in the origin, in bytes; `MOST_DIFFERING`."""


@dataclass(frozen=True, slots=True)
class Flushed:
    """What was given to the origin."""

    cleaned: int
    dirty: int
    """What has become dirty meanwhile."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What the cache has forgotten."""

    dropped: int
    kept_dirty: int


@dataclass(frozen=True, slots=True)
class StoredCache:
    """What the head of a cache says that is not mounted."""

    block_bytes: int
    place_count: int
    settings: CacheSettings
    origin: str
    origin_identity: str
    origin_bytes: int
    dirty: int | None
    """Blocks that the origin lacks; None: the last mount did not end, and nobody has counted."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What a lost origin lacks, as it was written to a file."""

    path: str
    ranges_path: str | None
    """The list of ranges; None where the file was changed in place."""
    blocks: int
    zero_blocks: int
    """Of these, those that are zeroes, because they were discarded."""
    ranges: int
    size_bytes: int
