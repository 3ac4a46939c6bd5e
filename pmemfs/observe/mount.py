"""What the daemon of a mount reports of itself and of its files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import trio

from pmemfs.errors import MemoryFault, NoExtents
from pmemfs.fuse.session import Session
from pmemfs.logs import log_place
from pmemfs.media.keyreport import KeyReport
from pmemfs.media.label import Mode
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import effective_scheme
from pmemfs.mount.elsewhere import places_elsewhere
from pmemfs.mount.mountpoint import places_of
from pmemfs.mount.transport import promise
from pmemfs.observe.answers import (
    Deaths,
    KeptStatus,
    MountStatus,
    NamesStatus,
    PinSummary,
)
from pmemfs.observe.extents import file_extents
from pmemfs.observe.pool import iso_time, pool_info
from pmemfs.observe.stat import Sample, own_counts, worker_sample
from pmemfs.pins.registry import Pins
from pmemfs.pool import Pool
from pmemfs.unsaid import json_values
from pmemfs.volume.base import looked_at
from pmemfs.volume.fs.space import Space


class MountObserver:
    """Answers questions about a mount, from the daemon's own objects."""

    def __init__(
        self,
        pool: Pool,
        medium: MappedMedium,
        session: Session,
        started: float,
        pins: Pins,
        keys: Callable[[], tuple[KeyReport, ...]],
    ) -> None:
        self._pool = pool
        self._medium = medium
        self._session = session
        self._engine = session.engine
        self._fs = session.served.fs
        self._mount = session.mount
        self._started = started
        self._pins = pins
        self._keys = keys

    async def info(self) -> dict[str, Any]:
        """The status of the mount and its pool."""
        status = MountStatus(
            pid=os.getpid(),
            mountpoint=self._session.mountpoint,
            device=self._mount.device,
            read_only=self._session.remounter.options.read_only,
            # In mode `fs` each file has an owner and mode of its own.
            options=self._session.remounter.options.as_text(only_said=self._fs is not None),
            engine=self._session.remounter.options.engine,
            transport=self._session.transport,
            transport_reason=self._session.transport_reason,
            data_plane_pid=self._session.data_plane_pid,
            effective_scheme=effective_scheme(self._pool).word,
            fault_count=self._engine.fault_count,
            uptime_seconds=round(time.monotonic() - self._started, 3),
            io=self._engine.statistics(),
            space=await self._space(),
            pool=pool_info(self._pool, self._medium),
            is_detached=self._is_detached(),
            log=log_place(),
            pool_fd=self._medium.fileno(),
            structures=self._session.memmap.memory(),
            pins=self._pin_summary(),
            kept=self._kept(),
            keys=self._keys(),
            compression=self._fs.compression() if self._fs is not None else None,
            names=self._names(),
        )
        return json_values(status)

    def _is_detached(self) -> bool:
        """Whether the mount is nowhere, in no mount namespace that can be seen."""
        return not places_of(self._mount) and not any(places_elsewhere(self._mount))

    def _kept(self) -> KeptStatus | None:
        kept = self._session.kept
        if kept is None:
            return None
        died = {
            whose: Deaths(times, iso_time(last_ns))
            for whose, (times, last_ns) in kept.deaths().items()
        }
        return KeptStatus(
            kept.keeper.pid if kept.keeper else None, died["daemon"], died["plane"],
            died["keeper"], promise(self._session.transport, os.uname().release),
            kept.since_ns, kept.is_upgrading,
        )  # fmt: skip

    def _names(self) -> NamesStatus | None:
        names = self._session.served.names
        if names is None:
            return None
        words = map(names.word, ("known_inodes", "used_bytes", "memory_bytes", "busy", "short"))
        return NamesStatus(bool(names.word("on")), *words)

    def _pin_summary(self) -> PinSummary:
        living, page_bytes = self._pins.living, self._pool.label.page_size_bytes
        return PinSummary(
            pin_count=len(living),
            process_count=len({(pin.client.pid, pin.client.started) for pin in living}),
            held_bytes=sum(pin.page_count for pin in living) * page_bytes,
            resting_bytes=sum(pin.page_count for pin in self._pins.resting) * page_bytes,
        )

    async def _space(self) -> Space | None:
        """Where the frames are; None in mode `block`, and if the bitmaps can't be read."""
        try:
            if self._fs is None:
                return None
            await looked_at(self._fs)
            return self._fs.space()
        except MemoryFault:
            return None

    async def extents(self, inode: int, start_bytes: int = 0) -> dict[str, Any]:
        """Where a file lies in the pool, from an offset on. Raises NoExtents."""
        if self._fs is None:
            raise NoExtents(path=self._mount.mountpoint, why="it shows a device, not files")
        try:
            return json_values(file_extents(self._fs, inode, start_bytes))
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise NoExtents(path=f"inode {inode}", why=why) from None

    async def stat(self) -> dict[str, Any]:
        """What was counted since the mount: a `Sample`.

        A thread reads it while I/O goes on, from memory that the data plane writes in any case.
        """
        return (await trio.to_thread.run_sync(self._sample)).as_json()

    def _sample(self) -> Sample:
        seconds = time.monotonic() - self._started
        return Sample(
            pid=os.getpid(),
            engine=self._session.remounter.options.engine,
            transport=self._session.transport,
            seconds=seconds,
            control=own_counts(self._engine.own_statistics()),
            workers=tuple(
                worker_sample(counters, self._session.queue_count)
                for counters in self._engine.counters()
            ),
            mode=Mode(self._pool.label.mode).word,
            identity=self._session.mount_identity,
        )
