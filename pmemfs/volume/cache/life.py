"""The life of a cache in a mount: its origin is opened, it is served, and it is left in order.

life = CacheLife(...)     the mount is being made
await life.begin()        the origin is the right one, and fenced
await life.serve()        until it is cancelled
await life.finish()       nothing is served any more; what is dirty stays dirty
await life.close()        in any case
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from pmemfs.errors import MountFailed
from pmemfs.media.cache import Policy
from pmemfs.medium.mapped import MappedMedium
from pmemfs.origin.base import Origin, say_nothing
from pmemfs.volume.cache.opening import open_right_origin
from pmemfs.volume.cache.volume import CacheVolume

log = logging.getLogger(__name__)

_HURRY_SECONDS = 1.0


class CacheLife:
    """The life of one cache; `is_degraded`: without its origin. `is_flushed`: the origin is
    written to, whatever the policy says."""

    def __init__(
        self, volume: CacheVolume, medium: MappedMedium, *, is_degraded: bool,
        is_flushed: bool = False,
    ) -> None:  # fmt: skip
        self.volume = self._volume = volume
        self._medium = medium
        self._is_degraded = is_degraded
        self._is_flushed = is_flushed
        self._origin: Origin | None = None
        self._beginning = trio.CancelScope()
        self.give_up: Callable[[str], None] = lambda why: None
        """Ends the process, where an origin hangs that can't be cut: pages that a transfer may
        still touch can't be let go. It is told why."""

    async def begin(self, say: Callable[[str], None] = say_nothing) -> None:
        """Open the origin; `say` is told what this waits for.

        Raises WrongOrigin, as `open_origin`, and MountFailed if `stop_beginning` was called
        meanwhile.
        """
        with self._beginning:
            await self._begin(say)
            return
        raise MountFailed(pool=self._medium.name, path=self._volume.name,
                          why="it was ended while the origin was being opened")  # fmt: skip

    async def _begin(self, say: Callable[[str], None]) -> None:
        head = self._volume.head.head
        if self._is_degraded:
            log.warning("%s: mounted without its origin %s", self._medium.name, head.origin)
        else:
            # A policy that writes nothing needs no right to write.
            is_kept = head.policy == Policy.READ_ONLY and not self._is_flushed
            read_only = self._medium.read_only or is_kept
            self._origin = await open_right_origin(
                head, self._medium.name, read_only=read_only, say=say, give_up=self.give_up
            )
            self._origin.hold_lock(self._medium.fileno())
        self._volume.origin_link.give_up = self.give_up
        await self._volume.begin(self._origin)

    def stop_beginning(self) -> None:
        """Open the origin no more."""
        self._beginning.cancel()

    async def serve(self) -> None:
        """Run the tasks of the volume."""
        await self._volume.serve()

    def hurry(self) -> None:
        """Somebody waits for the end: give the origin little time from now on."""
        self._beginning.cancel()
        self._volume.origin_link.note_end(_HURRY_SECONDS)

    async def finish(self) -> None:
        """Leave what the next mount needs to know."""
        await self._volume.finish()
        dirty = self._volume.count_dirty()
        if dirty:
            log.info("%s: the origin lacks %d blocks, which stay in the pool; see 'pmemfs flush'",
                     self._medium.name, dirty)  # fmt: skip

    async def close(self) -> None:
        """Let go of the origin."""
        if self._origin is not None:
            await self._origin.close()
