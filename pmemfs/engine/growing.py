"""Growing the pool of a mount while it is served.

    the medium is extended                          in a thread, as all that may block
    announce; the new memmap zone is cleared        see `growth`
    page structures move                            in one step; workers of a data plane are paused
    what becomes data is cleared; commit            requests are served meanwhile
    the volume is shown at its new size

Invariants:
- until the last step requests see the old size, so no program reads what is not zero yet;
- a step that fails is undone together with all steps before it. Structures move back, the labels
  surely say the old size, and the file gets its old size if the medium allows that;
- nothing scans page structures while they move (`memmap_lock`). A scan would read one page's
  structure as another's.

If this process dies in between, `growth` says what is left: page structures are worth nothing then,
and the order of labels and data was kept.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import trio

from pmemfs.engine.base import Engine
from pmemfs.errors import CannotGrow, NoSpace
from pmemfs.media.label import Scheme, State
from pmemfs.media.zones import Zone, Zones
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap
from pmemfs.pool import Pool
from pmemfs.pool.growth import Grown, Growth, target_bytes, unknown_end_bytes
from pmemfs.units import format_size

if TYPE_CHECKING:
    from pmemfs.volume.cache.volume import CacheVolume

log = logging.getLogger(__name__)

T = TypeVar("T")


class Grower:
    """Grows the pool of one mount. `show` makes the new size visible, which `pool.zones` has."""

    def __init__(
        self,
        pool: Pool,
        medium: MappedMedium,
        memmap: Memmap,
        engine: Engine,
        show: Callable[[], Awaitable[None]],
    ) -> None:
        self._pool = pool
        self._medium = medium
        self._memmap = memmap
        self._engine = engine
        self._show = show
        self.lock = trio.Lock()
        """Held by who grows the pool, and by who changes whether it is written to."""
        self.memmap_lock = trio.Lock()
        """Held while a thread scans page structures."""

    async def grow(self, wanted_bytes: int | None) -> Grown:
        """Grow. Raises as `target_bytes` and `Growth`, NoSpace, and OSError if the medium fails."""
        pool, medium = self._pool, self._medium
        async with self.lock:
            # A pool that is mounted, and clean, is one that is not written to.
            if medium.read_only or pool.label.state == State.CLEAN:
                raise CannotGrow(path=medium.name, why="it is mounted read-only")
            old_bytes = pool.label.pool_size_bytes
            size_bytes = await _run(lambda: target_bytes(pool, medium, wanted_bytes))
            if size_bytes > old_bytes:
                self._engine.check_reach(size_bytes)
                unknown_end = unknown_end_bytes(medium, size_bytes)
                growth = Growth(pool, size_bytes, unknown_end, is_mounted=True)
                try:
                    await self._carry_out(growth, size_bytes)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    why = "the file system of the pool has no memory left"
                    raise NoSpace(
                        path=medium.name, wanted=format_size(size_bytes), why=why
                    ) from None
                await self._show()
                log.info("%s: grown to %s from %s", medium.name, format_size(size_bytes),
                         format_size(old_bytes))  # fmt: skip
            return Grown(pool.label.name, old_bytes, size_bytes)

    async def _carry_out(self, growth: Growth, size_bytes: int) -> None:
        has_moved = False
        file_bytes = await _run(lambda: self._medium.extend(size_bytes))
        try:
            await _run(growth.announce)
            await _run(growth.clear_memmap)
            await _run(lambda: self._memmap.prepare_move(growth.new.memmap))
            await self._move(growth.new, [growth.old.label_copy])
            has_moved = True
            async with self._engine.clearing(growth.old.data.end_bytes, growth.old.end_bytes):
                await _run(growth.clear_data)
                await _run(growth.commit)
        except Exception as error:
            log.error("%s: it could not grow: %s", self._medium.name, error)
            # Structures first: `abandon` may give their new place back to the file system.
            if has_moved:
                await self._move(growth.old, [])
            if await _run(growth.abandon):
                self._medium.give_back(file_bytes)
            raise

    async def _move(self, zones: Zones, stale: list[Zone]) -> None:
        ranges = [(zone.offset_bytes, zone.end_bytes) for zone in stale]
        geometry = self._pool.geometry_of(zones)
        async with self.memmap_lock:
            if self._pool.scheme is Scheme.PMEM:
                async with self._engine.paused():
                    self._memmap.move(geometry, zones.memmap, ranges)
            else:
                # Structures stay where they are, and there is only room for more of them.
                self._memmap.move(geometry, zones.memmap, ranges)


class OriginFollower(Grower):
    """In mode `cache` the pool keeps its size; what grows is the file, with the origin."""

    def __init__(
        self, pool: Pool, medium: MappedMedium, memmap: Memmap, engine: Engine,
        show: Callable[[], Awaitable[None]], volume: CacheVolume,
    ) -> None:  # fmt: skip
        super().__init__(pool, medium, memmap, engine, show)
        self._volume = volume

    async def grow(self, wanted_bytes: int | None) -> Grown:
        """Take over the size of an origin that has grown. Raises CannotGrow and OSError."""
        if wanted_bytes is not None:
            raise CannotGrow(path=self._medium.name, why="a cache is as large as its origin, and "
                             "its pool keeps its size; leave the size out to take over the "
                             "origin's")  # fmt: skip
        async with self.lock:
            volume = self._volume
            if self._medium.read_only or volume.read_only:
                raise CannotGrow(path=self._medium.name, why="it is mounted read-only")
            old_bytes, new_bytes = await volume.resize()
            if new_bytes > old_bytes:
                await self._show()
            return Grown(self._pool.label.name, old_bytes, new_bytes)


async def _run(step: Callable[[], T]) -> T:
    """Run a step that may wait for a device. It goes on to its end even if we are cancelled."""
    return await trio.to_thread.run_sync(step)
