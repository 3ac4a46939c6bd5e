"""What `pmemfs stat` tells from counters: differences, rates, percentiles, and what it asks for."""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.pools import small_pool
from pmemfs.cli import stat as command
from pmemfs.cli.commands import pmemfs, run
from pmemfs.control.shape import decode
from pmemfs.dataplane import layouts
from pmemfs.dataplane.counters import read_counters
from pmemfs.dataplane.layouts import (
    LATENCY_BUCKETS,
    Operation,
    OperationCounts,
    SlotHead,
    bucket_start_ns,
)
from pmemfs.dataplane.native import load_word, store_word
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.sharing import share_pool
from pmemfs.engine.statistics import EngineStatistics
from pmemfs.mountinfo import Mount
from pmemfs.observe.stat import (
    OPERATIONS,
    Counts,
    Sample,
    Worker,
    difference,
    figures,
    own_counts,
    per_second,
    percentile_ns,
    total,
    worker_sample,
)

STARTS = [bucket_start_ns(bucket) for bucket in range(LATENCY_BUCKETS)]
LONGEST_NS = bucket_start_ns(LATENCY_BUCKETS)

numbers = st.integers(0, 2**64 - 1)
buckets = st.integers(0, LATENCY_BUCKETS - 1)
counts = st.builds(
    Counts,
    answered=numbers,
    forwarded=numbers,
    failed=numbers,
    moved_bytes=numbers,
    total_ns=numbers,
    latencies=st.dictionaries(buckets, numbers, max_size=6),
)
operations = st.dictionaries(st.sampled_from(OPERATIONS), counts)
workers = st.builds(
    Worker,
    number=st.integers(0, 3),
    cpu=st.none() | st.integers(0, 3),
    sleeps=numbers,
    spins=numbers,
    operations=operations,
)
samples = st.builds(
    Sample,
    pid=st.integers(1, 2**31),
    engine=st.sampled_from(["native", "python"]),
    transport=st.just("fd"),
    seconds=st.floats(0, 1e9),
    control=operations,
    workers=st.lists(workers, max_size=3).map(tuple),
)


def bucket_of(ns: int) -> int:
    """As `bucket_of` in plane.pxi."""
    if ns < 128:
        return 0
    power = ns.bit_length() - 1
    return min((power - 7) * 4 + (ns >> (power - 2) & 3) + 1, LATENCY_BUCKETS - 1)


def all_counts(sample: Sample) -> list[Counts]:
    """Every count in a sample."""
    return [
        *sample.control.values(),
        *(each for worker in sample.workers for each in worker.operations.values()),
    ]


# Buckets and percentiles


@given(st.integers(0, 2 * LONGEST_NS) | st.integers(0, 10**6))
def test_a_latency_is_counted_in_the_bucket_that_starts_at_or_below_it(ns: int) -> None:
    assert bucket_of(ns) == bisect_right(STARTS, ns) - 1


