"""Mode cache where two things meet: a change and what is just being stored, flushed or fetched."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from pmemfs.errors import OriginGone, system_error
from pmemfs.media.cache import HEAD, Policy
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.origin.base import Identity
from pmemfs.origin.file import FileOrigin
from pmemfs.origin.naming import FileName
from pmemfs.pool import Pool
from pmemfs.units import KIB, MIB
from pmemfs.volume.cache import misses
from pmemfs.volume.cache.blocks import Piece
from pmemfs.volume.cache.opening import identity_text
from pmemfs.volume.cache.volume import CacheVolume
from pmemfs.volume.onefile import INODE

BLOCK = 4 * KIB


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", seed=b"o")


@pytest.fixture
def pool_path(shm: Path, origin: Path) -> Path:
    make_cache(shm / "pool", str(origin))
    return shm / "pool"


class SlowFences:
    """Fences of a medium, as slow as those by msync may be."""

    def __init__(self, medium: MappedMedium, monkeypatch: pytest.MonkeyPatch) -> None:
        self._fence = medium.fence
        self._may_end = threading.Event()
        self._may_end.set()
        self._waits = threading.Event()
        monkeypatch.setattr(medium, "durability", Durability.MSYNC)
        monkeypatch.setattr(medium, "fence", self._fence_slowly)

    def _fence_slowly(self) -> None:
        if not self._may_end.is_set():
            self._waits.set()
            assert self._may_end.wait(30)
        self._fence()

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Within this none ends."""
        self._waits.clear()
        self._may_end.clear()
        try:
            yield
        finally:
            self._may_end.set()

    async def reached(self) -> None:
        """Wait until one has begun."""
        assert await trio.to_thread.run_sync(self._waits.wait, 30)


def mapped(pool: Pool) -> MappedMedium:
    medium = pool.medium
    assert isinstance(medium, MappedMedium)
    return medium


