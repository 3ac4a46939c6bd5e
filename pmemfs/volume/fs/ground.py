"""The ground that all of a mounted file system stands on: its medium, frames, slots and head.

Invariants:
- the head says "not clean" before anything else is written, and "clean" after everything else. So
  after a crash the next mount knows that it has to search for leaks;
- code that meets damage reports it here, and from then on nothing is written: a write that builds
  on a wrong record would spread the damage;
- nothing in the file system awaits, so what one call does is atomic to all tasks.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from pmemfs.clock import FileClock
from pmemfs.errors import DamagedFileSystem, system_error
from pmemfs.media.filesystem import (
    HEAD,
    HEAD_FRAME,
    JOURNAL_FRAME,
    LEAST_FRAMES,
    Geometry,
    Head,
    validate_head,
)
from pmemfs.media.journal import HEAD as JOURNAL_HEAD
from pmemfs.medium.base import Medium
from pmemfs.memmap.base import Memmap
from pmemfs.pool import Pool
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.busy import BusyPages
from pmemfs.volume.fs.commits import Commits, NoCommits
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.metadata import MetadataMedium
from pmemfs.volume.fs.publication import NoTables, Tables
from pmemfs.volume.fs.reading import may_read_in_steps, unfinished_words
from pmemfs.volume.fs.reserves import Reserves
from pmemfs.volume.fs.table import InodeTable
from pmemfs.volume.pinned import PinnedFrames

log = logging.getLogger(__name__)

_CLEAN_AT = HEAD.offset_of("is_clean")
_LOG_FRAMES_AT = HEAD.offset_of("log_frames")
_HAS_COMPRESSED_AT = HEAD.offset_of("has_compressed")


def geometry_of(pool: Pool) -> Geometry:
    """The frames of a pool's data zone."""
    return Geometry(int(pool.first_data_pfn), pool.data_pfn_count)


def stored_table(pool: Pool) -> InodeTable:
    """The inodes of a pool that is not mounted, as the next mount would leave them. Writes nothing.
    Raises DamagedFileSystem."""
    medium, geometry = pool.medium, geometry_of(pool)
    _head_of(pool, medium, geometry)
    table = InodeTable(medium, geometry, Allocator(medium, geometry))
    table.pending_words = unfinished_words(medium, table)
    return table


def _head_of(pool: Pool, medium: Medium, geometry: Geometry) -> Head:
    """Raises DamagedFileSystem."""
    if geometry.frame_count < LEAST_FRAMES:
        raise DamagedFileSystem(why="the data zone is too small to hold one")
    raw = medium.read(geometry.offset_of(HEAD_FRAME), HEAD.size_bytes)
    return validate_head(raw, pool.label.uuid)


def empty_journal(medium: Medium, geometry: Geometry) -> None:
    """Make the journal empty, durably."""
    at = geometry.offset_of(JOURNAL_FRAME)
    medium.store(at, bytes(JOURNAL_HEAD.size_bytes))
    medium.persist(at, JOURNAL_HEAD.size_bytes)


