"""What workers answer of a cache by its tags, and what they leave to the control plane."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.cached import Cached, cached
from kit.data_plane import SYNCFS
from pmemfs.dataplane.layouts import Presence
from pmemfs.media.cache import GROUP_SHIFT, SEQUENCES, WAYS, Tag, TagState
from pmemfs.media.label import Scheme
from pmemfs.medium.base import Durability
from pmemfs.memmap.records import RecordMemmap, as_records
from pmemfs.pfn import PAGE_STRUCTURE_BYTES
from pmemfs.units import GIB, KIB, MIB
from pmemfs.volume.cache.eviction import Eviction
from pmemfs.volume.onefile import INODE

SCHEMES = (Scheme.PMEM, Scheme.ON_DEMAND)
BLOCK = 4 * KIB


@pytest.fixture(params=SCHEMES, ids=lambda scheme: scheme.word)
def cache(request: pytest.FixtureRequest, shm: Path) -> Iterator[Cached]:
    """An empty cache of small blocks."""
    with cached(shm, scheme=request.param) as made:
        yield made
        made.assert_nothing_is_left()


@pytest.fixture
def small(shm: Path) -> Iterator[Cached]:
    """A cache of three sets."""
    with cached(shm, set_count=3, size_bytes=GIB) as made:
        yield made
        made.assert_nothing_is_left()


def some(size: int = BLOCK) -> bytes:
    return os.urandom(size)


# Reading


def test_a_block_that_is_there_is_read_and_counted(cache: Cached) -> None:
    data = some()
    cache.plant(7, data, way=5)
    assert cache.read(7 * BLOCK, BLOCK) == data
    assert cache.read(7 * BLOCK + 9, 100) == data[9:109]
    assert cache.counters.read_hits == 2
    page = cache.memmap.page(cache.ground.place_pfn(cache.ground.set_of(7), 5))
    assert page is not None
    assert (page.reads, page.mapping, page.index, page.refcount) == (2, INODE, 7, 0)


def test_a_read_of_which_a_part_is_missing_is_forwarded_and_counts_nothing(cache: Cached) -> None:
    for block in (0, 1, 3):
        cache.plant(block, some())
    assert cache.read(0, 2 * BLOCK) is not None
    before = cache.counters
    assert cache.read(0, 3 * BLOCK) is None
    assert cache.read(2 * BLOCK, BLOCK) is None
    assert cache.read(BLOCK + 5, 2 * BLOCK) is None
    assert cache.counters == before


@pytest.mark.parametrize("points", [False, True], ids=["copied", "pointed"])
def test_a_large_read_gets_every_block_wherever_it_lies(shm: Path, points: bool) -> None:
    with cached(shm, points=points) as cache:
        data = some(300 * BLOCK)
        # Runs of one way, single blocks, and the end of a region, whose sets may be the same ones.
        for at in range(300):
            block = 400 + at
            way = 3 if block < 512 else 4 if at < 150 else 5 + block % 11
            cache.plant(block, data[at * BLOCK : (at + 1) * BLOCK], way=way)
        for start, size in [(0, 250), (44, 256), (149, 2), (0, 150), (111, 3)]:
            found = cache.read((400 + start) * BLOCK, size * BLOCK)
            assert found == data[start * BLOCK : (start + size) * BLOCK]
            found = cache.read((400 + start) * BLOCK + 1, size * BLOCK - 2)
            assert found == data[start * BLOCK + 1 : (start + size) * BLOCK - 1]
        cache.assert_nothing_is_left()


def test_a_block_of_zeroes_reads_as_zeroes_whatever_its_place_holds(cache: Cached) -> None:
    data = some()
    cache.plant(0, data)
    cache.plant(1, some(), state=TagState.ZERO)
    cache.plant(2, some(), state=TagState.ZERO)
    cache.plant(3, data)
    assert cache.read(0, 4 * BLOCK) == data + bytes(2 * BLOCK) + data
    assert cache.read(BLOCK + 10, 20) == bytes(20)


def test_of_two_tags_of_one_block_the_newer_counts(cache: Cached) -> None:
    for older, newer in [(3, 4), (SEQUENCES - 1, 0), (0, 15)]:
        old, new = some(), some()
        for ways in [(2, 9), (9, 2)]:
            cache.plant(5, old, way=ways[0], sequence=older)
            cache.plant(5, new, way=ways[1], sequence=newer, state=TagState.DIRTY)
            assert cache.read(5 * BLOCK, BLOCK) == new


@pytest.mark.parametrize("other", [4, 4 + SEQUENCES // 2])
def test_two_tags_of_one_block_of_which_neither_is_newer_are_damage(
    cache: Cached, other: int
) -> None:
    cache.plant(5, some(), way=2, sequence=4)
    cache.plant(5, some(), way=9, sequence=other)
    assert cache.read(5 * BLOCK, BLOCK) is None
    assert cache.write(5 * BLOCK, some()) is None


@pytest.mark.parametrize("bit", [0, 2, 3, 8, 47, 48, 63])
def test_a_set_with_a_damaged_tag_is_left_to_the_control_plane(cache: Cached, bit: int) -> None:
    number = cache.plant(5, some())
    assert cache.read(5 * BLOCK, BLOCK) is not None
    word = cache.ground.tag_word(Tag(TagState.CLEAN, 0, 700), number, 4) ^ 1 << bit
    cache.set_word(number, 4, word)
    assert cache.read(5 * BLOCK, BLOCK) is None
    assert cache.write(5 * BLOCK, some()) is None
    cache.set_word(number, 4, 0)
    assert cache.read(5 * BLOCK, BLOCK) is not None


def test_a_tag_of_another_place_is_no_tag(cache: Cached) -> None:
    number = cache.plant(5, some())
    word = cache.words(number)[0]
    cache.set_word(number, 0, 0)
    cache.set_word(number, 1, word)
    assert cache.read(5 * BLOCK, BLOCK) is None


def test_the_end_is_the_size_and_what_lies_behind_reads_as_nothing(shm: Path) -> None:
    with cached(shm, size_bytes=10 * BLOCK + 100) as cache:
        data = some(100) + bytes(BLOCK - 100)
        cache.plant(10, data)
        assert cache.read(10 * BLOCK, BLOCK) == data[:100]
        assert cache.read(10 * BLOCK + 90, 4096) == data[90:100]
        assert cache.read(10 * BLOCK + 100, 10) == b""
        assert cache.read((1 << 64) - 4096, 4096) == b""
        cache.size_bytes = 10 * BLOCK
        cache.show()
        assert cache.read(10 * BLOCK, BLOCK) == b""


def test_what_is_hidden_is_forwarded(cache: Cached) -> None:
    cache.plant(0, some())
    cache.published.hide()
    assert cache.read(0, BLOCK) is None
    assert cache.write(0, some()) is None
    assert cache.seek(0, os.SEEK_DATA) is None
    assert cache.fsync() == "forward"
    cache.show()
    assert cache.read(0, BLOCK) is not None


def test_all_of_an_origin_is_data(cache: Cached) -> None:
    assert cache.seek(5, os.SEEK_DATA) == 5
    assert cache.seek(5, os.SEEK_HOLE) == cache.size_bytes
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        cache.seek(cache.size_bytes, os.SEEK_DATA)


def test_an_fsync_is_answered_where_a_fence_is_all_it_takes(cache: Cached) -> None:
    assert cache.fsync() == "answer"
    assert cache.workers[0].answer(bytes(8), opcode=SYNCFS, inode=1)[0] == "answer"
    cache.published.allow_fsyncs(False)
    assert cache.fsync() == "forward"
    assert cache.workers[0].answer(bytes(8), opcode=SYNCFS, inode=1)[0] == "forward"


# Writing


def test_a_write_goes_to_another_place_and_frees_the_old_one(cache: Cached) -> None:
    old, new = some(), some()
    number = cache.plant(5, old, way=0, sequence=SEQUENCES - 1)
    assert cache.write(5 * BLOCK, new) == BLOCK
    assert cache.tags(number) == {1: Tag(TagState.DIRTY, 0, 5)}
    assert cache.medium.read(cache.ground.place_offset(number, 0), BLOCK) == old
    assert cache.read(5 * BLOCK, BLOCK) == new
    counts = cache.counters
    assert (counts.write_hits, counts.inserted, counts.dirtied, counts.evicted) == (1, 0, 1, 0)
    assert cache.write(5 * BLOCK, old) == BLOCK
    assert cache.counters.dirtied == 1
    assert cache.published.last_write_ns > 0


def test_pages_count_as_they_did_in_the_old_place_and_one_write_more(cache: Cached) -> None:
    number = cache.plant(5, some(), way=0)
    for _ in range(3):
        cache.read(5 * BLOCK, BLOCK)
    # Whose the place was before does not matter.
    for _ in range(9):
        cache.memmap.get_page(cache.ground.place_pfn(number, 1))
        cache.memmap.put_page(cache.ground.place_pfn(number, 1))
    cache.write(5 * BLOCK, some())
    page = cache.memmap.page(cache.ground.place_pfn(number, 1))
    assert page is not None
    assert (page.reads, page.writes, page.mapping, page.index) == (3, 1, INODE, 5)
    cache.write((5 + 512) * BLOCK, some())
    new = cache.ground.set_of(5 + 512)
    (way,) = (way for way, tag in cache.tags(new).items() if tag.block == 5 + 512)
    page = cache.memmap.page(cache.ground.place_pfn(new, way))
    assert page is not None
    assert (page.reads, page.writes, page.refcount) == (0, 1, 0)


def test_a_part_of_a_block_keeps_the_rest_of_it(cache: Cached) -> None:
    old = some()
    cache.plant(5, old)
    assert cache.write(5 * BLOCK + 100, b"part") == 4
    assert cache.read(5 * BLOCK, BLOCK) == old[:100] + b"part" + old[104:]
    cache.plant(6, some(), state=TagState.ZERO)
    dirtied = cache.counters.dirtied
    assert cache.write(6 * BLOCK + 100, b"part") == 4
    assert cache.read(6 * BLOCK, BLOCK) == bytes(100) + b"part" + bytes(BLOCK - 104)
    # The origin lacked the zeroes, too.
    assert cache.counters.dirtied == dirtied


def test_a_part_of_a_block_that_is_missing_is_forwarded_and_stores_nothing(cache: Cached) -> None:
    cache.plant(5, some())
    before = cache.all_tags()
    for offset, size in [(6 * BLOCK, 100), (5 * BLOCK, BLOCK + 1), (4 * BLOCK + 1, 5 * BLOCK)]:
        assert cache.write(offset, some(size)) is None
    # Of a long write, too, the first blocks are not written for nothing.
    assert cache.write(100 * BLOCK, some(200 * BLOCK + 1)) is None
    assert cache.all_tags() == before
    assert cache.counters.inserted == cache.counters.write_hits == 0


@pytest.mark.parametrize("block_shift", [12, 13, 16])
@pytest.mark.parametrize("durability", [Durability.VOLATILE, Durability.CACHE_LINES])
def test_a_write_of_any_size_and_alignment_is_read_back(
    shm: Path, block_shift: int, durability: Durability
) -> None:
    with cached(shm, block_shift=block_shift) as cache:
        cache.shared.set_header_word("durability", list(Durability).index(durability))
        size = 2 * MIB
        content = bytearray(some(size))
        assert cache.write(0, bytes(content[:MIB])) == MIB
        assert cache.write(MIB, bytes(content[MIB:])) == MIB
        for start, length in [(0, 1), (4095, 2), (70_000, 200_000), (65_536, MIB), (MIB - 1, 3),
                              (1, MIB - 1), (500_000, 512)]:  # fmt: skip
            data = some(length)
            assert cache.write(start, data) == length
            content[start : start + length] = data
            assert cache.read(0, MIB) == content[:MIB]
            assert cache.read(MIB, MIB) == content[MIB:]
        assert all(len(tags) == 1 for tags in cache.all_tags().values())
        cache.assert_nothing_is_left()


def test_the_last_block_is_written_whole_up_to_the_end_and_has_zeroes_behind(shm: Path) -> None:
    with cached(shm, size_bytes=10 * BLOCK + 100) as cache:
        number = cache.ground.set_of(10)
        cache.medium.store(cache.ground.place_offset(number, 0), some())
        data = some(BLOCK + 100)
        assert cache.write(9 * BLOCK, data) == BLOCK + 100
        assert cache.read(9 * BLOCK, 2 * BLOCK) == data
        at = cache.ground.place_offset(number, 0)
        assert cache.medium.read(at, BLOCK) == data[BLOCK:] + bytes(BLOCK - 100)
        assert cache.write(10 * BLOCK + 50, some(50)) == 50
        (way,) = cache.tags(number)
        at = cache.ground.place_offset(number, way)
        assert cache.medium.read(at + 100, BLOCK - 100) == bytes(BLOCK - 100)
        # What reaches beyond the end is for the control plane to refuse or to shorten.
        for offset, size in [(10 * BLOCK, 101), (10 * BLOCK + 100, 1), (1 << 63, 1), (9, 1 * MIB)]:
            assert cache.write(offset, some(size)) is None


def test_writes_are_forwarded_where_they_are_not_allowed(cache: Cached) -> None:
    cache.plant(5, some())
    group = cache.ground.set_of(5) >> GROUP_SHIFT
    cache.published.allow_group(group, False)
    assert cache.write(5 * BLOCK, some()) is None
    cache.published.allow_group(group, True)
    assert cache.write(5 * BLOCK, some()) == BLOCK
    cache.published.allow_writes(False)
    assert cache.write(5 * BLOCK, some()) is None
    cache.published.allow_writes(True)
    cache.shared.set_header_word("durability", list(Durability).index(Durability.MSYNC))
    assert cache.write(5 * BLOCK, some()) is None
    cache.shared.set_header_word("read_only", 1)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        cache.write(5 * BLOCK, some())


def test_a_write_over_two_groups_needs_both(shm: Path) -> None:
    with cached(shm, pool_bytes=80 * MIB) as cache:
        assert cache.ground.group_count == 3
        border = 1 << GROUP_SHIFT
        first = next(b for b in range(4096) if cache.ground.set_of(b) == border - 1
                     and cache.ground.set_of(b + 1) == border)  # fmt: skip
        assert cache.write(first * BLOCK, some(2 * BLOCK)) == 2 * BLOCK
        cache.published.allow_group(1, False)
        assert cache.write(first * BLOCK, some(2 * BLOCK)) is None
        assert cache.write(first * BLOCK, some(BLOCK)) == BLOCK


def test_a_set_that_another_has_locked_is_left_to_the_control_plane(cache: Cached) -> None:
    number = cache.plant(5, some())
    locks = cache.locks
    assert locks.lock(number)
    assert not locks.lock(number)
    assert cache.write(5 * BLOCK, some()) is None
    # The lock of the block before was taken and is given back.
    assert cache.write(4 * BLOCK, some(2 * BLOCK)) is None
    assert locks.holder(cache.ground.set_of(4)) == 0
    # Readers take none.
    assert cache.read(5 * BLOCK, BLOCK) is not None
    locks.unlock(number)
    assert cache.write(5 * BLOCK, some()) == BLOCK


# Places


def test_the_older_of_two_tags_is_cleared_before_a_write(cache: Cached) -> None:
    number = cache.plant(5, some(), way=2, sequence=7)
    cache.plant(5, some(), way=9, sequence=8, state=TagState.DIRTY)
    assert cache.write(5 * BLOCK + 7, b"new") == 3
    assert cache.tags(number) == {0: Tag(TagState.DIRTY, 9, 5)}


def test_a_new_block_leaves_one_place_free(small: Cached) -> None:
    blocks = small.blocks_of_set(1, WAYS + 1)
    for block in blocks[: WAYS - 1]:
        assert small.write(block * BLOCK, some()) == BLOCK
    # All are dirty, so the last place is for their changes.
    for block in blocks[WAYS - 1 :]:
        assert small.write(block * BLOCK, some()) is None
    for block in blocks[: WAYS - 1]:
        data = some()
        assert small.write(block * BLOCK, data) == BLOCK
        assert small.read(block * BLOCK, BLOCK) == data
    assert small.counters.evicted == 0


def test_a_new_block_drives_out_a_clean_one_of_a_full_set(small: Cached) -> None:
    blocks = small.blocks_of_set(1, WAYS)
    for way, block in enumerate(blocks[: WAYS - 1]):
        small.plant(block, some(), way=way, state=TagState.CLEAN if way == 4 else TagState.DIRTY)
    assert small.write(blocks[-1] * BLOCK, some()) == BLOCK
    tags = small.tags(1)
    assert blocks[4] not in {tag.block for tag in tags.values()}
    assert len(tags) == WAYS - 1
    assert small.counters.evicted == 1


def test_a_set_without_any_free_place_gives_two_clean_ones(small: Cached) -> None:
    blocks = small.blocks_of_set(1, WAYS + 1)
    for way, block in enumerate(blocks[:WAYS]):
        small.plant(block, some(), way=way)
    # A block that is there needs one place only, and is no victim itself.
    data = some()
    assert small.write(blocks[0] * BLOCK + 1, data[1:]) == BLOCK - 1
    assert len(small.tags(1)) == WAYS - 1
    assert small.counters.evicted == 1
    assert small.read(blocks[0] * BLOCK + 1, BLOCK - 1) == data[1:]
    for way, block in enumerate(blocks[:WAYS]):
        small.plant(block, some(), way=way)
    assert small.write(blocks[WAYS] * BLOCK, data) == BLOCK
    assert len(small.tags(1)) == WAYS - 1
    assert small.counters.evicted == 3


def test_a_set_with_one_clean_block_and_no_free_place_takes_no_new_one(small: Cached) -> None:
    blocks = small.blocks_of_set(1, WAYS + 1)
    for way, block in enumerate(blocks[:WAYS]):
        small.plant(block, some(), way=way, state=TagState.CLEAN if way == 4 else TagState.ZERO)
    assert small.write(blocks[WAYS] * BLOCK, some()) is None
    # What it has driven out is the spare place now.
    assert small.write(blocks[0] * BLOCK, some()) == BLOCK


def test_a_place_that_is_held_is_given_to_nobody(small: Cached) -> None:
    blocks = small.blocks_of_set(1, WAYS)
    for way in range(3):
        small.hold(1, way)
    assert small.write(blocks[0] * BLOCK, some()) == BLOCK
    assert small.tags(1) == {3: Tag(TagState.DIRTY, 0, blocks[0])}
    for way in range(3):
        small.drop(1, way)


def test_a_block_that_is_held_is_no_victim(small: Cached) -> None:
    blocks = small.blocks_of_set(1, WAYS)
    for way, block in enumerate(blocks[: WAYS - 1]):
        small.plant(block, some(), way=way)
        if way != 11:
            small.hold(1, way)
    assert small.write(blocks[-1] * BLOCK, some()) == BLOCK
    assert 11 not in small.tags(1)
    small.hold(1, 11)
    # Nothing can go now, and the place that is free is held.
    assert small.write(blocks[0] * BLOCK, some()) is None
    for way in range(WAYS - 1):
        small.drop(1, way)
    assert small.write(blocks[0] * BLOCK, some()) == BLOCK


def test_pages_of_another_mount_go_first_then_the_oldest(small: Cached) -> None:
    blocks = small.blocks_of_set(1, 2 * WAYS)
    data = {block: some() for block in blocks}
    for way, block in enumerate(blocks[: WAYS - 1]):
        small.plant(block, data[block], way=way)
        if way not in (3, 7):
            # Twice, so that no block counts as used once only.
            small.read(block * BLOCK, BLOCK)
            small.read(block * BLOCK, BLOCK)
    gone = []
    for block in blocks[WAYS - 1 : WAYS + 4]:
        there = {tag.block for tag in small.tags(1).values()}
        small.write(block * BLOCK, some())
        (left,) = there - {tag.block for tag in small.tags(1).values()}
        gone.append(left)
    assert gone == [blocks[way] for way in (3, 7, 0, 1, 2)]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.none() | st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2)),
        min_size=WAYS - 1, max_size=WAYS - 1,
    ),
    st.sets(st.integers(0, WAYS - 2), max_size=4),
    st.sets(st.integers(0, WAYS - 2), max_size=4),
)  # fmt: skip
def test_workers_evict_the_block_that_the_control_plane_would(
    one_set: Cached, pages: list[tuple[int, int, int] | None], dirty: set[int], held: set[int]
) -> None:
    """Pages are (last access, reads, writes), or uninitialised."""
    cache, ground = one_set, one_set.ground
    ways = range(WAYS - 1)
    for way, page in enumerate(pages):
        state = TagState.DIRTY if way in dirty else TagState.CLEAN
        cache.plant(way, bytes([way]) * cache.block_bytes, way=way, state=state)
        set_page(cache, way, page)
        if way in held:
            cache.hold(0, way)
    cache.set_word(0, WAYS - 1, 0)
    chosen = Eviction(cache.memmap, ground).choose
    candidates = [way for way in ways if way not in dirty]
    expected = chosen(0, candidates)
    while expected in held:
        candidates.remove(expected)
        expected = chosen(0, candidates)
    written = cache.write(WAYS * cache.block_bytes, some(cache.block_bytes))
    assert (written is None) == (expected is None)
    there = {tag.block for tag in cache.tags(0).values()}
    assert set(ways) - there == ({expected} if expected is not None else set())
    for way in held:
        cache.drop(0, way)
    cache.assert_nothing_is_left()


@pytest.fixture(params=[12, 14], ids=["4K", "16K"])
def one_set(request: pytest.FixtureRequest, shm: Path) -> Iterator[Cached]:
    """A cache of one set."""
    with cached(shm, set_count=1, block_shift=request.param) as made:
        yield made


def set_page(cache: Cached, way: int, page: tuple[int, int, int] | None) -> None:
    """Let the first page of a place of set 0 say this; None: it is uninitialised."""
    pfn = cache.ground.place_pfn(0, way)
    cache.memmap.get_page(pfn)
    cache.memmap.put_page(pfn)
    assert isinstance(cache.memmap, RecordMemmap)
    memory, at = cache.memmap._locate(cache.memmap.geometry.pfn_to_page(pfn))
    record = as_records(memory[at : at + PAGE_STRUCTURE_BYTES])
    if page is None:
        record["generation"] = 0
    else:
        record["last_access_ns"], record["reads"], record["writes"] = page


# Sparse pools


def test_workers_touch_only_what_is_known_to_have_memory(shm: Path) -> None:
    with cached(shm, is_reserved=False) as cache:
        ground = cache.ground
        number = cache.plant(5, some())
        chunks = range(cache.medium.size_bytes // (2 * MIB))
        at = ground.tag_offset(number, 0) // (2 * MIB)
        places = {way: ground.place_offset(number, way) // (2 * MIB) for way in range(WAYS)}
        assert cache.read(5 * BLOCK, BLOCK) is None
        assert cache.write(5 * BLOCK, some()) is None
        cache.published.note_reserved(at * 2 * MIB, 2 * MIB)
        assert cache.read(5 * BLOCK, BLOCK) is None
        assert cache.write(5 * BLOCK, some()) is None
        cache.published.note_reserved(places[0] * 2 * MIB, 2 * MIB)
        assert cache.read(5 * BLOCK, BLOCK) is not None
        held = os.stat(cache.medium.fileno()).st_blocks
        # Places of higher ways lie in chunks that nobody has looked at.
        wholes = [way for way in places if cache.shared.presence(places[way]) is Presence.WHOLE]
        for _ in range(2 * WAYS):
            assert cache.write(5 * BLOCK, some()) in (BLOCK, None)
        assert set(cache.tags(number)) <= set(wholes)
        assert os.stat(cache.medium.fileno()).st_blocks == held
        assert all(cache.shared.presence(chunk) in (Presence.WHOLE, Presence.DEFAULT)
                   for chunk in chunks)  # fmt: skip


def test_half_a_chunk_of_memory_is_not_enough(shm: Path) -> None:
    with cached(shm, is_reserved=False) as cache:
        cache.published.note_reserved(2 * MIB, 2 * MIB - 4096)
        cache.published.note_reserved(4 * MIB + 4096, 2 * MIB - 4096)
        assert cache.shared.presence(1) is Presence.DEFAULT
        assert cache.shared.presence(2) is Presence.DEFAULT


def test_a_fault_costs_one_request_and_leaves_no_lock(shm: Path) -> None:
    # With page structures in memory that is not cut off.
    with cached(shm, scheme=Scheme.ON_DEMAND) as cache:
        data = some(32 * BLOCK)
        assert cache.write(0, data) == len(data)
        size = cache.medium.size_bytes
        number = cache.ground.set_of(20)
        for way in range(1, WAYS):
            # The next free places of one set in the middle of the batch lie behind the cut.
            if cache.ground.place_offset(number, way) < size // 2:
                cache.hold(number, way)
        held = [w for w in range(WAYS) if cache.is_held(number, w)]
        os.truncate(cache.medium.fileno(), size // 2)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            cache.write(16 * BLOCK, some(8 * BLOCK))
        os.truncate(cache.medium.fileno(), size)
        for way in held:
            cache.drop(number, way)
        cache.assert_nothing_is_left()
        found = cache.read(16 * BLOCK, 8 * BLOCK)
        assert found is not None
        for at in range(8):
            assert found[at * BLOCK : (at + 1) * BLOCK] != bytes(BLOCK)
