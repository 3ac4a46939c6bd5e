"""The figures of a cache as `info` shows them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pmemfs.cli.cache_asking import in_blocks
from pmemfs.cli.cache_set import settings_facts
from pmemfs.media.cachereport import CacheReport, StoredCache
from pmemfs.text import counted
from pmemfs.units import format_size


def stored_facts(cache: StoredCache | None) -> Iterator[tuple[str, object]]:
    """Of a cache that is not mounted."""
    if cache is None:
        yield "cache", "its head is damaged; 'pmemfs check' says more"
        return
    yield "origin", f"{cache.origin}, {format_size(cache.origin_bytes)} ({cache.origin_identity})"
    yield "cache", _places(cache.place_count, cache.block_bytes)
    dirty = "not known: the last mount was not left in order; 'pmemfs flush' finds out"
    if cache.dirty is not None:
        dirty = _dirty(cache.dirty, cache.block_bytes)
    yield "dirty", dirty
    yield from settings_facts(cache.settings)


def mounted_facts(cache: CacheReport, now_ns: int | None = None) -> Iterator[tuple[str, object]]:
    """Of a mounted cache."""
    origin, block_bytes = cache.origin, cache.block_bytes
    how = origin.state if origin.state == "present" else f"{origin.state.upper()}"
    if origin.last_error and origin.state != "present":
        how += f": {origin.last_error}"
    yield "origin", f"{origin.name}, {format_size(origin.size_bytes)} ({origin.identity})"
    yield "  state", how
    yield (
        "  transfers",
        f"{format_size(origin.read_bytes)} read, {format_size(origin.written_bytes)} written, "
        f"{origin.errors} errors, {origin.retries} retries, {origin.timeouts} timeouts",
    )
    yield "cache", _places(cache.place_count, block_bytes)
    share = hit_ratio(cache)
    ratio = "" if share is None else f" ({share:.1%})"
    yield (
        "hits",
        f"{in_blocks(cache.read_hits + cache.write_hits)}, "
        f"{counted(cache.misses, 'miss', 'misses')}{ratio}",
    )
    yield (
        "fetched",
        f"{in_blocks(cache.fetched)}, {cache.read_ahead} ahead, {cache.bypassed} bypassed",
    )
    yield "evicted", in_blocks(cache.evicted)
    dirty = _dirty(cache.dirty, block_bytes)
    if cache.oldest_dirty_ns and cache.dirty:
        age = max(0, (now_ns or time.time_ns()) - cache.oldest_dirty_ns) / 1e9
        dirty += f", the oldest for at most {age:.0f} s"
    if cache.is_searching:
        dirty += "; what the last mount left is still being counted"
    yield "dirty", dirty
    if cache.full_set_waits or cache.limit_waits:
        yield (
            "writes that waited",
            f"{cache.full_set_waits} for a full set, {cache.limit_waits} for the dirty limit",
        )
    if origin.write_back_failures:
        yield "write-back failures", origin.write_back_failures
    yield from settings_facts(cache.settings)


def hit_ratio(cache: CacheReport) -> float | None:
    """The share of blocks that did not wait for the origin; None before the first one."""
    hits = cache.read_hits + cache.write_hits
    return hits / (hits + cache.misses) if hits + cache.misses else None


def _places(count: int, block_bytes: int) -> str:
    return f"{format_size(count * block_bytes)}, {count} places of {format_size(block_bytes)}"


def _dirty(count: int, block_bytes: int) -> str:
    return f"{format_size(count * block_bytes)} in {in_blocks(count)}" if count else "nothing"
