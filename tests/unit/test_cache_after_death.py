"""Whatever process of a cache's mount dies, and in the midst of whatever, the others go on.

The dead are real processes here, killed while they change tags, fill places or give the origin
bytes. Their successors are in this process.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from kit.cache_deaths import BLOCK, Model, Mount, Step, a_mount, live, served, steps_of
from kit.caches import fsync, make_cache, new_origin, read
from pmemfs.media.cache import Policy
from pmemfs.units import MIB
from pmemfs.volume.cache.volume import CacheVolume

ORIGIN_BYTES = 4 * MIB
POOL_BYTES = 3 * MIB
BLOCKS = ORIGIN_BYTES // BLOCK
STEPS = 60
POLICIES = (Policy.WRITE_BACK, Policy.WRITE_THROUGH, Policy.WRITE_AROUND)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", ORIGIN_BYTES, seed=b"o")


def new_pool(directory: Path, origin: Path, policy: Policy = Policy.WRITE_BACK) -> Path:
    path = directory / "pool"
    make_cache(path, str(origin), pool_bytes=POOL_BYTES, policy=policy)
    return path


async def content_of(volume: CacheVolume) -> bytes:
    return b"".join([await read(volume, at, MIB) for at in range(0, ORIGIN_BYTES, MIB)])


def nothing_is_held(volume: CacheVolume, mount: Mount) -> bool:
    ground = volume.ground
    places = ((number, way) for number in range(ground.set_count) for way in range(16))
    locks = mount.shared.cache_locks.cast("Q").tolist()
    return not any(locks) and not any(
        volume.index._memmap.are_referenced(ground.place_pfn(number, way), 1)
        for number, way in places
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.word)
def test_a_daemon_that_dies_at_any_step_loses_nothing_that_was_answered(
    shm: Path, origin: Path, policy: Policy
) -> None:
    pool, chance = new_pool(shm, origin, policy), random.Random(policy)
    model = Model(origin.read_bytes())
    for _ in range(10):
        with a_mount(pool, origin) as mount:
            steps = steps_of(chance.randrange(1 << 30), STEPS, BLOCKS)
            lived = live(mount, steps, chance.randint(1, 1500))
            model.carry_out(steps[: lived.begun])
            for _ in range(chance.randrange(3)):
                # Those that take over may die as well, before they serve or a little later.
                live(mount, [Step("flush")], chance.randint(1, 300), takes_over=True)
            trio.run(look, mount, model, lived.begun == lived.ended)
    assert origin.read_bytes() == model.content


async def look(mount: Mount, model: Model, was_answered: bool) -> None:
    """What a successor finds, and gives the origin."""
    life = mount.daemon().take_over(is_plane_alive=False)
    async with served(life) as volume:
        found = await content_of(volume)
        model.settle(found, was_answered=was_answered)
        await volume.write_backs.flush()
        await fsync(volume)
        assert volume.count_dirty() == 0
        assert nothing_is_held(volume, mount)
    assert not mount.problems()
    assert mount.origin.read_bytes() == model.content