@given(
    st.lists(st.integers(0, LONGEST_NS - 1) | st.integers(0, 10**5), min_size=1),
    st.integers(1, 1000),
)
def test_a_percentile_is_in_the_bucket_of_the_true_one(took_ns: list[int], permille: int) -> None:
    true_ns = sorted(took_ns)[-(-len(took_ns) * permille // 1000) - 1]
    found_ns = percentile_ns(Counter(map(bucket_of, took_ns)), permille=permille)
    assert found_ns is not None
    assert bisect_right(STARTS, found_ns) - 1 == bucket_of(true_ns)


@given(st.dictionaries(buckets, st.integers(0, 2**64 - 1)))
def test_percentiles_rise_and_exist_where_anything_was_counted(latencies: dict[int, int]) -> None:
    found = [percentile_ns(latencies, permille=permille) for permille in (1, 500, 990, 999, 1000)]
    if any(latencies.values()):
        known = [ns for ns in found if ns is not None]
        assert len(known) == len(found)
        assert known == sorted(known)
    else:
        assert set(found) == {None}


def test_percentiles_of_a_known_histogram() -> None:
    # Ninety at 1024 ns and up, nine at 8192 and up, one at 1 ms and up.
    latencies = {bucket_of(1024): 90, bucket_of(8192): 9, bucket_of(1 << 20): 1}
    assert percentile_ns(latencies, permille=500) == 1024 + 256 * (50 - 0.5) / 90
    assert percentile_ns(latencies, permille=900) == 1024 + 256 * (90 - 0.5) / 90
    assert percentile_ns(latencies, permille=990) == 8192 + 2048 * (9 - 0.5) / 9
    assert percentile_ns(latencies, permille=999) == (1 << 20) + (1 << 18) / 2


def test_the_last_bucket_has_no_end_to_be_measured_by() -> None:
    assert percentile_ns({LATENCY_BUCKETS - 1: 7}, permille=500) == STARTS[-1]


# Rates and figures


def test_figures_of_known_counts() -> None:
    of_counts = figures(
        Counts(10, 2, 1, 4096, 20_000, {bucket_of(2000): 10}), seconds=2.0, is_native=True
    )
    assert (of_counts.requests, of_counts.native, of_counts.forwarded) == (12, 10, 2)
    assert (of_counts.failed, of_counts.moved_bytes) == (1, 4096)
    assert (of_counts.requests_per_second, of_counts.bytes_per_second) == (6.0, 2048.0)
    assert of_counts.mean_ns == 2000.0
    assert of_counts.p50_ns is not None


def test_the_python_engine_tells_no_more_than_it_counted() -> None:
    statistics = EngineStatistics(reads=3, writes=2, fsyncs=1, read_bytes=300, written_bytes=200)
    control = own_counts(statistics)
    sample = Sample(1, "python", "pyfuse3", 1.0, control, ())
    assert not sample.is_native
    assert {name: each.answered for name, each in sample.operations.items()} == {
        "read": 3,
        "write": 2,
        "fsync": 1,
    }
    of_reads = figures(sample.operations["read"], sample.seconds, is_native=False)
    assert (of_reads.requests, of_reads.moved_bytes) == (3, 300)
    assert of_reads.native is of_reads.forwarded is of_reads.failed is None
    assert of_reads.mean_ns is of_reads.p50_ns is of_reads.p99_ns is of_reads.p99_9_ns is None


def test_no_time_and_no_requests_are_no_error() -> None:
    assert per_second(7, 0.0) == 0.0
    nothing = figures(Counts(), 0.0, is_native=True)
    assert nothing.mean_ns is nothing.p50_ns is None
    assert nothing.requests_per_second == 0.0


@given(counts, st.floats(0, 1e9))
def test_counters_that_do_not_agree_break_nothing(of_some: Counts, seconds: float) -> None:
    of_counts = figures(of_some, seconds, is_native=True)
    assert of_counts.requests_per_second >= 0
    assert of_counts.mean_ns is None or of_counts.mean_ns >= 0


# Differences


@given(samples, samples)
def test_a_difference_is_never_negative(now: Sample, before: Sample) -> None:
    found = difference(now, before)
    assert found.seconds >= 0
    assert all(worker.sleeps >= 0 and worker.spins >= 0 for worker in found.workers)
    for each in all_counts(found):
        assert min(each.answered, each.forwarded, each.failed, each.moved_bytes) >= 0
        assert each.total_ns >= 0
        assert all(count >= 0 for count in each.latencies.values())


@given(st.lists(counts, min_size=2, max_size=6))
def test_differences_of_rising_counters_add_up(steps: list[Counts]) -> None:
    def sample(number: int) -> Sample:
        so_far = total(steps[: number + 1])
        worker = Worker(0, None, number, 2 * number, {"read": so_far})
        return Sample(1, "native", "fd", float(number), {"write": so_far}, (worker,))

    found = [difference(sample(n), sample(n - 1)) for n in range(1, len(steps))]
    for operation, of_sample in (("read", "operations"), ("write", "control")):
        added = total(getattr(each, of_sample)[operation] for each in found)
        assert added == total([_without_zeros(step) for step in steps[1:]])
    assert sum(each.workers[0].sleeps for each in found) == len(steps) - 1
    assert sum(each.seconds for each in found) == len(steps) - 1


def _without_zeros(step: Counts) -> Counts:
    latencies = {bucket: count for bucket, count in step.latencies.items() if count}
    return Counts(
        step.answered, step.forwarded, step.failed, step.moved_bytes, step.total_ns, latencies
    )


def test_a_daemon_in_the_place_of_a_dead_one_counts_its_own_answers_from_nothing() -> None:
    def sample(pid: int, seconds: float, count: int, own: int) -> Sample:
        worker = Worker(0, 0, 0, 0, {"read": Counts(answered=count)})
        return Sample(pid, "native", "fd", seconds, {"read": Counts(answered=own)}, (worker,))

    found = difference(sample(2, 3.0, 8, 4), sample(1, 100.0, 5, 9))
    assert (found.seconds, found.control["read"].answered) == (3.0, 4)
    # What the data plane counts lies in memory that outlives the daemon.
    assert found.operations["read"].answered == 3


def test_what_a_worker_counted_first_is_a_difference_from_nothing() -> None:
    first = Counts(answered=1, latencies={3: 1})
    idle = Worker(0, 0, 0, 0, {})
    busy = Worker(0, 0, 1, 0, {"read": first})
    before = Sample(1, "native", "uring", 1.0, {}, (idle,))
    now = Sample(1, "native", "uring", 2.0, {}, (busy, Worker(1, None, 4, 5, {})))
    found = difference(now, before)
    assert found.operations["read"] == first
    assert found.operations["write"] == Counts()
    assert found.workers[1] == now.workers[1]


@given(samples)
def test_a_sample_survives_the_way_through_json(sample: Sample) -> None:
    assert decode(Sample, json.loads(json.dumps(sample.as_json()))) == sample


# Counters in the shared memory


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    memory = share_pool(small_pool(), worker_count=3)
    yield memory
    memory.close()


def operation_at(shared: SharedMemory, worker: int, operation: Operation) -> int:
    """Where the counters of an operation of a worker are."""
    slot = shared.areas.slots + worker * layouts.SLOT_BYTES
    return slot + layouts.SLOT_HEAD.size_bytes + operation * layouts.OPERATION_BYTES


def fill(
    shared: SharedMemory,
    worker: int,
    operation: Operation,
    of_operation: OperationCounts,
    latencies: dict[int, int],
) -> None:
    """Store counters, as a worker does."""
    at = operation_at(shared, worker, operation)
    size = layouts.OPERATION_COUNTS.size_bytes
    shared.memory[at : at + size] = layouts.OPERATION_COUNTS.pack(of_operation)
    for bucket, count in latencies.items():
        store_word(shared.memory, at + size + bucket * 8, count)


def sample_of(shared: SharedMemory, queue_count: int = 2) -> Sample:
    """A sample of the shared memory alone."""
    found = tuple(worker_sample(each, queue_count) for each in read_counters(shared))
    return Sample(1, "native", "uring", 1.0, {}, found)


def test_counters_are_read_from_where_workers_write_them(shared: SharedMemory) -> None:
    last = LATENCY_BUCKETS - 1
    fill(shared, 0, Operation.READ, OperationCounts(5, 1, 2, 4096, 900), {0: 4, last: 1})
    fill(shared, 2, Operation.READ, OperationCounts(1, 0, 0, 512, 300), {7: 1})
    fill(shared, 2, Operation.OTHER, OperationCounts(0, 9, 0, 0, 0), {})
    head = layouts.SLOT_HEAD.pack(SlotHead(section=3, sleeps=11, spins=12, thread_id=99))
    at = shared.areas.slots + 2 * layouts.SLOT_BYTES
    shared.memory[at : at + len(head)] = head

    sample = sample_of(shared)
    assert [worker.cpu for worker in sample.workers] == [0, 1, None]
    assert [worker.serves for worker in sample.workers] == ["CPU 0", "CPU 1", "/dev/fuse"]
    assert [(worker.sleeps, worker.spins) for worker in sample.workers] == [
        (0, 0),
        (0, 0),
        (11, 12),
    ]
    assert sample.workers[0].operations == {"read": Counts(5, 1, 2, 4096, 900, {0: 4, last: 1})}
    assert sample.workers[1].operations == {}
    assert sample.operations["read"] == Counts(6, 1, 2, 4608, 1200, {0: 4, 7: 1, last: 1})
    assert sample.operations["other"] == Counts(forwarded=9)
    assert set(sample.operations) == set(OPERATIONS)


def count_requests(shared: SharedMemory, requests: int) -> None:
    """Count writes as `count_request` in plane.pxi does, word by word."""
    at = operation_at(shared, 1, Operation.WRITE)

    def add(offset: int, amount: int) -> None:
        store_word(shared.memory, at + offset, load_word(shared.memory, at + offset) + amount)

    for number in range(requests):
        took_ns = 100 + number
        add(layouts.OPERATION_COUNTS.offset_of("answered"), 1)
        add(layouts.OPERATION_COUNTS.offset_of("moved_bytes"), 4096)
        add(layouts.OPERATION_COUNTS.offset_of("total_ns"), took_ns)
        add(layouts.OPERATION_COUNTS.size_bytes + bucket_of(took_ns) * 8, 1)


def test_samples_taken_while_requests_are_counted_lose_and_invent_nothing(
    shared: SharedMemory,
) -> None:
    requests = 5000
    writer = threading.Thread(target=count_requests, args=(shared, requests))
    before = first = sample_of(shared)
    found = []
    writer.start()
    while writer.is_alive():
        now = sample_of(shared)
        found.append(difference(now, before))
        before = now
    writer.join()
    found.append(difference(sample_of(shared), before))
    for each in found:
        figures(each.operations["write"], each.seconds, is_native=True)
    added = total(each.operations["write"] for each in found)
    assert added == difference(sample_of(shared), first).operations["write"]
    assert (added.answered, added.moved_bytes) == (requests, requests * 4096)
    assert sum(added.latencies.values()) == requests


# The command


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the command have these samples for answers."""
    monkeypatch.setattr(command, "require_mount", lambda _: MOUNT)

    def prepare(*these: Sample) -> None:
        left = iter(these)
        monkeypatch.setattr(command, "ask", lambda *_: next(left))

    return prepare


MOUNT = Mount("0:57", "/mnt", "fuse.pmemfs", "pmem0", "rw")


def native(pid: int = 1, seconds: float = 1.0, **counted: Any) -> Sample:
    """A sample of a data plane with one worker, which counted reads."""
    worker = Worker(0, 0, 0, 0, {"read": Counts(**counted)})
    return Sample(pid, "native", "uring", seconds, {}, (worker,))


def test_an_interval_is_what_came_in_it(
    answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(native(seconds=10, answered=100), native(seconds=12, answered=106, moved_bytes=8192))
    assert run(pmemfs, ["stat", "/mnt", "--watch", "0.01", "--count", "2", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["since"], first["operations"]["read"]["requests_per_second"]) == ("mount", 10.0)
    assert (second["since"], second["operations"]["read"]["requests_per_second"]) == ("report", 3.0)
    assert second["operations"]["read"]["bytes_per_second"] == 4096.0


def test_another_daemon_in_the_same_place_ends_the_watch(
    answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(native(pid=1), native(pid=2))
    assert run(pmemfs, ["stat", "/mnt", "--watch", "0.01"]) == 1
    assert "another one is there" in capsys.readouterr().err


def test_tables_fit_80_characters_with_large_numbers(
    answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    counted = Counts(10**7, 10**6, 10**5, 10**12, 10**11, {30: 10**7})
    workers = tuple(Worker(n, n or None, 10**6, 10**6, {"write": counted}) for n in range(3))
    answers(Sample(1, "native", "uring", 200.0, {}, workers))
    assert run(pmemfs, ["stat", "/mnt", "--per-cpu", "--latency"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80, out
    rows = [line.split() for line in out.splitlines() if line.startswith("1: CPU 1")]
    assert rows[0][3:6] == ["10000000", "1000000", "100000"]
    assert rows[0][-2:] == ["1000000", "1000000"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--watch", "/mnt"], "not a number of seconds"),
        (["/mnt", "--watch", "0"], "is not from"),
        (["/mnt", "--watch=nan"], "is not from"),
        (["/mnt", "--watch=inf"], "is not from"),
        (["/mnt", "--watch=1e400"], "is not from"),
        (["/mnt", "--watch", "--count", "0"], "--count: 0 is not from 1"),
        (["/mnt", "--count", "3"], "give --watch, too"),
        ([], "TARGET"),
    ],
    ids=str,
)
def test_bad_usage_is_told(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pmemfs, ["stat", *words]) == 2
    assert sentence in capsys.readouterr().err
