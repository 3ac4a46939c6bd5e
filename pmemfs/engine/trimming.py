"""Gives back memory that no file uses: FITRIM, which fstrim(8) asks for, and `pmemfs trim`.

This is for sparse pools and block devices. A pool that has memory everywhere was promised that at
`create`, so it keeps its memory. Invariants:
- only free frames are touched. No file has them, no page of them is held, and no published table
  names them. They are looked up and punched in one step without an await, so they can't be given to
  a file in between;
- the data plane is told that chunks may have holes before they get them. Otherwise a worker would
  touch a hole through the mapping once a file gets frames there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from pmemfs.dataplane.presence import CHUNK_BYTES
from pmemfs.engine.base import Engine
from pmemfs.errors import CannotTrim
from pmemfs.media.filesystem import CHUNK_FRAMES, GROUP_CHUNKS
from pmemfs.medium.mapped import MappedMedium
from pmemfs.medium.sparse import data_ranges
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.masks import runs_of

_CHUNKS_AT_ONCE = 8


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

    async def trim(
        self, start_bytes: int = 0, length_bytes: int = 1 << 64, least_bytes: int = 0
    ) -> Trimmed:
        """Give back what is free in a range of the frames, in runs of at least `least_bytes`.

        Raises CannotTrim.
        """
        fs = self._check()
        first = start_bytes // CHUNK_BYTES
        count = fs.geometry.group_count * GROUP_CHUNKS
        last = min(count, -(-(start_bytes + length_bytes) // CHUNK_BYTES))
        given_back = 0
        for chunk in range(first, last, _CHUNKS_AT_ONCE):
            chunks = range(chunk, min(chunk + _CHUNKS_AT_ONCE, last))
            found = list(self._free_memory(fs, chunks, least_bytes))
            if found:
                start, end = found[0][0], found[-1][1]
                async with self._engine.clearing(start, end):
                    # It may have become read-only meanwhile.
                    self._check()
                    given_back += self._punch(fs, chunks, least_bytes, start, end)
            await trio.lowlevel.checkpoint()
        return Trimmed(self._pool.label.name, given_back)

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
        """Punch what is free now. Nothing awaits here, so it stays free until it is punched.

        Only within the range in which the data plane expects holes: more may have become free.
        """
        given_back = 0
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
            given_back += end - start
        return given_back

    def _free_memory(
        self, fs: FileSystem, chunks: range, least_bytes: int
    ) -> Iterator[tuple[int, int]]:
        """The free ranges in these chunks that have memory, in bytes of the pool."""
        fd, first_pfn = self._medium.fileno(), fs.geometry.first_pfn
        start_bytes = (first_pfn + chunks.start * CHUNK_FRAMES) << PAGE_SHIFT
        end_bytes = (first_pfn + chunks.stop * CHUNK_FRAMES) << PAGE_SHIFT
        if next(iter(data_ranges(fd, start_bytes, end_bytes)), None) is None:
            # There is nothing to give back, so no bitmap has to be read.
            return
        for chunk in chunks:
            group, position = divmod(chunk, GROUP_CHUNKS)
            for bit, count in runs_of(fs.allocator.group(group).masks[position]):
                if count * FRAME_BYTES >= least_bytes:
                    pfn = first_pfn + chunk * CHUNK_FRAMES + bit
                    yield from data_ranges(fd, pfn << PAGE_SHIFT, (pfn + count) << PAGE_SHIFT)