def test_what_was_discarded_does_not_come_back_by_a_fetch_that_is_just_publishing(
    pool_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> None:
        with opened_pool(pool_path) as pool:
            slow = SlowFences(mapped(pool), monkeypatch)
            async with served_cache(pool) as volume:
                async with trio.open_nursery() as nursery:
                    with slow.held_up():
                        nursery.start_soon(read, volume, 5 * BLOCK, BLOCK)
                        await slow.reached()
                        nursery.start_soon(punch, volume, 5 * BLOCK, BLOCK)
                        await trio.sleep(0.2)
                assert await read(volume, 5 * BLOCK, BLOCK) == bytes(BLOCK)

    trio.run(look)


def test_a_block_that_becomes_clean_during_a_discard_is_discarded(
    pool_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> None:
        with opened_pool(pool_path) as pool:
            slow = SlowFences(mapped(pool), monkeypatch)
            async with served_cache(pool) as volume:
                await write(volume, 5 * BLOCK, b"x" * BLOCK)
                await read(volume, 6 * BLOCK, BLOCK)
                await volume.cleaner.write_out([5])
                async with trio.open_nursery() as nursery:
                    with slow.held_up():
                        nursery.start_soon(punch, volume, 5 * BLOCK, 2 * BLOCK)
                        await slow.reached()
                        await volume.cleaner.settle()
                await fsync(volume)
                assert await read(volume, 5 * BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)

    trio.run(look)


def test_settings_that_are_changed_at_once_are_all_kept(
    pool_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "policy": Policy.WRITE_THROUGH, "max_dirty_percent": 7, "max_dirty_age_seconds": 8,
        "origin_timeout_seconds": 9, "read_ahead_bytes": 0,
    }  # fmt: skip

    async def change() -> None:
        with opened_pool(pool_path) as pool:
            SlowFences(mapped(pool), monkeypatch)
            async with served_cache(pool) as volume:
                async with trio.open_nursery() as nursery:
                    for name, value in changes.items():

                        async def change_one(name: str = name, value: int = value) -> None:
                            await volume.change_settings(**{name: value})

                        nursery.start_soon(change_one)
                assert {name: getattr(volume.head.head, name) for name in changes} == changes

    trio.run(change)


def test_an_fsync_flushes_what_only_the_origin_has(pool_path: Path) -> None:
    """Under write-back, which otherwise leaves the origin alone at an fsync."""

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                link = volume.origin_link
                await write(volume, 0, b"x" * BLOCK)
                assert volume.write_back(INODE) is None
                await punch(volume, 5 * BLOCK, BLOCK)
                assert link.owes_flush
                await fsync(volume)
                assert not link.has_unflushed
                assert volume.write_back(INODE) is None
                await volume.change_settings(policy=Policy.WRITE_AROUND)
                await write(volume, 7 * BLOCK, b"x" * BLOCK)
                await volume.change_settings(policy=Policy.WRITE_BACK)
                assert link.owes_flush
                await fsync(volume)
                assert not link.has_unflushed

    trio.run(look)


def test_the_policy_read_only_refuses_to_discard(pool_path: Path, origin: Path) -> None:
    before = origin.read_bytes()

    async def look() -> None:
        with opened_pool(pool_path) as pool:
            async with served_cache(pool) as volume:
                await write(volume, 0, b"x" * BLOCK)
                await volume.change_settings(policy=Policy.READ_ONLY)
                for refused in (volume.zero, volume.allocate):
                    with pytest.raises(OSError, match="Read-only"):
                        refused(INODE, 0, 2 * BLOCK, keep_size=True)
                with pytest.raises(OSError, match="Read-only"):
                    await punch(volume, 0, 2 * BLOCK)
                assert await read(volume, 0, BLOCK) == b"x" * BLOCK

    trio.run(look)
    assert origin.read_bytes() == before


def test_readers_need_no_memory_of_a_sparse_pool(
    shm: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = origin.read_bytes()
    make_cache(shm / "sparse", str(origin), sparse=True)

    async def look() -> None:
        with opened_pool(shm / "sparse") as pool:
            medium, reserve = mapped(pool), pool.medium.reserve

            def reserve_some(offset_bytes: int, length_bytes: int) -> None:
                # Tags, page structures and some places; the file system is full after that.
                if offset_bytes > full_from[0]:
                    raise system_error(errno.ENOSPC)
                reserve(offset_bytes, length_bytes)

            full_from = [2 * medium.size_bytes]
            monkeypatch.setattr(medium, "reserve", reserve_some)
            async with served_cache(pool) as volume:
                assert await read(volume, 0, BLOCK) == wanted[:BLOCK]
                for full_from[0] in (volume.ground.blocks_offset + 64 * KIB, 0):
                    for at in range(0, ORIGIN_BYTES, 1 << 20):
                        assert await read(volume, at, 1 << 20) == wanted[at : at + (1 << 20)]

    trio.run(look)


def test_more_readers_past_a_full_cache_than_buffers_are_kept_for_get_their_bytes(
    shm: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = origin.read_bytes()
    make_cache(shm / "sparse", str(origin), sparse=True)
    monkeypatch.setattr(misses, "_KEPT_BUFFERS", 1)

    async def look() -> None:
        with opened_pool(shm / "sparse") as pool:
            async with served_cache(pool) as volume:

                def reserve_none(offset_bytes: int, length_bytes: int) -> None:
                    raise system_error(errno.ENOSPC)

                monkeypatch.setattr(pool.medium, "reserve", reserve_none)

                async def check(at: int) -> None:
                    assert await read(volume, at, BLOCK) == wanted[at : at + BLOCK]

                async with trio.open_nursery() as nursery:
                    for number in range(4):
                        nursery.start_soon(check, number * MIB)

    trio.run(look)


class Failing(FileOrigin):
    """A file whose reads and flushes wait, and whose writes and flushes fail, when told to."""

    may_read: trio.Event
    may_flush: trio.Event
    fails = False
    lost_flushes = 0
    """So many flushes more find that the connection was lost."""
    written: list[int]
    """Where writes began."""

    def __init__(self, *words: Any, **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.may_read, self.may_flush, self.written = trio.Event(), trio.Event(), []
        self.may_read.set()
        self.may_flush.set()

    async def read(self, offset_bytes: int, views: Any) -> None:
        await self.may_read.wait()
        await super().read(offset_bytes, views)

    async def write(self, offset_bytes: int, views: Any) -> None:
        if self.fails:
            raise system_error(errno.EIO)
        self.written.append(offset_bytes)
        await super().write(offset_bytes, views)

    async def flush(self, losses: int | None = None) -> None:
        if self.lost_flushes:
            self.lost_flushes -= 1
            await self.may_flush.wait()
            raise OriginGone(name=self.name, why="the connection is lost")
        await super().flush(losses)


async def failing_origin(origin: Path) -> Failing:
    failing = await Failing.open(FileName(str(origin)))
    assert isinstance(failing, Failing)
    return failing


def test_what_was_answered_before_a_flush_failed_stays_dirty(pool_path: Path, origin: Path) -> None:
    """Also what was written while that flush was under way: the server may have lost it too."""

    async def look() -> None:
        failing = await failing_origin(origin)
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, origin=failing) as volume:
                for block in (1, 2):
                    await write(volume, block * BLOCK, b"x" * BLOCK)
                await volume.cleaner.write_out([1])
                failing.lost_flushes, failing.may_flush = 1, trio.Event()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(settle_in_vain, volume)
                    await trio.testing.wait_all_tasks_blocked()
                    await volume.cleaner.write_out([2])
                    failing.may_flush.set()
                await volume.cleaner.settle()
                assert volume.count_dirty() == 2
                await volume.write_backs.flush()
                assert volume.count_dirty() == 0

    trio.run(look)


async def settle_in_vain(volume: CacheVolume) -> None:
    with pytest.raises(OriginGone):
        await volume.cleaner.settle()


def test_an_fsync_writes_again_what_was_written_through_and_may_be_lost(
    pool_path: Path, origin: Path
) -> None:
    async def look() -> None:
        failing = await failing_origin(origin)
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, origin=failing) as volume:
                await volume.change_settings(policy=Policy.WRITE_THROUGH)
                await write(volume, 3 * BLOCK, b"x" * BLOCK)
                failing.lost_flushes = 1
                await settle_in_vain(volume)
                await fsync(volume)
                assert failing.written == [3 * BLOCK, 3 * BLOCK]
                assert volume.count_dirty() == 0

    trio.run(look)


def test_an_fsync_fails_once_when_what_was_written_around_may_be_lost(
    pool_path: Path, origin: Path
) -> None:
    async def look() -> None:
        failing = await failing_origin(origin)
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, origin=failing) as volume:
                await volume.change_settings(policy=Policy.WRITE_AROUND)
                await write(volume, 3 * BLOCK, b"x" * BLOCK)
                failing.lost_flushes = 1
                await settle_in_vain(volume)
                with pytest.raises(OSError, match="Input/output error"):
                    await fsync(volume)
                await fsync(volume)

    trio.run(look)


def test_a_write_that_fails_takes_no_bytes_from_one_that_was_answered(
    pool_path: Path, origin: Path
) -> None:
    """Under write-through, and before the origin has flushed the write that was answered."""

    async def look() -> None:
        failing = await failing_origin(origin)
        failing.may_read = trio.Event()
        with opened_pool(pool_path) as pool:
            async with served_cache(pool, origin=failing) as volume:
                await volume.change_settings(policy=Policy.WRITE_THROUGH)
                caught: list[OSError] = []

                async def fail() -> None:
                    try:
                        await write(volume, 5 * BLOCK + 512, b"y" * 512)
                    except OSError as error:
                        caught.append(error)

                async with trio.open_nursery() as nursery:
                    # It needs the rest of its block.
                    nursery.start_soon(fail)
                    await trio.testing.wait_all_tasks_blocked()
                    await write(volume, 5 * BLOCK, b"x" * BLOCK)
                    failing.fails = True
                    failing.may_read.set()
                assert [error.errno for error in caught] == [errno.EIO]
                found = volume.index.find(5)
                assert found is not None
                assert found.tag.is_dirty
                assert volume.blocks.load(Piece(5, 0, 512)) == b"x" * 512
                failing.fails = False

    trio.run(look)


@pytest.mark.parametrize("text", ["é" * 400, "\x01", ""])
def test_a_pool_keeps_any_identity_of_an_origin(text: str) -> None:
    kept = identity_text(Identity("nbd", text, BLOCK))
    assert kept.isprintable()
    assert len(kept.encode()) <= HEAD.room_of("origin_identity")
    assert kept != identity_text(Identity("nbd", text + "x", BLOCK))


def test_a_fetch_of_the_last_block_that_began_before_the_origin_grew_shows_no_zeroes(
    shm: Path, tmp_path: Path
) -> None:
    size = 16 * BLOCK + 512
    origin = new_origin(tmp_path / "short", size, seed=b"o")
    make_cache(shm / "pool", str(origin))

    async def look() -> None:
        failing = await failing_origin(origin)
        with opened_pool(shm / "pool") as pool:
            async with served_cache(pool, origin=failing) as volume:
                failing.may_read = trio.Event()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read, volume, 16 * BLOCK, 512)
                    await trio.testing.wait_all_tasks_blocked()
                    with origin.open("ab") as file:
                        file.write(b"grown" * 1024)
                    assert await volume.resize() == (size, size + 5120)
                    failing.may_read.set()
                found = await read(volume, size, 5120)
                assert found == b"grown" * 1024

    trio.run(look)
