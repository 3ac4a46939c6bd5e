"""Mode cache in one process, before a real file: what programs see, and what the origin gets."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from kit.caches import (
    ORIGIN_BYTES,
    fsync,
    make_cache,
    new_origin,
    opened_pool,
    punch,
    read,
    served_cache,
    write,
)
from pmemfs.errors import MemoryFault, WrongOrigin, system_error
from pmemfs.media.cache import Policy
from pmemfs.memmap import open_memmap
from pmemfs.origin.file import FileOrigin
from pmemfs.origin.naming import FileName
from pmemfs.units import MIB
from pmemfs.volume.cache.groups import SEEN, Groups
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.offline import forget_all
from pmemfs.volume.cache.opening import open_right_origin
from pmemfs.volume.cache.volume import CacheVolume


def bytes_of(path: Path) -> bytes:
    """What an origin has now."""
    return path.read_bytes()


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for something that nobody tells."""
    while not is_so():  # noqa: ASYNC110
        await trio.sleep(0.02)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", seed=b"o")


@pytest.fixture
def pool_path(shm: Path, origin: Path) -> Path:
    make_cache(shm / "pool", str(origin))
    return shm / "pool"


def test_what_the_origin_has_is_read_and_comes_into_the_cache(
    pool_path: Path, origin: Path
) -> None:
    wanted = bytes_of(origin)

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                assert await read(volume, 100, 50_000) == wanted[100:50_100]
                assert volume.statistics().misses == 13
                assert await read(volume, 100, 50_000) == wanted[100:50_100]
                report = volume.statistics()
                assert (report.misses, report.read_hits, report.inserted) == (13, 13, 13)
                assert await read(volume, ORIGIN_BYTES - 10, 100) == wanted[-10:]
                assert await read(volume, ORIGIN_BYTES, 100) == b""

    trio.run(look)


def test_what_was_written_is_read_and_the_origin_gets_it_by_a_flush(
    pool_path: Path, origin: Path
) -> None:
    wanted = bytearray(bytes_of(origin))

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                for offset, length in ((0, 4096), (5000, 9000), (40_960, 81_920), (100_001, 3)):
                    data = bytes([offset % 251 + 1]) * length
                    assert await write(volume, offset, data) == length
                    wanted[offset : offset + length] = data
                assert await read(volume, 0, 200_000) == wanted[:200_000]
                assert volume.count_dirty() == len({0, *range(1, 4), *range(10, 30), 24})
                await volume.write_backs.flush()
                assert volume.count_dirty() == 0
                assert bytes_of(origin) == wanted
                assert volume.statistics().oldest_dirty_ns == 0

    trio.run(look)


def test_a_write_of_a_part_of_a_block_that_is_not_there_is_a_miss(pool_path: Path) -> None:
    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                await write(volume, 5000, b"part" * 2000)
                assert volume.statistics().misses == 2
                await write(volume, 5000, b"more" * 2000)
                assert volume.statistics().misses == 2

    trio.run(look)


def test_a_remount_keeps_clean_and_dirty_blocks(pool_path: Path, origin: Path) -> None:
    before = bytes_of(origin)

    async def first() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                await write(volume, 8192, b"new" * 1000)
                await read(volume, 1 << 20, 4096)

    async def second() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                assert volume.count_dirty() == 1
                assert await read(volume, 8192, 3000) == b"new" * 1000
                assert await read(volume, 1 << 20, 4096) == before[1 << 20 : (1 << 20) + 4096]
                assert volume.statistics().misses == 0
                await volume.write_backs.flush()

    trio.run(first)
    assert bytes_of(origin) == before
    trio.run(second)
    assert bytes_of(origin)[8192 : 8192 + 3000] == b"new" * 1000


@pytest.mark.parametrize("policy", [Policy.WRITE_THROUGH, Policy.WRITE_AROUND])
def test_the_origin_has_a_write_when_it_was_answered(
    pool_path: Path, origin: Path, policy: Policy
) -> None:
    wanted = bytearray(bytes_of(origin))

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                await read(volume, 0, 8192)
                await volume.change_settings(policy=policy)
                for offset, length in ((0, 4096), (4608, 512), (9000, 700), (32_768, 65_536)):
                    data = bytes([offset % 251 + 1]) * length
                    assert await write(volume, offset, data) == length
                    wanted[offset : offset + length] = data
                    assert bytes_of(origin) == wanted
                    assert await read(volume, offset, length) == data
                await fsync(volume)
                assert volume.count_dirty() == 0
                assert await read(volume, 0, 200_000) == wanted[:200_000]

    trio.run(look)


