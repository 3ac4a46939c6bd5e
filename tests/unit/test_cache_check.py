"""What `check` says of a cache, and what a repair makes of it."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.cache_crash import BLOCKS, CacheMedium, Start, World, on_medium, started, template
from kit.pools import content
from pmemfs.errors import DamagedCache, DamagedSet
from pmemfs.media.cache import BLOCK, Ground, Tag, TagState
from pmemfs.media.label import Mode, Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.pool import Pool, PoolSpec
from pmemfs.pool.label_check import Finding, has_errors
from pmemfs.units import MIB
from pmemfs.volume.cache import tagcheck
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.pool_check import check_pool, repair_pool

GROUNDS = st.builds(
    Ground,
    st.just(0),
    st.integers(1, (1 << 32) - 1),
    st.just(12),
    st.integers(0, (1 << 64) - 1),
)


@given(GROUNDS, st.integers(0, BLOCK.mask), st.sampled_from(TagState), st.integers(0, 31))
def test_many_tags_at_once_are_computed_as_one_is(
    ground: Ground, block: int, state: TagState, sequence: int
) -> None:
    set_number = ground.set_of(block)
    word = ground.tag_word(Tag(state, sequence, block), set_number, 3)
    low = np.array([word & (1 << 48) - 1], np.uint64)
    places = np.array([set_number * 16 + 3], np.uint64)
    assert tagcheck.check_bits(low, places, ground).tolist() == [word >> 48]
    assert tagcheck.sets_of(np.array([block], np.uint64), ground).tolist() == [set_number]
    assert ground.read_tag(word, set_number, 3) == Tag(state, sequence, block)


@given(GROUNDS, st.integers(0, BLOCK.mask), st.integers(0, 31), st.integers(0, 63))
def test_a_flipped_bit_makes_a_tag_damage_wherever_it_is(
    ground: Ground, block: int, sequence: int, bit: int
) -> None:
    set_number = ground.set_of(block)
    word = ground.tag_word(Tag(TagState.DIRTY, sequence, block), set_number, 0)
    with pytest.raises(DamagedCache):
        ground.read_tag(word ^ 1 << bit, set_number, 0)
    assert ground.first_damaged([word ^ 1 << bit], set_number) == 0
    assert ground.first_damaged([word], set_number) is None


def build(w: World) -> None:
    for block in range(12):
        w.fetch(block)
    for block in range(8, 14):
        w.write(block)
    w.make_zero(10)
    w.stored.rewrite(is_settled=0)


@functools.cache
def start() -> Start:
    return started(build)


def settled(w: World) -> None:
    w.find_dirty()
    w.remount()
    w.stored.rewrite(is_settled=1)


def tag_at(w: World, block: int) -> int:
    found = w.index.find(block)
    assert found
    return w.stored.ground.tag_offset(found.set_number, found.way)


def put(w: World, offset: int, word: int) -> None:
    w.medium.store(offset, (word & (1 << 64) - 1).to_bytes(8, "little"))


def damage_clean(w: World) -> None:
    """No block is dirty here."""
    w.write_back()
    found = w.index.find(0)
    assert found
    put(w, tag_at(w, 0), found.word ^ 1 << 20)


def damage_dirty(w: World) -> None:
    found = w.index.find(8)
    assert found
    put(w, tag_at(w, 8), found.word ^ 1 << 50)


def put_into_wrong_set(w: World) -> None:
    ground = w.stored.ground
    other = 1 - ground.set_of(40)
    put(w, ground.tag_offset(other, 15), ground.tag_word(Tag(TagState.CLEAN, 0, 40), other, 15))


def put_behind_the_end(w: World, state: TagState = TagState.CLEAN) -> None:
    ground = w.stored.ground
    block = len(BLOCKS) + 1
    number = ground.set_of(block)
    put(w, ground.tag_offset(number, 15), ground.tag_word(Tag(state, 0, block), number, 15))


def put_twin(w: World, ahead: int, state: TagState = TagState.CLEAN) -> None:
    """Another tag for block 8, whose sequence is so far ahead."""
    found, ground = w.index.find(8), w.stored.ground
    assert found
    tag = Tag(state, (found.tag.sequence + ahead) % 32, 8)
    number = found.set_number
    put(w, ground.tag_offset(number, 15), ground.tag_word(tag, number, 15))


def forget_group(w: World) -> None:
    put(w, w.stored.ground.group_offset(0), 0)


def put_group_into_future(w: World) -> None:
    put(w, w.stored.ground.group_offset(0), time.time_ns() + 10**12)


def scribble_head(w: World, copy: int) -> None:
    w.medium.store(w.pool.zones.data.offset_bytes + copy * 4096 + 900, b"scribble")


def miscount(w: World) -> None:
    settled(w)
    w.stored.rewrite(dirty_blocks=99)


Damage = Callable[[World], object]
CASES: dict[str, tuple[Damage, str, str, bool, bool]] = {
    "a damaged tag, nothing dirty": (
        damage_clean, "wrong check bits", "nothing is lost", True, False),
    "a damaged tag that was dirty": (
        damage_dirty, "wrong check bits", "is lost if it was dirty", True, True),
    "a tag of a wrong set": (
        put_into_wrong_set, "belongs to another set", "is lost if it was dirty", True, True),
    "a clean tag behind the end": (
        put_behind_the_end, "behind the end of the origin", "nothing is lost", True, False),
    "a dirty tag behind the end": (
        lambda w: put_behind_the_end(w, TagState.DIRTY), "behind the end", "is lost", True, True),
    "an older twin": (
        lambda w: put_twin(w, -1), "has a newer one", "nothing is lost", False, False),
    "a newer twin": (
        lambda w: put_twin(w, 1), "has a newer one", "nothing is lost", False, False),
    "an older twin after an unmount": (
        lambda w: (settled(w), put_twin(w, -1)), "has a newer one", "nothing is lost", True, False),
    "a twin that is neither": (
        lambda w: put_twin(w, 0), "neither is the newer one", "may be lost", True, True),
    "a group that is forgotten": (
        forget_group, "and its word says none", "since now", True, False),
    "a group in the future": (
        put_group_into_future, "still to come", "since now", False, False),
    "a damaged head": (
        lambda w: scribble_head(w, 0), "checksum is wrong", "written anew", True, False),
    "a damaged copy of the head": (
        lambda w: scribble_head(w, 1), "checksum is wrong", "written anew", True, False),
    "a wrong count": (miscount, "99 blocks as dirty", "put right", True, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_damage_is_said_and_repaired(case: str) -> None:
    damage, sentence, remedy, is_error, needs_force = CASES[case]
    w = start().world(is_settled=False)
    damage(w)
    found = [f for f in check_pool(w.medium) if f.remedy]
    assert len(found) == 1
    assert sentence in found[0].sentence
    assert remedy in str(found[0].remedy)
    assert str(found[0].remedy).startswith("only with --force") == needs_force
    assert found[0].is_error == is_error

    before = content(w.medium)
    said: list[Finding] = []
    if needs_force:
        assert repair_pool(w.medium, said.append) == 0
        assert [f.is_error for f in said] == [True]
        assert content(w.medium) == before
        said.clear()
    assert repair_pool(w.medium, said.append, force=needs_force) == 1
    assert [f.is_error for f in said] == [False]
    assert remedy in said[0].sentence
    left = check_pool(w.medium)
    assert not [f for f in left if f.is_error or f.remedy]
    for block in BLOCKS:
        w.index.find(block)


def test_a_cache_that_was_killed_is_without_errors() -> None:
    w = start().world(is_settled=False)
    findings = check_pool(w.medium)
    assert not has_errors(findings)
    assert "14 of 32 places hold a block; dirty: 6 blocks" in findings[-1].sentence


def test_without_a_head_nothing_can_be_repaired_and_what_is_lost_is_said() -> None:
    w = start().world(is_settled=False)
    for copy in range(2):
        scribble_head(w, copy)
    findings = check_pool(w.medium)
    assert "what was dirty in it is lost" in findings[-1].sentence
    assert not [f for f in findings if f.remedy]
    assert repair_pool(w.medium, print, force=True) == 0
    with pytest.raises(DamagedCache, match="neither copy of its head is valid"):
        StoredHead.open(w.pool)


def test_of_very_many_problems_some_are_listed_and_all_are_repaired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tagcheck, "MOST_PROBLEMS", 5)
    w = start().world(is_settled=False)
    rng = random.Random(1)
    for way in range(16):
        put(w, w.stored.ground.tag_offset(0, way), rng.getrandbits(64))
    assert "11 more things were found" in check_pool(w.medium)[-2].sentence
    assert repair_pool(w.medium, lambda _: None, force=True) == 16
    assert not has_errors(check_pool(w.medium))


@pytest.mark.parametrize("seed", range(40))
def test_scribbled_tags_words_and_heads_are_refused_or_served_and_can_be_repaired(
    seed: int,
) -> None:
    """Never another block's bytes: a block reads as it should, or fails."""
    rng = random.Random(seed)
    w = start().world(is_settled=False)
    ground = w.stored.ground
    for _ in range(rng.choice((1, 3, 20))):
        offset = rng.choice(
            [ground.tag_offset(rng.randrange(2), rng.randrange(16)),
             ground.tag_offset(rng.randrange(2), rng.randrange(16)),
             ground.group_offset(0), ground.data_offset + rng.randrange(4096 - 64)]
        )  # fmt: skip
        old = int.from_bytes(w.medium.read(offset, 8), "little")
        put(w, offset, rng.choice([rng.getrandbits(64), old ^ 1 << rng.randrange(64)]))
    w.mount(is_settled=False)
    assert look(w, w.content) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w, "judge", None)
        for block in rng.sample(list(BLOCKS), 8):
            for change in (w.write, w.fetch, w.clean, w.trim, w.drop):
                try:
                    change(block)
                except (DamagedSet, AssertionError, StopIteration):
                    # The volume would answer EIO.
                    w.content[block] = b""
    w.find_dirty()
    w.mount(is_settled=False)
    repair_pool(w.medium, lambda _: None, force=True)
    assert not has_errors(check_pool(w.medium))
    w.mount(is_settled=False)
    assert look(w, {}) == len(BLOCKS)


