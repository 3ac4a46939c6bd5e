"""What `pmemfs stat --prometheus` says: the counters of a mount, in Prometheus' text format.

Names and units follow https://prometheus.io/docs/practices/naming: base units, and `_total` for
what only goes up. A counter begins at 0 with each mount, which Prometheus takes for a reset.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pmemfs.cli.find import ask
from pmemfs.dataplane.layouts import bucket_start_ns
from pmemfs.errors import NoAnswer, PmemfsError
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import MountStatus, NamesStatus
from pmemfs.observe.stat import Counts, Operations, Sample

if TYPE_CHECKING:
    from pmemfs.media.cachereport import CacheReport
    from pmemfs.media.transformreport import CompressionReport

_NS = 1e-9
_FIRST_BOUND, _LAST_BOUND = 10, 36
"""Latencies are told apart from 2^10 ns (1 us) to 2^36 ns (69 s), by powers of two."""
_LOOK_SECONDS = 1

_CACHE_COUNTERS = {
    "read_hits": "Blocks that were read and were in the cache",
    "write_hits": "Blocks that were written and needed nothing from the origin",
    "misses": "Blocks that had to be waited for",
    "fetched": "Blocks that came from the origin",
    "read_ahead": "Blocks that were fetched before anybody asked for them",
    "bypassed": "Blocks of long scans, which were not kept",
    "evicted": "Blocks that made room for others",
    "cleaned": "Dirty blocks that the origin has got",
    "full_set_waits": "Writes that waited because their set was full of dirty blocks",
    "limit_waits": "Writes that waited because too many blocks were dirty",
}
_ORIGIN_COUNTERS = {
    "errors": "Calls that the origin has failed",
    "retries": "Calls that were tried again",
    "timeouts": "Requests that were answered with EIO because their time was over",
    "write_back_failures": "Write-backs that the origin has failed",
}


_COMPRESSION_COUNTERS = {
    "compressed_count": ("compressed_pieces", "Pieces of files that were compressed"),
    "made_plain_count": ("plain_again_pieces", "Compressed pieces that were made plain again"),
    "decompressed_count": (
        "decompressed_pieces",
        "Reads of compressed pieces that came to the daemon, which had to decompress them",
    ),
    "hit_count": (
        "piece_hits",
        "Reads of compressed pieces that came to the daemon, which had the plain bytes still",
    ),
    "saved_bytes": ("saved_bytes", "What compressing pieces has given back at that time"),
}  # fmt: skip
_COMPRESSION_GAUGES = {
    "packed_bytes": (
        "packed_bytes", "What lies compressed of the files in memory, as their readers see it"
    ),
    "stored_bytes": ("packed_stored_bytes", "What that takes of the pool"),
    "kept_bytes": ("kept_plain_bytes", "Plain bytes of pieces that are kept for their next read"),
}  # fmt: skip


class MountCollector(Collector):
    """Asks the daemon of a mount, once for each scrape.

    `must_answer`: raise PmemfsError if it does not answer.
    """

    def __init__(self, mount: Mount, *, must_answer: bool) -> None:
        self._mount = mount
        self._must_answer = must_answer

    def collect(self) -> Iterator[Metric]:
        """All metrics; of a mount that does not answer only `pmemfs_up`, which is 0 then."""
        where = {"mountpoint": self._mount.mountpoint}
        try:
            status = ask(self._mount, "info", MountStatus)
            sample = ask(self._mount, "stat", Sample)
            metrics = list(_of_requests(sample, where))
            if status.names:
                metrics += _of_names(status.names, where)
            if status.compression:
                metrics += _of_compression(status.compression, where)
            if sample.mode == "cache":
                from pmemfs.cli.cache_asking import cache_report

                metrics += _of_cache(cache_report(self._mount), where)
        except PmemfsError:
            if self._must_answer:
                raise
            yield _gauge("pmemfs_up", "Whether the daemon of the mount answers", 0, where)
            return
        yield _gauge("pmemfs_up", "Whether the daemon of the mount answers", 1, where)
        about = {**where, "pool": status.pool.name, "mode": status.pool.mode,
                 "scheme": status.pool.scheme, "engine": sample.engine}  # fmt: skip
        yield _gauge("pmemfs_mount_info", "What is mounted", 1, about)
        yield _gauge("pmemfs_uptime_seconds", "Time since the mount", sample.seconds, where)
        yield from metrics


def text_of(mount: Mount) -> str:
    """The metrics of a mount that answers. Raises PmemfsError if it does not."""
    return generate_latest(_registry(mount, must_answer=True)).decode()


def serve(mount: Mount, host: str, port: int) -> None:
    """Answer scrapes at http://host:port/metrics until the mount ends. Raises OSError, NoAnswer."""
    from pmemfs.cli.find import find_mount

    server, thread = start_http_server(port, host, registry=_registry(mount, must_answer=False))
    try:
        while find_mount(mount.mountpoint):
            time.sleep(_LOOK_SECONDS)
    finally:
        server.shutdown()
        thread.join()
    raise NoAnswer(path=mount.mountpoint, why="it has ended")


def _registry(mount: Mount, *, must_answer: bool) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MountCollector(mount, must_answer=must_answer))
    return registry


