"""Every engine over every scheme, page size and kind of medium, against a plain file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.data_plane import InProcess, PythonEngine
from kit.pages import counts_of
from kit.pools import POOL_BYTES, SCHEMES, small_pool
from kit.sources import needs_root, small_tmpfs, sparse_file
from pmemfs.errors import NoPageStructures
from pmemfs.media.label import Scheme
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.medium.source import identify, make_file
from pmemfs.memmap import Memmap, open_memmap
from pmemfs.memmap.records import RecordMemmap
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import GIB, KIB, MIB
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.onefile import INODE

RESERVED_BYTES = {4 * KIB: 9 * MIB, 2 * MIB: 20 * MIB, GIB: 5 * GIB}


class WatchedMedium(MappedMedium):
    """A medium that looks, at each touch of the data, whether its pages are referenced."""

    memmap: Memmap | None = None
    data_zone = range(0)
    touches = 0

    def _look(self, offset_bytes: int, length_bytes: int) -> None:
        if offset_bytes not in self.data_zone:
            return
        self.touches += 1
        assert offset_bytes + length_bytes <= self.data_zone.stop
        if self.memmap is None or not self.memmap.has_pages:
            return
        geometry = self.memmap.geometry
        assert geometry is not None
        step = 1 << geometry.order
        first = offset_bytes // FRAME_BYTES
        last = (offset_bytes + length_bytes - 1) // FRAME_BYTES
        for pfn in {*range(first, last + 1, step), last}:
            page = self.memmap.page(pfn)
            assert page is not None
            assert page.refcount > 0, f"frame {pfn} is touched without a reference"

    def peek(self, offset_bytes: int, length_bytes: int) -> bytes:
        """A read that is the test's own."""
        return bytes(super().read(offset_bytes, length_bytes))

    def read(self, offset_bytes: int, length_bytes: int) -> memoryview | bytes:
        self._look(offset_bytes, length_bytes)
        return super().read(offset_bytes, length_bytes)

    def store(self, offset_bytes: int, data: bytes) -> None:  # type: ignore[override]
        self._look(offset_bytes, len(data))
        super().store(offset_bytes, data)


@dataclass
class Served:
    """An engine and all that is under it; beside it a file, which must always hold the same."""

    pool: Pool
    medium: WatchedMedium
    memmap: Memmap
    engine: PythonEngine | InProcess
    volume: BlockVolume
    oracle: int

    @property
    def size_bytes(self) -> int:
        return self.volume.size_bytes

    def outside(self) -> bytes:
        """Everything that is not data or page structures: labels, gaps, what is left over."""
        zones = [zone for _, zone in self.pool.zones.in_order()]
        gaps = [(one.end_bytes, next_.offset_bytes) for one, next_ in pairwise(zones)]
        labels = [(zone.offset_bytes, zone.end_bytes) for zone in (zones[0], zones[-1])]
        found = []
        for start, end in [*labels, *gaps]:
            # Gaps are large where pages are; their edges are what an offset would reach.
            edge_bytes = min(64 * KIB, end - start)
            found += [self.medium.peek(start, edge_bytes)]
            found += [self.medium.peek(end - edge_bytes, edge_bytes)]
        return b"".join(found)


ENGINES = ("python", "native-copying", "native-pointing")
"""The native engine answers reads with a copy (as for uring), or out of the pool (as for fd)."""
KINDS = ("reserved", "sparse")
COMBINATIONS = [
    (engine, scheme, size, kind)
    for engine in ENGINES
    for scheme in SCHEMES
    for size in POOL_BYTES
    for kind in KINDS
]
SAMPLE = [
    combination
    for combination in COMBINATIONS
    if sum(map(list.index, (list(ENGINES), list(SCHEMES), list(POOL_BYTES), list(KINDS)),
               combination)) % 3 == 0
]  # fmt: skip
"""Of the combinations a third: in it each value meets each two of any other two kinds."""


def name_of(combination: tuple[str, Scheme, int, str]) -> str:
    engine, scheme, page_size_bytes, kind = combination
    return f"{engine}-{scheme.word}-{page_size_bytes // KIB}K-{kind}"


