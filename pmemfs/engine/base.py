"""The counts and the durability of one mount, whatever mode it serves.

Invariant: a write is flushed at once, and `fsync` only fences. So nothing has to remember what was
written.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from pmemfs.dataplane.counters import WorkerCounters
from pmemfs.engine.statistics import EngineStatistics
from pmemfs.medium.base import Durability, Medium
from pmemfs.memmap.base import Memmap
from pmemfs.tally import Tally


class Engine:
    """The counts and the durability of one mount, in the Python process."""

    def __init__(self, medium: Medium, memmap: Memmap) -> None:
        self._medium = medium
        self._memmap = memmap
        self._reads = self._writes = self._fsyncs = 0
        self._read_bytes = self._written_bytes = 0
        self.tally: Tally | None = None
        """Where the counts last longer than this process. None: nothing of them does."""

    def count_read(self, read_bytes: int) -> None:
        """A read was answered here."""
        self._reads += 1
        self._read_bytes += read_bytes

    def count_write(self, written_bytes: int) -> None:
        """A write was answered here."""
        self._writes += 1
        self._written_bytes += written_bytes

    async def fsync(self) -> None:
        """Make every write that was answered before durable; a user asks for it. Raises OSError."""
        self._fsyncs += 1
        await self.make_durable()

    async def make_durable(self) -> None:
        """Make every write durable that was answered before; no user asked. Raises OSError."""
        # The epoch opens before the fence: a write that comes meanwhile belongs to the next epoch,
        # so its page stays dirty even if this fence has not covered it.
        epoch = self._memmap.begin_persist()
        if self._medium.durability is Durability.MSYNC:
            await trio.to_thread.run_sync(self._medium.fence)
        else:
            # In this thread, because a store fence orders only its own processor's write-backs.
            self._medium.fence()
        self._memmap.end_persist(epoch)

    async def refuse_writes(self) -> None:
        """Refuse what comes from now on; what was under way is over when this returns."""

    def accept_writes(self) -> None:
        """The opposite of `refuse_writes`."""

    hears_meanwhile = False
    """Whether other requests are read while one waits."""

    def check_reach(self, size_bytes: int) -> None:
        """Raise CannotGrow if the pool can't become this large while it is mounted."""

    def note_options(self, options: str) -> None:
        """Note with which options the mount is mounted from now on."""

    def note_size(self) -> None:
        """The medium has become larger, and its new part is about to be served."""

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """While this lasts, only the caller touches page structures. Here it is alone anyway."""
        yield

    @asynccontextmanager
    async def clearing(self, start_bytes: int, end_bytes: int) -> AsyncIterator[None]:
        """While this lasts, a range of the pool that is not data yet may lose its memory."""
        yield

    @property
    def fault_count(self) -> int:
        """How often memory could not be touched."""
        return self._medium.fault_count

    def statistics(self) -> EngineStatistics:
        """The counts so far."""
        return self.own_statistics()

    def counters(self) -> list[WorkerCounters]:
        """What each worker of a data plane has counted. Here there are no workers."""
        return []

    def own_statistics(self) -> EngineStatistics:
        """The counts of this process, and of those in whose place it serves."""
        own = EngineStatistics(
            reads=self._reads,
            writes=self._writes,
            fsyncs=self._fsyncs,
            read_bytes=self._read_bytes,
            written_bytes=self._written_bytes,
        )
        return EngineStatistics(*self.tally.totals(Tally.ENGINE, own)) if self.tally else own
