"""What joins the two planes of a mount: shared memory, sockets, and the settings of both.

It outlives both processes, so a daemon makes it for a new mount, or is left it by a dead one.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.sharing import share_pool
from pmemfs.fuse.planes import PlaneSettings, Sockets, choose_settings
from pmemfs.media.label import Mode
from pmemfs.mount.transport import Choice
from pmemfs.pool import Pool


class Joint(NamedTuple):
    """What joins the planes of one mount."""

    shared: SharedMemory
    sockets: Sockets
    settings: PlaneSettings
    choice: Choice

    @classmethod
    def make(cls, pool: Pool, choice: Choice) -> Self:
        """What joins those of a new mount."""
        sockets = Sockets()
        settings = choose_settings(choice.transport, sockets.message_bytes)
        sockets.add_own(settings.queue_count)
        shared = share_pool(
            pool, worker_count=settings.worker_count, has_files=pool.label.mode == Mode.FS,
            cache_set_count=_set_count(pool),
        )  # fmt: skip
        for name in ("queue_count", "depth", "reader_count"):
            shared.set_header_word(name, getattr(settings, name))
        return cls(shared, sockets, settings, choice)


def _set_count(pool: Pool) -> int:
    """The sets of a cache; 0 in the other modes."""
    if pool.label.mode != Mode.CACHE:
        return 0
    from pmemfs.volume.cache.heads import StoredHead

    return StoredHead.open(pool).ground.set_count