@pytest.fixture(params=COMBINATIONS, ids=name_of)
def served(request: pytest.FixtureRequest, shm: Path) -> Iterator[Served]:
    engine_name, scheme, page_size_bytes, kind = request.param
    path = str(shm / "pool")
    if kind == "sparse":
        sparse_file(shm / "pool", POOL_BYTES[page_size_bytes])
    else:
        # Gigabytes are not taken: there is room for what the test writes, which is all it needs.
        make_file(path, RESERVED_BYTES[page_size_bytes], sparse=page_size_bytes == GIB)
    medium = WatchedMedium(identify(path))
    medium.reserved = kind == "reserved"
    spec = PoolSpec("served", page_size_bytes, max(page_size_bytes, 2 * MIB), scheme)
    pool = Pool.create(medium, spec)
    pool.begin_mount()
    engine: PythonEngine | InProcess
    if engine_name == "python":
        medium.memmap = memmap = open_memmap(pool)
        volume = BlockVolume(pool, memmap)
        engine = PythonEngine(medium, memmap, volume)
    else:
        engine = InProcess(pool, medium, points=engine_name == "native-pointing")
        medium.memmap, volume = engine.memmap, engine.volume
        memmap = engine.memmap
    medium.data_zone = range(pool.zones.data.offset_bytes, pool.zones.data.end_bytes)
    sparse_file(shm / "oracle", volume.size_bytes)
    oracle = os.open(shm / "oracle", os.O_RDWR)
    yield Served(pool, medium, memmap, engine, volume, oracle)
    os.close(oracle)
    medium.close()


def places(size_bytes: int, page_size_bytes: int) -> st.SearchStrategy[int]:
    """Offsets where something begins or ends, and any other."""
    edges = [0, 4096, 4 * MIB, 128 * MIB, page_size_bytes, size_bytes]
    near = st.builds(
        lambda edge, by: max(0, edge + by),
        st.sampled_from([edge for edge in edges if edge <= size_bytes]),
        st.integers(-9000, 9000) | st.sampled_from([-4096, -1, 0, 1, 4096]),
    )
    return near | st.integers(0, size_bytes + 5000)


PATTERN = bytes(range(251)) * 300
"""No two pieces of it that are a page or a sector apart are the same."""

lengths = st.integers(0, 20_000) | st.sampled_from([0, 1, 512, 4096, 8192, 65536])


@pytest.mark.slow
@pytest.mark.parametrize("served", SAMPLE, ids=name_of, indirect=True)
def test_any_reads_and_writes_answer_as_a_plain_file_does(served: Served) -> None:
    outside = served.outside()
    size = served.size_bytes
    page_size_bytes = served.pool.label.page_size_bytes
    step = st.tuples(st.booleans(), places(size, page_size_bytes), lengths, st.integers(0, 255))

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(step, max_size=10))
    def compare(steps: list[tuple[bool, int, int, int]]) -> None:
        for is_write, offset, length, seed in steps:
            fits = max(0, min(length, size - offset))
            if is_write:
                data = PATTERN[seed % 251 :][:length]
                write(served, offset, data, fits)
            got = bytes(served.engine.read(offset, length))
            assert got == os.pread(served.oracle, length, offset)
            assert len(got) == fits
            if served.memmap.has_pages:
                assert counts_of(served.memmap).in_use == 0

    compare()
    assert served.outside() == outside
    if isinstance(served.engine, PythonEngine):
        assert served.medium.touches > 100
    else:
        statistics = served.engine.statistics()
        # What reaches past the end is the control plane's to answer.
        assert statistics.reads + statistics.writes > 3 * served.engine.forwarded


def write(served: Served, offset: int, data: bytes, fits: int) -> None:
    """Write to both; what does not fit is ENOSPC where nothing does, else short."""
    if fits == 0:
        with pytest.raises(OSError, match="the end of the device") as caught:
            served.engine.write(offset, data)
        assert caught.value.errno == errno.ENOSPC
        return
    assert served.engine.write(offset, data) == fits
    assert os.pwrite(served.oracle, data[:fits], offset) == fits


def test_at_the_end_reads_are_short_and_writes_store_the_part_that_fits(served: Served) -> None:
    size = served.size_bytes
    assert served.engine.write(size - 100, b"e" * 4096) == 100
    assert bytes(served.engine.read(size - 100, 4096)) == b"e" * 100
    assert bytes(served.engine.read(size, 1)) == b""
    assert bytes(served.engine.read(size + (1 << 50), 4096)) == b""
    for offset in (size, size + 1, 1 << 62, (1 << 63) - 1):
        with pytest.raises(OSError, match="end of the device") as caught:
            served.engine.write(offset, b"x")
        assert caught.value.errno == errno.ENOSPC