def _of_requests(sample: Sample, where: Mapping[str, str]) -> Iterator[Metric]:
    labels = [*where, "operation", "plane"]
    answered = CounterMetricFamily(
        "pmemfs_requests", "Requests that were answered, and by which plane", labels=labels
    )
    failed = CounterMetricFamily(
        "pmemfs_failed_requests", "Requests that the data plane has answered with an error",
        labels=[*where, "operation"],
    )  # fmt: skip
    forwarded = CounterMetricFamily(
        "pmemfs_forwarded_requests", "Requests that the data plane has left to the control plane",
        labels=[*where, "operation"],
    )  # fmt: skip
    moved = CounterMetricFamily("pmemfs_moved_bytes", "Bytes read and written", labels=labels)
    planes: dict[str, Operations] = {"control": sample.control}
    if sample.is_native:
        planes["data"] = sample.operations
    for plane, operations in planes.items():
        for name, counts in operations.items():
            answered.add_metric([*where.values(), name, plane], counts.answered)
            moved.add_metric([*where.values(), name, plane], counts.moved_bytes)
            if plane == "data":
                failed.add_metric([*where.values(), name], counts.failed)
                forwarded.add_metric([*where.values(), name], counts.forwarded)
    yield from (answered, failed, forwarded, moved)
    if sample.is_native:
        yield _latencies(sample, where)


def _latencies(sample: Sample, where: Mapping[str, str]) -> Metric:
    metric = HistogramMetricFamily(
        "pmemfs_request_duration_seconds",
        "From taking a request to answering it, in the data plane",
        labels=[*where, "operation"],
    )
    for name, counts in sample.operations.items():
        buckets = [(str(2**power * _NS), _below(counts, 2**power))
                   for power in range(_FIRST_BOUND, _LAST_BOUND + 1)]  # fmt: skip
        buckets.append(("+Inf", sum(counts.latencies.values())))
        metric.add_metric([*where.values(), name], buckets, counts.total_ns * _NS)
    return metric


def _below(counts: Counts, bound_ns: int) -> int:
    # A bound is a power of two, where a bucket of ours begins, so no bucket lies on both sides.
    return sum(
        count for bucket, count in counts.latencies.items() if bucket_start_ns(bucket) < bound_ns
    )


def _of_names(names: NamesStatus, where: Mapping[str, str]) -> Iterator[Metric]:
    for name, meaning, value in (
        ("known_inodes", "Inodes that the data plane knows", names.known_inodes),
        ("used_bytes", "Memory of the data plane for what it knows of names", names.used_bytes),
        ("limit_bytes", "What this memory may be, see names_memory", names.limit_bytes),
    ):
        yield _gauge(f"pmemfs_names_{name}", meaning, value, where)
    handed_over = CounterMetricFamily(
        "pmemfs_names_handed_over_requests",
        "Requests about names that the data plane has left to the control plane, and why",
        labels=[*where, "reason"],
    )
    handed_over.add_metric([*where.values(), "busy"], names.handed_over_busy)
    handed_over.add_metric([*where.values(), "memory"], names.handed_over_short)
    yield handed_over


def _of_compression(report: CompressionReport, where: Mapping[str, str]) -> Iterator[Metric]:
    for field, (name, meaning) in _COMPRESSION_COUNTERS.items():
        yield _counter(f"pmemfs_{name}", meaning, getattr(report, field), where)
    for field, (name, meaning) in _COMPRESSION_GAUGES.items():
        yield _gauge(f"pmemfs_{name}", meaning, getattr(report, field), where)


def _of_cache(report: CacheReport, where: Mapping[str, str]) -> Iterator[Metric]:
    for name, meaning in _CACHE_COUNTERS.items():
        yield _counter(f"pmemfs_cache_{name}", meaning, getattr(report, name), where)
    bytes_of_blocks = {
        "size": ("What the cache can hold", report.place_count),
        "dirty": ("What the origin lacks", report.dirty),
    }
    for name, (meaning, blocks) in bytes_of_blocks.items():
        value = blocks * report.block_bytes
        yield _gauge(f"pmemfs_cache_{name}_bytes", meaning, value, where)
    oldest_ns = report.oldest_dirty_ns
    age = max(0.0, time.time() - oldest_ns * _NS) if oldest_ns else 0.0
    yield _gauge("pmemfs_cache_oldest_dirty_seconds", "Age of the oldest dirty block", age, where)
    origin = report.origin
    is_up = origin.state == "present"
    yield _gauge("pmemfs_origin_up", "Whether the origin answers", is_up, where)
    for name, meaning in _ORIGIN_COUNTERS.items():
        yield _counter(f"pmemfs_origin_{name}", meaning, getattr(origin, name), where)
    yield _counter("pmemfs_origin_read_bytes", "Read of the origin", origin.read_bytes, where)
    yield _counter(
        "pmemfs_origin_written_bytes", "Written to the origin", origin.written_bytes, where
    )


def _gauge(name: str, meaning: str, value: float, labels: Mapping[str, str]) -> Metric:
    metric = GaugeMetricFamily(name, meaning, labels=list(labels))
    metric.add_metric(list(labels.values()), value)
    return metric


def _counter(name: str, meaning: str, value: float, labels: Mapping[str, str]) -> Metric:
    metric = CounterMetricFamily(name, meaning, labels=list(labels))
    metric.add_metric(list(labels.values()), value)
    return metric
