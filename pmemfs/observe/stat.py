"""What `pmemfs stat` shows: samples of a mount's counters, and what follows from them.

Nothing here looks at a mount, and nothing loads numpy or trio, because a command should start at
once. Invariants:
- counters are read while they change, so one may be a request ahead of another: nothing here needs
  them to agree;
- a difference is never negative, whatever the two samples hold;
- a percentile lies in the same bucket of latencies as the true value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pmemfs.dataplane.layouts import LATENCY_BUCKETS, Operation, bucket_start_ns

if TYPE_CHECKING:
    from pmemfs.dataplane.counters import OperationCounters, WorkerCounters
    from pmemfs.engine.statistics import EngineStatistics

OPERATIONS = tuple(operation.name.lower() for operation in Operation)


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted of some requests. `latencies` has only buckets that are not empty."""

    answered: int = 0
    forwarded: int = 0
    failed: int = 0
    moved_bytes: int = 0
    total_ns: int = 0
    latencies: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for a bucket that can't exist: its start would be astronomical."""
        if not all(0 <= bucket < LATENCY_BUCKETS for bucket in self.latencies):
            raise ValueError("there is no such bucket of latencies")

    def __bool__(self) -> bool:
        return self != Counts()


Operations = Mapping[str, Counts]
"""Counts by the names in `OPERATIONS`; an operation that is missing was never counted."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A thread of the data plane; it serves the queue of a CPU, or reads /dev/fuse (`cpu` None)."""

    number: int
    cpu: int | None
    sleeps: int
    spins: int
    operations: Operations

    @property
    def serves(self) -> str:
        """Where its requests come from."""
        return "/dev/fuse" if self.cpu is None else f"CPU {self.cpu}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a mount counted in `seconds`. `control` is what the control plane moved itself."""

    pid: int | None
    engine: str
    transport: str
    seconds: float
    control: Operations
    workers: tuple[Worker, ...]
    mode: str = ""
    """What is mounted: a cache can be asked for more."""
    identity: int = 0
    """Tells the mount from all others; 0: unknown."""

    def as_json(self) -> dict[str, Any]:
        """The sample as JSON values."""
        return asdict(self)

    @property
    def is_native(self) -> bool:
        """Whether a data plane counted: only that has workers."""
        return bool(self.workers)

    @property
    def operations(self) -> Operations:
        """All requests, by operation, as the engine counts them."""
        if not self.is_native:
            return self.control
        return {
            name: total(worker.operations.get(name, Counts()) for worker in self.workers)
            for name in OPERATIONS
        }


@dataclass(frozen=True, slots=True)
class Figures:
    """What is shown of some requests. None: this engine doesn't count it, or no request came."""

    requests: int
    native: int | None
    forwarded: int | None
    failed: int | None
    moved_bytes: int
    requests_per_second: float
    bytes_per_second: float
    mean_ns: float | None
    p50_ns: float | None
    p99_ns: float | None
    p99_9_ns: float | None


def worker_sample(counters: WorkerCounters, queue_count: int) -> Worker:
    """What a worker has counted; the first `queue_count` workers serve the CPU of their number."""
    counts = {
        operation.name.lower(): _counts(of_operation)
        for operation, of_operation in counters.operations.items()
    }
    return Worker(
        number=counters.number,
        cpu=counters.number if counters.number < queue_count else None,
        sleeps=counters.sleeps,
        spins=counters.spins,
        operations={name: count for name, count in counts.items() if count},
    )


def own_counts(statistics: EngineStatistics) -> Operations:
    """What the control plane moved itself. It counts neither latencies nor failures."""
    return {
        "read": Counts(answered=statistics.reads, moved_bytes=statistics.read_bytes),
        "write": Counts(answered=statistics.writes, moved_bytes=statistics.written_bytes),
        "fsync": Counts(answered=statistics.fsyncs),
    }


