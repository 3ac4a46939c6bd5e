"""A cache that is not mounted, for as long as a command needs it.

What a daemon does for its mount is done here without one: the pool is locked, its origin is fenced,
and both are left as after a mount that has ended. A cache that was killed is recovered by the same
search. Invariant: whatever ends the command, Ctrl-C as well, what the origin lacks stays dirty.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any, TypeVar

import trio

from pmemfs.errors import NotACache
from pmemfs.media.cache import SET_BYTES, CacheHead
from pmemfs.media.label import Mode, State
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.pfn import FRAME_BYTES
from pmemfs.pool import Pool
from pmemfs.units import align_up
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.life import CacheLife
from pmemfs.volume.cache.volume import CacheVolume

Answer = TypeVar("Answer")
Operation = Callable[[CacheVolume], Awaitable[Answer]]

# A command says itself what went wrong.
logging.getLogger("pmemfs").addHandler(logging.NullHandler())


def open_cache(medium: MappedMedium) -> Pool:
    """The pool of a cache. Raises NotACache, and as `Pool.open`."""
    pool = Pool.open(medium)
    if pool.label.mode != Mode.CACHE:
        raise NotACache(path=medium.name, mode=Mode(pool.label.mode).word)
    return pool


def run_unmounted(
    path: str, operate: Operation[Answer], *, say: Callable[[str], None], read_only: bool = False,
    degraded: bool = False, flushing: bool = False,
) -> Answer:  # fmt: skip
    """Do something with the cache of a pool; `degraded`: without its origin; `flushing`: the origin
    is written to, even if the policy is read-only. `say` is told what this waits for.

    Raises NotACache, WrongOrigin, as `Pool.open`, as `open_origin`, and what `operate` raises.
    """
    with closing(MappedMedium.open(path, read_only=read_only)) as medium:
        pool = open_cache(medium)
        if read_only:
            return trio.run(_run, pool, medium, operate, say, degraded, flushing)
        was_clean = pool.label.state == State.CLEAN
        pool.begin_mount()
        is_done = False
        try:
            answer = trio.run(_run, pool, medium, operate, say, degraded, flushing)
            is_done = True
        finally:
            # `_run` leaves the cache in order, or has not begun.
            if is_done or was_clean:
                pool.end_mount()
        return answer


async def _run(
    pool: Pool, medium: MappedMedium, operate: Operation[Answer], say: Callable[[str], None],
    degraded: bool, flushing: bool,
) -> Answer:  # fmt: skip
    volume = CacheVolume(pool, open_memmap(pool))
    life = CacheLife(volume, medium, is_degraded=degraded, is_flushed=flushing)
    answers: list[Answer] = []
    failure: BaseException | None = None
    try:
        await life.begin(say)
        try:
            async with trio.open_nursery() as tasks:
                tasks.start_soon(life.serve)
                try:
                    answers.append(await operate(volume))
                except trio.Cancelled:
                    raise
                except BaseException as error:
                    # Raised in here it would come out in a group.
                    failure = error
                tasks.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await life.finish()
    finally:
        with trio.CancelScope(shield=True):
            await life.close()
    if failure is not None:
        raise failure
    return answers[0]


def forget_all(pool: Pool, **origin: Any) -> CacheHead:
    """Let a cache be empty, its dirty blocks lost; `origin` has what is known of the origin now.

    After a power failure meanwhile, some of it may be forgotten.
    """
    stored = StoredHead.open(pool)
    stored.rewrite(is_settled=0)
    ground = stored.ground
    tags_bytes = align_up(ground.set_count * SET_BYTES, FRAME_BYTES)
    pool.medium.clear(ground.tags_offset, tags_bytes)
    # A group without dirty blocks may have a word; a dirty block without one would be forgotten.
    pool.medium.clear(ground.groups_offset, ground.tags_offset - ground.groups_offset)
    stored.rewrite(is_settled=1, dirty_blocks=0, **origin)
    return stored.head
