"""What serves a cache beside this process: the workers of a data plane, if there are any."""

from __future__ import annotations

from typing import NamedTuple

from pmemfs.media.cache import Ground
from pmemfs.volume.onefile import Onlookers


class WorkerCounts(NamedTuple):
    """What all workers together have done to a cache, in blocks."""

    read_hits: int = 0
    write_hits: int = 0
    inserted: int = 0
    evicted: int = 0
    dirtied: int = 0


class OwnCounts(NamedTuple):
    """What was done without workers; see `CacheReport`."""

    read_hits: int
    write_hits: int
    misses: int
    joined: int
    fetched: int
    read_ahead: int
    bypassed: int
    without_place: int
    inserted: int
    evicted: int
    cleaned: int
    full_set_waits: int
    limit_waits: int


class CacheOnlookers(Onlookers):
    """Onlookers of a cache. Here nothing looks on; the native engine overrides this."""

    def show_cache(self, ground: Ground, size_bytes: int) -> None:
        """Let the onlookers serve the cache, whose file has this size."""

    def allow_writes(self, is_allowed: bool) -> None:
        """Whether they may make blocks dirty."""

    def allow_fsyncs(self, is_allowed: bool) -> None:
        """Whether an fsync has nothing to do but to fence."""

    def note_reserved(self, offset_bytes: int, length_bytes: int) -> None:
        """A range of a sparse pool has got memory."""

    def counters(self) -> WorkerCounts:
        """What they have done so far."""
        return WorkerCounts()

    async def grace(self) -> None:
        """Wait until they have ended what they had begun."""
