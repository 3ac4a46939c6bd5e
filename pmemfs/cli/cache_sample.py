"""What `stat` shows of a cache: counts since the report before, and what is dirty now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pmemfs.cli.output import say
from pmemfs.mountinfo import Mount
from pmemfs.text import counted
from pmemfs.units import format_size

if TYPE_CHECKING:
    from pmemfs.media.cachereport import CacheReport
    from pmemfs.observe.stat import Sample

_COUNTS = ("read_hits", "write_hits", "misses", "fetched", "evicted", "cleaned")


class CacheWatch:
    """The figures of one mount, report after report; there are none in other modes."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._before: CacheReport | None = None

    def values(self, sample: Sample) -> dict[str, Any]:
        """For programs: an object `cache`, or nothing in other modes."""
        if sample.mode != "cache":
            return {}
        from pmemfs.cli.cache_asking import cache_report

        now, before = cache_report(self._mount), self._before
        self._before = now
        counts = {
            name: getattr(now, name) - (getattr(before, name) if before else 0) for name in _COUNTS
        }
        hits = counts["read_hits"] + counts["write_hits"]
        asked = hits + counts["misses"]
        return {
            "cache": {
                **counts,
                "hit_ratio": hits / asked if asked else None,
                "dirty": now.dirty,
                "dirty_bytes": now.dirty * now.block_bytes,
                "oldest_dirty_ns": now.oldest_dirty_ns,
                "origin_state": now.origin.state,
            }
        }

    def say_it(self, sample: Sample) -> None:
        """For people: a line, or none in other modes."""
        cache = self.values(sample).get("cache")
        if cache is None:
            return
        ratio = cache["hit_ratio"]
        share = "" if ratio is None else f" ({ratio:.1%})"
        hits, dirty = cache["read_hits"] + cache["write_hits"], format_size(cache["dirty_bytes"])
        went = f"{cache['evicted']} evicted, {cache['cleaned']} cleaned"
        state = f"{dirty} dirty, origin {cache['origin_state']}"
        asked = f"{counted(hits, 'hit', 'hits')}, {counted(cache['misses'], 'miss', 'misses')}"
        say(f"cache: {asked}{share}, {went}; {state}")
