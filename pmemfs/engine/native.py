"""The engine of a mount that the data plane serves: what the control plane adds to the data plane.

`SharedEngine` is what both planes have in common in any mode. `PublishedDevice` shows the device of
mode `block` to the data plane, as `published` shows files; a mode with one file has
`SharedAttributes`.
Invariants:
- memory is taken from under a range only after a grace period in which every worker learns that
  there may be holes. Otherwise a worker's store would fill the hole again, or fault;
- presence changes under one lock, so what one task finds whole was not just punched by another.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from pmemfs.dataplane.counters import WorkerCounters, read_counters
from pmemfs.dataplane.layouts import Extent, FaultRecord, KeptAttributes, Operation
from pmemfs.dataplane.memmap import SharedMemmap
from pmemfs.dataplane.native import PageLocks
from pmemfs.dataplane.presence import expect_holes, look_again, survey
from pmemfs.dataplane.tables import Grace, SharedMemory
from pmemfs.engine.base import Engine
from pmemfs.engine.statistics import EngineStatistics
from pmemfs.errors import CannotGrow
from pmemfs.media.zones import Zone
from pmemfs.medium.base import Durability
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.pool.pool import next_generation
from pmemfs.units import format_size
from pmemfs.volume.block import DeviceOnlookers
from pmemfs.volume.onefile import INODE, KEPT, Onlookers

_GRACE_POLL_SECONDS = 0.0005
_PAUSE_SECONDS = 10


def page_locks(shared: SharedMemory, medium: MappedMedium) -> PageLocks:
    """The locks of encrypted pages, which both planes take before they store there."""
    return PageLocks(shared.memory, medium.view(0, medium.reach_bytes))


class SharedEngine(Engine):
    """What both planes serve together: counts, durability, presence."""

    hears_meanwhile = True

    def __init__(
        self, pool: Pool, medium: MappedMedium, memmap: Memmap, shared: SharedMemory
    ) -> None:
        super().__init__(medium, memmap)
        self._pool = pool
        self._mapped = medium
        self.shared = shared
        self.presence_lock = trio.Lock()
        """Held while presence changes."""
        self._faults_seen = 0
        medium.when_lost = self._note_lost
        lost = shared.header_word("lost_errno")
        if lost:
            medium.lose(OSError(lost, "an earlier msync failed"))
        self.holders: list[Callable[[], None]] = []
        """Who holds pages across an await: each is called to take all of its references anew, as
        pins, after a new generation has begun. Nothing else runs meanwhile."""

    @property
    def _data(self) -> Zone:
        return self._pool.zones.data

    async def make_durable(self) -> None:
        epoch = self._memmap.begin_persist()
        # The data plane stores an error here as well. After one lost write nobody can tell what is
        # missing, so no fsync of either plane may succeed any more.
        lost = self.shared.header_word("lost_errno")
        if lost:
            raise OSError(lost, "an earlier msync failed")
        try:
            if self._medium.durability is Durability.MSYNC:
                await trio.to_thread.run_sync(self._mapped.sync_all)
            else:
                # In this thread: it did the writes that no worker has fenced.
                self._medium.fence()
        except OSError as error:
            self.shared.set_header_word("lost_errno", error.errno or errno.EIO)
            raise
        self._memmap.end_persist(epoch)

    def forget_workers(self) -> None:
        """The data plane was killed: let nothing that it held keep anything busy.

        No worker may live, and none may be started before this returns. Raises OSError if the label
        can't be written; then nothing may be served any more.
        """
        self.shared.forget_workers()
        self.renew()

    def renew(self) -> None:
        """Begin a new generation of page structures, in which only the `holders` hold pages, and
        free all locks of encrypted pages.

        No worker may be in a section. Raises OSError, and what holders raise.
        """
        if self.shared.header_word("has_files") and not self._medium.read_only:
            page_locks(self.shared, self._mapped).free_all()
        # What workers have stored is flushed. That it is dirty as well, msync must find out anew.
        if self._medium.durability is not Durability.MSYNC:
            self._medium.fence()
        if self._medium.read_only:
            # No structure lies in the pool then, so no label has to know the generation.
            generation = next_generation(self.shared.header_word("generation"))
        else:
            generation = self._pool.renew()
        if isinstance(self._memmap, SharedMemmap):
            self._memmap.renew(generation)
        for hold_again in self.holders:
            hold_again()

    @property
    def is_damaged(self) -> bool:
        """Whether this daemon, or one before it that has died, has met damage."""
        return bool(self.shared.header_word("damaged"))

    def note_damage(self) -> None:
        """Damage was met, so that nothing may be written any more."""
        self.shared.set_header_word("damaged", 1)

    def _note_lost(self, error: OSError) -> None:
        # Whichever plane was first: the kernel reports it to one of them, and only once.
        if not self.shared.header_word("lost_errno"):
            self.shared.set_header_word("lost_errno", error.errno or errno.EIO)

    def note_options(self, options: str) -> None:
        self.shared.note_options(options)

    def note_size(self) -> None:
        self.shared.set_pool_bytes(self._mapped.size_bytes)

    async def refuse_writes(self) -> None:
        self.shared.set_header_word("read_only", 1)
        with trio.move_on_after(_PAUSE_SECONDS) as patience:
            await self.grace()
        if patience.cancelled_caught:
            self.accept_writes()
            raise OSError(errno.EBUSY, "a request that is served never ends")

    def accept_writes(self) -> None:
        self.shared.set_header_word("read_only", 0)

    def check_reach(self, size_bytes: int) -> None:
        if size_bytes > self.shared.reach_bytes:
            raise CannotGrow(
                path=self._mapped.name,
                why=f"while it is mounted it can grow to {format_size(self.shared.reach_bytes)} at "
                "most; unmount it and resize again",
            )

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        try:
            grace = self.shared.pause()
            with trio.move_on_after(_PAUSE_SECONDS) as patience:
                await self._wait_for(grace)
            if patience.cancelled_caught:
                why = f"a request did not end within {_PAUSE_SECONDS} seconds; try again"
                raise CannotGrow(path=self._mapped.name, why=why)
            yield
        finally:
            # Also after a failure: a word that stays set would stop the workers for good.
            self.shared.resume()

    @asynccontextmanager
    async def clearing(self, start_bytes: int, end_bytes: int) -> AsyncIterator[None]:
        async with self.presence_lock:
            if not self.shared.header_word("reserved"):
                # The last chunk of the data may reach into this range.
                expect_holes(self.shared, start_bytes, end_bytes)
                await self.grace()
            yield

    @property
    def fault_count(self) -> int:
        return super().fault_count + self.shared.header_word("fault_count")

    def statistics(self) -> EngineStatistics:
        own = self.own_statistics()
        workers = self.counters()

        def total(operation: Operation, name: str) -> int:
            return sum(getattr(worker.operations[operation], name) for worker in workers)

        def succeeded(operation: Operation) -> int:
            return total(operation, "answered") - total(operation, "failed")

        return EngineStatistics(
            reads=own.reads + succeeded(Operation.READ),
            writes=own.writes + succeeded(Operation.WRITE),
            fsyncs=own.fsyncs + total(Operation.FSYNC, "answered"),
            read_bytes=own.read_bytes + total(Operation.READ, "moved_bytes"),
            written_bytes=own.written_bytes + total(Operation.WRITE, "moved_bytes"),
        )

    def counters(self) -> list[WorkerCounters]:
        """What each worker of the data plane has counted."""
        return read_counters(self.shared)

    def new_faults(self) -> list[FaultRecord]:
        """The faults of the data plane since the last call."""
        found = self.shared.faults(self._faults_seen)
        self._faults_seen += len(found)
        return found

    async def keep_presence(self) -> None:
        """Find out which chunks that had holes have become whole."""
        async with self.presence_lock:
            await trio.to_thread.run_sync(look_again, self.shared, self._mapped.fileno())

    async def survey_presence(self) -> None:
        """Find out, once after mounting, which parts of a sparse pool have memory."""
        if self._mapped.reserved:
            return
        zone = self._data
        async with self.presence_lock:
            await trio.to_thread.run_sync(
                survey, self.shared, self._mapped.fileno(), zone.offset_bytes, zone.end_bytes
            )

    async def grace(self) -> None:
        await self._wait_for(self.shared.begin_grace())

    async def _wait_for(self, grace: Grace) -> None:
        # Polled, because telling us would slow down the workers.
        while not self.shared.is_over(grace):  # noqa: ASYNC110
            await trio.sleep(_GRACE_POLL_SECONDS)


class SharedAttributes(Onlookers):
    """What workers do to the only file of a mount, and what a later daemon is told of it."""

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared

    @property
    def last_write_ns(self) -> int:
        return self._shared.last_write_ns(INODE)

    def kept(self, number: int) -> dict[str, int]:
        kept = self._shared.kept_attributes(number)
        return {name: getattr(kept, name) for name in KEPT} if kept else {}

    def keep(self, number: int, attributes: dict[str, int]) -> None:
        self._shared.keep_attributes(KeptAttributes(inode=number, **attributes))

    def forget_last_write(self) -> None:
        self._shared.forget_last_write(INODE)


class PublishedDevice(SharedAttributes, DeviceOnlookers):
    """The device of mode `block` in the shared memory, as one extent."""

    def __init__(self, engine: SharedEngine, medium: MappedMedium) -> None:
        super().__init__(engine.shared)
        self._engine = engine
        self._mapped = medium

    def show(self, first_pfn: int, size_bytes: int) -> None:
        extent = Extent(0, first_pfn, size_bytes >> PAGE_SHIFT, 0)
        self._shared.publish(INODE, size_bytes, [extent])

    @asynccontextmanager
    async def expecting_holes(self, pool_offset: int, length_bytes: int) -> AsyncIterator[None]:
        # A device never has holes, and some devices can't even be asked.
        may_have_holes = not self._mapped.source.kind.is_device
        end_bytes = pool_offset + length_bytes
        # The order matters: mark the chunks, wait until no worker uses an old mark, then punch.
        async with self._engine.presence_lock:
            if may_have_holes:
                expect_holes(self._shared, pool_offset, end_bytes)
                await self._engine.grace()
            yield
            if may_have_holes and self._mapped.reserved:
                await trio.to_thread.run_sync(
                    survey, self._shared, self._mapped.fileno(), pool_offset, end_bytes
                )

    async def look_again(self) -> None:
        await self._engine.survey_presence()
