"""What commands do with a cache that is not mounted. Loads what a daemon loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing, suppress
from typing import NoReturn

import trio

from pmemfs.cli.cache_asking import added, in_blocks, parts_of
from pmemfs.cli.early import EXIT_INTERRUPTED
from pmemfs.cli.output import complain, progress_bar, warn
from pmemfs.errors import EXIT_FAILED, DirtyBlocks, PmemfsError, sentence_of
from pmemfs.media.cache import GROUP_SHIFT, Policy
from pmemfs.media.cachereport import (
    CacheSettings,
    Dropped,
    Exported,
    Flushed,
    StoredCache,
    Verified,
)
from pmemfs.medium.mapped import MappedMedium
from pmemfs.pool import Pool
from pmemfs.volume.cache.export import DirtyContent, export_dirty
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.making import look_at_origin, stored_cache
from pmemfs.volume.cache.methods import CacheMethods
from pmemfs.volume.cache.offline import forget_all, open_cache, run_unmounted
from pmemfs.volume.cache.volume import CacheVolume
from pmemfs.volume.cache.zeroing import CachedBlocks

_POLL_SECONDS = 0.5
_Chosen = tuple[int, int | None]


def _give_up(why: str, is_interrupted: bool) -> NoReturn:
    """End at once. What was not done stays to be done."""
    code = EXIT_INTERRUPTED if is_interrupted else EXIT_FAILED
    complain("interrupted" if is_interrupted else why, exit_code=code)
    os._exit(code)


def flush_unmounted(path: str) -> Flushed:
    """Let the origin be complete."""
    with progress_bar(path) as show:

        async def operate(volume: CacheVolume) -> Flushed:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(_show_dirty, volume, show)
                failure = None
                try:
                    flushed = await CacheMethods(volume).flush()
                except PmemfsError as error:
                    failure = error
                tasks.cancel_scope.cancel()
            if failure:
                raise failure
            return Flushed(**flushed)

        return run_unmounted(path, operate, _give_up, say=warn, flushing=True)


async def _show_dirty(volume: CacheVolume, show: Callable[[int, int], None]) -> None:
    total = 1
    while True:
        await trio.sleep(_POLL_SECONDS)
        # After a crash the search finds more and more.
        total = max(total, volume.count_dirty())
        show(total - volume.count_dirty(), total)


def drop_unmounted(path: str, chosen: _Chosen, *, clean_only: bool) -> Dropped:
    """Drop the clean blocks of a range; unless `clean_only`, give the origin the dirty ones
    first."""

    async def operate(volume: CacheVolume) -> Dropped:
        methods = CacheMethods(volume)
        if not clean_only:
            await methods.flush()
        offset, end = chosen
        length = None if end is None else end - offset
        return Dropped(**await methods.drop(offset, length))

    return run_unmounted(
        path, operate, _give_up, say=warn, degraded=clean_only, flushing=not clean_only
    )


def drop_all(path: str, *, discard_dirty: bool) -> Dropped:
    """Let a pool forget all, and take the origin as it is now.

    Raises DirtyBlocks if the pool has what its origin lacks, and can't be given.
    """
    dirty = _count_dirty(path)
    if dirty and not discard_dirty:
        try:
            flush_unmounted(path)
        except (PmemfsError, OSError) as error:
            why = f"can't give it: {sentence_of(error).partition(';')[0]}"
            raise DirtyBlocks(path=path, blocks=in_blocks(dirty), why=why) from None
    with closing(MappedMedium.open(path)) as medium:
        pool = open_cache(medium)
        head = StoredHead.open(pool).head
        # Counted again, because another process may have mounted the pool meanwhile.
        if not discard_dirty and (dirty := DirtyContent(pool).count()):
            raise DirtyBlocks(path=path, blocks=in_blocks(dirty),
                              why="somebody has just written to it")  # fmt: skip
        origin = {}
        try:
            origin = trio.run(_look, head.origin, head.policy == Policy.READ_ONLY)
        except (PmemfsError, OSError) as error:
            warn(f"the origin can't be looked at, and has to be the same as before: "
                 f"{sentence_of(error)}")  # fmt: skip
        pool.begin_mount()
        used = _count_used(pool)
        forget_all(pool, **origin)
        pool.end_mount()
    return Dropped(used, 0)


async def _look(text: str, read_only: bool) -> dict[str, object]:
    facts = await look_at_origin(text, read_only=read_only, say=warn)
    return facts._asdict()


def _count_used(pool: Pool) -> int:
    """How many blocks a cache has."""
    ground = StoredHead.open(pool).ground
    cached, step = CachedBlocks(pool.medium, ground), 1 << GROUP_SHIFT
    firsts = range(0, ground.set_count, step)
    return sum(len(cached.in_sets(at, min(step, ground.set_count - at))) for at in firsts)


def _count_dirty(path: str) -> int:
    with closing(MappedMedium.open(path, read_only=True)) as medium:
        return DirtyContent(open_cache(medium)).count()


def verify_unmounted(path: str, chosen: _Chosen) -> Verified:
    """Compare clean blocks with the origin, writing nothing."""
    with progress_bar(path) as show:

        async def operate(volume: CacheVolume) -> Verified:
            methods, found, done = CacheMethods(volume), Verified(0, 0, ()), 0
            for offset, length in parts_of(chosen, volume.size_bytes):
                found = added(found, Verified(**await methods.verify(offset, length)))
                done += length
                show(done, volume.size_bytes)
            return found

        return run_unmounted(path, operate, _give_up, say=warn, read_only=True)


def set_unmounted(path: str, changes: dict[str, int]) -> CacheSettings:
    """Change settings in the head."""
    with closing(MappedMedium.open(path, read_only=not changes)) as medium:
        pool = open_cache(medium)
        if changes:
            StoredHead.open(pool).rewrite(**changes)
        return stored_cache(pool).settings


def read_stored(path: str) -> StoredCache | None:
    """What the head of a pool says; None if it is damaged."""
    with closing(MappedMedium.open(path, read_only=True)) as medium, suppress(PmemfsError):
        return stored_cache(open_cache(medium))
    return None


def export_unmounted(path: str, to: str, *, is_new: bool) -> Exported:
    """Write what only the pool has to a file."""
    with (
        closing(MappedMedium.open(path, read_only=True)) as medium,
        progress_bar(to) as show,
    ):
        return export_dirty(DirtyContent(open_cache(medium)), to, is_new=is_new, show=show)
