"""Checks a file system that is not mounted: all that is stored, against what it must be.

There are three passes: over all inodes, over all directories, over the bitmaps. Further passes run
only if these have found something, to say who owns what and where it lies in the tree. Invariants:
- nothing is written, and whatever the pool holds becomes a finding and never an exception;
- memory holds two bits a frame, some bytes an inode, and one inode at a time, so that a pool of
  terabytes can be checked;
- an unfinished journal is not an error: everything is checked as the next mount would leave it;
- what a crash may leave, frames and inodes that nobody owns, is a finding but not an error.
"""

from __future__ import annotations

from pmemfs.errors import DamagedFileSystem
from pmemfs.media.filesystem import (
    FIRST_INODES_FRAME,
    HEAD,
    HEAD_FRAME,
    LEAST_FRAMES,
    is_head_sound,
    validate_head,
)
from pmemfs.media.inode import ROOT, SIZE_LIMIT_BYTES, SLOTS_PER_FRAME
from pmemfs.media.log import InodeFlags
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.census import DAMAGED, FREE, Census
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.findings import Problem, Progress, Remedy, Stage, Verdict, frames_are
from pmemfs.volume.fs.framecheck import FrameCheck, Owners
from pmemfs.volume.fs.ground import geometry_of
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.reading import is_directory_still, stored_size, unfinished_words
from pmemfs.volume.fs.table import InodeTable
from pmemfs.volume.fs.transaction import log_runs
from pmemfs.volume.fs.transformcheck import TransformCheck
from pmemfs.volume.fs.treecheck import TreeCheck


def check_filesystem(pool: Pool, progress: Progress = lambda *_: None) -> Verdict:
    """Check the file system of a pool that is not mounted."""
    return _Check(pool, progress).run()


