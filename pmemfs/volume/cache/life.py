"""The life of a cache in a mount: its origin is opened, it is served, and it is left in order.

life = CacheLife(...)     the mount is being made
await life.begin()        the origin is the right one, and fenced
await life.serve()        until it is cancelled
await life.finish()       nothing is served any more; what is dirty stays dirty
await life.close()        in any case

If this process is killed, its successor goes on with what `keep` was given: it sees to it that the
dead process's transfers are over (`await_transfers`) before any page is given away, and has the
origin in its life from `left`. If the origin can't be opened again at once, it is tried
until it can, because what the cache has is served without it.

| name | descriptors | data |
|---|---|---|
| `transfers` | the end of a pipe that hangs up when no transfer touches the pool any more | |
| `origin` | those of `Origin.left` | that of `Origin.left` |
"""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Sequence

import trio

from pmemfs.errors import MountFailed, PmemfsError, sentence_of
from pmemfs.media.cache import Policy
from pmemfs.medium.mapped import MappedMedium
from pmemfs.origin.base import Left, Origin, say_nothing
from pmemfs.volume.cache.opening import open_right_origin
from pmemfs.volume.cache.volume import CacheVolume

log = logging.getLogger(__name__)

_HURRY_SECONDS = 1.0
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 2.0
_TELL_SECONDS = 10.0


def keep_nothing(name: str, fds: Sequence[int], data: bytes) -> None:
    """This process has no successor."""


def await_transfers(fd: int) -> None:
    """Wait until no transfer of a dead daemon touches the pool any more. `fd` is what it has kept
    as `transfers`; this closes it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while not poll.poll(_TELL_SECONDS * 1000):
        log.warning("the origin has not ended yet what the last daemon has asked of it; waiting, "
                    "because it may still touch the pool")  # fmt: skip
    os.close(fd)


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
        self.left: Left | None = None
        """What a dead daemon has left of the origin; None: none has served this mount before."""
        self._is_expected = False
        self._transfers_fd = -1
        """The end of the pipe that the origin holds; it is closed by the end of this process."""
        self.keep: Callable[[str, Sequence[int], bytes], None] = keep_nothing
        """Keeps descriptors and data for a successor."""
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
        self._volume.origin_link.give_up = self.give_up
        if self._is_degraded:
            log.warning("%s: mounted without its origin %s", self._medium.name, head.origin)
        elif self.left is not None and not head.is_settled:
            self._is_expected = True
            await self._volume.resume()
            return
        else:
            # One that was killed before the mount began has left its head settled.
            await self._open(say)
        await self._volume.begin(self._origin)

    async def _open(self, say: Callable[[str], None] = say_nothing) -> Origin:
        """Open the origin; it holds what the end of its transfers has to be known by."""
        head = self._volume.head.head
        # A policy that writes nothing needs no right to write.
        is_kept = head.policy == Policy.READ_ONLY and not self._is_flushed
        self._origin = origin = await open_right_origin(
            head, self._medium.name, read_only=self._medium.read_only or is_kept, say=say,
            give_up=self.give_up, left=self.left, opened=self._keep_data,
        )  # fmt: skip
        seen, self._transfers_fd = os.pipe2(os.O_CLOEXEC)
        self.keep("transfers", [seen], b"")
        os.close(seen)
        origin.hold(self._medium.fileno(), self._transfers_fd)
        left = origin.left()
        self.keep("origin", left.fds, left.data)
        return origin

    def _keep_data(self, origin: Origin) -> None:
        """A process may die before it has the fence, and then a cluster remembers it as well."""
        if (left := origin.left()).data:
            self.keep("origin", left.fds, left.data)

    async def _open_again(self) -> None:
        """Open the origin of a mount that lasts, however long that takes."""
        name, pause = self._volume.head.head.origin, _FIRST_PAUSE_SECONDS
        why = ""
        while True:
            try:
                origin = await self._open()
                break
            except (OSError, PmemfsError) as error:
                if sentence_of(error) != why:
                    why = sentence_of(error)
                    self._volume.origin_link.last_error = why
                    log.error("the origin %s can't be opened again: %s; trying again", name, why)
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        await self._volume.arrive(origin)
        log.info("the origin %s is open again", name)

    def stop_beginning(self) -> None:
        """Open the origin no more."""
        self._beginning.cancel()

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the tasks of the volume. It has started when requests may come."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._volume.serve)
            task_status.started()
            if self._is_expected:
                nursery.start_soon(self._open_again)

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
        if self._transfers_fd >= 0:
            os.close(self._transfers_fd)
