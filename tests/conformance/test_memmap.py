"""One suite for every memmap scheme and page size, against a model in plain Python."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kit.pages import counts_of, hottest_of
from kit.pools import mapped_pool
from pmemfs.dataplane.memmap import SharedMemmap
from pmemfs.engine.sharing import share_memmap, share_pool
from pmemfs.errors import NoPageStructures, NotInPool, PageReferences
from pmemfs.media.label import Scheme
from pmemfs.media.page import COUNTER_MAX, PageFlags
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Access, Memmap, effective_scheme, open_memmap
from pmemfs.memmap.none import NoMemmap
from pmemfs.memmap.on_demand import SECTION_BYTES, OnDemandMemmap
from pmemfs.memmap.pmem import PmemMemmap
from pmemfs.memmap.records import RecordMemmap, as_records
from pmemfs.memmap.scanning import PageCounts
from pmemfs.pfn import PAGE_STRUCTURE_BYTES, pfn_t_has_page, pfn_t_to_pfn
from pmemfs.pool import Pool
from pmemfs.units import GIB, KIB, MIB

WITH_PAGES = [(scheme, size) for scheme in (Scheme.PMEM, Scheme.ON_DEMAND)
              for size in (4 * KIB, 2 * MIB, GIB)]  # fmt: skip


@pytest.fixture(params=WITH_PAGES, ids=lambda p: f"{p[0].word}-{p[1] // KIB}K")
def pool(request: pytest.FixtureRequest, shm: os.PathLike[str]) -> Iterator[Pool]:
    """A mounted pool, whose memmap zone and data hold random bytes where there are any."""
    scheme, page_size_bytes = request.param
    with mapped_pool(shm, scheme, page_size_bytes) as made:  # type: ignore[arg-type]
        zone = made.zones.memmap
        made.medium.store(zone.offset_bytes, os.urandom(zone.size_bytes))
        made.medium.store(zone.end_bytes, os.urandom(4096))
        yield made


Opener = Callable[[Pool], Memmap]


def open_shared(pool: Pool) -> Memmap:
    """The page structures of a pool as the planes of a native mount share them."""
    assert isinstance(pool.medium, MappedMedium)
    shared = share_pool(pool, worker_count=1)
    return share_memmap(pool, pool.medium, shared)


@pytest.fixture(params=[open_memmap, open_shared], ids=["own", "shared"])
def opener(request: pytest.FixtureRequest) -> Opener:
    """Both ways to keep the page structures of a mount: for one process, and for two."""
    return cast(Opener, request.param)


@pytest.fixture
def memmap(pool: Pool, opener: Opener) -> RecordMemmap:
    opened = opener(pool)
    assert isinstance(opened, RecordMemmap)
    return opened


@pytest.fixture
def pages(memmap: RecordMemmap) -> list[int]:
    """Pages where something begins or ends: the zone, stretches and sections."""
    return interesting_pages(memmap)


def interesting_pages(memmap: RecordMemmap) -> list[int]:
    count = memmap.geometry.page_count
    section = max(1, (SECTION_BYTES >> 12) >> memmap.geometry.order)
    around = {edge + step for edge in (0, 1024, section, count) for step in (-2, -1, 0, 1)}
    return sorted(page for page in around if 0 <= page < count)


def refcount(memmap: RecordMemmap, pfn: int) -> int:
    page = memmap.page(pfn)
    return page.refcount if page else 0


def set_field(memmap: RecordMemmap, page: int, name: str, value: int) -> None:
    """What takes 4 billion transfers otherwise."""
    memory, at = memmap._locate(page)
    as_records(memory[at : at + PAGE_STRUCTURE_BYTES])[name] = value


# The model


@dataclass
class ModelPage:
    """What a page structure must say."""

    refcount: int = 0
    reads: int = 0
    writes: int = 0
    mapping: int = 0
    index: int = 0
    written_in: int | None = None
    touched: bool = False


@dataclass
class Model:
    """The protocol, in the most obvious way."""

    page_count: int
    pages: dict[int, ModelPage] = field(default_factory=dict)
    epoch: int = 1
    persisted: int = 0

    def get(self, page: int, access: Access, mapping: int, index: int) -> None:
        found = self.pages.setdefault(page, ModelPage())
        found.refcount += 1
        if mapping:
            found.mapping, found.index = mapping, index
        if access is not Access.PIN:
            found.touched = True
        if access is Access.READ:
            found.reads += 1
        if access is Access.WRITE:
            found.writes += 1
            found.written_in = self.epoch

    def is_dirty(self, page: ModelPage) -> bool:
        return page.written_in is not None and page.written_in > self.persisted

    def counts(self) -> PageCounts:
        known = self.pages.values()
        dirty = sum(map(self.is_dirty, known))
        return PageCounts(
            total=self.page_count,
            uninitialised=self.page_count - len(known),
            clean=len(known) - dirty,
            dirty=dirty,
            referenced=sum(page.touched for page in known),
            in_use=sum(page.refcount > 0 for page in known),
        )


def machine_of(make: Callable[[], RecordMemmap]) -> type[RuleBasedStateMachine]:
    """A state machine that drives a memmap and its model alike."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.memmap = make()
            self.geometry = self.memmap.geometry
            self.model = Model(self.geometry.page_count)
            self.pages = interesting_pages(self.memmap)
            self.open_epochs: list[int] = []

        def pfn(self, page: int, within: int) -> int:
            return self.geometry.page_to_pfn(page) + within % (1 << self.geometry.order)

        @rule(
            where=st.integers(0, 99),
            within=st.integers(0, 1 << 18),
            access=st.sampled_from(Access),
            owner=st.tuples(st.integers(0, 3), st.integers(0, 1 << 40)),
        )
        def get_page(self, where: int, within: int, access: Access, owner: tuple[int, int]) -> None:
            page = self.pages[where % len(self.pages)]
            self.memmap.get_page(self.pfn(page, within), access, *owner)
            self.model.get(page, access, *owner)

        @rule(
            where=st.integers(0, 99),
            within=st.integers(0, 1 << 18),
            count=st.integers(1, 6),
            access=st.sampled_from(Access),
            owner=st.tuples(st.integers(0, 3), st.integers(0, 1 << 40)),
        )
        def get_pages(
            self, where: int, within: int, count: int, access: Access, owner: tuple[int, int]
        ) -> None:
            page = self.pages[where % len(self.pages)]
            count = min(count, self.geometry.page_count - page)
            pfn = self.pfn(page, within)
            last = self.pfn(page + count - 1, within // 2)
            self.memmap.get_pages(pfn, max(1, last - pfn + 1), access, *owner)
            for position in range(count if last >= pfn else 1):
                self.model.get(page + position, access, owner[0], owner[1] + position)

        @rule(where=st.integers(0, 99), within=st.integers(0, 1 << 18))
        def put_page(self, where: int, within: int) -> None:
            page = self.pages[where % len(self.pages)]
            known = self.model.pages.get(page)
            if known and known.refcount:
                self.memmap.put_page(self.pfn(page, within))
                known.refcount -= 1
            else:
                with pytest.raises(PageReferences):
                    self.memmap.put_page(self.pfn(page, within))

        @rule(where=st.integers(0, 99), count=st.integers(1, 6))
        def put_pages(self, where: int, count: int) -> None:
            page = self.pages[where % len(self.pages)]
            count = min(count, self.geometry.page_count - page)
            known = [self.model.pages.get(page + position) for position in range(count)]
            pfn_count = count << self.geometry.order
            if all(one and one.refcount for one in known):
                self.memmap.put_pages(self.pfn(page, 0), pfn_count)
                for one in known:
                    assert one is not None
                    one.refcount -= 1
            else:
                with pytest.raises(PageReferences):
                    self.memmap.put_pages(self.pfn(page, 0), pfn_count)

        @rule()
        def begin_persist(self) -> None:
            epoch = self.memmap.begin_persist()
            assert epoch == self.model.epoch
            self.model.epoch += 1
            self.open_epochs.append(epoch)

        @rule(which=st.integers(0, 9))
        def end_persist(self, which: int) -> None:
            if self.open_epochs:
                epoch = self.open_epochs.pop(which % len(self.open_epochs))
                self.memmap.end_persist(epoch)
                self.model.persisted = max(self.model.persisted, epoch)

        @invariant()
        def counts_agree(self) -> None:
            assert counts_of(self.memmap) == self.model.counts()

        def teardown(self) -> None:
            for page in self.pages:
                self.page_agrees(page)
            hottest = hottest_of(self.memmap, 5)
            heat = sorted(
                ((-(one.reads + one.writes), page) for page, one in self.model.pages.items()
                 if one.reads + one.writes),
            )[:5]  # fmt: skip
            assert [report.pfn for report in hottest] == [self.pfn(page, 0) for _, page in heat]
            assert [-(r.reads + r.writes) for r in hottest] == [total for total, _ in heat]

        def page_agrees(self, page: int) -> None:
            found = self.memmap.page(self.pfn(page, 0))
            model = self.model.pages.get(page)
            assert (found is None) == (model is None)
            if found is None or model is None:
                return
            assert found.order == self.geometry.order
            assert (found.refcount, found.reads, found.writes) == (
                model.refcount, model.reads, model.writes,
            )  # fmt: skip
            assert (found.mapping, found.index) == (model.mapping, model.index)
            assert self.memmap.is_dirty(found) == self.model.is_dirty(model)
            assert (found.last_access_ns > 0) == model.touched

    return Machine


@pytest.mark.slow
def test_any_sequence_of_calls_answers_as_the_model_does(pool: Pool, opener: Opener) -> None:
    generation = iter(range(pool.label.generation, 1 << 64))

    def remounted() -> RecordMemmap:
        """A new mount, over whatever the last one left in the zone."""
        pool.label = pool.label.__class__(
            **{
                name: getattr(pool.label, name)
                for name in pool.label._fields
                if name != "generation"
            },
            generation=next(generation),
        )
        memmap = opener(pool)
        assert isinstance(memmap, RecordMemmap)
        return memmap

    run_state_machine_as_test(
        machine_of(remounted),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# What the model does not say


def test_each_scheme_has_its_own_class(pool: Pool, memmap: RecordMemmap) -> None:
    expected = {Scheme.PMEM: PmemMemmap, Scheme.ON_DEMAND: OnDemandMemmap}
    assert type(memmap) in (expected[pool.scheme], SharedMemmap)
    assert memmap.has_pages


def test_garbage_in_the_pool_is_never_believed(
    pool: Pool, memmap: RecordMemmap, pages: list[int]
) -> None:
    assert counts_of(memmap).uninitialised == memmap.geometry.page_count
    for page in pages:
        pfn = memmap.geometry.page_to_pfn(page)
        assert memmap.page(pfn) is None
        with pytest.raises(PageReferences, match="no reference to drop"):
            memmap.put_page(pfn)
    memmap.get_page(memmap.geometry.page_to_pfn(pages[-1]))
    counts = counts_of(memmap)
    assert (counts.uninitialised, counts.in_use) == (counts.total - 1, 1)
    fresh = memmap.page(memmap.geometry.page_to_pfn(pages[-1]))
    assert fresh is not None
    assert (fresh.flags, fresh.reads, fresh.writes, fresh.mapping, fresh.private) == (0,) * 5


def test_a_new_mount_knows_nothing_of_the_last_ones_pages(pool: Pool, opener: Opener) -> None:
    first = opener(pool)
    pfn = pool.first_data_pfn
    first.get_pages(pfn, min(3, pool.data_pfn_count), Access.WRITE, 2, 0)
    pool.end_mount()
    pool.begin_mount()
    second = opener(pool)
    assert counts_of(second).uninitialised == counts_of(second).total
    assert second.page(pfn) is None
    with pytest.raises(PageReferences):
        second.put_page(pfn)


def test_opening_costs_no_memory_and_a_page_only_what_is_around_it(
    pool: Pool, shm: os.PathLike[str], opener: Opener
) -> None:
    with mapped_pool(
        shm, pool.scheme, pool.label.page_size_bytes, 64 * GIB  # type: ignore[arg-type]
    ) as large:  # fmt: skip
        before = os.stat(large.medium.name).st_blocks * 512
        memmap = opener(large)
        assert counts_of(memmap).uninitialised == counts_of(memmap).total
        memmap.get_page(int(large.first_data_pfn) + large.data_pfn_count - 1)
        assert os.stat(large.medium.name).st_blocks * 512 - before <= 128 * KIB
        if isinstance(memmap, OnDemandMemmap):
            assert memmap.section_count == 1


def test_no_structure_is_touched_before_there_is_memory_for_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[range] = []

    def reserve(offset_bytes: int, length_bytes: int) -> None:
        reserved.append(range(offset_bytes, offset_bytes + length_bytes))

    monkeypatch.setattr(pool.medium, "reserve", reserve)
    memmap = open_memmap(pool)
    first, last = int(pool.first_data_pfn), int(pool.first_data_pfn) + pool.data_pfn_count - 1
    memmap.get_page(first)
    memmap.get_pages(last, 1)
    memmap.get_pages(first, pool.data_pfn_count)
    if pool.scheme is not Scheme.PMEM:
        assert reserved == []
        return
    structures = range(pool.zones.memmap.offset_bytes, pool.zones.memmap.end_bytes)
    assert sorted({part.start for part in reserved}) == list(structures[:: 64 * KIB])
    assert sum(map(len, reserved)) == len(structures), "each stretch is reserved once"


def test_a_shared_structure_gets_memory_before_it_is_touched(shm: Path) -> None:
    with mapped_pool(shm, Scheme.PMEM, 4 * KIB) as pool:
        memmap = open_shared(pool)
        zone = pool.zones.memmap

        def stretches() -> list[int]:
            """Which 64 KiB of the zone have any memory."""
            with open(pool.medium.name, "rb") as file:
                return [
                    start // (64 * KIB)
                    for start in range(0, zone.size_bytes, 64 * KIB)
                    if os.lseek(file.fileno(), zone.offset_bytes + start, os.SEEK_DATA)
                    < min(zone.offset_bytes + start + 64 * KIB, zone.end_bytes)
                ]

        first = int(pool.first_data_pfn)
        assert stretches() == []
        memmap.get_page(first + 1024)
        assert stretches() == [1]
        memmap.get_pages(first + 3 * 1024 - 1, 2)
        assert stretches() == [1, 2, 3]


def test_a_failing_range_takes_no_reference_at_all(memmap: RecordMemmap, pages: list[int]) -> None:
    count = min(4, memmap.geometry.page_count)
    first, last = memmap.geometry.page_to_pfn(0), memmap.geometry.page_to_pfn(count - 1)
    memmap.get_page(last)
    set_field(memmap, count - 1, "refcount", COUNTER_MAX)
    with pytest.raises(PageReferences, match="maximum") as caught:
        memmap.get_pages(first, count << memmap.geometry.order, Access.WRITE, 2, 0)
    assert caught.value.errno == errno.EOVERFLOW
    with pytest.raises(PageReferences, match="maximum"):
        memmap.get_page(last, Access.WRITE)
    assert [refcount(memmap, memmap.geometry.page_to_pfn(page)) for page in range(count)] == [
        *[0] * (count - 1),
        COUNTER_MAX,
    ]
    assert counts_of(memmap).dirty == counts_of(memmap).referenced == 0
    page = memmap.page(last)
    assert page is not None
    assert (page.mapping, page.writes) == (0, 0)


def test_a_failing_put_of_a_range_drops_no_reference_at_all(memmap: RecordMemmap) -> None:
    count = min(4, memmap.geometry.page_count)
    pfn_count = count << memmap.geometry.order
    first = memmap.geometry.page_to_pfn(0)
    memmap.get_pages(first, pfn_count)
    memmap.put_page(memmap.geometry.page_to_pfn(count - 1))
    with pytest.raises(PageReferences, match="no reference to drop"):
        memmap.put_pages(first, pfn_count)
    assert counts_of(memmap).in_use == count - 1


def test_a_page_is_dirty_until_what_was_written_before_a_persist_is_durable(
    memmap: RecordMemmap,
) -> None:
    pfn, other = memmap.geometry.page_to_pfn(0), memmap.geometry.page_to_pfn(1)
    memmap.get_page(pfn, Access.WRITE)
    memmap.put_page(pfn)
    epoch = memmap.begin_persist()
    memmap.get_page(other, Access.WRITE)
    assert counts_of(memmap).dirty == 2
    memmap.end_persist(epoch)
    assert counts_of(memmap).dirty == 1, "what was written meanwhile is not durable"
    page = memmap.page(other)
    assert page is not None
    assert memmap.is_dirty(page)
    memmap.end_persist(memmap.begin_persist())
    assert counts_of(memmap).dirty == 0


def test_a_page_that_is_written_again_meanwhile_stays_dirty(memmap: RecordMemmap) -> None:
    pfn = memmap.geometry.page_to_pfn(0)
    memmap.get_page(pfn, Access.WRITE)
    epoch = memmap.begin_persist()
    memmap.get_page(pfn, Access.WRITE)
    memmap.end_persist(epoch)
    assert counts_of(memmap).dirty == 1


def test_of_two_persists_the_later_covers_the_earlier(memmap: RecordMemmap) -> None:
    first = memmap.begin_persist()
    memmap.get_page(memmap.geometry.page_to_pfn(0), Access.WRITE)
    second = memmap.begin_persist()
    memmap.end_persist(second)
    memmap.end_persist(first)
    assert counts_of(memmap).dirty == 0


def test_the_activity_of_a_range_is_that_of_its_pages_and_makes_no_structure(
    memmap: RecordMemmap, pages: list[int]
) -> None:
    first, per_page = int(memmap.geometry.first_pfn), 1 << memmap.geometry.order
    taken = memmap.memory()
    for page in pages:
        assert memmap.activity(first + page * per_page, per_page) == (False, 0, 0)
    assert memmap.memory() == taken
    pfn = first + pages[0] * per_page
    memmap.get_pages(pfn, per_page, Access.WRITE)
    is_referenced, accessed_ns, writes = memmap.activity(pfn, per_page)
    assert (is_referenced, writes) == (True, 1)
    memmap.put_pages(pfn, per_page)
    assert memmap.activity(pfn, 2 * per_page) == (False, accessed_ns, 1)
    memmap.get_pages(pfn, per_page, Access.READ)
    assert memmap.activity(pfn, per_page)[1] >= accessed_ns
    memmap.put_pages(pfn, per_page)


def test_a_pin_is_no_access(memmap: RecordMemmap) -> None:
    pfn = memmap.geometry.page_to_pfn(1)
    memmap.get_page(pfn, Access.PIN)
    page = memmap.page(pfn)
    assert page is not None
    assert (page.flags, page.reads, page.writes, page.last_access_ns) == (0, 0, 0, 0)
    assert hottest_of(memmap, 10) == []


def test_flags_and_times_say_what_happened(memmap: RecordMemmap) -> None:
    before = time.time_ns()
    for page, access in ((0, Access.READ), (1, Access.WRITE)):
        memmap.get_page(memmap.geometry.page_to_pfn(page), access)
    read, written = (memmap.page(memmap.geometry.page_to_pfn(page)) for page in (0, 1))
    assert read is not None
    assert written is not None
    assert read.flags == PageFlags.REFERENCED
    assert written.flags == PageFlags.REFERENCED | PageFlags.DIRTY
    for found in (read, written):
        assert before <= found.last_access_ns <= time.time_ns()


def test_pages_that_get_other_content_count_anew_and_stay_whose_they_are(
    memmap: RecordMemmap, pages: list[int]
) -> None:
    pfn, untouched = (memmap.geometry.page_to_pfn(page) for page in (pages[0], pages[-1]))
    for access in (Access.READ, Access.READ, Access.WRITE):
        memmap.get_page(pfn, access, 5, 7)
    memmap.put_page(pfn)
    memmap.count_anew(pfn, 1, 3, 4)
    page = memmap.page(pfn)
    assert page is not None
    assert (page.last_access_ns, page.reads, page.writes) == (0, 3, 4)
    assert (page.refcount, page.mapping, page.index) == (2, 5, 7)
    memmap.count_anew(untouched, 1, 3, 4)
    assert memmap.page(untouched) is None
    assert memmap.usage(pfn) == (2, 0, 3, 4)
    assert memmap.usage(untouched) is None
    with pytest.raises(NotInPool):
        memmap.usage(memmap.geometry.page_to_pfn(0) - 1)


@pytest.mark.parametrize("as_range", [False, True])
def test_counters_stay_at_their_maximum(memmap: RecordMemmap, as_range: bool) -> None:
    pfn = memmap.geometry.page_to_pfn(0)
    memmap.get_page(pfn)
    for name in ("reads", "writes"):
        set_field(memmap, 0, name, COUNTER_MAX - 1)
    for access in (Access.READ, Access.WRITE):
        for _ in range(3):
            if as_range:
                memmap.get_pages(pfn, 2 << memmap.geometry.order, access)
            else:
                memmap.get_page(pfn, access)
    page = memmap.page(pfn)
    assert page is not None
    assert (page.reads, page.writes) == (COUNTER_MAX, COUNTER_MAX)
    assert hottest_of(memmap, 1)[0].reads == COUNTER_MAX


def test_owner_and_index_are_recorded_and_kept_by_whoever_knows_no_better(
    memmap: RecordMemmap,
) -> None:
    pfn = memmap.geometry.page_to_pfn(0)
    memmap.get_pages(pfn, 2 << memmap.geometry.order, Access.READ, mapping=9, index=40)
    memmap.get_page(pfn, Access.WRITE)
    for page, index in ((0, 40), (1, 41)):
        found = memmap.page(memmap.geometry.page_to_pfn(page))
        assert found is not None
        assert (found.mapping, found.index) == (9, index)


def test_outside_the_data_nothing_is_a_page(pool: Pool, memmap: RecordMemmap) -> None:
    first, end = int(pool.first_data_pfn), int(pool.first_data_pfn) + pool.data_pfn_count
    for pfn in (first - 1, end, 0, -1, 1 << 60):
        for asked in (memmap.get_page, memmap.put_page, memmap.page, memmap.pfn_t):
            with pytest.raises(NotInPool):
                asked(pfn)
    for start, count in ((first - 1, 2), (end - 1, 2), (first, pool.data_pfn_count + 1)):
        for ranged in (memmap.get_pages, memmap.put_pages):
            with pytest.raises(NotInPool):
                ranged(start, count)
    assert counts_of(memmap).uninitialised == counts_of(memmap).total


def test_a_word_leads_to_its_page_and_back(memmap: RecordMemmap, pages: list[int]) -> None:
    for page in pages:
        pfn = memmap.geometry.page_to_pfn(page)
        word = memmap.pfn_t(pfn + (1 << memmap.geometry.order) - 1)
        assert pfn_t_has_page(word)
        assert memmap.pfn_t_to_page(word) == page
        assert pfn_t_to_pfn(word, memmap.geometry) == pfn


def test_where_structures_are_in_the_pool_a_word_is_the_offset_of_one(
    pool: Pool, opener: Opener
) -> None:
    memmap = opener(pool)
    word = memmap.pfn_t(int(pool.first_data_pfn) + pool.data_pfn_count - 1)
    memmap.get_page(int(pool.first_data_pfn) + pool.data_pfn_count - 1, Access.PIN, mapping=0xABCD)
    if pool.scheme is not Scheme.PMEM:
        assert pool.zones.memmap.size_bytes == 0, "the offset is of no byte of the pool"
        return
    raw = bytes(pool.medium.read(int(word), PAGE_STRUCTURE_BYTES))
    assert int.from_bytes(raw[:8], "little") == pool.label.generation
    assert (0xABCD).to_bytes(8, "little") in raw
    assert pool.zones.memmap.contains(int(word), PAGE_STRUCTURE_BYTES)


def test_the_hottest_pages_come_first_and_equals_by_their_place(
    memmap: RecordMemmap, pages: list[int]
) -> None:
    chosen = pages[:2] + pages[-2:]
    chosen = sorted(set(chosen))
    for heat, page in enumerate(chosen):
        for _ in range(min(heat, 2) + 1):
            memmap.get_page(memmap.geometry.page_to_pfn(page), Access.READ)
    found = [memmap.geometry.pfn_to_page(report.pfn) for report in hottest_of(memmap, 10)]
    assert found == sorted(chosen, key=lambda page: (-min(chosen.index(page), 2), page))
    assert hottest_of(memmap, 0) == []
    assert len(hottest_of(memmap, 1)) == 1
    assert hottest_of(memmap, 1)[0].reads == min(len(chosen) - 1, 2) + 1


def test_dropping_what_is_idle_keeps_what_is_in_use_or_dirty(memmap: RecordMemmap) -> None:
    geometry = memmap.geometry
    section = max(1, (SECTION_BYTES >> 12) >> geometry.order)
    last = geometry.page_count - 1
    held, idle = geometry.page_to_pfn(0), geometry.page_to_pfn(last)
    assert last // section > 0, "the pool must have two sections"
    memmap.get_page(held, Access.READ)
    memmap.get_page(idle, Access.WRITE)
    memmap.put_page(idle)
    assert memmap.drop_idle(0) == 0
    memmap.end_persist(memmap.begin_persist())
    assert memmap.drop_idle(3600) == 0
    dropped = memmap.drop_idle(0)
    assert refcount(memmap, held) == 1
    if isinstance(memmap, OnDemandMemmap):
        assert memmap.section_count == 1
        assert dropped == (last % section) + 1
        assert counts_of(memmap).uninitialised == geometry.page_count - 1
    else:
        assert dropped == 0
    memmap.get_page(idle)
    assert refcount(memmap, idle) == 1


def test_a_read_only_pool_keeps_its_page_structures_in_dram(pool: Pool, opener: Opener) -> None:
    pool.medium.read_only = True
    assert effective_scheme(pool) is Scheme.ON_DEMAND
    memmap = opener(pool)
    before = bytes(pool.medium.read(pool.zones.memmap.offset_bytes, 4096))
    memmap.get_page(int(pool.first_data_pfn))
    assert bytes(pool.medium.read(pool.zones.memmap.offset_bytes, 4096)) == before


# No page structures


@pytest.fixture(params=[4 * KIB, 2 * MIB, GIB])
def without(request: pytest.FixtureRequest, shm: os.PathLike[str]) -> Iterator[NoMemmap]:
    with mapped_pool(shm, Scheme.NONE, request.param) as made:  # type: ignore[arg-type]
        assert made.zones.memmap.size_bytes == 0
        opened = open_memmap(made)
        assert isinstance(opened, NoMemmap)
        yield opened


def test_whatever_needs_a_page_says_which_scheme_would_serve(without: NoMemmap) -> None:
    asked: list[Callable[[], object]] = [
        lambda: without.get_page(600),
        lambda: without.put_page(600),
        lambda: without.get_pages(600, 2, Access.READ, 2, 0),
        lambda: without.put_pages(600, 2),
        lambda: without.page(600),
        lambda: without.pfn_t_to_page(without.pfn_t(600)),
        lambda: counts_of(without),
        lambda: hottest_of(without, 3),
    ]
    for ask in asked:
        with pytest.raises(NoPageStructures) as caught:
            ask()
        assert caught.value.errno == errno.EOPNOTSUPP
        assert "'pmem' and 'on-demand' do" in str(caught.value)


def test_without_page_structures_a_word_still_answers_its_pfn(without: NoMemmap) -> None:
    word = without.pfn_t(12345)
    assert not pfn_t_has_page(word)
    assert pfn_t_to_pfn(word) == 12345
    assert without.geometry is None
    assert not without.has_pages


def test_without_page_structures_fsync_has_nothing_to_remember(without: NoMemmap) -> None:
    without.end_persist(without.begin_persist())
    assert without.drop_idle(0) == 0


def test_one_page_and_a_range_work_on_the_same_structures(memmap: RecordMemmap) -> None:
    pfn, page_pfns = int(memmap.geometry.first_pfn), 1 << memmap.geometry.order
    for page in range(2):
        memmap.get_page(pfn + page * page_pfns, Access.WRITE, 2, page)
    memmap.put_pages(pfn, 2 * page_pfns)
    memmap.get_pages(pfn, 2 * page_pfns, Access.READ, 3, 10)
    found = memmap.page(pfn + page_pfns)
    assert found is not None
    assert (found.refcount, found.reads, found.writes) == (1, 1, 1)
    assert (found.mapping, found.index) == (3, 11)
    for page in range(2):
        memmap.put_page(pfn + page * page_pfns)
    assert counts_of(memmap).in_use == 0
