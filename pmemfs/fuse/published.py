"""What the data plane answers: I/O of files in use, and attributes of directories.

Most files are opened, read once and closed, and publishing them would cost more than it saves. So a
file is published when more requests look likely: at a read that does not reach its end, at its
second write, at a write of 64 KiB, or at an fsync. It is withdrawn when its last handle is closed.
The cost of publishing grows with the number of extents. So a file with many extents that changes
again and again (as when pages are written in any order into holes) is published anew only after so
many requests that publishing costs no more than they do. Invariants:
- only open regular files are published. A file with privileges that a write must take away, or one
  that is immutable or append-only, is not, because the data plane knows nothing of these;
- a file that has lost extents is withdrawn before their frames are given to anybody else, and the
  next request that comes here publishes it anew. Otherwise a worker would write into another file;
- an encrypted file is published with the slot of its key, and withdrawn before that gets another
  key. Otherwise a worker would store one file's bytes under the key of another;
- `changed` and `gone` return a token as long as any worker may see what was ever published.

The kernel asks for a directory's attributes after each change of its names. So the attributes of
directories that a program has asked for are published, and published again when they change.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pmemfs.clock import AccessTimes
from pmemfs.dataplane import layouts
from pmemfs.dataplane.layouts import (
    EXTENT,
    EXTENT_ARENA_BYTES,
    PIECE_BYTES_SHIFT,
    PIECE_CHECKSUM_SHIFT,
    PIECE_ID_SHIFT,
    Extent,
    ExtentFlags,
)
from pmemfs.dataplane.tables import Grace, SharedMemory
from pmemfs.fuse.encode import attr_out
from pmemfs.fuse.handlers.privileges import has_privileges
from pmemfs.media.inode import SIZE_LIMIT_BYTES
from pmemfs.media.transform import PIECE_FRAMES, StoredPiece
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.units import KIB
from pmemfs.volume.base import Attributes
from pmemfs.volume.fs.extents import frames_of
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import FIXED, Inode
from pmemfs.volume.fs.packed import Batch
from pmemfs.volume.fs.publication import Tables
from pmemfs.volume.fs.spans import compressed_ranges

_LARGE_WRITE_BYTES = 64 * KIB
_WRITES = 2
_MOST_EXTENTS = EXTENT_ARENA_BYTES // 8 // EXTENT.size_bytes
"""The limit for one file, so that it can't push out all others."""
_EXTENTS_A_REQUEST = 64
"""How many extents can be published in the time that one request takes."""
_FIRST_REACH, _MOST_REACH = 256, 16384
"""Of a file with many pieces, so many are shown to workers at first (32 MiB of it) and at most
(2 GiB)."""
_GRACES_KEPT = 64


class PublishedAttributes:
    """The answers to GETATTR in the shared memory."""

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self._wanted = shared.published_attributes()
        """The inode that was asked for last, by place."""

    def is_wanted(self, ino: int) -> bool:
        """Whether a program has asked for an inode's attributes, and not for a rival's since."""
        return self._wanted.get(layouts.attributes_place_of(ino)) == ino

    def publish(self, attributes: Attributes) -> None:
        """Let the data plane answer from now on, with these attributes in their place."""
        ino = attributes.ino
        self._wanted[layouts.attributes_place_of(ino)] = ino
        self._shared.publish_attributes(ino, attr_out(attributes))

    def withdraw_all(self) -> None:
        """Withdraw what is published of all inodes; it is published again when it changes."""
        for ino in self._shared.published_attributes().values():
            self._shared.withdraw_attributes(ino)

    def withdraw(self, ino: int) -> None:
        """Withdraw what was published of an inode."""
        if self.is_wanted(ino):
            self._shared.withdraw_attributes(ino)