def test_no_offset_or_length_reaches_the_reserved_zones(served: Served) -> None:
    outside = served.outside()
    size, data_at = served.size_bytes, served.pool.zones.data.offset_bytes
    for offset in (-data_at, -1, size, size - 1, 1 << 63, (1 << 64) - data_at, -(1 << 62)):
        for length in (1, 4096, 64 * KIB):
            if offset == size - 1:
                assert served.engine.write(offset, b"\xee" * length) == 1
            else:
                with pytest.raises(OSError, match="end of the device"):
                    served.engine.write(offset, b"\xee" * length)
            assert len(served.engine.read(offset, length)) == (offset == size - 1)
    assert served.outside() == outside


def test_pages_say_whose_they_are_and_how_often_they_moved(served: Served) -> None:
    served.engine.write(5000, b"x" * 9000)
    served.engine.read(4096, 1)
    if not served.memmap.has_pages:
        with pytest.raises(NoPageStructures):
            counts_of(served.memmap)
        return
    geometry = served.memmap.geometry
    assert geometry is not None
    for offset in (5000, 13_999):
        index = offset >> (12 + geometry.order)
        page = served.memmap.page(int(served.pool.first_data_pfn) + offset // 4096)
        assert page is not None
        assert (page.mapping, page.index) == (INODE, index)
        assert page.writes == 1
        assert page.refcount == 0
    last = served.size_bytes - 1
    served.engine.write(last, b"x")
    page = served.memmap.page(int(served.pool.first_data_pfn) + last // 4096)
    assert page is not None
    assert page.index == last // served.pool.label.page_size_bytes


def test_pages_are_dirty_from_the_write_to_the_fsync(served: Served) -> None:
    if not served.memmap.has_pages:
        trio.run(served.engine.fsync)
        assert served.engine.statistics().fsyncs == 1
        return
    served.engine.read(0, 4096)
    assert counts_of(served.memmap).dirty == 0
    served.engine.write(0, b"x" * 4096)
    assert counts_of(served.memmap).dirty == 1
    trio.run(served.engine.fsync)
    assert counts_of(served.memmap).dirty == 0
    assert counts_of(served.memmap).referenced >= 1


def test_a_hole_reads_as_zeroes_and_costs_neither_memory_nor_a_page(served: Served) -> None:
    before = os.stat(served.medium.name).st_blocks
    assert bytes(served.engine.read(MIB, 100_000)) == bytes(100_000)
    if served.medium.reserved:
        # The pages are there, so they are read like any others.
        assert not served.medium.is_hole(served.pool.zones.data.offset_bytes, 4096)
        return
    assert os.stat(served.medium.name).st_blocks == before
    if served.memmap.has_pages:
        assert counts_of(served.memmap).uninitialised == counts_of(served.memmap).total


def test_statistics_count_what_was_served(served: Served) -> None:
    served.engine.write(0, b"12345")
    served.engine.read(0, 3)
    served.engine.read(served.size_bytes - 1, 100)
    trio.run(served.engine.fsync)
    statistics = served.engine.statistics()
    assert (statistics.writes, statistics.written_bytes) == (1, 5)
    assert (statistics.reads, statistics.read_bytes) == (2, 4)
    assert statistics.fsyncs == 1


# When the medium fails


@dataclass
class Small:
    """An engine on a recording medium."""

    pool: Pool
    medium: RecordingMedium
    memmap: Memmap
    engine: PythonEngine


def small(scheme: Scheme) -> Small:
    pool = small_pool(scheme)
    pool.begin_mount()
    medium = pool.medium
    assert isinstance(medium, RecordingMedium)
    memmap = open_memmap(pool)
    return Small(pool, medium, memmap, PythonEngine(medium, memmap, BlockVolume(pool, memmap)))


@pytest.mark.parametrize("scheme", [Scheme.PMEM, Scheme.ON_DEMAND])
def test_an_fsync_that_failed_leaves_the_pages_dirty_and_all_after_it_fail(scheme: Scheme) -> None:
    served = small(scheme)
    served.engine.write(0, b"x" * 5000)
    served.medium._failures = {served.medium.call_count: OSError(errno.EIO, "gone")}
    with pytest.raises(OSError, match="gone"):
        trio.run(served.engine.fsync)
    assert counts_of(served.memmap).dirty == 2
    with pytest.raises(OSError, match="gone"):
        trio.run(served.engine.fsync)
    assert counts_of(served.memmap).dirty == 2


@pytest.mark.parametrize("scheme", [Scheme.PMEM, Scheme.ON_DEMAND])
def test_a_write_that_failed_holds_no_reference(scheme: Scheme) -> None:
    served = small(scheme)
    served.medium._failures = {served.medium.call_count: OSError(errno.EIO, "gone")}
    with pytest.raises(OSError, match="gone"):
        served.engine.write(4090, b"x" * 20)
    assert counts_of(served.memmap).in_use == 0
    assert counts_of(served.memmap).dirty == 2
    assert served.engine.statistics().writes == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_written_before_an_fsync_survives_any_power_failure(scheme: Scheme) -> None:
    served = small(scheme)
    data_at = served.pool.zones.data.offset_bytes
    served.engine.write(100, b"durable" * 100)
    trio.run(served.engine.fsync)
    served.engine.write(5000, b"open" * 10)
    outcomes = set()
    for image in served.medium.after_power_failure(limit=500):
        assert image[data_at + 100 : data_at + 800] == b"durable" * 100
        outcomes.add(image[data_at + 5000 : data_at + 5040])
        again = Pool.open(RecordingMedium(image))
        assert again.label == served.pool.label
    assert {bytes(40), b"open" * 10} < outcomes


def test_without_the_flush_of_a_write_it_would_not_survive() -> None:
    for ignored in (0, 1):
        served = small(Scheme.NONE)
        served.medium._ignored_calls = {served.medium.call_count + ignored}
        served.engine.write(0, b"12345678")
        trio.run(served.engine.fsync)
        assert len(list(served.medium.after_power_failure())) == 2


def test_an_fsync_that_waits_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_file(str(tmp_path / "pool"), 8 * MIB, sparse=False)
    medium = MappedMedium.open(str(tmp_path / "pool"))
    if medium.durability is not Durability.MSYNC:
        medium.close()
        pytest.skip("temporary files are in memory here")
    pool = Pool.create(medium, PoolSpec("pool"))
    pool.begin_mount()
    memmap = open_memmap(pool)
    assert isinstance(memmap, RecordMemmap)
    engine = PythonEngine(medium, memmap, BlockVolume(pool, memmap))
    entered, go_on = trio.Event(), trio.Event()
    real = medium.fence

    def fence() -> None:
        trio.from_thread.run_sync(entered.set)
        trio.from_thread.run(go_on.wait)
        real()

    monkeypatch.setattr(medium, "fence", fence)

    async def both() -> None:
        engine.write(0, b"before")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.fsync)
            await entered.wait()
            engine.write(MIB, b"meanwhile")
            assert bytes(engine.read(MIB, 9)) == b"meanwhile"
            go_on.set()
        assert counts_of(memmap).dirty == 1

    trio.run(both)
    medium.close()


# On a full file system


def fill(engine: PythonEngine) -> None:
    """Write 8 MiB, from the start."""
    for offset in range(0, 8 * MIB, 64 * KIB):
        engine.write(offset, b"x" * 64 * KIB)


@needs_root
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sparse_pool_that_runs_out_of_memory_answers_enospc_and_serves_on(
    scheme: Scheme,
) -> None:
    with small_tmpfs(MIB) as directory:
        medium = MappedMedium.open(str(sparse_file(directory / "pool", 64 * MIB)))
        try:
            pool = Pool.create(medium, PoolSpec("pool", scheme=scheme))
            pool.begin_mount()
            memmap = open_memmap(pool)
            engine = PythonEngine(medium, memmap, BlockVolume(pool, memmap))
            with pytest.raises(OSError, match="No space left") as caught:
                fill(engine)
            assert caught.value.errno == errno.ENOSPC
            assert engine.statistics().written_bytes >= 512 * KIB
            assert bytes(engine.read(0, 4)) == b"xxxx"
            assert engine.write(0, b"again") == 5
            assert bytes(engine.read(32 * MIB, 4096)) == bytes(4096)
            if memmap.has_pages:
                assert counts_of(memmap).in_use == 0
            pool.end_mount()
        finally:
            medium.close()
