"""What the data plane answers: I/O of files that are open and in use, attributes of directories.

Most files are opened, read once and closed, and what publishing costs would be lost on them. So a
file is published when it shows that there is more to come: at a read that does not reach its end,
at its second write or one of 64 KiB, at an fsync; and withdrawn when nobody has it open any more.
Publishing costs by the number of extents, so a file of many that changes again and again (pages
written in any order into holes) is published anew only after so many requests that this is no more
than they cost themselves. Invariants:
- only regular files that are open are published, and none that a write must take privileges from,
  or that is immutable or append-only: the data plane knows nothing of either;
- whose extents changed is withdrawn before they are given to anybody else, and published anew by
  the next request that comes here;
- `changed` and `gone` answer a token as long as any worker may see what was ever published.

The kernel asks for the attributes of a directory after each change of its names, unless nobody
looks at it: so of those that somebody has asked for, they are published, and again when they
change.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass

from pmemfs.clock import AccessTimes
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import EXTENT, EXTENT_ARENA_BYTES, Extent
from pmemfs.dataplane.tables import Grace, SharedMemory
from pmemfs.fuse.encode import attr_out
from pmemfs.fuse.handlers.privileges import has_privileges
from pmemfs.units import KIB
from pmemfs.volume.base import Attributes
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import FIXED
from pmemfs.volume.fs.publication import Tables

_LARGE_WRITE_BYTES = 64 * KIB
_WRITES = 2
_MOST_EXTENTS = EXTENT_ARENA_BYTES // 8 // EXTENT.size_bytes
"""One file may not push out all others."""
_EXTENTS_A_REQUEST = 64
"""So many can be published while one request is answered."""
_GRACES_KEPT = 64


class PublishedAttributes:
    """The answers to GETATTR in the memory that the planes share."""

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self._wanted = shared.published_attributes()
        """By place, the inode that was asked for last."""

    def is_wanted(self, ino: int) -> bool:
        """Whether somebody has asked for an inode's attributes, and for no rival's since."""
        return self._wanted.get(layouts.attributes_place_of(ino)) == ino

    def publish(self, attributes: Attributes) -> None:
        """Let the data plane answer from now on; nobody else's attributes in its place."""
        ino = attributes.ino
        self._wanted[layouts.attributes_place_of(ino)] = ino
        self._shared.publish_attributes(ino, attr_out(attributes))

    def withdraw(self, ino: int) -> None:
        """What was published is no longer so."""
        if self.is_wanted(ino):
            self._shared.withdraw_attributes(ino)


class PublishedTables(Tables):
    """The tables of files in the memory that the planes share."""

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self.attributes = PublishedAttributes(shared)
        self._published = dict.fromkeys(table.inode for table in shared.published())
        """The least recently published one first."""
        self._leaving: dict[int, Grace] = {}
        """What was withdrawn, and may still be seen."""
        self._before: Grace | None = shared.begin_grace()
        """What was withdrawn by whoever was here before may still be seen until then."""

    def note_reads(self, access_times: AccessTimes) -> None:
        """Which reads the data plane is to note; before it serves any."""
        self._shared.set_header_word("access_times", access_times)

    def is_published(self, ino: int) -> bool:
        """Whether the data plane serves a file now."""
        return ino in self._published

    def publish(
        self, ino: int, size_bytes: int, extents: Sequence[Extent], *, live_offset: int,
        limit_bytes: int,
    ) -> bool:  # fmt: skip
        """Let the data plane serve a file, if need be instead of another one; whether it does.

        Where it doesn't, it does not go on with what was published before, either.
        """
        if len(extents) > _MOST_EXTENTS:
            self.withdraw(ino)
            return False
        # The first may have no entry, for which a rival has to go, or no memory, for which any.
        for candidates in (self._shared.rivals(ino), list(self._published), []):
            try:
                self._shared.publish(
                    ino, size_bytes, extents, live_offset=live_offset, limit_bytes=limit_bytes
                )
            except OSError:
                self._withdraw_oldest(candidates, ino)
                continue
            self._published.pop(ino, None)
            self._published[ino] = None
            return True
        self.withdraw(ino)
        return False

    def withdraw(self, ino: int) -> Grace | None:
        """Serve a file here from now on; the time from which on nobody sees its table any more."""
        if ino in self._published:
            del self._published[ino]
            self._forget_what_is_over()
            self._leaving[ino] = self._shared.withdraw(ino)
        grace = self._leaving.get(ino, self._before)
        if grace is not None and self._shared.is_over(grace):
            self._leaving.pop(ino, None)
            # The first of all, so it is over whichever this was.
            self._before = None
            return None
        return grace

    def touched(self, ino: int, changed_ns: int) -> None:
        self.attributes.withdraw(ino)
        if ino in self._published:
            self._shared.set_changed_ns(ino, changed_ns)

    def changed(self, ino: int) -> object | None:
        return self.withdraw(ino)

    def gone(self, ino: int) -> object | None:
        self.attributes.withdraw(ino)
        return self.withdraw(ino)

    def is_over(self, token: object) -> bool:
        assert isinstance(token, Grace)
        return self._shared.is_over(token)

    def _withdraw_oldest(self, candidates: Sequence[int], but: int) -> None:
        oldest = next((ino for ino in self._published if ino in candidates and ino != but), None)
        if oldest is not None:
            self.withdraw(oldest)

    def _forget_what_is_over(self) -> None:
        if len(self._leaving) >= _GRACES_KEPT:
            self._leaving = {
                ino: grace for ino, grace in self._leaving.items()
                if not self._shared.is_over(grace)
            }  # fmt: skip


