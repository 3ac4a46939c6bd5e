"""Gives back memory that no file uses: FITRIM, which fstrim(8) asks for, and `pmemfs trim`.

This is for sparse pools and block devices. A pool that has memory everywhere was promised that at
`create`, so it keeps its memory. Where a sparse pool finds no more memory, what free frames have is
given back without being asked for, so that other frames can get it. And where there are no more
free frames, those of what was just removed are waited for a moment: rm(1) returns before the kernel
says that it has forgotten the file. Invariants:
- only free frames are touched. No file has them, no page of them is held, and no published table
  names them. They are looked up and punched in one step without an await, so they can't be given to
  a file in between;
- the data plane is told that chunks may have holes before they get them. Otherwise a worker would
  touch a hole through the mapping once a file gets frames there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import trio

from pmemfs.dataplane.presence import CHUNK_BYTES
from pmemfs.engine.base import Engine
from pmemfs.errors import CannotTrim, PmemfsError
from pmemfs.media.filesystem import CHUNK_FRAMES, GROUP_CHUNKS
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.shortage import Attempts
from pmemfs.medium.sparse import next_data
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.masks import runs_of

_CHUNKS_AT_ONCE = 2
"""Of which all frames may lie alone, and be punched while nothing else is served."""
_VAIN_NS = 10**9
"""For so long a vain search for memory is not repeated, while the pool and what is free in it are
as large as they were."""
_PAUSES_SECONDS = (0, 0.002, 0.01, 0.05, 0.2)
"""Before each look for memory of what was removed."""
_WAITS_SECONDS: tuple[float, ...] = (0.001, 0.01, 0.05, 0.2)
"""Before each new attempt to get frames."""
_BLOCK_BYTES = 512
"""Of st_blocks, see stat(2)."""


@dataclass(frozen=True, slots=True)
class Trimmed:
    """How much was given back."""

    name: str
    given_back_bytes: int


class Trimmer:
    """Gives back the memory of one mount; `fs` is None in mode `block`."""

    def __init__(
        self, pool: Pool, medium: MappedMedium, engine: Engine, fs: FileSystem | None
    ) -> None:
        self._pool = pool
        self._medium = medium
        self._engine = engine
        self._fs = fs
        self.gather: list[Callable[[], bool]] = [fs.gather] if fs else []
        """Each takes back some frames that nobody uses any more; whether there are more."""
        self._searching = trio.Lock()
        self._seen_shortages = 0
        self._found_bytes = 0
        self._vain_until_ns = 0
        self._vain = 0, 0
        self.removal_counts: list[Callable[[], int]] = []
        """Each counts names that were taken from inodes, so frames may soon be free."""
        self._vain_removals = -1
        if fs:
            self.removal_counts.append(lambda: fs.store.removal_count)
        # What is removed is never heard of while a request waits, if none is read meanwhile.
        self._pauses_seconds = _PAUSES_SECONDS if engine.hears_meanwhile else (0,)
        self._waits_seconds = _WAITS_SECONDS if engine.hears_meanwhile else ()

    async def find_room(self, attempts: Attempts) -> bool:
        """Let there be memory, if that is what is missing, or else wait for frames. As of
        `FindRoom`."""
        if self._lacks_memory:
            return await self.find_memory(attempts)
        fs = self._fs
        return fs is not None and not fs.read_only and await self._wait_for_frames(attempts)

    @property
    def _lacks_memory(self) -> bool:
        """Whether the medium has found no memory since what is free was last given back."""
        medium = self._medium
        is_short = medium.shortage_count != self._seen_shortages or self._searching.locked()
        return is_short and not medium.reserved

    async def _wait_for_frames(self, attempts: Attempts) -> bool:
        """Let what was removed become free; False: no longer."""
        # Where nothing was removed since the last vain wait, a file may still be closed.
        is_vain = self._removal_count == self._vain_removals
        waits = self._waits_seconds[: 1 if is_vain else None]
        if attempts.wait_count >= len(waits):
            # What was removed during the last wait was not waited for.
            self._vain_removals = max(self._vain_removals, attempts.removal_count)
            return False
        attempts.removal_count = self._removal_count
        await trio.sleep(waits[attempts.wait_count])
        attempts.wait_count += 1
        # What is damaged is reported where it is met, and the request finds no room.
        with suppress(OSError, PmemfsError):
            await self._gather()
        return True

    @property
    def _removal_count(self) -> int:
        return sum(count() for count in self.removal_counts)

    async def find_memory(self, attempts: Attempts) -> bool:
        """Give back the memory of all that is free, if the medium has found none since that was
        last done. As of `FindRoom`."""
        fs = self._fs
        if fs is None or fs.read_only or not self._lacks_memory:
            return False
        attempts.found_bytes = await self._find_memory(fs, attempts.found_bytes)
        return attempts.found_bytes > 0

    async def _find_memory(self, fs: FileSystem, before_bytes: int) -> int:
        """How much memory was given back, or 0: not more than before."""
        medium = self._medium
        shortages = medium.shortage_count
        async with self._searching:
            # One search is for all who came before it.
            if self._seen_shortages < shortages:
                self._seen_shortages = medium.shortage_count
                self._found_bytes = await self._search(fs, before_bytes)
            return self._found_bytes

    async def _search(self, fs: FileSystem, before_bytes: int) -> int:
        found_bytes = 0
        for pause_seconds in self._pauses_seconds:
            # What was removed is free when the kernel says that nobody has it, and it says so some
            # time after the removal.
            await trio.sleep(pause_seconds)
            found_bytes += await self._give_back(fs)
            if found_bytes > before_bytes:
                return found_bytes
        return 0

    async def _give_back(self, fs: FileSystem) -> int:
        await self._gather()
        found = fs.allocator.known_free, self._memory_bytes()
        if time.monotonic_ns() < self._vain_until_ns and found == self._vain:
            return 0
        try:
            trimmed = await self.trim()
        except CannotTrim:
            return 0
        if not trimmed.given_back_bytes:
            self._vain_until_ns, self._vain = time.monotonic_ns() + _VAIN_NS, found
        return trimmed.given_back_bytes

    async def _gather(self) -> None:
        """Take back all that nobody uses any more."""
        for gather in self.gather:
            while gather():
                await trio.lowlevel.checkpoint()

    async def trim(
        self, start_bytes: int = 0, length_bytes: int = 1 << 64, least_bytes: int = 0
    ) -> Trimmed:
        """Give back what is free in a range of the frames, in runs of at least `least_bytes`.

        Raises CannotTrim.
        """
        fs = self._check()
        count = fs.geometry.group_count * GROUP_CHUNKS
        first = min(start_bytes // CHUNK_BYTES, count)
        last = min(count, -(-(start_bytes + length_bytes) // CHUNK_BYTES))
        given_back = 0
        while (first := self._next_chunk(fs, first, last)) < last:
            chunks = range(first, min(first + _CHUNKS_AT_ONCE, last))
            found = list(self._free_memory(fs, chunks, least_bytes))
            if found:
                start, end = found[0][0], found[-1][1]
                async with self._engine.clearing(start, end):
                    # It may have become read-only meanwhile.
                    self._check()
                    given_back += self._punch(fs, chunks, least_bytes, start, end)
            await trio.lowlevel.checkpoint()
            first = chunks.stop
        return Trimmed(self._pool.label.name, given_back)

    def _next_chunk(self, fs: FileSystem, first: int, last: int) -> int:
        """The first chunk from `first` on that has memory; `last` if none has."""
        start_bytes = fs.geometry.first_pfn << PAGE_SHIFT
        end_bytes = start_bytes + last * CHUNK_BYTES
        at = next_data(self._medium.fileno(), start_bytes + first * CHUNK_BYTES, end_bytes)
        return (at - start_bytes) // CHUNK_BYTES if at < end_bytes else last

    def _check(self) -> FileSystem:
        medium, fs = self._medium, self._fs
        why = ""
        if fs is None:
            why = "it is one device; trim the file system on it, for example with fstrim"
        elif medium.read_only or fs.read_only:
            why = "it is mounted read-only"
        elif medium.reserved and not medium.source.kind.is_device:
            why = "it was created with memory for all of it and keeps it; see 'create --sparse'"
        if why or fs is None:
            raise CannotTrim(path=medium.name, why=why)
        return fs

    def _punch(
        self, fs: FileSystem, chunks: range, least_bytes: int, first_bytes: int, end_bytes: int
    ) -> int:
        """Punch what is free now; how much memory that gave back. Nothing awaits here, so it stays
        free until it is punched.

        Only within the range in which the data plane expects holes: more may have become free.
        """
        punched_bytes, before_bytes = 0, self._memory_bytes()
        for start, end in self._free_memory(fs, chunks, least_bytes):
            start, end = max(start, first_bytes), min(end, end_bytes)
            if start >= end:
                continue
            try:
                self._medium.punch_hole(start, end - start)
            except OSError as error:
                raise CannotTrim(
                    path=self._medium.name, why=os.strerror(error.errno or 0)
                ) from error
            punched_bytes += end - start
        if self._medium.source.kind.is_device:
            return punched_bytes
        # A run may have had holes, and workers may have got some of the memory by now.
        return max(0, min(punched_bytes, before_bytes - self._memory_bytes()))

    def _memory_bytes(self) -> int:
        """How much memory the pool takes."""
        return os.fstat(self._medium.fileno()).st_blocks * _BLOCK_BYTES

    def _free_memory(
        self, fs: FileSystem, chunks: range, least_bytes: int
    ) -> Iterator[tuple[int, int]]:
        """The free ranges in these chunks that have some memory, in bytes of the pool, each from
        where it has some.

        Where their memory ends is not asked: tmpfs looks for that through all of what follows.
        """
        fd, first_pfn = self._medium.fileno(), fs.geometry.first_pfn
        for chunk in chunks:
            group, position = divmod(chunk, GROUP_CHUNKS)
            for bit, count in runs_of(fs.allocator.group(group).masks[position]):
                if count * FRAME_BYTES >= least_bytes:
                    pfn = first_pfn + chunk * CHUNK_FRAMES + bit
                    end = (pfn + count) << PAGE_SHIFT
                    start = next_data(fd, pfn << PAGE_SHIFT, end) & -FRAME_BYTES
                    if start < end:
                        yield start, end