class PublishedTables(Tables):
    """The tables of files in the shared memory."""

    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self.attributes = PublishedAttributes(shared)
        self._published = dict.fromkeys(table.inode for table in shared.published())
        """The published inodes, the least recently published first."""
        self._leaving: dict[int, Grace] = {}
        """Withdrawn inodes whose tables a worker may still see."""
        self._names = shared.names
        self._before: Grace | None = shared.begin_grace()
        """Until then a worker may still see tables that an earlier daemon has withdrawn."""

    def note_reads(self, access_times: AccessTimes) -> None:
        """Tell the data plane which reads to note as accesses from now on."""
        self._shared.set_header_word("access_times", access_times)

    def withdraw_all(self) -> None:
        """Serve all files here from now on, until they are published anew."""
        for ino in list(self._published):
            self.withdraw(ino)

    def is_published(self, ino: int) -> bool:
        """Whether the data plane serves a file now."""
        return ino in self._published

    def publish(
        self, ino: int, size_bytes: int, extents: Sequence[Extent], *, live_offset: int,
        limit_bytes: int, key_slot: int = 0,
    ) -> bool:  # fmt: skip
        """Let the data plane serve a file, in place of another one if necessary; whether it does.

        `key_slot` is as for `SharedMemory.publish`.

        If it does not, an older table of the file is withdrawn, too.
        """
        if len(extents) > _MOST_EXTENTS:
            self.withdraw(ino)
            return False
        # The first try may lack an entry, and then a rival has to go. The second may lack memory,
        # and then any published file may go.
        for candidates in (self._shared.rivals(ino), list(self._published), []):
            try:
                self._shared.publish(
                    ino, size_bytes, extents, live_offset=live_offset, limit_bytes=limit_bytes,
                    key_slot=key_slot,
                )  # fmt: skip
            except OSError:
                self._withdraw_oldest(candidates, ino)
                continue
            self._published.pop(ino, None)
            self._published[ino] = None
            return True
        self.withdraw(ino)
        return False

    def withdraw(self, ino: int) -> Grace | None:
        """Serve a file here from now on; the grace period after which no worker sees its table."""
        if ino in self._published:
            del self._published[ino]
            self._forget_what_is_over()
            self._leaving[ino] = self._shared.withdraw(ino)
        grace = self._leaving.get(ino, self._before)
        if grace is not None and self._shared.is_over(grace):
            self._leaving.pop(ino, None)
            # `_before` is the oldest of all, so it is over whichever grace period this was.
            self._before = None
            return None
        return grace

    def touched(self, ino: int, changed_ns: int) -> None:
        self.attributes.withdraw(ino)
        if ino in self._published:
            self._shared.set_changed_ns(ino, changed_ns)

    def rewritten(self, ino: int) -> None:
        if self._names is not None:
            self._names.rewritten(ino)

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
    """What has been asked of an open file."""

    opens: int = 0
    writes: int = 0
    is_wanted: bool = False
    patience: int = 0
    """How many requests are answered here before it is published again."""
    reach: int = 0
    """How many pieces workers are shown."""
    window: range = range(0)
    """The frames whose pieces workers are shown."""

    def move_window(self, end: int, end_of_file: int) -> None:
        """Show pieces around the end of a read that came here, twice as many as the last time.

        So what it costs to show them stays a small part of what was read, and who only looks at
        the first bytes of large files doesn't pay for all of their pieces.
        """
        self.reach = min(max(2 * self.reach, _FIRST_REACH), _MOST_REACH)
        frames = self.reach * PIECE_FRAMES
        start = (end - 1) // frames * frames if frames < end_of_file else 0
        self.window = range(start, start + frames)


def _extents_of(inode: Inode, packing: Batch | None, window: range) -> list[Extent]:
    """What a table says of the content of a file of which some is perhaps being compressed.

    Only in a window of it is each piece an extent of its own, which a worker can decompress.
    """
    extents = [Extent(e.index, e.pfn, e.frame_count, 0) for e in inode.extents]
    if packing:
        extents = [part for extent in extents for part in _without(extent, packing.ranges)]
    if inode.pieces:
        extents += [
            Extent(low, 0, high - low, ExtentFlags.FORWARDED)
            for start, end in ((0, window.start), (window.stop, SIZE_LIMIT_BYTES >> PAGE_SHIFT))
            for low, high in compressed_ranges(inode, start, end)
        ]
        extents += [
            _piece_extent(index, piece)
            for index, piece in inode.pieces_in(window.start, len(window))
        ]
        extents.sort(key=lambda extent: extent.index)
    return extents


def _piece_extent(index: int, piece: StoredPiece) -> Extent:
    flags = (
        ExtentFlags.FORWARDED.value | piece.id << PIECE_ID_SHIFT
        | piece.stored_bytes << PIECE_BYTES_SHIFT | piece.checksum << PIECE_CHECKSUM_SHIFT
    )  # fmt: skip
    return Extent(index, piece.pfn, piece.frame_count, flags)


