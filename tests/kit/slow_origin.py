"""An origin whose reads wait for a test."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from pmemfs.errors import OriginGone
from pmemfs.origin.file import FileOrigin
from pmemfs.origin.naming import FileName
from pmemfs.origin.vectors import Vectors


class SlowOrigin(FileOrigin):
    """A file whose reads of many wait for `let_go`, or fail."""

    kept: list[tuple[int, Vectors]]
    calls = 0
    fails_reads = 0
    is_broken = False
    """Whether it fails in a way that the cache has no patience with."""

    def begin_reads(self, reads: Sequence[tuple[int, Vectors]]) -> int:
        self.calls += 1
        self.kept += reads
        return len(reads)

    def let_go(self) -> None:
        """Read what was asked for."""
        kept, self.kept = self.kept, []
        assert super().begin_reads(kept) == len(kept)

    def fail(self) -> None:
        """Fail what was asked for."""
        kept, self.kept = self.kept, []
        for _, vectors in kept:
            vectors.result, vectors.is_done = -errno.EIO, True
            vectors.waiter(vectors)

    async def read(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        if self.fails_reads:
            self.fails_reads -= 1
            if self.is_broken:
                raise OSError(errno.EIO, "a test says so")
            raise OriginGone(name=self.name, why="a test says so")
        await super().read(offset_bytes, views)


async def slow(origin: Path) -> SlowOrigin:
    """The origin of a test that decides when it answers."""
    opened = await SlowOrigin.open(FileName(str(origin)))
    opened.kept = []
    return opened
