"""What the workers of a data plane have counted, read from the shared memory as it is.

Reading disturbs no worker: each writes only its own counters, in whole words. A request that is
just being counted may be in one counter and not yet in another.
"""

from __future__ import annotations

from typing import NamedTuple

from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import LATENCY_BUCKETS, Operation
from pmemfs.dataplane.tables import SharedMemory

_HEAD_BYTES = layouts.SLOT_HEAD.size_bytes
_COUNTS_BYTES = layouts.OPERATION_COUNTS.size_bytes


class OperationCounters(NamedTuple):
    """One operation at one worker. `latencies` counts answers in `LATENCY_BUCKETS` buckets."""

    answered: int
    forwarded: int
    failed: int
    moved_bytes: int
    total_ns: int
    latencies: tuple[int, ...]


class CacheCounters(NamedTuple):
    """What workers have done to a cache, in blocks."""

    read_hits: int = 0
    write_hits: int = 0
    inserted: int = 0
    evicted: int = 0
    dirtied: int = 0


class WorkerCounters(NamedTuple):
    """The counters of one worker. `cache` has zeroes in other modes."""

    number: int
    sleeps: int
    spins: int
    operations: dict[Operation, OperationCounters]
    cache: CacheCounters


def read_counters(shared: SharedMemory) -> list[WorkerCounters]:
    """The counters of all workers."""
    return [_worker(shared, number) for number in range(shared.worker_count)]


def _worker(shared: SharedMemory, number: int) -> WorkerCounters:
    start = shared.areas.slots + number * layouts.SLOT_BYTES
    raw = shared.memory[start : start + layouts.SLOT_BYTES]
    return WorkerCounters(
        number=number,
        sleeps=shared.slot_word(number, "sleeps"),
        spins=shared.slot_word(number, "spins"),
        operations={operation: _operation(raw, operation) for operation in Operation},
        cache=_cache(raw),
    )


def read_cache_counters(shared: SharedMemory) -> CacheCounters:
    """What all workers have done to a cache."""
    starts = (shared.areas.slots + n * layouts.SLOT_BYTES for n in range(shared.worker_count))
    workers = [_cache(shared.memory[start : start + layouts.SLOT_BYTES]) for start in starts]
    return CacheCounters(*map(sum, zip(*workers, strict=True)))


def _cache(slot: memoryview) -> CacheCounters:
    raw = slot[layouts.CACHE_COUNTS_AT :][: layouts.CACHE_COUNTS.size_bytes]
    counts = layouts.CACHE_COUNTS.unpack(raw)
    return CacheCounters(*(getattr(counts, name) for name in CacheCounters._fields))


def _operation(slot: memoryview, operation: Operation) -> OperationCounters:
    start = _HEAD_BYTES + operation * layouts.OPERATION_BYTES
    counts = layouts.OPERATION_COUNTS.unpack(slot[start : start + _COUNTS_BYTES])
    latencies = slot[start + _COUNTS_BYTES :][: 8 * LATENCY_BUCKETS].cast("Q")
    return OperationCounters(
        answered=counts.answered,
        forwarded=counts.forwarded,
        failed=counts.failed,
        moved_bytes=counts.moved_bytes,
        total_ns=counts.total_ns,
        latencies=tuple(latencies),
    )
