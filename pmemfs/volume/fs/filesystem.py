"""A file system on a pool: mode `fs`.

    files.py  names.py  attributes.py                  what can be done
    store.py  transaction.py  metadata.py              inodes, and how they change
    inode.py  log.py  extents.py                       what an inode is
    compaction.py                                      long logs, written anew in steps
    table.py  allocator.py  busy.py                    slots and frames
    leaks.py                                           what a crash left behind

All operations are atomic and, when they return, durable, but for what `write` stores: its bytes,
and the size and time in the live line, are durable with `persist`.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass

from pmemfs.clock import coarse_ns
from pmemfs.errors import BadGeometry
from pmemfs.media.filesystem import (
    FIRST_INODES_FRAME,
    HEAD,
    HEAD_FRAME,
    JOURNAL_FRAME,
    LEAST_FRAMES,
    Geometry,
    Head,
    pack_head,
)
from pmemfs.media.inode import INLINE_OFFSET, ROOT
from pmemfs.media.inode import pack_head as pack_inode_head
from pmemfs.media.log import RECORD_BYTES, pack_parent, seal
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.fs.files import FileOperations
from pmemfs.volume.fs.inode import State
from pmemfs.volume.fs.leaks import LeakSearch
from pmemfs.volume.fs.names import NameOperations
from pmemfs.volume.fs.space import Space
from pmemfs.volume.fs.store import geometry_of


@dataclass(frozen=True, slots=True)
class Room:
    """How much room there is."""

    total_frames: int
    free_frames: int
    reserved_frames: int
    """Of the free ones, those that only what deletes may take."""


class FileSystem(FileOperations, NameOperations):
    """A mounted file system."""

    _leaks: LeakSearch | None = None

    @staticmethod
    def format(pool: Pool, *, mode: int = 0o755, uid: int = 0, gid: int = 0) -> None:
        """Make an empty file system on a pool. Raises BadGeometry where it is too small."""
        geometry = geometry_of(pool)
        if geometry.frame_count < LEAST_FRAMES:
            raise BadGeometry(why="the pool is too small to hold a file system")
        medium = pool.medium
        _wipe_bitmaps(medium, geometry)
        medium.store(geometry.offset_of(JOURNAL_FRAME), bytes(FRAME_BYTES))
        slot = geometry.offset_of(FIRST_INODES_FRAME)
        now_ns = coarse_ns()
        state = State(stat.S_IFDIR | mode, 1, uid, gid, 0, now_ns, now_ns, now_ns, 0, 0, 0)
        log_start = slot + INLINE_OFFSET
        records = seal((pack_parent(ROOT), state.pack()), ROOT, 1, log_start)
        raw = pack_inode_head(ROOT, 1, now_ns, log_start, log_start + len(records))
        raw += bytes(INLINE_OFFSET - len(raw)) + records
        medium.store(slot, raw + bytes(FRAME_BYTES - len(raw)))
        for frame in (0, 1):
            used = 1 << FIRST_INODES_FRAME
            medium.store(geometry.offset_of(frame), used.to_bytes(8, "little"))
        medium.persist(geometry.offset_of(0), (FIRST_INODES_FRAME + 1) * FRAME_BYTES)
        # Last, since what has a head is a file system.
        at = geometry.offset_of(HEAD_FRAME)
        medium.store(at, pack_head(Head(uuid=pool.label.uuid, is_clean=1)))
        medium.persist(at, HEAD.size_bytes)

    def room(self) -> Room:
        """How much room there is. Reads the bitmaps of all groups, the first time."""
        free_frames = self.allocator.free_count()
        reserved = min(self.allocator.reserve, free_frames)
        return Room(self.geometry.frame_count, free_frames, reserved)

    def space(self) -> Space:
        """Where the frames are. Looks at all that is in memory, and at all bitmaps."""
        room = self.room()
        inodes = list(self.cached_inodes)
        files = [inode for inode in inodes if inode.is_file]
        slots = sum(inode.log.slot_count for inode in inodes)
        live = sum(inode.compacted_slots for inode in inodes)
        return Space(
            total_frames=room.total_frames,
            free_frames=room.free_frames,
            busy_frames=self.busy.frame_count,
            largest_free_frames=self.allocator.largest_run(),
            cached_inodes=len(inodes),
            cached_extents=sum(len(inode.extents) for inode in files),
            mapped_frames=sum(inode.extents.frame_count for inode in files),
            aligned_frames=sum(inode.extents.aligned_frames() for inode in files),
            log_bytes=slots * RECORD_BYTES,
            dead_log_bytes=max(0, slots - live) * RECORD_BYTES,
        )

    def tidy(self) -> bool:
        """What is to be done now and then; whether to `go_on` with it soon."""
        self.clock += 1
        self.collect_slots()
        self.look_for_idle()
        if not self.read_only:
            self.drop_inode_frames()
        return self.go_on()

    def go_on(self) -> bool:
        """Some ms of what takes long, beside the operations; whether there is more."""
        has_more = self.busy.collect()
        has_more |= self.drop_some()
        if self.read_only:
            return has_more
        has_more |= self._search_leaks()
        return self.compact_some() or has_more

    def _search_leaks(self) -> bool:
        if not self.may_have_leaks:
            return False
        if self._leaks is None:
            self._leaks = LeakSearch(self)
        if self._leaks.step():
            return True
        self._leaks = None
        self.may_have_leaks = False
        return False


def _wipe_bitmaps(medium: Medium, geometry: Geometry) -> None:
    """Both bitmaps of each group: what was there may be anything."""
    start = geometry.offset_of(0)
    if medium.is_hole(start, geometry.frame_count << PAGE_SHIFT):
        return
    for group in range(geometry.group_count):
        offset = geometry.group_pfn(group) << PAGE_SHIFT
        length = min(2, geometry.frames_of(group)) << PAGE_SHIFT
        if not medium.is_hole(offset, length):
            medium.store(offset, bytes(length))
            medium.flush(offset, length)