def difference(now: Sample, before: Sample) -> Sample:
    """What was counted between two samples of one mount.

    A daemon that has taken the place of a dead one begins its own counts and its time anew.
    """
    goes_on = now.pid == before.pid
    workers_before = {worker.number: worker for worker in before.workers}
    return Sample(
        pid=now.pid,
        engine=now.engine,
        transport=now.transport,
        seconds=max(0.0, now.seconds - before.seconds) if goes_on else now.seconds,
        control=_operations_between(now.control, before.control) if goes_on else now.control,
        workers=tuple(
            _worker_between(worker, workers_before.get(worker.number)) for worker in now.workers
        ),
        mode=now.mode,
        identity=now.identity,
    )


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of some counts."""
    counts = list(counts)
    latencies: Counter[int] = Counter()
    for each in counts:
        latencies.update(each.latencies)
    return Counts(
        answered=sum(each.answered for each in counts),
        forwarded=sum(each.forwarded for each in counts),
        failed=sum(each.failed for each in counts),
        moved_bytes=sum(each.moved_bytes for each in counts),
        total_ns=sum(each.total_ns for each in counts),
        latencies=dict(latencies),
    )


def figures(counts: Counts, seconds: float, *, is_native: bool) -> Figures:
    """What is shown of requests that were counted within `seconds`."""
    requests = counts.answered + counts.forwarded
    return Figures(
        requests=requests,
        native=counts.answered if is_native else None,
        forwarded=counts.forwarded if is_native else None,
        failed=counts.failed if is_native else None,
        moved_bytes=counts.moved_bytes,
        requests_per_second=per_second(requests, seconds),
        bytes_per_second=per_second(counts.moved_bytes, seconds),
        mean_ns=counts.total_ns / counts.answered if is_native and counts.answered else None,
        p50_ns=percentile_ns(counts.latencies, permille=500),
        p99_ns=percentile_ns(counts.latencies, permille=990),
        p99_9_ns=percentile_ns(counts.latencies, permille=999),
    )


def per_second(amount: int, seconds: float) -> float:
    """The rate; 0 if no time has passed."""
    return amount / seconds if seconds > 0 else 0.0


def percentile_ns(latencies: Mapping[int, int], *, permille: int) -> float | None:
    """The latency that `permille` of 1000 requests did not exceed; None without requests.

    The true value is the latency of the request of rank ceil(n * permille / 1000). The result lies
    in that request's bucket, as if the bucket's requests were spread evenly over it. For the last
    bucket, which has no end, the result is its start. Source: `histogram_quantile` of Prometheus.
    """
    rank = -(-sum(latencies.values()) * permille // 1000)
    for bucket in sorted(latencies):
        count = latencies[bucket]
        if 0 < rank <= count:
            start = bucket_start_ns(bucket)
            if bucket >= LATENCY_BUCKETS - 1:
                return float(start)
            width = bucket_start_ns(bucket + 1) - start
            return start + width * (rank - 0.5) / count
        rank -= count
    return None


def _counts(counters: OperationCounters) -> Counts:
    return Counts(
        answered=counters.answered,
        forwarded=counters.forwarded,
        failed=counters.failed,
        moved_bytes=counters.moved_bytes,
        total_ns=counters.total_ns,
        latencies={bucket: count for bucket, count in enumerate(counters.latencies) if count},
    )


def _worker_between(now: Worker, before: Worker | None) -> Worker:
    if before is None:
        return now
    return Worker(
        number=now.number,
        cpu=now.cpu,
        sleeps=max(0, now.sleeps - before.sleeps),
        spins=max(0, now.spins - before.spins),
        operations=_operations_between(now.operations, before.operations),
    )


def _operations_between(now: Operations, before: Operations) -> Operations:
    return {name: _counts_between(counts, before.get(name, Counts()))
            for name, counts in now.items()}  # fmt: skip


def _counts_between(now: Counts, before: Counts) -> Counts:
    return Counts(
        answered=max(0, now.answered - before.answered),
        forwarded=max(0, now.forwarded - before.forwarded),
        failed=max(0, now.failed - before.failed),
        moved_bytes=max(0, now.moved_bytes - before.moved_bytes),
        # The clock behind latencies may be set back.
        total_ns=max(0, now.total_ns - before.total_ns),
        # A Counter drops what is not above zero.
        latencies=dict(Counter(now.latencies) - Counter(before.latencies)),
    )
