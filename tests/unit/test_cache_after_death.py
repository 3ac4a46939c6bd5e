"""Whatever process of a cache's mount dies, and in the midst of whatever, the others go on.

The dead are real processes here, killed while they change tags, fill places or give the origin
bytes. Their successors are in this process.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from kit.cache_deaths import (
    BLOCK,
    Daemon,
    Model,
    Mount,
    Step,
    a_mount,
    kill,
    live,
    served,
    steps_of,
    write_always,
)
from kit.caches import fsync, make_cache, new_origin, read, write
from kit.data_plane import READ, WRITE, read_in, write_in
from kit.slow_origin import slow
from pmemfs.dataplane.native import Responder
from pmemfs.errors import OriginBusy
from pmemfs.media.cache import Policy
from pmemfs.origin.file import FileOrigin
from pmemfs.origin.naming import FileName
from pmemfs.units import MIB
from pmemfs.volume.cache.groups import SEEN
from pmemfs.volume.cache.volume import CacheVolume
from pmemfs.volume.onefile import INODE

ORIGIN_BYTES = 4 * MIB
POOL_BYTES = 3 * MIB
BLOCKS = ORIGIN_BYTES // BLOCK
STEPS = 60
POLICIES = (Policy.WRITE_BACK, Policy.WRITE_THROUGH, Policy.WRITE_AROUND)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", ORIGIN_BYTES, seed=b"o")


def new_pool(directory: Path, origin: Path, **fields: Any) -> Path:
    path = directory / "pool"
    make_cache(path, str(origin), **{"pool_bytes": POOL_BYTES, **fields})
    return path


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


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
    pool, chance = new_pool(shm, origin, policy=policy), random.Random(policy)
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
    assert bytes_of(mount.origin) == model.content


async def kill_a_worker(
    daemon: Daemon, volume: CacheVolume, writes: list[tuple[int, bytes]], chance: random.Random
) -> None:
    """Kill a worker while it writes, and the daemon fetches and writes back."""
    offset, data = chance.choice(writes)
    # This lets workers write, too.
    await write(volume, offset, data)
    worker = write_always(daemon.mount, writes)
    async with trio.open_nursery() as nursery:
        await trio.sleep(chance.uniform(0.01, 0.02))
        nursery.start_soon(volume.write_backs.flush)
        for block in chance.sample(range(300, 1000), 12):
            nursery.start_soon(read, volume, block * BLOCK, 2 * BLOCK)
        await trio.sleep(chance.uniform(0.0, 0.01))
        kill(worker)
        for _ in range(chance.randrange(4)):
            await trio.lowlevel.checkpoint()
        daemon.engine.forget_workers()


def versions_of(blocks: Sequence[int], count: int) -> dict[int, list[bytes]]:
    """What a worker writes to some blocks, one after another."""
    return {
        block: [b"%6d.%5d|" % (block, version) * (BLOCK // 13) + b"." * (BLOCK % 13)
                for version in range(count)]
        for block in blocks
    }  # fmt: skip


def writes_of(versions: dict[int, list[bytes]]) -> list[tuple[int, bytes]]:
    """All of them, neighbours together."""
    return [
        (first * BLOCK, b"".join(versions[first + at][turn] for at in range(8)))
        for turn in range(len(versions[0]))
        for first in range(0, len(versions), 8)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(6))
def test_what_a_killed_worker_leaves_of_a_set_harms_nobody(
    shm: Path, origin: Path, turn: int
) -> None:
    chance = random.Random(turn)
    versions = versions_of(range(256), 4)

    async def go(mount: Mount) -> None:
        daemon = mount.daemon()
        async with served(daemon.open()) as volume:
            for offset, data in writes_of(versions)[:32]:
                await write(volume, offset, data)
            for number in range(8):
                await kill_a_worker(daemon, volume, writes_of(versions), chance)
                if number % 2:
                    await volume.write_backs.flush()
                    assert volume.count_dirty() == 0
            found = await content_of(volume)
            for block, legal in versions.items():
                assert found[block * BLOCK : (block + 1) * BLOCK] in legal
            await volume.write_backs.flush()
            await fsync(volume)
            assert nothing_is_held(volume, mount)
            assert bytes_of(mount.origin) == found
            assert volume.count_dirty() == 0
        assert not mount.problems()

    pool = new_pool(shm, origin, pool_bytes=6 * MIB, max_dirty_percent=100)
    with a_mount(pool, origin) as mount:
        trio.run(go, mount)


def test_what_the_origin_fills_stays_held_when_the_data_plane_dies(shm: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def go(mount: Mount) -> None:
        slow_origin = await slow(origin)
        daemon = mount.daemon()
        volume = daemon.open().volume
        await volume.begin(slow_origin)
        async with trio.open_nursery() as nursery:
            await nursery.start(volume.serve)
            await volume.write_backs.flush()
            assert volume.search.is_done
            reading: Any = volume.read(INODE, 40 * BLOCK, 3 * BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            taken = [v for _, v in slow_origin.kept]
            assert taken
            assert not nothing_is_held(volume, mount)
            daemon.engine.forget_workers()
            # Its references count in the new generation, so nobody gets the places.
            assert not nothing_is_held(volume, mount)
            # And what workers may have done to tags is found out anew.
            assert not volume.search.has_counted
            while slow_origin.kept:
                slow_origin.let_go()
                await trio.testing.wait_all_tasks_blocked()
            assert await reading == wanted[40 * BLOCK : 43 * BLOCK]
            await volume.write_backs.flush()
            assert volume.search.is_done
            assert all(volume.groups.state(g) >= SEEN for g in range(volume.groups.count))
            assert nothing_is_held(volume, mount)
            nursery.cancel_scope.cancel()
        await slow_origin.close()

    with a_mount(new_pool(shm, origin), origin) as mount:
        trio.run(go, mount)


def test_a_worker_serves_hits_while_there_is_no_daemon(shm: Path, origin: Path) -> None:
    data, more = b"before" * (BLOCK // 6) + b"....", b"after." * (BLOCK // 6) + b"...."
    steps = [Step("write", 5, 0, BLOCK, data), Step("flush"), Step("write", 6, 0, BLOCK, data)]

    def answer(worker: Responder, opcode: int, offset: int, payload: bytes = b"") -> str:
        operation = (read_in if opcode == READ else write_in)(offset, BLOCK)
        verdict, error, read_back = worker.answer(
            operation, opcode=opcode, inode=INODE, payload=payload
        )
        assert not error
        if opcode == READ and verdict == "answer":
            assert read_back == data
        return verdict

    async def go(mount: Mount) -> None:
        worker = mount.worker()
        assert [answer(worker, READ, block * BLOCK) for block in (5, 6, 7)] == [
            "answer", "answer", "forward",
        ]  # fmt: skip
        life = mount.daemon().take_over(is_plane_alive=True)
        # Not before the group was seen: what the daemon has stored there last may not be durable.
        assert answer(worker, WRITE, 5 * BLOCK, more) == "forward"
        async with served(life) as volume:
            assert volume.count_dirty() == 0
            await volume.write_backs.flush()
            assert volume.index.cleaned == 1
            await write(volume, 5 * BLOCK, data)
            assert answer(worker, WRITE, 5 * BLOCK, data) == "answer"
            assert volume.count_dirty() == 1
            await volume.write_backs.flush()
        assert bytes_of(origin)[5 * BLOCK : 7 * BLOCK] == data * 2

    with a_mount(new_pool(shm, origin), origin) as mount:
        lived = live(mount, steps, 1 << 40)
        assert lived.ended == len(steps)
        trio.run(go, mount)


def test_an_origin_that_is_away_is_opened_again_when_it_is_there(shm: Path, origin: Path) -> None:
    """What the cache has is served meanwhile; the rest waits as for an origin that is away."""
    elsewhere = origin.with_name("elsewhere")

    async def go(mount: Mount) -> None:
        mount.forget("origin")
        os.rename(origin, elsewhere)
        life = mount.daemon().take_over(is_plane_alive=False)
        async with served(life) as volume:
            assert await read(volume, 0, BLOCK) == b"x" * BLOCK
            assert volume.statistics().origin.state == "away"
            got: list[bytes] = []

            async def wait_for(block: int) -> None:
                got.append(await read(volume, block * BLOCK, BLOCK))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for, 9)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert not got
                os.rename(elsewhere, origin)
            assert got == [bytes_of(origin)[9 * BLOCK : 10 * BLOCK]]
            # An fsync owes the origin what the dead daemon may have written to it.
            assert volume.origin_link.owes_flush
            await fsync(volume)
            assert not volume.origin_link.owes_flush

    with a_mount(new_pool(shm, origin), origin) as mount:
        assert live(mount, [Step("write", 0, 0, BLOCK, b"x")], 1 << 40).ended == 1
        trio.run(go, mount)


def test_nobody_else_gets_an_origin_between_a_daemon_and_its_successor(
    shm: Path, origin: Path
) -> None:
    with a_mount(new_pool(shm, origin), origin) as mount:
        live(mount, [Step("fsync")], 1 << 40)
        with pytest.raises(OriginBusy):
            trio.run(fenced, origin)
        mount.forget("origin")
        trio.run(fenced, origin)


async def fenced(origin: Path) -> None:
    opened = await FileOrigin.open(FileName(str(origin)))
    try:
        await opened.fence()
    finally:
        await opened.close()


def test_a_command_that_comes_first_waits_for_the_origin(shm: Path, origin: Path) -> None:
    async def go(mount: Mount) -> None:
        life = mount.daemon().take_over(is_plane_alive=False)
        volume, has_flushed = life.volume, trio.Event()

        async def flush() -> None:
            await volume.errands.run(volume.write_backs.flush, is_long=True)
            has_flushed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flush)
            await trio.testing.wait_all_tasks_blocked(0.01)
            async with served(life):
                await has_flushed.wait()
                assert volume.index.cleaned == 1

    with a_mount(new_pool(shm, origin), origin) as mount:
        live(mount, [Step("write", 0, 0, BLOCK, b"x")], 1 << 40)
        trio.run(go, mount)