def _without(extent: Extent, forwarded: Mapping[int, int]) -> Iterator[Extent]:
    """The parts of an extent, those of them forwarded that lie in ranges, given by their indexes
    and in order."""
    at, end = extent.index, extent.index + extent.frame_count
    for index, count in forwarded.items():
        low, high = max(at, index), min(end, index + count)
        if low >= high:
            continue
        if at < low:
            yield Extent(at, extent.pfn + at - extent.index, low - at, 0)
        yield Extent(low, 0, high - low, ExtentFlags.FORWARDED)
        at = high
    if at < end:
        yield Extent(at, extent.pfn + at - extent.index, end - at, 0)


class Publisher:
    """Is told what happens to open files, and publishes the files that are worth it."""

    def __init__(self, fs: FileSystem, tables: PublishedTables) -> None:
        self._fs = fs
        self._tables = tables
        self._demands: dict[int, _Demand] = {}

    def opened(self, ino: int) -> None:
        """A handle was opened, or was open before this object was made."""
        demand = self._demands.get(ino)
        if demand is None:
            demand = self._demands[ino] = _Demand()
            if self._tables.is_published(ino):
                # An earlier daemon has found it worth that.
                demand.is_wanted = True
        demand.opens += 1

    def closed(self, ino: int) -> None:
        """A handle was closed: called as often as `opened`."""
        demand = self._demands[ino]
        demand.opens -= 1
        if not demand.opens:
            del self._demands[ino]
            self._tables.withdraw(ino)

    def was_read(self, ino: int, end_bytes: int) -> None:
        """A read came here that asked for bytes up to `end_bytes`."""
        demand = self._demands.get(ino)
        if not demand:
            return
        end = frames_of(end_bytes)
        if not self._tables.is_published(ino):
            if not demand.is_wanted and end_bytes < self._fs.attributes(ino).size_bytes:
                demand.is_wanted = True
            if demand.is_wanted and end - 1 not in demand.window:
                self._move_window(ino, demand, end)
            self._publish(ino, demand)
        elif end - 1 not in demand.window:
            if demand.patience and demand.reach == _MOST_REACH:
                # It stays published as it is.
                demand.patience -= 1
            elif self._move_window(ino, demand, end):
                demand.patience = 0
                self._publish(ino, demand)

    def _move_window(self, ino: int, demand: _Demand, end: int) -> bool:
        """Show workers the pieces where a file is read; whether that is others than before."""
        inode = self._fs.frames.file(ino)
        if not inode.pieces_in(end - 1, 1):
            return False
        demand.move_window(end, inode.end)
        return True

    def was_written(self, ino: int, length_bytes: int) -> None:
        """A write came here and was done."""
        demand = self._demands.get(ino)
        if demand:
            demand.writes += 1
            demand.is_wanted |= length_bytes >= _LARGE_WRITE_BYTES or demand.writes >= _WRITES
            # A published file, too: its end and its limit have changed.
            self._publish(ino, demand)

    def was_synced(self, ino: int) -> None:
        """An fsync came here."""
        demand = self._demands.get(ino)
        if demand and not self._tables.is_published(ino):
            demand.is_wanted = True
            self._publish(ino, demand)

    def was_changed(self, ino: int) -> None:
        """Something else has happened that may have changed extents, size or mode."""
        demand = self._demands.get(ino)
        if demand:
            self._publish(ino, demand)

    def has_failed(self, ino: int) -> None:
        """A change was perhaps done in part, so what is published may be out of date."""
        self._tables.withdraw(ino)

    def _publish(self, ino: int, demand: _Demand) -> None:
        if not demand.is_wanted:
            return
        if ino in self._fs.moving:
            # A worker's write would go to a frame that is just leaving the file.
            self._tables.withdraw(ino)
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
        frames = self._fs.frames
        try:
            key_slot = frames.key_slot(ino)
        except OSError:
            # Its key is being locked, so no worker may see it any more.
            self._tables.withdraw(ino)
            return
        reads_count_after_ns = self._fs.show_accessed(ino)
        extents = _extents_of(frames.file(ino), frames.packed.packing.get(ino), demand.window)
        demand.patience = len(extents) // _EXTENTS_A_REQUEST
        self._tables.publish(
            ino, attributes.size_bytes, extents, live_offset=self._fs.live_line(ino),
            limit_bytes=self._fs.append_limit(ino), key_slot=key_slot,
        )  # fmt: skip
        self._tables.touched(ino, reads_count_after_ns)