def test_what_was_discarded_reads_as_zeroes_here_and_in_the_origin(
    pool_path: Path, origin: Path
) -> None:
    wanted = bytearray(bytes_of(origin))

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                await read(volume, 0, 65_536)
                await write(volume, 16_384, b"x" * 16_384)
                wanted[16_384:32_768] = b"x" * 16_384
                for offset, length in ((4096, 4096), (10_000, 20_000), (1 << 20, 1 << 20)):
                    await punch(volume, offset, length)
                    wanted[offset : offset + length] = bytes(length)
                    assert await read(volume, 0, 65_536) == wanted[:65_536]
                await volume.write_backs.flush()
                assert bytes_of(origin) == wanted
                await punch(volume, 0, ORIGIN_BYTES)
                assert await read(volume, 0, 65_536) == bytes(65_536)
                assert bytes_of(origin) == bytes(ORIGIN_BYTES)

    trio.run(look)


def test_many_readers_of_one_block_cause_one_fetch(pool_path: Path) -> None:
    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(read, volume, 12_288, 100)
                report = volume.statistics()
                assert (report.fetched, report.joined) == (1, 19)

    trio.run(look)


def test_a_cache_full_of_dirty_blocks_cleans_some_and_goes_on(shm: Path, tmp_path: Path) -> None:
    size = 6 * MIB
    origin = new_origin(tmp_path / "origin", size)
    make_cache(shm / "pool", str(origin), max_dirty_percent=100)

    async def look() -> None:
        with opened_pool(shm / "pool") as pool:
            async with served_cache(pool) as volume:
                step = 65_536
                for at in range(0, size, step):
                    assert await write(volume, at, bytes([at // step % 255 + 1]) * step) == step
                for at in range(0, size, step):
                    assert await read(volume, at, step) == bytes([at // step % 255 + 1]) * step
                assert volume.statistics().full_set_waits > 0
                await volume.write_backs.flush()

    trio.run(look)
    data = bytes_of(origin)
    assert all(data[at] == at // 65_536 % 255 + 1 for at in range(0, size, 4096))


def test_what_follows_an_end_inside_a_block_is_read_after_the_origin_has_grown(
    shm: Path, tmp_path: Path
) -> None:
    size = MIB + 512
    origin = new_origin(tmp_path / "origin", size)
    make_cache(shm / "pool", str(origin))

    async def look() -> None:
        with opened_pool(shm / "pool") as pool:
            async with served_cache(pool) as volume:
                await read(volume, MIB, 512)
                await write(volume, MIB, b"x" * 100)
                grow(origin, size, b"grown" * 1000)
                assert await read(volume, MIB, 4096) == b"x" * 100 + bytes(412)
                assert await volume.resize() == (size, size + 5120)
                wanted = b"x" * 100 + bytes(412) + b"grown" * 1000
                assert await read(volume, MIB, 5000) == wanted[:5000]

    trio.run(look)


def grow(origin: Path, size_bytes: int, data: bytes) -> None:
    """Somebody makes the origin larger."""
    with origin.open("r+b") as file:
        file.seek(size_bytes)
        file.write(data)
        file.truncate(size_bytes + 5120)


@pytest.mark.parametrize("policy", [*Policy][:3])
def test_writers_of_one_block_do_not_take_bytes_from_each_other(
    pool_path: Path, origin: Path, policy: Policy
) -> None:
    wanted = bytearray(origin.read_bytes())
    chance = random.Random(policy)

    async def write_sectors(volume: CacheVolume, number: int) -> None:
        for _ in range(15):
            offset = (chance.randrange(4) * 32 + number) * 512
            data = bytes([chance.randrange(256)]) * 512
            await write(volume, offset, data)
            wanted[offset : offset + 512] = data
            assert await read(volume, offset, 512) == data

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                await volume.change_settings(policy=policy)
                async with trio.open_nursery() as nursery:
                    for number in range(32):
                        nursery.start_soon(write_sectors, volume, number)
                await fsync(volume)
                await volume.write_backs.flush()

    trio.run(look)
    assert bytes_of(origin) == wanted


def test_what_a_killed_mount_has_left_dirty_is_written_back_while_the_search_goes_on(
    shm: Path, origin: Path
) -> None:
    make_cache(shm / "pool", str(origin), pool_bytes=64 * MIB, sparse=True, max_dirty_age_seconds=1)

    async def first() -> None:
        with opened_pool(shm / "pool") as pool:
            async with served_cache(pool, is_killed=True) as volume:
                await write(volume, 8192, b"left" * 1024)

    async def second() -> None:
        with opened_pool(shm / "pool") as pool:
            volume = CacheVolume(pool, open_memmap(pool))
            (suspect,) = volume.groups.suspects()
            # As long as another task is about to see a group, the search is not over.
            held = volume.groups.seeing([1 - suspect])
            next(held)
            opened = await open_right_origin(volume.head.head, pool.medium.name, read_only=False)
            await volume.begin(opened)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.serve)
                with trio.fail_after(60):
                    await until(lambda: bytes_of(origin)[8192:12_288] == b"left" * 1024)
                    assert volume.statistics().is_searching
                    held.close()
                    await until(lambda: not volume.statistics().is_searching)
                nursery.cancel_scope.cancel()
            await volume.finish()
            await opened.close()

    trio.run(first)
    trio.run(second)


def test_a_look_at_a_sparse_group_asks_the_file_system_once_for_each_part_that_has_memory(
    shm: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(shm / "pool", str(origin), pool_bytes=64 * MIB, sparse=True)
    asked: list[int] = []
    seek = os.lseek

    def counting(fd: int, offset_bytes: int, whence: int) -> int:
        asked.append(offset_bytes)
        return seek(fd, offset_bytes, whence)

    with opened_pool(shm / "pool") as pool:
        groups = Groups(pool.medium, CacheVolume(pool, open_memmap(pool)).ground, is_settled=False)
        monkeypatch.setattr(os, "lseek", counting)
        for _ in groups.seeing([0]):
            pool.medium.fence()
    assert groups.state(0) == SEEN
    assert len(asked) <= 3


def test_a_search_that_could_not_read_all_tags_is_made_again_by_the_next_mount(
    pool_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, is_killed=True) as volume:
                await write(volume, 0, bytes(4096))

    async def second() -> None:
        with opened_pool(pool_path) as pool:
            ground = CacheVolume(pool, open_memmap(pool)).ground
            flush = pool.medium.flush

            def fail(offset_bytes: int, length_bytes: int) -> None:
                if ground.tags_offset <= offset_bytes < ground.blocks_offset:
                    raise MemoryFault(pfn=offset_bytes >> 12, path="pool")
                flush(offset_bytes, length_bytes)

            monkeypatch.setattr(pool.medium, "flush", fail)
            async with served_cache(pool) as volume:
                await until(lambda: not volume.statistics().is_searching)
            monkeypatch.undo()
            assert not StoredHead.open(pool).head.is_settled

    trio.run(first)
    trio.run(second)


class Counting(FileOrigin):
    """A file that counts writes and flushes, which wait and fail when told to."""

    may_flush: trio.Event
    meanwhile: Callable[[int], Awaitable[None]]
    fails = False
    flushes = writes = 0

    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        await super().write(offset_bytes, views)
        self.writes += 1

    async def flush(self, losses: int | None = None) -> None:
        self.flushes += 1
        await self.may_flush.wait()
        await self.meanwhile(9 + self.flushes)
        if self.fails:
            raise system_error(errno.EIO)
        await super().flush(losses)


@pytest.mark.parametrize("fails", [False, True])
def test_all_who_wait_for_a_flush_share_the_next_one(
    pool_path: Path, origin: Path, fails: bool
) -> None:
    async def look() -> None:
        counting = await Counting.open(FileName(str(origin)))
        assert isinstance(counting, Counting)
        counting.may_flush = trio.Event()
        outcomes: list[bool] = []

        async def clean(volume: CacheVolume, block: int) -> None:
            try:
                await volume.cleaner.clean([block])
            except OSError:
                outcomes.append(False)
            else:
                outcomes.append(True)

        with opened_pool(pool_path) as pool:
            async with served_cache(pool, origin=counting) as volume:
                # There is always something written that was not flushed.
                counting.meanwhile = lambda block: volume.cleaner.write_out([block])
                await write(volume, 0, bytes(30 * 4096))
                async with trio.open_nursery() as nursery:
                    for block in range(10):
                        nursery.start_soon(clean, volume, block)
                        await until(lambda: counting.flushes == 1)
                    await until(lambda: counting.writes == 10)
                    await trio.testing.wait_all_tasks_blocked()
                    # One flush is under way, and the nine others wait.
                    counting.fails = fails
                    counting.may_flush.set()
                assert counting.flushes == 2
                assert outcomes == [not fails] * 10
                founds = [volume.index.find(block) for block in range(10)]
                assert [found.tag.is_dirty for found in founds if found] == [fails] * 10
                counting.fails = False
                await volume.write_backs.flush()
                assert volume.count_dirty() == 0

    trio.run(look)


def test_a_pool_that_was_being_emptied_is_refused_until_it_is_empty(
    pool_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fill() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                await read(volume, 0, 64 * 4096)

    async def look() -> bytes:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                return await read(volume, 0, 4096)

    trio.run(fill)
    with origin.open("r+b") as file:
        file.write(b"somebody else")
    with pytest.raises(WrongOrigin, match="somebody has written to it"):
        trio.run(look)
    with opened_pool(pool_path) as pool, monkeypatch.context() as ending:
        # As kill -9 ends it, before the tags are gone.
        ending.setattr(pool.medium, "clear", interrupt)
        with pytest.raises(KeyboardInterrupt):
            forget_all(pool)
    with pytest.raises(WrongOrigin, match="was ended before it was done"):
        trio.run(look)
    with opened_pool(pool_path) as pool:
        forget_all(pool)
    assert trio.run(look)[:13] == b"somebody else"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
