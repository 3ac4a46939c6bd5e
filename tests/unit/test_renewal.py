"""What a killed data plane has left keeps nothing busy, once page structures have a new generation.

The killed worker is a raised count and an odd section word here, which is all that it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kit.cached import cached
from kit.data_plane import InProcess, SharedFiles, in_process, shared_files
from kit.fs_tree import FILE
from kit.pools import POOL_BYTES, SCHEMES
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import SectionState
from pmemfs.dataplane.native import store_word
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Access, Memmap
from pmemfs.pool import Pool
from pmemfs.pool.growth import Growth
from pmemfs.units import GIB, KIB, MIB
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.filesystem import FileSystem

WITH_PAGES = (Scheme.PMEM, Scheme.ON_DEMAND)
PAGE_SIZES = (4 * KIB, 2 * MIB, GIB)
FRAMES = 16


def leave_section_odd(shared: SharedMemory, worker: int = 0) -> None:
    at = shared.areas.slots + worker * layouts.SLOT_BYTES
    store_word(shared.memory, at + layouts.SLOT_HEAD.offset_of("section"), 2 * 7 + 1)


def first_frame(pool: Pool) -> int:
    return int(pool.first_data_pfn)


# Every scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_section_of_a_dead_worker_holds_no_grace_period(shm: Path, scheme: Scheme) -> None:
    with in_process(shm, scheme) as (_, engine):
        leave_section_odd(engine.shared, 1)
        grace = engine.shared.begin_grace()
        assert not engine.shared.is_over(grace)
        engine.control.forget_workers()
        assert engine.shared.is_over(grace)
        assert engine.shared.begin_grace().sections == ()
        # The next data plane goes on with the same slots.
        engine.write(4 * KIB, b"served again")
        assert engine.read(4 * KIB, 12) == b"served again"
        assert engine.forwarded == 0


@pytest.mark.parametrize("page_size_bytes", PAGE_SIZES)
@pytest.mark.parametrize("scheme", WITH_PAGES)
def test_references_of_a_dead_worker_are_forgotten(
    shm: Path, scheme: Scheme, page_size_bytes: int
) -> None:
    with in_process(shm, scheme, page_size_bytes, POOL_BYTES[page_size_bytes]) as (pool, engine):
        memmap, pfn = engine.memmap, first_frame(pool)
        last = pfn + pool.data_pfn_count - 1
        for held in (pfn, last):
            memmap.get_page(held, Access.WRITE)
        generation = pool.label.generation
        engine.control.forget_workers()
        assert pool.label.generation == engine.shared.header_word("generation") == generation + 1
        for held in (pfn, last):
            assert not memmap.are_referenced(held, 1)
            assert memmap.page(held) is None
        # Both planes count in the new generation.
        engine.write(0, bytes(4 * KIB))
        memmap.get_page(pfn)
        page = memmap.page(pfn)
        assert page is not None
        assert (page.refcount, page.writes) == (1, 1)
        memmap.put_page(pfn)
        assert not memmap.are_referenced(pfn, 1)


def test_sections_in_memory_are_given_back_even_if_one_was_just_being_dropped(shm: Path) -> None:
    with in_process(shm, Scheme.ON_DEMAND) as (pool, engine):
        pfn = first_frame(pool)
        engine.memmap.get_page(pfn)
        engine.shared.memory[engine.shared.areas.sections] = SectionState.GOING
        engine.control.forget_workers()
        assert engine.shared.memory[engine.shared.areas.sections] == SectionState.ABSENT
        assert engine.memmap.memory().dram_bytes == 0
        # Idle sections are found by what structures say, whatever their generation.
        engine.memmap.get_page(pfn)
        engine.memmap.put_page(pfn)
        assert engine.memmap.drop_idle(-1) == 0
        assert engine.memmap.drop_idle(-1) > 0


@pytest.mark.parametrize("scheme", WITH_PAGES)
def test_who_holds_pages_holds_them_in_the_new_generation_too(shm: Path, scheme: Scheme) -> None:
    with in_process(shm, scheme) as (pool, engine):
        memmap, pfn = engine.memmap, first_frame(pool)
        memmap.get_pages(pfn, FRAMES)
        engine.control.holders.append(lambda: memmap.get_pages(pfn, FRAMES))
        engine.control.forget_workers()
        assert memmap.are_referenced(pfn + FRAMES - 1, 1)
        assert not memmap.are_referenced(pfn + FRAMES, 1)
        memmap.put_pages(pfn, FRAMES)
        assert not memmap.are_referenced(pfn, FRAMES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pool_that_is_only_read_keeps_its_label(shm: Path, scheme: Scheme) -> None:
    with in_process(shm, scheme) as (pool, _):
        path, label = pool.medium.name, pool.label
        with closing(MappedMedium.open(_copy(path), read_only=True)) as medium:
            engine = InProcess(Pool.open(medium), medium)
            if engine.memmap.has_pages:
                engine.memmap.get_page(first_frame(pool))
            engine.control.forget_workers()
            assert not engine.memmap.are_referenced(first_frame(pool), 1)
            assert Pool.open(medium).label == label


def _copy(path: str) -> str:
    copied = Path(path + ".copy")
    copied.write_bytes(Path(path).read_bytes())
    return str(copied)


# Frames of files


@pytest.fixture(params=WITH_PAGES, ids=lambda scheme: scheme.word)
def files(shm: Path, request: pytest.FixtureRequest) -> Iterator[SharedFiles]:
    with shared_files(shm, request.param) as made:
        yield made


def busy_frames(fs: FileSystem) -> int:
    while fs.tidy() or fs.go_on():
        pass
    return fs.store.busy.frame_count


def removed_run(fs: FileSystem, memmap: Memmap) -> Run:
    """A run of a file that is removed while somebody holds its pages."""
    number = fs.make(ROOT, b"f", FILE)
    fs.write(number, 0, bytes(FRAMES * 4 * KIB))
    (run,) = (Run(one.pfn, one.frame_count) for one in fs.extents(number))
    memmap.get_pages(*run)
    fs.unlink(ROOT, b"f")
    return run


def test_frames_that_a_dead_worker_held_are_free_after_the_renewal(files: SharedFiles) -> None:
    run = removed_run(files.fs, files.memmap)
    leave_section_odd(files.shared)
    assert busy_frames(files.fs) == run.frame_count
    files.engine().forget_workers()
    assert busy_frames(files.fs) == 0


def test_a_pinned_page_stays_unavailable_through_a_renewal(files: SharedFiles) -> None:
    run, engine = removed_run(files.fs, files.memmap), files.engine()
    engine.holders.append(lambda: files.memmap.get_pages(*run))
    engine.forget_workers()
    assert busy_frames(files.fs) == run.frame_count
    files.memmap.put_pages(*run)
    assert busy_frames(files.fs) == 0


# Caches


def test_a_set_that_a_dead_worker_has_locked_is_free_again(shm: Path) -> None:
    with cached(shm) as cache:
        cache.shared.cache_locks.cast("Q")[cache.ground.set_of(3)] = 1 + 1
        assert not cache.locks.lock(cache.ground.set_of(3))
        cache.shared.forget_workers()
        assert cache.locks.lock(cache.ground.set_of(3))


def test_a_set_that_a_dead_daemon_has_locked_is_free_again(shm: Path) -> None:
    with cached(shm) as cache:
        number = cache.ground.set_of(3)
        other = number ^ 1
        assert cache.locks.lock(number)
        cache.shared.cache_locks.cast("Q")[other] = 1 + 1
        cache.shared.forget_control()
        assert not any(cache.shared.cache_groups)
        cache.shared.free_control_locks()
        assert cache.locks.holder(number) == 0
        # That worker lives, and knows nothing of the daemon.
        assert cache.locks.holder(other) == 1 + 1


# A dead daemon


def test_no_worker_waits_for_a_section_that_a_dead_daemon_was_dropping(shm: Path) -> None:
    with in_process(shm, Scheme.ON_DEMAND) as (_, engine):
        engine.shared.memory[engine.shared.areas.sections] = SectionState.GOING
        engine.shared.forget_control()
        engine.write(0, b"not in vain")
        assert engine.read(0, 11) == b"not in vain"
        assert engine.forwarded == 0


# Growth


def test_a_growth_that_is_under_way_takes_the_new_generation_with_it(shm: Path) -> None:
    """Otherwise the first mount of the grown pool would take structures of this mount for its own,
    if a power failure left only the label that was announced."""
    with in_process(shm, size_bytes=16 * MIB) as (pool, _):
        medium = pool.medium
        assert isinstance(medium, MappedMedium)
        medium.extend(32 * MIB)
        growth = Growth(pool, 32 * MIB, 16 * MIB, is_mounted=True)
        pool.renew()
        growth.announce()
        with torn(medium, 0):
            assert Pool.open(medium).label.generation == pool.label.generation
        generation = pool.renew()
        # The power fails while the label in front is being written.
        with torn(medium, 0):
            assert Pool.open(medium).label.pool_size_bytes == 32 * MIB
            assert Pool.open(medium).label.generation == generation
        growth.commit()
        assert Pool.open(medium).damaged_copies == []
        assert pool.label.generation == Pool.open(medium).label.generation == generation
        pool.renew()
        assert Pool.open(medium).label == pool.label
        assert pool.label.pool_size_bytes == 32 * MIB


@contextmanager
def torn(medium: MappedMedium, offset_bytes: int) -> Iterator[None]:
    """While this lasts, a label is damaged."""
    before = bytes(medium.read(offset_bytes, 4 * KIB))
    medium.store(offset_bytes, b"\xa5" * 4 * KIB)
    yield
    medium.store(offset_bytes, before)
