"""`pmemfs check` of a pool of mode `cache`, as a user calls it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from kit.caches import make_cache, new_origin
from kit.commands import pmemfs
from pmemfs.media.cache import TAG_BYTES, Tag, TagState
from pmemfs.medium.mapped import MappedMedium
from pmemfs.pool import Pool
from pmemfs.volume.cache.heads import StoredHead


@pytest.fixture
def pool(shm: Path, tmp_path: Path) -> Path:
    """A pool with a cache that has one clean block, number 7."""
    path = shm / "pmem0"
    make_cache(path, str(new_origin(tmp_path / "origin")))
    plant(path, 7, TagState.CLEAN)
    return path


def plant(path: Path, block: int, state: TagState, flipped: int = 0) -> None:
    """Store a tag, with some bits wrong."""
    with closing(MappedMedium.open(str(path))) as medium:
        ground = StoredHead.open(Pool.open(medium)).ground
        number = ground.set_of(block)
        word = ground.tag_word(Tag(state, 0, block), number, 3) ^ flipped
        medium.put(ground.tag_offset(number, 3), word.to_bytes(TAG_BYTES, "little"))


@pytest.mark.slow
def test_a_cache_without_damage_is_said_to_have_none(pool: Path) -> None:
    result = pmemfs("check", pool)
    assert result.code == 0, result.err
    assert "places hold a block; dirty: 0 blocks; origin " in result.out
    assert "no errors" in result.out


@pytest.mark.slow
def test_what_loses_nothing_is_repaired_and_what_may_is_not_before_it_is_forced(
    pool: Path,
) -> None:
    plant(pool, 9, TagState.CLEAN, flipped=1 << 20)
    result = pmemfs("check", pool)
    assert result.code == 4
    assert "it is damaged: it has the wrong check bits" in result.out
    result = pmemfs("check", "--repair", pool)
    assert result.code == 1, result.out
    assert "nothing is lost, because nothing near it is dirty" in result.out

    # Now a block is dirty, and the group does not say so; then a damaged tag may have been dirty.
    plant(pool, 9, TagState.DIRTY)
    result = pmemfs("check", "--repair", pool)
    assert result.code == 1, result.out
    assert "its word says none: they count as dirty since now" in result.out
    plant(pool, 11, TagState.DIRTY, flipped=1 << 60)
    result = pmemfs("check", "--repair", pool)
    assert result.code == 4
    assert "NOT repaired: tag of set" in result.out
    assert "only with --force: its place is free, and what it stood for is lost" in result.out
    result = pmemfs("check", "--repair", "--force", pool)
    assert result.code == 1, result.out
    assert "2 of " in result.out
    assert "dirty: 1 block;" in result.out
