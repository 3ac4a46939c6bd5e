"""Both engines, side by side, given the same: same bytes, errors, page structures and counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.data_plane import InProcess, PythonEngine
from kit.pages import counts_of
from kit.pools import SCHEMES, mapped_pool
from pmemfs.media.label import Scheme
from pmemfs.media.layout import replace
from pmemfs.media.page import Page
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.memmap.records import RecordMemmap
from pmemfs.pool import Pool
from pmemfs.units import KIB, MIB
from pmemfs.volume.block import BlockVolume

POOL_BYTES = {4 * KIB: 8 * MIB, 2 * MIB: 16 * MIB}


@dataclass
class Pair:
    """The reference and what must not be told from it, each over a pool of its own."""

    python: PythonEngine
    native: InProcess
    size_bytes: int

    def both(self, call: str, *arguments: Any) -> None:
        """Call both; they answer the same, or fail the same."""
        assert self._outcome(self.python, call, arguments) == self._outcome(
            self.native, call, arguments
        )

    def _outcome(self, engine: PythonEngine | InProcess, call: str, arguments: Any) -> object:
        try:
            if call == "fsync":
                return trio.run(engine.fsync)
            answer = getattr(engine, call)(*arguments)
            return bytes(answer) if call == "read" else answer
        except OSError as error:
            return error.errno

    def compare(self) -> None:
        """All that can be seen of both is the same."""
        assert self.python.statistics() == self.native.statistics()
        ours, theirs = self.python._memmap, self.native.memmap
        assert ours.has_pages == theirs.has_pages
        if not ours.has_pages:
            return
        assert isinstance(ours, RecordMemmap)
        assert isinstance(theirs, RecordMemmap)
        assert counts_of(ours) == counts_of(theirs)
        for page in range(ours.geometry.page_count):
            pfn = ours.geometry.page_to_pfn(page)
            first, second = ours.page(pfn), theirs.page(pfn)
            assert comparable(first) == comparable(second), f"frame {pfn}"
            if first and second:
                assert ours.is_dirty(first) == theirs.is_dirty(second)
                assert bool(first.last_access_ns) == bool(second.last_access_ns)


def comparable(page: Page | None) -> Page | None:
    """A page structure without what two mounts never share."""
    return page and replace(page, generation=0, last_access_ns=0)


def steps(size_bytes: int) -> st.SearchStrategy[tuple[Any, ...]]:
    """Requests, at borders more often than elsewhere."""
    edges = [0, 4096, 2 * MIB, 4 * MIB, size_bytes]
    offsets = st.builds(
        lambda edge, by: max(0, edge + by), st.sampled_from(edges), st.integers(-9000, 9000)
    ) | st.integers(0, size_bytes + 5000)
    lengths = st.integers(1, 20_000) | st.sampled_from([1, 4096, 8192, 65536])
    data = st.builds(lambda length, byte: bytes([byte]) * length, lengths, st.integers(0, 255))
    return st.one_of(
        st.tuples(st.just("read"), offsets, lengths),
        st.tuples(st.just("write"), offsets, data),
        st.tuples(st.just("fsync")),
    )


@pytest.mark.slow
@pytest.mark.parametrize("points", [False, True], ids=["copying", "pointing"])
@pytest.mark.parametrize("page_size_bytes", POOL_BYTES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.word)
def test_the_same_requests_leave_the_same_traces(
    shm: Path, scheme: Scheme, page_size_bytes: int, points: bool
) -> None:
    size_bytes = POOL_BYTES[page_size_bytes]
    ours, theirs = shm / "python", shm / "native"
    ours.mkdir()
    theirs.mkdir()
    with (
        mapped_pool(ours, scheme, page_size_bytes, size_bytes) as python_pool,
        mapped_pool(theirs, scheme, page_size_bytes, size_bytes) as native_pool,
    ):
        pair = make_pair(python_pool, native_pool, points=points)

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(steps(pair.size_bytes), max_size=15))
        def run(requests: list[tuple[Any, ...]]) -> None:
            for request in requests:
                pair.both(*request)
            pair.compare()

        run()


def make_pair(python_pool: Pool, native_pool: Pool, *, points: bool) -> Pair:
    """Both engines, over two pools of one shape."""
    medium = native_pool.medium
    assert isinstance(medium, MappedMedium)
    memmap = open_memmap(python_pool)
    volume = BlockVolume(python_pool, memmap)
    python = PythonEngine(python_pool.medium, memmap, volume)
    return Pair(python, InProcess(native_pool, medium, points=points), volume.size_bytes)