def look(w: World, contents: dict[int, bytes]) -> int:
    """Read every block; how many could be read. Where a tag was cleared, the origin is read."""
    count = 0
    for block in BLOCKS:
        try:
            found = w.read(block)
        except DamagedSet:
            continue
        count += 1
        assert found in (contents.get(block) or found, w.origin[block])
    return count


def test_tags_of_a_sparse_pool_are_read_without_taking_memory(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    with path.open("wb") as file:
        file.truncate(64 << 30)
    medium = MappedMedium.open(str(path))
    try:
        spec = PoolSpec("sparse", scheme=Scheme.ON_DEMAND, mode=Mode.CACHE)
        pool = Pool.create(medium, spec)
        head = StoredHead.open(on_medium(template(), CacheMedium(start().image))).head
        ground = StoredHead.create(pool, head).ground
        assert path.stat().st_blocks * 512 < MIB
        number = ground.set_of(5)
        word = ground.tag_word(Tag(TagState.CLEAN, 0, 5), number, 4)
        medium.put(ground.tag_offset(number, 4), word.to_bytes(8, "little"))
        findings = check_pool(medium)
        assert not has_errors(findings)
        assert "1 of " in findings[-1].sentence
        assert path.stat().st_blocks * 512 < MIB
    finally:
        medium.close()


def test_a_new_cache_is_empty_whatever_the_memory_held() -> None:
    pool = on_medium(template(), CacheMedium(content(template().medium)))
    with pytest.raises(DamagedCache, match="does not start with the magic"):
        StoredHead.open(pool)
    head = StoredHead.open(on_medium(template(), CacheMedium(start().image))).head
    StoredHead.create(pool, head)
    findings = check_pool(pool.medium)
    assert not has_errors(findings)
    assert "0 of 32 places hold a block; dirty: 0 blocks" in findings[-1].sentence