class _Check:
    def __init__(self, pool: Pool, progress: Progress) -> None:
        self._pool = pool
        self._medium = pool.medium
        self._geometry = geometry_of(pool)
        self._progress = progress
        self._verdict = verdict = Verdict()
        self._allocator = Allocator(self._medium, self._geometry)
        self._table = table = InodeTable(self._medium, self._geometry, self._allocator)
        self._census = census = Census(self._medium, table)
        self._owners = owners = Owners(self._geometry.first_pfn)
        self._tree_check = TreeCheck(table, census, owners, verdict, progress)
        self._frame_check = FrameCheck(self._allocator, table, census, owners, verdict, progress)
        self._transform_check = TransformCheck(self._medium, verdict)
        self._ahead_frames = 0
        self._ahead_inodes: list[int] = []
        self._is_clean = False
        self._has_unreadable = False

    def run(self) -> Verdict:
        if self._geometry.frame_count < LEAST_FRAMES:
            self._verdict.error("file system", "the data zone is too small to hold one")
            return self._verdict
        if self._look_at_head():
            self._look_at_journal()
            self._look_at_inodes()
            self._transform_check.say_lost_keys()
            self._tree_check.look_at_directories()
            self._tree_check.look_at_tree()
            self._tree_check.look_at_counts()
            self._frame_check.look_at_bitmaps(has_unreadable=self._has_unreadable)
            self._say_ahead()
            self._frame_check.look_at_owners()
            self._tree_check.find_paths()
        return self._verdict

    # Head and journal

    def _look_at_head(self) -> bool:
        """Whether there is more to look at."""
        raw = self._medium.read(self._geometry.offset_of(HEAD_FRAME), HEAD.size_bytes)
        try:
            self._is_clean = validate_head(raw, self._pool.label.uuid).is_clean == 1
        except DamagedFileSystem as damage:
            if is_head_sound(raw):
                # A sound head was written on purpose: by a newer program, or for another pool.
                self._verdict.error("file system", str(damage))
                return False
            if not self._has_root():
                self._verdict.error(
                    "file system", f"{damage}; and there is no root directory either"
                )
                return False
            self._verdict.error(
                "file system", str(damage),
                remedy=Remedy(Stage.HEAD, "the head is written anew", lambda m: m.write_head()),
            )  # fmt: skip
        return True

    def _has_root(self) -> bool:
        try:
            return self._table.head(ROOT) is not None
        except DamagedFileSystem:
            return False

    def _look_at_journal(self) -> None:
        try:
            words = unfinished_words(self._medium, self._table)
        except DamagedFileSystem as damage:
            forget = Remedy(
                Stage.HEAD,
                "the journal is emptied: an operation that a crash has interrupted may be lost",
                lambda m: m.empty_journal(),
            )
            self._verdict.error("journal", str(damage), remedy=forget)
            return
        if words:
            self._table.pending_words = words
            carry_out = Remedy(Stage.JOURNAL, "it is carried out", lambda m: m.finish_journal())
            why = (
                "an operation was interrupted; the next mount carries it out, and this check says "
                "what would be there then"
            )
            self._verdict.add(Problem("journal", False, why, remedy=carry_out))

    # Inodes

    def _inode_frames(self) -> list[int]:
        """Every frame that holds inodes."""
        first = self._geometry.first_pfn + FIRST_INODES_FRAME
        if not self._table.marked(0) >> FIRST_INODES_FRAME & 1:
            mark = Remedy(
                Stage.BITMAPS, "it is marked", lambda m: m.mark_inodes(first, is_marked=True)
            )
            self._verdict.error(
                "inode bitmap", "the first frame of inodes is not marked", remedy=mark
            )
        return list(self._table.frames())

    def _look_at_inodes(self) -> None:
        frames = self._inode_frames()
        for done, pfn in enumerate(frames):
            if done % 128 == 0:
                self._progress("inodes", done * SLOTS_PER_FRAME, len(frames) * SLOTS_PER_FRAME)
            self._owners.add_metadata([Run(pfn, 1)])
            first = self._census.add_frame(pfn)
            for position, number in enumerate(self._census.numbers_of(pfn), first):
                self._look_at_inode(number, position)
        if self._census.types[0] == FREE:
            self._damaged(ROOT, "there is no root directory")
        self._owners.compare()

    def _look_at_inode(self, number: int, position: int) -> None:
        census = self._census
        try:
            inode = census.read(number)
        except DamagedFileSystem as damage:
            census.types[position] = DAMAGED
            self._damaged(number, str(damage.facts["why"]).removeprefix(f"inode {number}: "))
            return
        if inode is None:
            return
        census.types[position] = inode.type
        census.links[position] = inode.state.link_count
        self._owners.add_metadata(log_runs(inode.log))
        self._transform_check.look_at(inode)
        if inode.is_file:
            self._verdict.file_count += 1
            self._owners.add_data(inode.runs())
            self._look_at_size(inode)
        elif inode.is_directory:
            self._verdict.directory_count += 1
            census.parents[number] = inode.parent
            if not inode.entries and not inode.state.link_count:
                census.empty_directories.add(number)
        else:
            self._verdict.other_count += 1

    def _damaged(self, number: int, why: str) -> None:
        if number == ROOT or is_directory_still(self._medium, self._table, number):
            remedy = Remedy(
                Stage.ENTRIES,
                "its log is written anew, with the names that can still be read; what loses its "
                "name by this goes to lost+found",
                lambda m: m.rebuild_directory(number, self._census.lacks_name),
            )
        else:
            self._has_unreadable = True
            remedy = Remedy(
                Stage.INODES, "it is removed, and what it had is lost",
                lambda m: m.free_damaged(number), needs_force=True,
            )  # fmt: skip
        self._verdict.error("inode", why, number, remedy)

    def _look_at_size(self, inode: Inode) -> None:
        """Report frames behind the size. They need a reason: fallocate, or a mount that died."""
        try:
            end = -(-stored_size(self._medium, inode) >> PAGE_SHIFT)
        except DamagedFileSystem as damage:
            why = str(damage.facts["why"]).removeprefix(f"inode {inode.number}: ")
            self._unsized(inode, why)
            return
        # A program that this one does not know may have its reasons for what lies there.
        is_kept = inode.state.flags & InodeFlags.KEEPS_AHEAD or inode.unknown_id
        count = 0 if is_kept or inode.end <= end else _frames_behind(inode, end)
        if not count:
            return
        if self._is_clean:
            self._unsized(inode, f"{frames_are(count)} behind its size without a reason")
            return
        self._ahead_frames += count
        self._ahead_inodes.append(inode.number)

    def _unsized(self, inode: Inode, why: str) -> None:
        """Report a file whose size is unknown or wrong: all that is mapped may be its content."""
        number, size_bytes = inode.number, _covering_size(inode)
        cover = Remedy(
            Stage.INODES,
            f"its size becomes {size_bytes} bytes, so that none of its bytes is lost; behind what "
            "was written, bytes that were deleted elsewhere may show up",
            lambda m: m.set_size(number, size_bytes), needs_force=True,
        )  # fmt: skip
        self._verdict.error("inode", why, number, cover)

    def _say_ahead(self) -> None:
        if self._ahead_inodes:
            inodes = self._ahead_inodes
            trim = Remedy(Stage.LEAKS, "they are freed", lambda m: m.trim(inodes))
            why = (
                f"{frames_are(self._ahead_frames)} behind the sizes of {len(inodes)} files, where "
                "more was expected to be written"
            )
            self._verdict.leak("files", why, remedy=trim)


def _frames_behind(inode: Inode, end: int) -> int:
    """How many frames a file has behind a frame of it. A piece that begins before it stays whole,
    so that has none."""
    extents = inode.extents.pieces(end, max(0, inode.extents.end - end))
    count = sum(extent.frame_count for extent in extents if extent.pfn >= 0)
    pieces = inode.pieces_in(end, inode.end - end)
    return count + sum(piece.stored_frames for at, piece in pieces if at >= end)


def _covering_size(inode: Inode) -> int:
    """A size that covers all frames of a file."""
    size_bytes = max(inode.state.size_bytes, inode.end << PAGE_SHIFT)
    return min(size_bytes, SIZE_LIMIT_BYTES - 1)
