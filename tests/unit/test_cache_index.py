"""The index of a cache: against a dictionary, and what it promises in particular."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kit.cache_crash import (
    BLOCK_BYTES,
    BLOCKS,
    ZEROES,
    Start,
    World,
    all_tags,
    small_groups,
    started,
    text,
)
from pmemfs.errors import DamagedCache, DamagedSet, MemoryFault, SetBusy
from pmemfs.media.cache import WAYS, Tag, TagState, pack_head
from pmemfs.media.label import Mode, Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.memmap import Access
from pmemfs.memmap.on_demand import OnDemandMemmap
from pmemfs.pool import Pool, PoolSpec
from pmemfs.volume.cache.groups import CLOSING, OPEN, SEEN, UNSEEN, Found, Groups
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.index import Index, OwnLocks, Publication
from pmemfs.volume.cache.search import DirtySearch
from pmemfs.volume.onefile import INODE

blocks = st.sampled_from(BLOCKS)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch.setattr)


@functools.cache
def empty() -> Start:
    return started(lambda w: None)


@functools.cache
def full() -> Start:
    def build(w: World) -> None:
        for block in range(30):
            w.fetch(block)

    return started(build)


class Machine(RuleBasedStateMachine):
    """Operations of a volume in any order; `content` of the world is the oracle."""

    def __init__(self) -> None:
        super().__init__()
        self.world = empty().world()
        self.reserved: dict[int, object] = {}
        self.held: list[Found] = []
        self.dirty_at_mount = 0

    @rule(block=blocks, actor=st.integers(0, 2))
    def write(self, block: int, actor: int) -> None:
        if self.has_room(block):
            self.world.write(block, actor)

    @rule(block=blocks)
    def fetch(self, block: int) -> None:
        self.world.fetch(block)

    @rule(block=blocks)
    def clean(self, block: int) -> None:
        self.world.clean(block)

    @rule(block=blocks)
    def drop(self, block: int) -> None:
        self.world.drop(block)

    @rule(block=blocks)
    def trim(self, block: int) -> None:
        self.world.trim(block)

    @rule(block=blocks)
    def make_zero(self, block: int) -> None:
        self.world.make_zero(block)

    @rule(block=blocks)
    def write_around(self, block: int) -> None:
        self.world.write_around(block)

    @rule(some=st.lists(blocks, min_size=1, max_size=4, unique=True))
    def batch(self, some: list[int]) -> None:
        self.world.batch(some)

    @rule(block=blocks)
    def hold(self, block: int) -> None:
        if len(self.held) < 6 and (found := self.world.index.hold(block)):
            self.held.append(found)

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.world.index.release(self.held.pop())

    @precondition(lambda self: self.held)
    @rule()
    def read_what_is_held(self) -> None:
        """Whatever has become of the block, its place was given to nobody else."""
        for found in self.held:
            place = self.world.index.place_of(found)
            data = bytes(self.world.medium.read(place.pool_offset, BLOCK_BYTES))
            # What was fetched after a TRIM is zeroes.
            assert (
                found.tag.state is TagState.ZERO
                or data == ZEROES
                or data.startswith(b"block %d version" % found.tag.block)
            )

    @rule()
    def write_back(self) -> None:
        self.world.write_back()
        assert not list(self.world.groups.suspects())

    @rule()
    def search(self) -> None:
        self.world.find_dirty()

    @rule()
    def remount(self) -> None:
        self.held.clear()
        self.dirty_at_mount = len(self.dirty_tags())
        self.world.remount()

    @rule()
    def kill(self) -> None:
        self.held.clear()
        self.dirty_at_mount = len(self.dirty_tags())
        self.world.kill()

    def has_room(self, block: int) -> bool:
        """Whether a place can be had, also after another block was cleaned."""
        number = self.world.stored.ground.set_of(block)
        return sum(found.set_number == number for found in self.held) < 3

    def dirty_tags(self) -> list[Found]:
        tags = all_tags(self.world.medium, self.world.stored.ground)
        return [found for found in tags if found.tag.is_dirty]

    @invariant()
    def every_block_reads_as_it_was_written(self) -> None:
        for block, content in self.world.content.items():
            assert self.world.read(block) == content

    @invariant()
    def dirty_blocks_are_counted_and_found(self) -> None:
        index, dirty = self.world.index, self.dirty_tags()
        assert self.dirty_at_mount + index.dirtied - index.cleaned == len(dirty)
        suspects = set(self.world.groups.suspects())
        assert {found.set_number for found in dirty} <= suspects

    @invariant()
    def a_block_has_one_tag(self) -> None:
        tags = [f.tag.block for f in all_tags(self.world.medium, self.world.stored.ground)]
        assert len(tags) == len(set(tags))

    @invariant()
    def references_are_those_that_are_held(self) -> None:
        world = self.world
        counts = dict.fromkeys(((f.set_number, f.way) for f in self.held), 0)
        for found in self.held:
            counts[found.set_number, found.way] += 1
        for number in range(world.stored.ground.set_count):
            for way in range(WAYS):
                usage = world.memmap.usage(world.stored.ground.place_pfn(number, way))
                assert (usage.refcount if usage else 0) == counts.get((number, way), 0)


@pytest.mark.slow
def test_the_index_answers_as_a_dictionary_does(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch.setattr)
    machine = Machine.TestCase
    machine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    machine().runTest()


def test_a_place_that_somebody_holds_goes_to_nobody_else() -> None:
    w = full().world()
    found = w.index.hold(0)
    assert found
    w.drop(0)
    for block in BLOCKS:
        w.fetch(block)
    place = w.index.place_of(found)
    assert w.medium.read(place.pool_offset, BLOCK_BYTES) == text(0, 0)
    w.index.release(found)


def test_an_insertion_leaves_a_way_free_for_the_next_change() -> None:
    w = full().world()
    for block in range(30, 48):
        w.fetch(block)
        assert [w.free_ways(number) for number in (0, 1)] == [1, 1]


def test_what_is_dirty_or_held_is_not_evicted() -> None:
    w = empty().world()
    for block in range(32):
        w.write(block)
    assert [w.free_ways(number) for number in (0, 1)] == [0, 0]
    assert w.index.reserve(40, w.choose) is None
    w.clean(0)
    w.clean(1)
    held = [w.index.hold(0), w.index.hold(1)]
    assert w.index.reserve(40, w.choose) is None
    for found in held:
        assert found
        w.index.release(found)
    place = w.index.reserve(40, w.choose)
    assert place
    # The reserved place has no tag, so it is the block's only when it is published.
    assert w.index.find(40) is None
    assert w.index.reserve(40, w.choose) is None
    w.index.release(place)


def test_a_place_is_published_only_if_the_block_is_what_it_was() -> None:
    w = empty().world()
    place = w.index.reserve(0, w.choose)
    assert place
    w.write(0)
    before = w.index.find(0)
    assert w.index.publish(place, 0, TagState.CLEAN, expected=None) is None
    assert w.index.find(0) == before
    w.index.release(place)
    assert before
    assert w.index.clean(before)
    assert not w.index.clean(before)
    assert not w.index.clear(before)
    assert not w.index.zero(before)


def test_sequences_go_round() -> None:
    w = empty().world()
    for _ in range(70):
        w.write(5)
        assert w.read(5) == w.content[5]
    found = w.index.find(5)
    assert found
    assert found.tag.sequence == 69 % 32


def test_of_two_tags_the_newer_counts_until_a_writer_clears_the_older() -> None:
    w = empty().world()
    w.write(5)
    old = w.index.find(5)
    w.write(5)
    assert old
    w.medium.store(
        w.stored.ground.tag_offset(old.set_number, old.way), old.word.to_bytes(8, "little")
    )
    w.kill()
    new = w.index.find(5)
    assert new
    assert new.tag.sequence == 1
    w.fetch(7)
    assert w.index.is_same(new)
    assert not w.index.is_same(old)


def test_a_damaged_tag_hides_no_block_and_may_be_any_that_is_not_found() -> None:
    w = empty().world()
    w.write(5)
    w.write(7)
    found = w.index.find(5)
    assert found
    at = w.stored.ground.tag_offset(found.set_number, found.way)
    w.medium.store(at, (found.word ^ 1 << 9).to_bytes(8, "little"))
    assert w.read(7) == w.content[7]
    for block in (5, 9):
        with pytest.raises(DamagedSet, match="check --repair") as error:
            w.index.find(block)
        assert isinstance(error.value, OSError)
        with pytest.raises(DamagedSet):
            w.fetch(block)
    assert w.index.find(6) is None
    # It is never evicted, nor is its place given away.
    for block in range(8, 48, 2):
        w.fetch(block)
    for block in (7,):
        w.write(block)
    assert w.medium.read(at, 8) == (found.word ^ 1 << 9).to_bytes(8, "little")


def test_pages_say_which_block_they_hold_and_how_it_was_used() -> None:
    w = empty().world()
    w.write(5)
    for _ in range(3):
        w.read(5)
    found = w.index.find(5)
    assert found
    page = w.memmap.page(w.stored.ground.place_pfn(found.set_number, found.way))
    assert page
    assert (page.mapping, page.index, page.reads) == (INODE, 5, 3)
    # In its new place the block counts on; another block in the old one begins anew.
    w.write(5)
    moved = w.index.find(5)
    assert moved
    usage = w.memmap.usage(w.stored.ground.place_pfn(moved.set_number, moved.way))
    assert usage
    assert usage.reads == 3
    w.fetch(7)
    other = w.index.find(7)
    assert other
    assert (other.set_number, other.way) == (found.set_number, found.way)
    usage = w.memmap.usage(w.stored.ground.place_pfn(other.set_number, other.way))
    assert usage
    assert (usage.reads, usage.last_access_ns) == (0, 0)


def test_a_set_that_is_locked_can_be_read_and_not_changed() -> None:
    w = full().world()
    steps = w.index.clearing([found for block in (0, 1) if (found := w.index.find(block))])
    next(steps)
    for change, block in ((w.fetch, 40), (w.fetch, 41), (w.write, 2), (w.write, 41), (w.drop, 3)):
        with pytest.raises(SetBusy):
            change(block)
    assert w.read(2) == w.content[2]
    for _ in steps:
        w.medium.fence()
    w.write(2)
    # A change that is given up, since its fence has failed, leaves no set locked.
    found = w.index.find(3)
    assert found
    steps = w.index.clearing([found])
    next(steps)
    steps.close()
    w.write(3)


def test_a_fence_that_fails_leaves_no_reference() -> None:
    w = full().world()
    for block in range(0, 30, 2):
        w.read(block)
    steps = w.index.reserving([40, 41], w.choose, Access.WRITE)
    next(steps)
    with pytest.raises(OSError, match="lost"):
        steps.throw(OSError(5, "lost"))
    ground = w.stored.ground
    usages = [w.memmap.usage(ground.place_pfn(s, way)) for s in (0, 1) for way in range(WAYS)]
    assert not any(usage and usage.refcount for usage in usages)


class Workers:
    """Those of a data plane, as far as groups know them."""

    def __init__(self) -> None:
        self.allowed: set[int] = set()
        self.is_quiet = True

    def allow_group(self, group: int, is_allowed: bool) -> None:
        (self.allowed.add if is_allowed else self.allowed.discard)(group)

    def forbid_groups(self) -> None:
        self.allowed.clear()

    def begin_grace(self) -> object:
        return self

    def is_over(self, token: object) -> bool:
        return self.is_quiet


def with_workers(w: World) -> Workers:
    workers = Workers()
    w.groups = Groups(w.medium, w.stored.ground, workers, is_settled=True, now_ns=w.clock)
    w.index = Index(w.medium, w.memmap, w.stored.ground, OwnLocks(), w.groups)
    return workers


def test_workers_write_in_groups_that_are_open_and_leave_them_before_they_are_closed() -> None:
    w = empty().world()
    workers = with_workers(w)
    w.write(0)
    (group,) = workers.allowed
    assert w.groups.state(group) == OPEN
    assert w.groups.since_ns(group)
    w.clean(0)
    workers.is_quiet = False
    closing = w.groups.begin_closing([group])
    assert not workers.allowed
    assert not w.groups.can_finish(closing)
    assert w.groups.state(group) == CLOSING
    workers.is_quiet = True
    assert w.groups.can_finish(closing)
    assert w.index.run(w.groups.finish_closing(closing)) == [group]
    assert w.groups.state(group) == SEEN
    assert not w.groups.since_ns(group)
    assert not workers.allowed


def test_a_group_with_dirty_blocks_is_not_closed_and_says_since_when() -> None:
    w = empty().world()
    workers = with_workers(w)
    w.write(0)
    (group,) = workers.allowed
    before = w.groups.since_ns(group)
    assert w.close([group]) == []
    assert w.groups.since_ns(group) == before == w.groups.oldest_ns()
    since_ns = w.clock()
    assert w.close([group], since_ns) == []
    assert w.groups.since_ns(group) == since_ns
    assert workers.allowed == {group}


def test_a_group_that_is_needed_while_it_is_closed_stays_open() -> None:
    w = empty().world()
    workers = with_workers(w)
    w.write(0)
    (group,) = workers.allowed
    w.clean(0)
    closing = w.groups.begin_closing([group])
    steps = w.groups.finish_closing(closing)
    next(steps)
    w.index.may_become_dirty(group)
    for _ in steps:
        pass
    assert w.groups.state(group) == OPEN
    assert w.groups.since_ns(group)
    assert workers.allowed == {group}


def test_a_group_that_is_closed_while_another_task_opens_it_ends_open_with_a_durable_word() -> None:
    w = empty().world()
    workers = with_workers(w)
    opening = w.groups.opening([0])
    next(opening)
    assert w.close([0]) == [0]
    for _ in opening:
        w.medium.fence()
    assert w.groups.state(0) == OPEN
    assert workers.allowed == {0}
    durable = w.medium.durable[w.stored.ground.group_offset(0) :][:8]
    assert int.from_bytes(durable, "little") == w.groups.since_ns(0) != 0


def test_the_search_counts_what_the_last_mount_left_and_nothing_twice() -> None:
    w = empty().world()
    for block in range(10):
        w.write(block)
    w.clean(0)
    w.kill()
    assert w.groups.state(0) == UNSEEN
    assert not w.search.is_done
    w.write(20)
    w.clean(2)
    w.find_dirty()
    assert w.search.is_done
    assert w.groups.found_dirty == 9
    assert w.groups.found_dirty + w.index.dirtied - w.index.cleaned == 9
    assert not w.index.run(w.search.step())


def test_the_search_waits_for_a_group_that_another_task_looks_at() -> None:
    w = empty().world()
    w.write(0)
    w.write(1)
    w.kill()
    seeing = w.groups.seeing([0])
    next(seeing)
    with pytest.raises(SetBusy):
        w.index.see(0)
    for _ in range(4):
        assert w.index.run(w.search.step())
    seeing.close()
    w.find_dirty()
    assert w.groups.found_dirty == 2


def test_after_an_unmount_nothing_is_searched() -> None:
    w = empty().world()
    w.write(0)
    w.remount()
    assert w.search.is_done
    assert w.stored.head.dirty_blocks == 1
    assert [f.tag for f in w.index.dirty_in(w.stored.ground.set_of(0))] == [
        Tag(TagState.DIRTY, 0, 0)
    ]


def test_the_search_closes_groups_in_which_nothing_is_dirty() -> None:
    w = empty().world()
    w.write(0)
    w.clean(0)
    w.kill()
    w.find_dirty()
    assert list(w.groups.suspects()) == []


def test_a_torn_write_of_the_head_keeps_the_old_or_the_new_one() -> None:
    w = empty().world()
    heads = []
    w.medium.at_each_fence = lambda: heads.extend(
        StoredHead.open(with_image(w.pool, image)).head.policy
        for image in w.medium.after_power_failure(limit=30)
    )
    w.stored.rewrite(policy=3)
    assert set(heads) == {1, 3}
    w.medium.at_each_fence = lambda: None
    for image in w.medium.after_power_failure():
        assert StoredHead.open(with_image(w.pool, image)).head == w.stored.head


def with_image(pool: Pool, image: bytes) -> Pool:
    opened = Pool.open(RecordingMedium(image))
    assert opened.label.uuid == pool.label.uuid
    return opened


def test_the_newer_head_counts_and_a_damaged_one_is_written_anew() -> None:
    w = empty().world()
    start = w.pool.zones.data.offset_bytes
    newer = w.stored.head._replace(sequence=w.stored.head.sequence + 1, policy=4)
    for copy in range(2):
        w.mount(is_settled=True)
        w.medium.store(start + copy * 4096, pack_head(newer))
        w.medium.store(start + (1 - copy) * 4096, bytes(100))
        w.mount(is_settled=True)
        assert w.stored.head.policy == 4
        w.stored.rewrite(policy=2)
        first = bytes(w.medium.read(start, 4096))
        assert first == w.medium.read(start + 4096, 4096)


def test_what_is_no_head_is_not_written() -> None:
    w = empty().world()
    before = bytes(w.medium.read(0, w.medium.size_bytes))
    with pytest.raises(DamagedCache, match="dirty share"):
        w.stored.rewrite(max_dirty_percent=101)
    assert w.medium.read(0, w.medium.size_bytes) == before


@pytest.mark.parametrize("block_shift", [12, 14, 16])
def test_blocks_of_any_size_in_a_sparse_pool(tmp_path: Path, block_shift: int) -> None:
    size = 1 << block_shift
    path = tmp_path / "pool"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    medium = MappedMedium.open(str(path))
    try:
        pool = Pool.create(medium, PoolSpec("c", scheme=Scheme.ON_DEMAND, mode=Mode.CACHE))
        head = empty().world().stored.head
        stored = StoredHead.create(
            pool, head._replace(block_shift=block_shift, origin_bytes=1 << 40)
        )
        memmap = OnDemandMemmap(pool.page_geometry, pool.label.generation)
        groups = Groups(medium, stored.ground, is_settled=False)
        index = Index(medium, memmap, stored.ground, OwnLocks(), groups)
        rng = random.Random(block_shift)
        written = {}
        for block in (rng.randrange(1 << 40 >> block_shift) for _ in range(20)):
            data = rng.randbytes(size)
            place = index.reserve(block, lambda *_: None)
            assert place
            medium.reserve(place.pool_offset, size)
            medium.put(place.pool_offset, data)
            item = Publication(place, block, TagState.DIRTY, None)
            assert index.run(index.publishing([item])) != [None]
            index.release(place)
            written[block] = data
        for block, data in written.items():
            found = index.hold(block)
            assert found
            assert medium.read(index.place_of(found).pool_offset, size) == data
            frames = range(size >> 12)
            pfn = stored.ground.place_pfn(found.set_number, found.way)
            pages = [memmap.page(pfn + at) for at in frames]
            assert [page and page.refcount for page in pages] == [1 for _ in frames]
            first = block << block_shift - 12
            assert [page and page.index for page in pages] == [first + at for at in frames]
            index.release(found)
        search = DirtySearch(Groups(medium, stored.ground, is_settled=False))
        while index.run(search.step()):
            pass
        assert search._groups.found_dirty == 20
        assert path.stat().st_blocks * 512 < 20 * (size + 3 * 4096) + (1 << 20)
    finally:
        medium.close()


def test_memory_that_fails_leaves_nothing_locked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = empty().world()

    def fail(offset_bytes: int, length_bytes: int) -> None:
        raise MemoryFault(pfn=offset_bytes >> 12, path="pool")

    with monkeypatch.context() as patch:
        patch.setattr(w.medium, "flush", fail)
        with pytest.raises(MemoryFault):
            w.write(5)
    w.write(5)
    assert w.read(5) == w.content[5]
