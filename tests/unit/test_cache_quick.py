"""Misses that many readers have at once, on their way without tasks."""

from __future__ import annotations

import errno
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import CoroutineType

import pytest
import trio
import trio.testing

from kit.caches import ORIGIN_BYTES, make_cache, new_origin, opened_pool, read, served_cache, write
from kit.slow_origin import SlowOrigin, slow
from pmemfs.media.cache import WAYS, Policy, TagState
from pmemfs.media.label import Scheme
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB
from pmemfs.volume.base import Later
from pmemfs.volume.cache.volume import CacheVolume
from pmemfs.volume.coming import Coming
from pmemfs.volume.onefile import INODE

BLOCK = 4096
_REFUSED = "a test says so|took longer"
"""What a reader hears who has waited while the origin was asked again and again: where the machine
is busy, the time may be over before the origin says why."""


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", seed=b"o")


@pytest.fixture(params=[Scheme.PMEM, Scheme.ON_DEMAND], ids=lambda scheme: scheme.word)
def pool_path(request: pytest.FixtureRequest, shm: Path, origin: Path) -> Path:
    make_cache(shm / "pool", str(origin), scheme=request.param)
    return shm / "pool"


@asynccontextmanager
async def slow_cache(
    pool_path: Path, origin: Path
) -> AsyncIterator[tuple[SlowOrigin, CacheVolume]]:
    """A cache before such an origin."""
    slow_origin = await slow(origin)
    with opened_pool(pool_path) as pool:
        async with served_cache(pool, origin=slow_origin, is_native=True) as volume:
            try:
                yield slow_origin, volume
            finally:
                # Or a test that fails would wait for ever.
                slow_origin.let_go()


def begin(volume: CacheVolume, block: int, length: int = BLOCK) -> Coming[bytes | memoryview]:
    """A read that misses, and goes the quick way."""
    coming: Later[bytes | memoryview] = volume.read(INODE, block * BLOCK, length)
    assert isinstance(coming, Coming)
    return coming


async def fetched_all(volume: CacheVolume) -> None:
    """Wait for what is fetched ahead, too, which nobody else waits for."""
    while volume.misses.is_busy:  # noqa: ASYNC110
        await trio.sleep(0.001)


def check_order(volume: CacheVolume) -> None:
    """Each block has one tag, no place is held, and no lock is taken."""
    index, ground = volume.index, volume.ground
    found: Counter[int] = Counter()
    for number in range(ground.set_count):
        words = struct.unpack(
            f"<{WAYS}Q", volume._medium.read(ground.tag_offset(number, 0), 8 * WAYS)
        )
        assert ground.first_damaged(words, number) is None
        for way, word in enumerate(words):
            tag = ground.read_tag(word, number, way)
            found[tag.block if tag else -1] += 1
            pfn = ground.place_pfn(number, way)
            frames = (1 << ground.block_shift) // FRAME_BYTES
            assert not index._memmap.are_referenced(pfn, frames)
        assert index._locks.lock(number)
        index._locks.unlock(number)
    del found[-1]
    assert set(found.values()) <= {1}


