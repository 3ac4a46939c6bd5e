"""A file system on a pool: mode `fs`.

    names.py  attributes.py  xattrs.py  properties.py  what can be done to inodes
    filebytes.py  fileframes.py  placing.py            what can be done to the content of files
    relocating.py                                      lays a file out anew
    packed.py  cold.py                                 compressed pieces, and what becomes one
    store.py                                           what they all stand on, as one object:
    housekeeping.py  compaction.py  transaction.py         how inodes change, and the room for it
    inodecache.py  reading.py  livelines.py                inodes in memory, and as they are stored
    ground.py  table.py  allocator.py  busy.py             head, slots and frames
    inode.py  log.py  extents.py  entries.py           what an inode is
    reserves.py  catchup.py                            what workers take, and what they change
    leaks.py                                           finds what a crash left behind
    publication.py  commits.py                         what others are told of changes

All operations are atomic, and durable when they return. Only `write` differs: its bytes, and the
size and time in the live line, become durable with `persist`.
"""

from __future__ import annotations

import stat
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from pmemfs.clock import AccessTimes, coarse_ns
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
from pmemfs.memmap.base import Memmap
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.base import Room
from pmemfs.volume.fs.attributes import InodeAttributes
from pmemfs.volume.fs.commits import Commits
from pmemfs.volume.fs.filebytes import FileBytes
from pmemfs.volume.fs.fileframes import FileFrames
from pmemfs.volume.fs.ground import geometry_of
from pmemfs.volume.fs.holds import Holds
from pmemfs.volume.fs.inode import State
from pmemfs.volume.fs.leaks import LeakSearch
from pmemfs.volume.fs.names import Names
from pmemfs.volume.fs.properties import Properties
from pmemfs.volume.fs.publication import Tables
from pmemfs.volume.fs.relocating import Relocator
from pmemfs.volume.fs.sealing import Sealing
from pmemfs.volume.fs.space import Space
from pmemfs.volume.fs.store import Store
from pmemfs.volume.fs.xattrs import Xattrs

if TYPE_CHECKING:
    from pmemfs.media.transformreport import CompressionReport
    from pmemfs.volume.fs.cold import Cooler