class Ground:
    """The ground of one mounted file system."""

    def __init__(
        self, pool: Pool, memmap: Memmap, tables: Tables | None = None,
        commits: Commits | None = None,
    ) -> None:  # fmt: skip
        """Mount: carry out what the journal says, look at the head. Raises DamagedFileSystem."""
        self.pool = pool
        self.medium = MetadataMedium(pool.medium, lambda fault: self.become_read_only(str(fault)))
        self.memmap = memmap
        self.tables = tables or NoTables()
        self.commits = commits or NoCommits()
        self.geometry = geometry_of(pool)
        self.read_only = pool.medium.read_only
        self.damage = ""
        self.when_damaged: Callable[[], None] = lambda: None
        head = _head_of(pool, self.medium, self.geometry)
        self._head_offset = self.geometry.offset_of(HEAD_FRAME)
        self.journal_offset = self.geometry.offset_of(JOURNAL_FRAME)
        self.may_have_leaks = head.is_clean != 1
        self.has_compressed = head.has_compressed != 0
        """Whether an inode may have a compression; whoever looks for files to compress asks."""
        self._has_written = False
        self.allocator = Allocator(self.medium, self.geometry)
        self.allocator.set_log_frames(head.log_frames)
        self.table = InodeTable(self.medium, self.geometry, self.allocator)
        self.pinned = PinnedFrames()
        self.busy = BusyPages(self.allocator, memmap, self.tables, self.pinned)
        self.pinned.let_go = lambda held: self.busy.let_go(held, may_write=not self.read_only)
        self.clock = 0
        """Counts the calls of `FileSystem.tidy`; an inode's last use is told in these ticks."""
        self.times = FileClock()
        self.obeys_flags = True
        """Whether flags of inodes forbid anything: a repair must change what is immutable too."""
        self.untrimmed: set[int] = set()
        """Files that got frames since their last close, so some may lie behind their size."""
        self.has_lost_some = False
        """Whether a worker died that may have left frames without an owner, for the next mount to
        search."""
        self.reserves: Reserves | None = None
        """What workers may take by themselves, where they change names."""
        self._said_unserved: set[int] = set()
        """The IDs of transformations of which the log has a sentence."""
        self.table.pending_words = self.recover()

    def refuse(self, inode: Inode, flags: int) -> None:
        """Raise OSError (EPERM) if an inode has one of these `InodeFlags`, which forbid a change.

        The kernel can't refuse by itself, because FUSE tells it no flags.
        """
        if inode.state.flags & flags and self.obeys_flags:
            raise system_error(errno.EPERM)

    def refuse_unserved(self, inode: Inode) -> None:
        """Raise OSError (EOPNOTSUPP) if nothing here can serve what an inode is transformed with.

        Such an inode is only refused, because it is sound: a newer program has made it.
        """
        id_ = inode.unknown_id
        if not id_:
            return
        why = f"inode {inode.number} has a transformation ({id_}) that this program cannot serve"
        if id_ not in self._said_unserved:
            self._said_unserved.add(id_)
            log.warning("%s; it and all others like it are refused, and the rest is served", why)
        raise OSError(errno.EOPNOTSUPP, why)

    def begin_writing(self) -> None:
        """Raise OSError (EROFS) if nothing may be written; remember that something was.

        An operation that has begun to write must go on to its end, so nothing raises NotRead from
        here on.
        """
        may_read_in_steps.set(False)
        if self.read_only:
            raise system_error(errno.EROFS)
        if not self._has_written:
            self.store_clean(0)

    def found_damage(self, why: str) -> OSError:
        """The error for an operation that has met damage, after which nothing is written."""
        self.become_read_only(why)
        return OSError(errno.EIO, why)

    def become_read_only(self, why: str) -> None:
        """Something is damaged, or may be: change nothing any more."""
        if not self.damage:
            log.error("%s; nothing is written any more", why)
            self.damage = why
            self.when_damaged()
        self.read_only = True

    def stop_writing(self) -> None:
        """Change nothing any more until `resume_writing`, though nothing is damaged."""
        self.read_only = True

    def resume_writing(self) -> None:
        """The opposite of `stop_writing`, unless something is damaged."""
        self.read_only = bool(self.pool.medium.read_only or self.damage)

    def store_clean(self, is_clean: int) -> None:
        """Say in the head, durably, whether the search for leaks is needed (0) or not (1)."""
        at = self._head_offset + _CLEAN_AT
        # Who writes after it was clean says first that it is not.
        self._has_written = not is_clean
        self.medium.store(at, is_clean.to_bytes(8, "little"))
        self.medium.persist(at, 8)

    def note_log_frames(self, frame_count: int) -> None:
        """Keep room for a log that is longer than any before it, also after the next mount."""
        self.allocator.set_log_frames(frame_count)
        at = self._head_offset + _LOG_FRAMES_AT
        self.medium.store(at, frame_count.to_bytes(4, "little"))
        self.medium.flush(at, 4)

    def note_compression(self) -> None:
        """An inode is about to get a compression; stored with the next fence."""
        if not self.has_compressed:
            self.has_compressed = True
            self.medium.store(self._head_offset + _HAS_COMPRESSED_AT, b"\1\0\0\0")
            self.medium.flush(self._head_offset + _HAS_COMPRESSED_AT, 4)

    def grow(self) -> None:
        """The pool's zones have become larger."""
        self.geometry = self.table.geometry = geometry_of(self.pool)
        self.allocator.set_geometry(self.geometry)

    def recover(self) -> dict[int, int]:
        """Carry out what a crash, or the death of who was committing, interrupted, as the journal
        says.

        On a read-only mount: what would have been stored, for readers to see it so. Raises
        DamagedFileSystem.
        """
        words = unfinished_words(self.medium, self.table)
        if self.read_only or not words:
            return words
        # This may be cut off by a crash as well: the journal stays, and each word is redone only
        # while it has its old value.
        for offset, word in words.items():
            self.medium.store(offset, word.to_bytes(8, "little"))
            self.medium.flush(offset, 8)
        self.medium.fence()
        return {}
