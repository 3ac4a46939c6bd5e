"""Places that are reserved and published natively, beside workers, and as `Index` does it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.cached import Cached, cached
from pmemfs.dataplane.layouts import Presence
from pmemfs.dataplane.native import CachePlaces
from pmemfs.media.cache import TagState
from pmemfs.media.label import Scheme
from pmemfs.memmap import Access
from pmemfs.units import GIB, KIB
from pmemfs.volume.cache.eviction import Eviction
from pmemfs.volume.cache.groups import SEEING, SEEN, UNSEEN, Groups
from pmemfs.volume.cache.index import Index, Place
from pmemfs.volume.onefile import INODE

BLOCK = 4 * KIB


def places_of(cache: Cached, state: int = SEEN) -> CachePlaces:
    """Of the same kind as a mount has; all groups are in one state."""
    states = bytearray([state]) * cache.ground.group_count
    return cache.published.places(cache.medium, states)


def index_of(cache: Cached) -> Index:
    """The reference."""
    groups = Groups(cache.medium, cache.ground, is_settled=True)
    return Index(cache.medium, cache.memmap, cache.ground, cache.published.locks(), groups)


def fill(cache: Cached, offset: int, block: int) -> None:
    """What the origin has of a block."""
    cache.medium.store(offset, block.to_bytes(8, "little") * (cache.block_bytes // 8))


@contextmanager
def pair(shm: Path, scheme: Scheme) -> Iterator[list[Cached]]:
    """Two caches of three sets that are the same."""
    for name in "ab":
        (shm / name).mkdir(exist_ok=True)
    with (
        cached(shm / "a", scheme=scheme, set_count=3, size_bytes=GIB) as first,
        cached(shm / "b", scheme=scheme, set_count=3, size_bytes=GIB) as second,
    ):
        yield [first, second]


WAYS_OF_A_SET = st.lists(
    st.tuples(st.sampled_from([None, *TagState]), st.integers(0, 3), st.booleans()),
    min_size=16, max_size=16,
)  # fmt: skip


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(ways=WAYS_OF_A_SET, order=st.randoms(use_true_random=False), is_there=st.booleans())
@pytest.mark.parametrize("scheme", [Scheme.PMEM, Scheme.ON_DEMAND], ids=lambda s: s.word)
def test_the_same_place_is_chosen_as_by_the_index(
    shm: Path, scheme: Scheme, ways: list[tuple[TagState | None, int, bool]],
    order: random.Random, is_there: bool,
) -> None:  # fmt: skip
    with pair(shm, scheme) as caches:
        blocks = caches[0].blocks_of_set(1, 18)
        reads = [way for way, (_, count, _) in enumerate(ways) for _ in range(count)]
        order.shuffle(reads)
        for cache in caches:
            for way, (state, _, _) in enumerate(ways):
                if state is not None:
                    cache.plant(blocks[way], bytes(BLOCK), way=way, state=state)
            for way in reads:
                if ways[way][0] is not None:
                    cache.read(blocks[way] * BLOCK, BLOCK)
            for way, (_, _, is_held) in enumerate(ways):
                if is_held:
                    cache.hold(1, way)
        wanted = blocks[0] if is_there and ways[0][0] is not None else blocks[17]
        native, reference = caches
        places, index = places_of(native), index_of(reference)
        (offset,) = places.reserve([wanted], INODE)
        victim = Eviction(reference.memmap, reference.ground).choose
        if wanted == blocks[0]:
            # What is there is not for this way.
            assert offset == 0
            assert places.may_have(wanted)
        else:
            assert not places.may_have(wanted)
            place = index.reserve(wanted, victim, Access.READ)
            if offset:
                assert place is not None
                assert place.pool_offset == offset
                check_page(native, reference, place)
            # The spare place is what the native way insists on; the index does without it.
            assert place is not None or not offset
            if offset and place:
                for cache in caches:
                    fill(cache, offset, wanted)
                assert places.publish([wanted], [offset]) == [True]
                assert index.publish(place, wanted, TagState.CLEAN, expected=None)
                assert native.words(1) == reference.words(1)
                assert places.publish([wanted], [offset]) == [False]
                places.release([offset])
            if place:
                index.release(place)
        for cache in caches:
            for way, (_, _, is_held) in enumerate(ways):
                if is_held:
                    cache.drop(1, way)
            cache.assert_nothing_is_left()


def check_page(native: Cached, reference: Cached, place: Place) -> None:
    """The page of a place says the same in both."""
    pfn = place.pool_offset // BLOCK
    one, other = native.memmap.page(pfn), reference.memmap.page(pfn)
    assert one is not None
    assert other is not None
    assert one.last_access_ns > 0
    assert (one.refcount, one.reads, one.writes, one.mapping, one.index) == (
        other.refcount, other.reads, other.writes, other.mapping, other.index
    )  # fmt: skip


def test_what_was_not_seen_or_has_no_memory_is_left_to_the_index(shm: Path) -> None:
    with cached(shm) as cache:
        assert places_of(cache, UNSEEN).reserve([7], INODE) == [0]
        assert places_of(cache, SEEING).reserve([7], INODE) == [0]
        places = places_of(cache)
        cache.locks.lock(cache.ground.set_of(7))
        assert places.reserve([7], INODE) == [0]
        cache.locks.unlock(cache.ground.set_of(7))
        cache.medium.reserved = False
        cache.shared.set_header_word("reserved", 0)
        assert places.may_have(7)
        assert places.reserve([7], INODE) == [0]
        for chunk in range(cache.medium.size_bytes >> 21):
            cache.shared.set_presence(chunk, Presence.WHOLE)
        (offset,) = places.reserve([7], INODE)
        assert offset
        places.release([offset])
        cache.assert_nothing_is_left()


def test_a_damaged_set_is_left_to_the_index(shm: Path) -> None:
    with cached(shm) as cache:
        cache.set_word(cache.ground.set_of(7), 3, 0x1234_5678)
        places = places_of(cache)
        assert places.may_have(7)
        assert places.reserve([7], INODE) == [0]
        cache.assert_nothing_is_left()


def test_workers_write_and_read_while_places_are_filled(shm: Path) -> None:
    """Each block holds its number all over, whoever has stored it."""
    with cached(shm, set_count=3, size_bytes=GIB) as cache:
        places = places_of(cache)
        blocks = [block for number in range(3) for block in cache.blocks_of_set(number, 24)]
        contents = {block: block.to_bytes(8, "little") * (BLOCK // 8) for block in blocks}
        wrong: list[int] = []
        has_ended = threading.Event()

        def work(number: int) -> None:
            chance = random.Random(number)
            while not has_ended.is_set():
                some = chance.sample(blocks, 8)
                if number:
                    answers = cache.read_all([b * BLOCK for b in some], BLOCK, worker=number)
                    wrong.extend(b for b, data in zip(some, answers, strict=True)
                                 if data not in (None, contents[b]))  # fmt: skip
                else:
                    # Few, so that there are clean blocks to evict.
                    cache.write_all([(b * BLOCK, contents[b]) for b in blocks[::12]],
                                    worker=number)  # fmt: skip

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        chance, filled, kept = random.Random(7), 0, 0
        try:
            while kept < 1000 and filled < 100_000:
                some = chance.sample(blocks, 6)
                offsets = places.reserve(some, INODE)
                come = [(b, at) for b, at in zip(some, offsets, strict=True) if at]
                filled += len(some)
                for block, offset in come:
                    fill(cache, offset, block)
                taken = [at for _, at in come]
                kept += sum(places.publish([b for b, _ in come], taken))
                places.release(taken)
        finally:
            has_ended.set()
            for thread in threads:
                thread.join()
        assert kept >= 1000
        assert not wrong
        assert all(len(tags) == 1 for tags in cache.all_tags().values())
        for block in blocks:
            assert cache.read(block * BLOCK, BLOCK) in (None, contents[block])
        cache.assert_nothing_is_left()
