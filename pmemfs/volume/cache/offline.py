"""A cache that is not mounted, for as long as a command needs it.

What a daemon does for its mount is done here without one: the pool is locked, its origin is fenced,
and both are left as after a mount that has ended. A cache that was killed is recovered by the same
search. Invariants:
- whatever ends the command, Ctrl-C as well, what the origin lacks stays dirty;
- Ctrl-C ends it soon, also while the origin hangs. It comes as a signal between two steps: as an
  exception it would break a change of the index off wherever that is.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any, NoReturn, TypeVar

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
from pmemfs.volume.cache.opening import FORGETTING_MARK, UNKNOWN_MARK
from pmemfs.volume.cache.volume import CacheVolume

Answer = TypeVar("Answer")
Operation = Callable[[CacheVolume], Awaitable[Answer]]
GiveUp = Callable[[str, bool], NoReturn]
"""Ends the process because of a sentence; whether it was interrupted."""

# A command says itself what went wrong.
logging.getLogger("pmemfs").addHandler(logging.NullHandler())


def open_cache(medium: MappedMedium) -> Pool:
    """The pool of a cache. Raises NotACache, and as `Pool.open`."""
    pool = Pool.open(medium)
    if pool.label.mode != Mode.CACHE:
        raise NotACache(path=medium.name, mode=Mode(pool.label.mode).word)
    return pool


def run_unmounted(
    path: str, operate: Operation[Answer], give_up: GiveUp, *, say: Callable[[str], None],
    read_only: bool = False, degraded: bool = False, flushing: bool = False,
) -> Answer:  # fmt: skip
    """Do something with the cache of a pool; `degraded`: without its origin; `flushing`: the origin
    is written to, even if the policy is read-only. `say` is told what this waits for; `give_up` is
    for an origin that hangs and can't be cut.

    Raises NotACache, WrongOrigin, KeyboardInterrupt, as `Pool.open`, as `open_origin`, and what
    `operate` raises.
    """
    with closing(MappedMedium.open(path, read_only=read_only)) as medium:
        pool = open_cache(medium)
        volume = CacheVolume(pool, open_memmap(pool))
        life = CacheLife(volume, medium, is_degraded=degraded, is_flushed=flushing)
        command = _Command(volume, life, give_up, say)
        if read_only:
            return trio.run(command.run, operate)
        was_clean = pool.label.state == State.CLEAN
        pool.begin_mount()
        is_done = False
        try:
            answer = trio.run(command.run, operate)
            is_done = True
        finally:
            # `command` leaves the cache in order, or has not begun.
            if is_done or was_clean:
                pool.end_mount()
        return answer


class _Command:
    """What a command does with a cache, until it is done or interrupted."""

    def __init__(
        self, volume: CacheVolume, life: CacheLife, give_up: GiveUp, say: Callable[[str], None]
    ) -> None:
        self._volume = volume
        self._life = life
        self._say = say
        self._is_interrupted = False
        self._working = trio.CancelScope()
        self._failure: BaseException | None = None
        life.give_up = lambda why: give_up(why, self._is_interrupted)

    async def run(self, operate: Operation[Answer]) -> Answer:
        """Begin, do it, and leave the cache in order. Raises KeyboardInterrupt, and what `operate`
        raises."""
        answers: list[Answer] = []

        async def work() -> None:
            answers.append(await operate(self._volume))

        async with trio.open_nursery() as nursery:
            # Whoever started this may have it ignored.
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                await nursery.start(self._follow_interrupts)
            try:
                await self._begin_and(work)
            except Exception as error:
                # Raised in here it would come out in a group.
                self._failure = error
            nursery.cancel_scope.cancel()
        if self._is_interrupted:
            raise KeyboardInterrupt
        if self._failure is not None:
            raise self._failure
        return answers[0]

    async def _begin_and(self, work: Callable[[], Awaitable[None]]) -> None:
        life = self._life
        try:
            await life.begin(self._say)
            async with trio.open_nursery() as tasks:
                tasks.start_soon(life.serve)
                with self._working:
                    try:
                        await work()
                    except Exception as error:
                        self._failure = error
                tasks.cancel_scope.cancel()
            await life.finish()
        finally:
            await life.close()

    async def _follow_interrupts(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                self._is_interrupted = True
                self._working.cancel()
                self._life.hurry()


def forget_all(pool: Pool, **origin: Any) -> CacheHead:
    """Let a cache be empty, its dirty blocks lost; `origin` has what is known of the origin now.

    If this is ended meanwhile, some of it is forgotten, and no mount takes the rest for what the
    origin has: only another call makes the pool usable again.
    """
    stored = StoredHead.open(pool)
    stored.rewrite(is_settled=1, origin_mark=FORGETTING_MARK)
    ground = stored.ground
    tags_bytes = align_up(ground.set_count * SET_BYTES, FRAME_BYTES)
    pool.medium.clear(ground.tags_offset, tags_bytes)
    # A group without dirty blocks may have a word; a dirty block without one would be forgotten.
    pool.medium.clear(ground.groups_offset, ground.tags_offset - ground.groups_offset)
    stored.rewrite(is_settled=1, dirty_blocks=0, **{"origin_mark": UNKNOWN_MARK, **origin})
    return stored.head