def test_blocks_that_many_ask_for_at_once_come_with_few_calls(
    pool_path: Path, origin: Path
) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            blocks = random.Random(1).sample(range(ORIGIN_BYTES // BLOCK), 200)
            assert volume.misses.nursery is not None
            tasks = len(volume.misses.nursery.child_tasks)
            coming = [begin(volume, block) for block in blocks]
            await trio.testing.wait_all_tasks_blocked()
            assert slow_origin.calls == 1
            # One that was there for the beginning may have ended.
            assert len(volume.misses.nursery.child_tasks) <= tasks
            slow_origin.let_go()
            for block, answer in zip(blocks, coming, strict=True):
                assert await answer == wanted[block * BLOCK : (block + 1) * BLOCK]
            report = volume.statistics()
            assert (report.misses, report.fetched, report.inserted) == (200, 200, 200)
            # The other way, by the tags.
            for block in blocks:
                found = volume.index.find(block)
                assert found is not None
                assert (found.tag.state, found.tag.sequence) == (TagState.CLEAN, 0)
                assert (
                    await read(volume, block * BLOCK + 9, 99)
                    == wanted[block * BLOCK + 9 : block * BLOCK + 108]
                )
            assert volume.statistics().read_hits == 200
            check_order(volume)

    trio.run(look)


def test_a_full_cache_evicts_for_them(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, is_native=True) as volume:
                blocks = list(range(0, ORIGIN_BYTES // BLOCK, 2))
                random.Random(2).shuffle(blocks)
                for start in range(0, len(blocks), 64):
                    some = blocks[start : start + 64]
                    coming = [volume.read(INODE, block * BLOCK, BLOCK) for block in some]
                    for block, answer in zip(some, coming, strict=True):
                        data = answer if isinstance(answer, (bytes, memoryview)) else await answer
                        assert data == wanted[block * BLOCK : (block + 1) * BLOCK]
                report = volume.statistics()
                assert report.evicted > 1000
                assert report.inserted - report.evicted <= volume.ground.place_count
                check_order(volume)

    trio.run(look)


def test_all_readers_of_one_block_share_a_fetch(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, is_native=True) as volume:
                coming = [begin(volume, 3, 100 + at) for at in range(20)]
                # One of several blocks joins it, too, and so does a write of a part.
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read, volume, 2 * BLOCK, 3 * BLOCK)
                for at, answer in enumerate(coming):
                    assert await answer == wanted[3 * BLOCK : 3 * BLOCK + 100 + at]
                report = volume.statistics()
                assert (report.fetched, report.joined) == (3, 20)
                check_order(volume)

    trio.run(look)


@pytest.mark.parametrize("policy", [*Policy][:3])
def test_a_reader_gets_what_was_written_while_its_block_was_fetched(
    pool_path: Path, origin: Path, policy: Policy
) -> None:
    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            await volume.change_settings(policy=policy)
            answer = begin(volume, 7)
            await trio.testing.wait_all_tasks_blocked()
            assert len(slow_origin.kept) == 1
            await write(volume, 7 * BLOCK, b"n" * BLOCK)
            slow_origin.let_go()
            assert await answer == b"n" * BLOCK
            assert await read(volume, 7 * BLOCK, BLOCK) == b"n" * BLOCK
            await volume.write_backs.flush()
            check_order(volume)

    trio.run(look)
    assert origin.read_bytes()[7 * BLOCK : 8 * BLOCK] == b"n" * BLOCK


def test_neighbours_of_one_request_share_a_transfer(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            other = begin(volume, 105)
            answer = volume.read(INODE, 100 * BLOCK + 100, 10 * BLOCK)
            assert isinstance(answer, Coming)
            await trio.testing.wait_all_tasks_blocked()
            # What is asked for already cuts it in two.
            assert [offset // BLOCK for offset, _ in slow_origin.kept] == [105, 100, 106]
            slow_origin.let_go()
            assert await answer == wanted[100 * BLOCK + 100 : 110 * BLOCK + 100]
            assert await other == wanted[105 * BLOCK : 106 * BLOCK]
            report = volume.statistics()
            assert (report.misses, report.fetched, report.joined) == (12, 11, 1)
            # A read of which a part is there goes the other way.
            assert await read(volume, 108 * BLOCK, 5 * BLOCK) == wanted[108 * BLOCK : 113 * BLOCK]
            await fetched_all(volume)
            check_order(volume)

    trio.run(look)


def test_a_request_fails_if_one_of_its_blocks_does(pool_path: Path, origin: Path) -> None:
    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            slow_origin.is_broken = True
            begin(volume, 5)
            await trio.testing.wait_all_tasks_blocked()
            kept, slow_origin.kept = slow_origin.kept, []
            answer = volume.read(INODE, 4 * BLOCK, 3 * BLOCK)
            assert isinstance(answer, Coming)
            await trio.testing.wait_all_tasks_blocked()
            slow_origin.let_go()
            slow_origin.kept, slow_origin.fails_reads = kept, 10_000
            slow_origin.fail()
            with pytest.raises(OSError, match=_REFUSED):
                await answer
            check_order(volume)

    trio.run(look)


def test_a_sequence_is_read_ahead(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, is_native=True) as volume:
                for block in range(400):
                    data = await read(volume, block * BLOCK, BLOCK)
                    assert data == wanted[block * BLOCK : (block + 1) * BLOCK]
                report = volume.statistics()
                assert report.read_ahead > 300
                assert report.misses + report.read_hits == 400
                await fetched_all(volume)
                check_order(volume)

    trio.run(look)


def test_a_block_that_is_being_changed_is_fetched_after_that(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            async with volume.cleaner._order.changing(7, 1):
                changed, other = begin(volume, 7), begin(volume, 9)
                await trio.testing.wait_all_tasks_blocked()
                slow_origin.let_go()
                assert await other == wanted[9 * BLOCK : 10 * BLOCK]
                assert not changed.is_there
            assert await changed == wanted[7 * BLOCK : 8 * BLOCK]
            check_order(volume)

    trio.run(look)


def test_readers_of_an_origin_that_fails_have_its_patience(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            coming = [begin(volume, block) for block in range(0, 40, 2)]
            await trio.testing.wait_all_tasks_blocked()
            slow_origin.fails_reads = 5
            slow_origin.fail()
            for at, answer in enumerate(coming):
                assert await answer == wanted[2 * at * BLOCK : (2 * at + 1) * BLOCK]
            assert volume.statistics().origin.retries == 5
            check_order(volume)
            # While it is not well, nothing goes the quick way.
            slow_origin.fails_reads, slow_origin.is_broken = 10_000, True
            answer = begin(volume, 101)
            await trio.testing.wait_all_tasks_blocked()
            slow_origin.fail()
            with pytest.raises(OSError, match=_REFUSED) as caught:
                await answer
            assert caught.value.errno == errno.EIO
            reading = volume.read(INODE, 99 * BLOCK, BLOCK)
            assert isinstance(reading, CoroutineType)
            reading.close()
            check_order(volume)

    trio.run(look)


def test_a_reader_whose_time_is_over_gets_eio_and_the_place_stays_held(
    pool_path: Path, origin: Path
) -> None:
    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            await volume.change_settings(origin_timeout_seconds=1)
            answer = begin(volume, 7)
            with pytest.raises(OSError, match="took longer than 1 s") as caught:
                await answer
            assert caught.value.errno == errno.EIO
            with pytest.raises(AssertionError):
                check_order(volume)
            fetch = volume.misses.under_way[7]
            slow_origin.let_go()
            await fetch.done.wait()
            check_order(volume)
            assert volume.index.find(7) is not None

    trio.run(look)


def test_a_mount_that_ends_waits_for_the_origin(pool_path: Path, origin: Path) -> None:
    async def look() -> None:
        slow_origin = await slow(origin)
        with opened_pool(pool_path) as pool:
            async with trio.open_nursery() as nursery:
                async with served_cache(pool, origin=slow_origin, is_native=True) as volume:
                    answer = begin(volume, 7)
                    await trio.testing.wait_all_tasks_blocked()

                    async def let_go() -> None:
                        await trio.sleep(0.1)
                        assert not answer.is_there
                        slow_origin.let_go()

                    nursery.start_soon(let_go)
                check_order(volume)
                with pytest.raises(OSError, match="put/output error"):
                    answer.result()

    trio.run(look)


def test_a_reader_that_gives_up_leaves_the_fetch_to_others(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            first, second = begin(volume, 7), begin(volume, 7)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
            with pytest.raises(InterruptedError):
                await first
            with trio.move_on_after(0.01) as scope:
                await second
            assert scope.cancelled_caught
            slow_origin.let_go()
            assert await second == wanted[7 * BLOCK : 8 * BLOCK]
            check_order(volume)

    trio.run(look)


def test_what_the_quick_way_can_not_do_goes_the_other_way(shm: Path, tmp_path: Path) -> None:
    size = MIB + 512
    origin = new_origin(tmp_path / "origin", size, seed=b"o")
    make_cache(shm / "pool", str(origin), sparse=True)
    wanted = origin.read_bytes()

    async def look() -> None:
        with opened_pool(shm / "pool") as pool:
            async with served_cache(pool, is_native=True) as volume:
                # The last block ends behind the origin; the others have no memory yet.
                assert await read(volume, MIB, BLOCK) == wanted[MIB:]
                for block in range(200):
                    assert (
                        await read(volume, block * BLOCK, BLOCK)
                        == wanted[block * BLOCK : (block + 1) * BLOCK]
                    )
                check_order(volume)

    trio.run(look)


class Told:
    """Somebody who waits for blocks, and reads them where they are then."""

    def __init__(self) -> None:
        self.given = 0
        self.errors: list[Exception] = []

    def give(self, _: object) -> None:
        self.given += 1

    def fail(self, error: Exception) -> None:
        self.errors.append(error)


def test_blocks_are_brought_for_who_reads_them_there(pool_path: Path, origin: Path) -> None:
    wanted = origin.read_bytes()

    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            few, one, told = Told(), Told(), Told()
            assert volume.bring(100 * BLOCK + 9, 2 * BLOCK, few) == 3
            # Somebody who wants bytes shares the fetch.
            reading = begin(volume, 101)
            assert volume.bring(101 * BLOCK, BLOCK, one) == 1
            await trio.testing.wait_all_tasks_blocked()
            assert slow_origin.calls == 1
            fetches = dict(volume.misses.under_way)
            slow_origin.let_go()
            assert await reading == wanted[101 * BLOCK : 102 * BLOCK]
            assert (few.given, one.given) == (3, 1)
            # No bytes were copied for those who want none.
            assert not fetches[100].data
            assert not fetches[102].data
            assert volume.bring(102 * BLOCK, 2 * BLOCK, told) == 0
            assert volume.bring(ORIGIN_BYTES - 1, 2, told) == 1
            assert volume.bring(ORIGIN_BYTES, 1, told) == 0
            await trio.testing.wait_all_tasks_blocked()
            slow_origin.let_go()
            await fetched_all(volume)
            report = volume.statistics()
            assert (report.misses, report.fetched, report.joined) == (6, 4, 2)
            assert await read(volume, 100 * BLOCK, 9) == wanted[100 * BLOCK :][:9]
            check_order(volume)

    trio.run(look)


def test_who_wants_no_bytes_asks_for_them_where_the_quick_way_ends(
    pool_path: Path, origin: Path
) -> None:
    async def look() -> None:
        async with slow_cache(pool_path, origin) as (slow_origin, volume):
            told, late = Told(), Told()
            assert volume.bring(5 * BLOCK, BLOCK, told) == 1
            await trio.testing.wait_all_tasks_blocked()
            slow_origin.fails_reads, slow_origin.is_broken = 10_000, True
            slow_origin.fail()
            await trio.testing.wait_all_tasks_blocked()
            assert (told.given, told.errors) == (1, [])
            # That read is counted when it comes in the other way.
            assert volume.statistics().misses == 0
            with pytest.raises(OSError, match=_REFUSED):
                await read(volume, 5 * BLOCK, BLOCK)
            assert volume.statistics().misses == 1
            # While the origin is not well, nothing is brought.
            assert not volume.origin_link.is_well
            assert volume.bring(9 * BLOCK, BLOCK, late) == 0
            check_order(volume)

    trio.run(look)


def test_a_scan_is_not_brought_and_stays_one(pool_path: Path, origin: Path) -> None:
    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, is_native=True) as volume:
                await volume.change_settings(read_ahead_bytes=0, bypass_bytes=8 * BLOCK)
                for block in range(40):
                    if volume.bring(block * BLOCK, BLOCK, Told()):
                        await fetched_all(volume)
                    else:
                        await read(volume, block * BLOCK, BLOCK)
                report = volume.statistics()
                assert (report.bypassed, report.misses) == (32, 40)
                check_order(volume)

    trio.run(look)
