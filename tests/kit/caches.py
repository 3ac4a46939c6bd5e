"""Caches in this process: a pool, a file for its origin, and the volume between them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from kit.mounts import Mounted, PoolMaker
from pmemfs.control.client import call
from pmemfs.control.places import socket_path
from pmemfs.engine.caching import PublishedCache
from pmemfs.engine.native import SharedEngine
from pmemfs.engine.sharing import share_memmap, share_pool
from pmemfs.media.cache import CacheHead, Policy
from pmemfs.media.label import Mode, Scheme
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.mountinfo import mount_at
from pmemfs.origin.base import Origin
from pmemfs.origin.opening import open_origin
from pmemfs.pool import Pool
from pmemfs.pool.pool import PoolSpec
from pmemfs.units import MIB
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.opening import identity_text, open_right_origin
from pmemfs.volume.cache.volume import CacheVolume
from pmemfs.volume.onefile import INODE

POOL_BYTES = 4 * MIB
ORIGIN_BYTES = 24 * MIB


def new_origin(path: Path, size_bytes: int = ORIGIN_BYTES, *, seed: bytes = b"") -> Path:
    """A file with bytes that tell where they belong."""
    with path.open("wb") as file:
        if seed:
            for at in range(0, size_bytes, 4096):
                file.write((seed + b"%d " % at).ljust(64, b".") * 64)
            file.truncate(size_bytes)
        else:
            file.truncate(size_bytes)
    return path


async def _described(origin_text: str) -> dict[str, Any]:
    origin = await open_origin(origin_text, read_only=True)
    try:
        return {
            "origin": origin.name, "origin_bytes": origin.size_bytes,
            "origin_identity": identity_text(await origin.identity()),
            "origin_mark": await origin.mark(),
        }  # fmt: skip
    finally:
        await origin.close()


def make_cache(
    path: Path, origin_text: str, *, pool_bytes: int = POOL_BYTES, sparse: bool = False,
    scheme: Scheme = Scheme.PMEM, **fields: Any,
) -> None:  # fmt: skip
    """A pool of mode cache in a file."""
    settings: dict[str, Any] = {
        "policy": Policy.WRITE_BACK, "max_dirty_percent": 50, "max_dirty_age_seconds": 30,
        "origin_timeout_seconds": 5, "read_ahead_bytes": MIB, "bypass_bytes": 0,
    }  # fmt: skip
    settings |= trio.run(_described, origin_text) | fields
    with path.open("wb") as file:
        if sparse:
            file.truncate(pool_bytes)
        else:
            os.posix_fallocate(file.fileno(), 0, pool_bytes)
    medium = MappedMedium.open(str(path))
    try:
        spec = PoolSpec(name=path.name, mode=Mode.CACHE, scheme=scheme, alignment_bytes=4096)
        StoredHead.create(Pool.create(medium, spec), CacheHead(**settings))
    finally:
        medium.close()


@contextmanager
def opened_pool(path: Path, *, read_only: bool = False) -> Iterator[Pool]:
    """The pool of a cache, as a mount has it."""
    medium = MappedMedium.open(str(path), read_only=read_only)
    try:
        pool = Pool.open(medium)
        if not read_only:
            pool.begin_mount()
        yield pool
    finally:
        medium.close()


def shared_volume(pool: Pool) -> CacheVolume:
    """The volume of a pool as the native engine makes it, with nobody who looks on."""
    medium = pool.medium
    assert isinstance(medium, MappedMedium)
    count = StoredHead.open(pool).ground.set_count
    shared = share_pool(pool, worker_count=1, cache_set_count=count)
    memmap = share_memmap(pool, medium, shared)
    published = PublishedCache(SharedEngine(pool, medium, memmap, shared))
    has_locks = medium.durability is not Durability.MSYNC
    return CacheVolume(
        pool, memmap, onlookers=published, gate=published,
        locks=published.locks() if has_locks else None,
        places=partial(published.places, medium) if has_locks else None,
    )  # fmt: skip


@asynccontextmanager
async def served_cache(
    pool: Pool, *, origin: Origin | None = None, degraded: bool = False, is_killed: bool = False,
    is_native: bool = False,
) -> AsyncIterator[CacheVolume]:  # fmt: skip
    """The volume of a pool, with its tasks; a mount from its beginning to its end, unless
    `is_killed`: then nothing is left in order. With `is_native` misses go the quick way."""
    volume = shared_volume(pool) if is_native else CacheVolume(pool, open_memmap(pool))
    head = volume.head.head
    if origin is None and not degraded:
        read_only = pool.medium.read_only
        origin = await open_right_origin(head, pool.medium.name, read_only=read_only)
    try:
        await volume.begin(origin)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.serve)
            await trio.testing.wait_all_tasks_blocked()
            yield volume
            nursery.cancel_scope.cancel()
        if not is_killed:
            await volume.finish()
            if not pool.medium.read_only:
                pool.end_mount()
    finally:
        if origin is not None:
            await origin.close()


async def read(volume: CacheVolume, offset: int, length: int) -> bytes:
    """Read, and wait for it."""
    reading = volume.read(INODE, offset, length)
    return bytes(reading if isinstance(reading, (bytes, memoryview)) else await reading)


async def write(volume: CacheVolume, offset: int, data: bytes) -> int:
    """Write, and wait for it."""
    writing = volume.write(INODE, offset, data)
    return writing if isinstance(writing, int) else await writing


async def fsync(volume: CacheVolume) -> None:
    """Make all durable that was written."""
    waiting = volume.write_back(INODE)
    if waiting is not None:
        await waiting
    await volume.fencing.fence()


async def punch(volume: CacheVolume, offset: int, length: int) -> None:
    """Discard, and wait for it."""
    waiting = volume.punch(INODE, offset, length)
    if waiting is not None:
        await waiting


# Mounted


def cache_of(pools: PoolMaker, origin: object, **fields: Any) -> Path:
    """A pool that caches an origin."""
    path = pools.directory / "pmem0"
    make_cache(path, str(origin), **{"pool_bytes": 8 * MIB, **fields})
    return path


def ask(mounted: Mounted, method: str, **params: Any) -> dict[str, Any]:
    """What the daemon answers."""
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    return dict(call(socket_path(mount), method, **params))