class FileSystem:
    """A mounted file system: its parts, and their operations under one roof.

    An operation stands here as the bound method of the part that does it and documents it. All of
    them together are a `Volume`.
    """

    has_files = True
    never_closed: Collection[int] = ()

    def __init__(
        self, pool: Pool, memmap: Memmap, tables: Tables | None = None,
        holds: Holds | None = None, commits: Commits | None = None,
        sealing: Sealing | None = None,
    ) -> None:  # fmt: skip
        """Mount, as `Store` does. Raises DamagedFileSystem."""
        self.store = store = Store(pool, memmap, tables, holds, commits, sealing)
        self.frames = frames = FileFrames(store)
        self.content = content = FileBytes(store, frames)
        self.relocator = relocator = Relocator(store, frames)
        self.properties = properties = Properties(store)
        self.inode_attributes = attributes = InodeAttributes(store, frames, properties)
        self.xattrs = xattrs = Xattrs(store)
        self.tree = tree = Names(store)
        self._leaks: LeakSearch | None = None
        self._cooler: Cooler | None = None

        self.medium, self.tables, self.allocator = store.medium, store.tables, store.allocator
        self.untrimmed, self.pinned = store.untrimmed, store.ground.pinned
        self.inode, self.read_on = store.inode, store.read_on
        self.hold, self.drop, self.will_drop = store.hold, store.drop, store.will_drop
        self.grow = store.ground.grow
        self.settle, self.leave_clean = store.settle, store.leave_clean
        self.has_unnamed = store.has_unnamed
        self.resume_writing = store.ground.resume_writing

        self.lookup, self.names = tree.lookup, tree.names
        self.listing, self.listed = tree.listing, tree.listed
        self.stored_listing = tree.stored_listing
        self.has_entry, self.parent = tree.has_entry, tree.parent
        self.make, self.make_unnamed, self.link = tree.make, tree.make_unnamed, tree.link
        self.unlink, self.rmdir, self.rename = tree.unlink, tree.rmdir, tree.rename

        self.attributes, self.heritage = attributes.attributes, attributes.heritage
        self.set_attributes, self.set_flags = attributes.set_attributes, attributes.set_flags
        self.times_were_set = attributes.times_were_set
        self.note_read, self.show_accessed = attributes.note_read, attributes.show_accessed
        self.target = attributes.target
        self.get_xattr, self.find_xattr = xattrs.get_xattr, xattrs.find_xattr
        self.set_xattr, self.remove_xattr = xattrs.set_xattr, xattrs.remove_xattr
        self.list_xattrs = xattrs.list_xattrs
        self.set_xattrs_and_mode = xattrs.set_xattrs_and_mode

        self.read, self.write, self.copy = content.read, content.write, content.copy
        self.seek, self.has_hole = content.seek, content.has_hole
        self.pieces, self.note_stores = content.pieces, content.note_stores
        self.lay_out, self.make_plain = relocator.lay_out, frames.make_plain
        self.moving = relocator.moving
        self.check_open = content.check_open
        self.persist, self.write_back = content.persist, content.write_back
        self.allocate, self.zero, self.punch = frames.allocate, frames.zero, frames.punch
        self.collapse, self.insert = frames.collapse, frames.insert
        self.extents, self.append_limit = frames.extents, frames.append_limit
        self.live_line, self.trim_ahead = frames.live_line, frames.trim_ahead

    @property
    def geometry(self) -> Geometry:
        """The frames of the pool's data zone; a pool may grow."""
        return self.store.ground.geometry

    @property
    def cooler(self) -> Cooler:
        """What compresses files."""
        if self._cooler is None:
            # Imported here, because most file systems compress nothing.
            from pmemfs.volume.fs.cold import Cooler

            self._cooler = Cooler(self.store, self.frames, self.moving)
        return self._cooler

    @property
    def may_have_compressed(self) -> bool:
        """Whether an inode may have a compression."""
        return self.store.ground.has_compressed

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written: never on this mount, or no more since damage was met."""
        return self.store.ground.read_only

    @property
    def damage(self) -> str:
        """Why nothing is written any more; "" if no damage was met."""
        return self.store.ground.damage

    @property
    def may_find_room(self) -> bool:
        """As of `Volume`."""
        return self.store.ground.may_have_leaks and not self.read_only

    def note_accesses(self, times: AccessTimes, *, of_directories: bool) -> None:
        """Say which reads are noted as accesses, and whether reads of directories are, too."""
        self.inode_attributes.access_times = times
        self.inode_attributes.notes_directories = of_directories

    @staticmethod
    def format(pool: Pool, *, mode: int = 0o755, uid: int = 0, gid: int = 0) -> None:
        """Make an empty file system on a pool. Raises BadGeometry if the pool is too small."""
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
        # Last, because the head is what makes it a file system: a crash before this leaves a pool
        # that a mount refuses, not a file system with parts missing.
        at = geometry.offset_of(HEAD_FRAME)
        medium.store(at, pack_head(Head(uuid=pool.label.uuid, is_clean=1)))
        medium.persist(at, HEAD.size_bytes)

    def is_encrypted(self, number: int) -> bool:
        """As of `Volume`."""
        transform = self.inode(number).transform
        return transform is not None and transform.is_encrypted

    def is_over(self, token: object) -> bool:
        """As `Tables.is_over`."""
        return self.tables.is_over(token)

    def may_have_ahead(self, number: int) -> bool:
        """Whether a file may have got frames behind its size since it was last closed."""
        return number in self.untrimmed

    def room(self) -> Room:
        """How much room there is. Reads the bitmaps of all groups, the first time."""
        reserves = self.store.ground.reserves
        free_frames = self.allocator.free_count() + (reserves.frame_count if reserves else 0)
        reserved = min(self.allocator.reserve, free_frames)
        return Room(self.geometry.frame_count, free_frames, reserved)

    def look_on(self) -> bool:
        """Read some bitmaps that were not read before; whether there are more."""
        return self.allocator.look_on()

    def space(self) -> Space:
        """Where the frames are. Looks at all that is in memory, and at all bitmaps."""
        room = self.room()
        inodes = list(self.store.cache.inodes)
        files = [inode for inode in inodes if inode.is_file]
        slots = sum(inode.log.slot_count for inode in inodes)
        live = sum(inode.compacted_slots for inode in inodes)
        return Space(
            total_frames=room.total_frames,
            free_frames=room.free_frames,
            busy_frames=self.store.busy.frame_count,
            largest_free_frames=self.allocator.largest_run(),
            cached_inodes=len(inodes),
            cached_extents=sum(len(inode.extents) for inode in files),
            mapped_frames=sum(inode.data_frames for inode in files),
            aligned_frames=sum(inode.extents.aligned_frames() for inode in files),
            log_bytes=slots * RECORD_BYTES,
            dead_log_bytes=max(0, slots - live) * RECORD_BYTES,
        )

    def compression(self) -> CompressionReport | None:
        """What is compressed; None if no inode ever had a compression."""
        if not self.may_have_compressed:
            return None
        # Imported here, because most file systems compress nothing.
        from pmemfs.media.transformreport import CompressionReport

        packed, inodes = self.frames.packed, list(self.store.cache.inodes)
        pieces = [piece for inode in inodes for piece in inode.pieces.values()]
        done = self._cooler.statistics() if self._cooler else None
        return CompressionReport(
            packed_bytes=sum(piece.frame_count for piece in pieces) << PAGE_SHIFT,
            stored_bytes=sum(piece.stored_frames for piece in pieces) << PAGE_SHIFT,
            compressed_count=done.packed if done else 0,
            saved_bytes=(done.saved_frames if done else 0) << PAGE_SHIFT,
            made_plain_count=packed.made_plain,
            decompressed_count=packed.misses,
            hit_count=packed.hits,
            kept_bytes=packed.kept_bytes,
        )

    def tidy(self) -> bool:
        """Do what has to be done now and then; whether to call `go_on` soon."""
        housekeeping = self.store.housekeeping
        self.store.ground.clock += 1
        housekeeping.collect_slots()
        housekeeping.look_for_idle()
        if not self.read_only:
            housekeeping.drop_inode_frames()
        return self.go_on()

    def go_on(self) -> bool:
        """Do some ms of long work between operations; whether there is more."""
        # To free frames is to write, and a pin may end while nothing may be written.
        has_more = not self.read_only and self.store.busy.collect()
        has_more |= self.store.housekeeping.drop_some()
        if self.read_only:
            return has_more
        has_more |= self.search_on()
        return self.store.housekeeping.compact_some() or has_more

    def gather(self) -> bool:
        """Take back some of what workers have not used, or nobody uses any more; whether there is
        more."""
        if self.read_only:
            return False
        reserves = self.store.ground.reserves
        return self.store.busy.collect() or (reserves is not None and reserves.drain())

    def end(self) -> None:
        """The mount ends: everything is closed and no hold counts any more. Leave the pool clean.

        Raises OSError.
        """
        self._trim_ahead()
        self.store.end()

    def stop_writing(self) -> None:
        """Write nothing any more until `resume_writing`; nothing is open for it."""
        self._trim_ahead()
        self.store.stop_writing()

    def _trim_ahead(self) -> None:
        for number in () if self.read_only else list(self.untrimmed):
            # If one fails, the file system stays "not clean", and the next mount searches it.
            with suppress(OSError):
                self.frames.trim_ahead(number)

    def search_on(self) -> bool:
        """As of `Volume`."""
        ground = self.store.ground
        if not ground.may_have_leaks:
            return False
        if self._leaks is None:
            self._leaks = LeakSearch(self.store, self.frames)
        if self._leaks.step():
            return True
        self._leaks = None
        ground.may_have_leaks = False
        return False


def _wipe_bitmaps(medium: Medium, geometry: Geometry) -> None:
    """Clear both bitmaps of each group, because a new pool's memory may hold anything."""
    start = geometry.offset_of(0)
    if medium.is_hole(start, geometry.frame_count << PAGE_SHIFT):
        return
    for group in range(geometry.group_count):
        offset = geometry.group_pfn(group) << PAGE_SHIFT
        length = min(2, geometry.frames_of(group)) << PAGE_SHIFT
        if not medium.is_hole(offset, length):
            medium.store(offset, bytes(length))
            medium.flush(offset, length)