@dataclass(slots=True)
class _Demand:
    """What an open file was asked for."""

    opens: int = 0
    writes: int = 0
    is_wanted: bool = False
    patience: int = 0
    """Requests that are answered here before it is published again."""


class Publisher:
    """Is told what happens to open files, and publishes those that are worth it."""

    def __init__(self, fs: FileSystem, tables: PublishedTables) -> None:
        self._fs = fs
        self._tables = tables
        self._demands: dict[int, _Demand] = {}

    def opened(self, ino: int) -> None:
        """A file was opened, or was open before this began."""
        demand = self._demands.get(ino)
        if demand is None:
            # Published it is only where somebody else has found that it is wanted.
            wanted = self._tables.is_published(ino)
            demand = self._demands[ino] = _Demand(is_wanted=wanted)
        demand.opens += 1

    def closed(self, ino: int) -> None:
        """As often as `opened`."""
        demand = self._demands[ino]
        demand.opens -= 1
        if not demand.opens:
            del self._demands[ino]
            self._tables.withdraw(ino)

    def was_read(self, ino: int, end_bytes: int) -> None:
        """A read came here that asked for what is before `end_bytes`."""
        demand = self._demands.get(ino)
        if demand and not self._tables.is_published(ino):
            if not demand.is_wanted and end_bytes < self._fs.attributes(ino).size_bytes:
                demand.is_wanted = True
            self._publish(ino, demand)

    def was_written(self, ino: int, length_bytes: int) -> None:
        """A write came here, and has been done."""
        demand = self._demands.get(ino)
        if demand:
            demand.writes += 1
            demand.is_wanted |= length_bytes >= _LARGE_WRITE_BYTES or demand.writes >= _WRITES
            # Also what is published: it ends elsewhere now.
            self._publish(ino, demand)

    def was_synced(self, ino: int) -> None:
        """An fsync came here."""
        demand = self._demands.get(ino)
        if demand and not self._tables.is_published(ino):
            demand.is_wanted = True
            self._publish(ino, demand)

    def was_changed(self, ino: int) -> None:
        """Something else happened that may have changed its extents, its size or its mode."""
        demand = self._demands.get(ino)
        if demand:
            self._publish(ino, demand)

    def has_failed(self, ino: int) -> None:
        """What happened to it was not done wholly: what is published may be what was before."""
        self._tables.withdraw(ino)

    def _publish(self, ino: int, demand: _Demand) -> None:
        if not demand.is_wanted:
            return
        attributes = self._fs.attributes(ino)
        if (
            not stat.S_ISREG(attributes.mode)
            or attributes.flags & FIXED
            or has_privileges(self._fs, ino, attributes.mode)
        ):
            self._tables.withdraw(ino)
            return
        if demand.patience:
            demand.patience -= 1
            self._tables.withdraw(ino)
            return
        reads_count_after_ns = self._fs.show_accessed(ino)
        extents = [Extent(e.index, e.pfn, e.frame_count, 0) for e in self._fs.extents(ino)]
        demand.patience = len(extents) // _EXTENTS_A_REQUEST
        self._tables.publish(
            ino, attributes.size_bytes, extents, live_offset=self._fs.live_line(ino),
            limit_bytes=self._fs.append_limit(ino),
        )  # fmt: skip
        self._tables.touched(ino, reads_count_after_ns)
