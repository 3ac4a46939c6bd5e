"""Verifying a file system that nobody has mounted: all that is stored, against what it must be.

Three passes: over all inodes, over all directories, over the bitmaps; and others only where the
first have found something, to say whose it is and where it lies in the tree. Invariants:
- nothing is written, and whatever the pool holds becomes a finding and never an exception;
- what is kept in memory is two bits a frame, some bytes an inode, and one inode at a time;
- an unfinished journal is no error: everything is looked at as the next mount would leave it;
- what a crash can leave, frames and inodes of nobody, is a finding and no error.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from pmemfs.errors import DamagedFileSystem
from pmemfs.media.filesystem import (
    FIRST_INODES_FRAME,
    GROUP_CHUNKS,
    HEAD,
    HEAD_FRAME,
    LEAST_FRAMES,
    is_head_sound,
    validate_head,
)
from pmemfs.media.inode import ROOT, SIZE_LIMIT_BYTES, SLOT_BYTES, SLOTS_PER_FRAME
from pmemfs.media.log import InodeFlags
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.volume.fs.allocator import Allocator
from pmemfs.volume.fs.entries import Entry
from pmemfs.volume.fs.extents import MappedExtent, Run
from pmemfs.volume.fs.inode import DIRECTORY_TYPE, Inode
from pmemfs.volume.fs.leaks import FrameSet
from pmemfs.volume.fs.reading import (
    is_directory_still,
    read_log,
    stored_size,
    unfinished_words,
)
from pmemfs.volume.fs.store import geometry_of
from pmemfs.volume.fs.table import InodeTable
from pmemfs.volume.fs.transaction import log_runs

if TYPE_CHECKING:
    from pmemfs.volume.fs.repair import Repairs

MOST_PROBLEMS = 10_000
"""What is found beyond these is counted only."""
_FREE, _DAMAGED = 0, 255
_DEEPEST_PATH = 4096
_ALLOWED_LINKS = 0xFFFF_FFFF

Progress = Callable[[str, int, int], object]
"""Called now and then with what is looked at, how much of it was, and how much there is."""


class Stage(IntEnum):
    """The order of repairs. What belongs to one stage relies on those before being done."""

    HEAD = 0
    JOURNAL = 1
    BITMAPS = 2
    SHARED = 3
    ENTRIES = 4
    INODES = 5
    TREE = 6
    COUNTS = 7
    LEAKS = 8


@dataclass(slots=True)
class Remedy:
    """What `--repair` would do about a problem."""

    stage: Stage
    sentence: str
    """What it does, and what is lost by it."""
    carry_out: Callable[[Repairs], None]
    needs_force: bool = False
    """Whether it may lose what somebody wrote, or change it."""


@dataclass(slots=True)
class Problem:
    """One thing that was found."""

    what: str
    is_error: bool
    sentence: str
    inode: int = 0
    """The inode that it is about; 0: none."""
    remedy: Remedy | None = None
    path: bytes = b""
    """Where the inode is in the tree, if it is anywhere."""


@dataclass(slots=True)
class Verdict:
    """What a check has found."""

    problems: list[Problem]
    uncounted: int = 0
    """Errors and leaks that are not among the problems, since there were too many."""
    file_count: int = 0
    directory_count: int = 0
    other_count: int = 0
    used_frames: int = 0
    leaked_frames: int = 0

    @property
    def has_errors(self) -> bool:
        """Whether anything is wrong."""
        return any(problem.is_error for problem in self.problems)


class Census:
    """What is known of every inode, by the position of its slot among all slots."""

    def __init__(self) -> None:
        self.first: dict[int, int] = {}
        """The position of the first slot of each frame of inodes, by pfn."""
        self.types = bytearray()
        self.links = array("I")
        self.names = array("I")
        self.parents: dict[int, int] = {}
        """The directory above each directory, as that itself has it."""
        self.homes: dict[int, list[int]] = {}
        """The directories that have a name of each directory."""
        self.empty_directories: set[int] = set()
        """Of those that are removed, those without entries."""

    def add_frame(self, pfn: int) -> int:
        """Another frame of inodes; the position of its first slot."""
        self.first[pfn] = len(self.types)
        self.types.extend(bytes(SLOTS_PER_FRAME))
        self.links.extend([0] * SLOTS_PER_FRAME)
        self.names.extend([0] * SLOTS_PER_FRAME)
        return self.first[pfn]


def check_filesystem(pool: Pool, progress: Progress = lambda *_: None) -> Verdict:
    """Check the file system on a pool, which nobody has mounted."""
    return _Check(pool, progress).run()


class _Check:
    def __init__(self, pool: Pool, progress: Progress) -> None:
        self._pool = pool
        self._medium = pool.medium
        self._geometry = geometry_of(pool)
        self._progress = progress
        self._verdict = Verdict([])
        self._allocator = Allocator(self._medium, self._geometry)
        self._table = InodeTable(self._medium, self._geometry, self._allocator)
        self._census = Census()
        first_pfn = self._geometry.first_pfn
        self._metadata = FrameSet(first_pfn)
        self._data = FrameSet(first_pfn)
        self._shared = FrameSet(first_pfn)
        self._unmarked = FrameSet(first_pfn)
        self._ahead_frames = 0
        self._ahead_inodes: list[int] = []
        self._is_clean = False
        self._has_unreadable = False

    def run(self) -> Verdict:
        if self._geometry.frame_count < LEAST_FRAMES:
            self._error("file system", "the data zone is too small to hold one")
            return self._verdict
        if self._look_at_head():
            self._look_at_journal()
            self._look_at_inodes()
            self._look_at_directories()
            self._look_at_tree()
            self._look_at_counts()
            self._look_at_bitmaps()
            self._look_at_owners()
            self._find_paths()
        return self._verdict

    # Head and journal

    def _look_at_head(self) -> bool:
        """Whether there is anything more to look at."""
        raw = self._medium.read(self._geometry.offset_of(HEAD_FRAME), HEAD.size_bytes)
        try:
            self._is_clean = validate_head(raw, self._pool.label.uuid).is_clean == 1
        except DamagedFileSystem as damage:
            if is_head_sound(raw):
                # Somebody meant it: a newer program, or another pool's data.
                self._error("file system", str(damage))
                return False
            if not self._has_root():
                self._error("file system", f"{damage}; and there is no root directory either")
                return False
            self._error(
                "file system", str(damage),
                remedy=Remedy(Stage.HEAD, "the head is written anew", lambda r: r.write_head()),
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
                lambda r: r.empty_journal(),
            )
            self._error("journal", str(damage), remedy=forget)
            return
        if words:
            self._table.pending_words = words
            carry_out = Remedy(Stage.JOURNAL, "it is carried out", lambda r: r.finish_journal())
            why = (
                "an operation was interrupted; the next mount carries it out, and what is said "
                "here is said as if it had been"
            )
            self._add(Problem("journal", False, why, remedy=carry_out))

    # Inodes

    def _frames(self) -> list[int]:
        """Every frame of inodes."""
        first = self._geometry.first_pfn + FIRST_INODES_FRAME
        if not self._table.marked(0) >> FIRST_INODES_FRAME & 1:
            mark = Remedy(
                Stage.BITMAPS, "it is marked", lambda r: r.mark_inodes(first, is_marked=True)
            )
            self._error("inode bitmap", "the first frame of inodes is not marked", remedy=mark)
        return list(self._table.frames())

    def _numbers(self) -> Iterator[int]:
        """The numbers of all slots."""
        for pfn in self._census.first:
            yield from self._numbers_of(pfn)

    def _numbers_of(self, pfn: int) -> Iterator[int]:
        start = pfn << PAGE_SHIFT
        return map(self._table.number_at, range(start, start + FRAME_BYTES, SLOT_BYTES))

    def _look_at_inodes(self) -> None:
        frames = self._frames()
        for done, pfn in enumerate(frames):
            if done % 128 == 0:
                self._progress("inodes", done * SLOTS_PER_FRAME, len(frames) * SLOTS_PER_FRAME)
            self._shared.add(self._metadata.add([Run(pfn, 1)]))
            first = self._census.add_frame(pfn)
            for position, number in enumerate(self._numbers_of(pfn), first):
                self._look_at_inode(number, position)
        if self._census.types[0] == _FREE:
            self._damaged(ROOT, "there is no root directory")
        for chunk, mask in list(self._data.chunks()):
            self._shared.add_mask(chunk, mask & self._metadata.mask(chunk))

    def _look_at_inode(self, number: int, position: int) -> None:
        census = self._census
        try:
            inode = self._read(number)
        except DamagedFileSystem as damage:
            census.types[position] = _DAMAGED
            self._damaged(number, str(damage.facts["why"]).removeprefix(f"inode {number}: "))
            return
        if inode is None:
            return
        census.types[position] = inode.type
        census.links[position] = inode.state.link_count
        self._shared.add(self._metadata.add(log_runs(inode.log)))
        if inode.is_file:
            self._verdict.file_count += 1
            self._shared.add(self._data.add(inode.runs()))
            self._look_at_size(inode)
        elif inode.is_directory:
            self._verdict.directory_count += 1
            census.parents[number] = inode.parent
            if not inode.entries and not inode.state.link_count:
                census.empty_directories.add(number)
        else:
            self._verdict.other_count += 1

    def _read(self, number: int) -> Inode | None:
        return read_log(self._medium, self._table, number)

    def _damaged(self, number: int, why: str) -> None:
        if number == ROOT or is_directory_still(self._medium, self._table, number):
            remedy = Remedy(
                Stage.ENTRIES,
                "its log is written anew, with the names that can still be read; what loses its "
                "name by this goes to lost+found",
                lambda r: r.rebuild_directory(number, self._lacks_name),
            )
        else:
            self._has_unreadable = True
            remedy = Remedy(
                Stage.INODES, "it is removed, and what it had is lost",
                lambda r: r.free_damaged(number), needs_force=True,
            )  # fmt: skip
        self._error("inode", why, number, remedy)

    def _lacks_name(self, number: int, type_: int) -> bool:
        """Whether an inode of this type has fewer names, in what can be read, than it says."""
        position = self._position(number)
        if position is None or number == ROOT:
            return False
        census = self._census
        if census.types[position] == _DAMAGED:
            return True
        is_that = census.types[position] == type_
        return is_that and census.names[position] < max(census.links[position], 1)

    def _look_at_size(self, inode: Inode) -> None:
        """Frames behind a size that is known have a reason: fallocate, or a mount that died."""
        try:
            end = -(-stored_size(self._medium, inode) >> PAGE_SHIFT)
        except DamagedFileSystem as damage:
            why = str(damage.facts["why"]).removeprefix(f"inode {inode.number}: ")
            self._unsized(inode, why)
            return
        if inode.state.flags & InodeFlags.KEEPS_AHEAD or inode.extents.end <= end:
            return
        beyond = inode.extents.pieces(end, inode.extents.end - end)
        count = sum(piece.frame_count for piece in beyond if piece.pfn >= 0)
        if self._is_clean:
            self._unsized(inode, f"{_frames(count)} behind its size, and nothing says why")
            return
        self._ahead_frames += count
        self._ahead_inodes.append(inode.number)

    def _unsized(self, inode: Inode, why: str) -> None:
        """The size of a file is not known, or wrong: what is mapped may all be its content."""
        number, size_bytes = inode.number, _covering_size(inode)
        cover = Remedy(
            Stage.INODES,
            f"its size becomes {size_bytes} bytes, which loses nothing that it has; behind what "
            "was written may be bytes that were deleted elsewhere",
            lambda r: r.set_size(number, size_bytes), needs_force=True,
        )  # fmt: skip
        self._error("inode", why, number, cover)

    # Directories

    def _look_at_directories(self) -> None:
        numbers = sorted(self._census.parents)
        for done, number in enumerate(numbers):
            if done % 128 == 0:
                self._progress("directories", done, len(numbers))
            for name, entry in self._entries(number):
                self._look_at_entry(number, name, entry)

    def _entries(self, directory: int) -> list[tuple[bytes, Entry]]:
        """What is in a directory that was read before."""
        inode = self._read(directory)
        return list(inode.entries.items()) if inode else []

    def _position(self, number: int) -> int | None:
        """The position of an inode's slot; None where there is none of it."""
        first_pfn = self._geometry.first_pfn + FIRST_INODES_FRAME
        if number == ROOT:
            return self._census.first[first_pfn]
        first = self._census.first.get(number * SLOT_BYTES >> PAGE_SHIFT)
        if first is None:
            return None
        position = first + number % SLOTS_PER_FRAME
        return None if position == self._census.first[first_pfn] else position

    def _look_at_entry(self, directory: int, name: bytes, entry: Entry) -> None:
        number, census = entry.inode, self._census
        position = self._position(number)
        type_ = census.types[position] if position is not None else _FREE
        remove = Remedy(
            Stage.ENTRIES, f"the name {_shown(name)} is removed from it",
            lambda r: r.remove_entry(directory, name),
        )  # fmt: skip
        if position is None or type_ == _FREE:
            if not self._is_inode_in_unmarked_frame(directory, name, number):
                why = f"its entry {_shown(name)} leads to inode {number}, which there is not"
                self._error("directory", why, directory, remove)
            return
        if type_ == _DAMAGED:
            census.names[position] += 1
            why = f"its entry {_shown(name)} leads to inode {number}, which is damaged"
            # That is repaired or freed first: then this leads somewhere or to nothing.
            self._error("directory", why, directory)
            return
        if number == ROOT:
            why = f"its entry {_shown(name)} leads to the root"
            self._error("directory", why, directory, remove)
            return
        census.names[position] = min(census.names[position] + 1, _ALLOWED_LINKS)
        if type_ == DIRECTORY_TYPE:
            census.homes.setdefault(number, []).append(directory)
        if entry.type != type_:
            why = f"its entry {_shown(name)} says another type than inode {number} has"
            retype = Remedy(
                Stage.ENTRIES, "the entry gets the type of the inode",
                lambda r: r.retype_entry(directory, name, type_),
            )  # fmt: skip
            self._error("directory", why, directory, retype)

    def _is_inode_in_unmarked_frame(self, directory: int, name: bytes, number: int) -> bool:
        """Whether an entry leads to what looks like a frame of inodes that has lost its bit."""
        pfn = number * SLOT_BYTES >> PAGE_SHIFT
        if not self._geometry.is_usable(pfn, 1) or pfn in self._census.first:
            return False
        if self._data.meeting([Run(pfn, 1)]) or self._metadata.meeting([Run(pfn, 1)]):
            # Bytes of a user may look like anything.
            return False
        if not self._table.looks_like_inodes(pfn):
            return False
        why = (
            f"its entry {_shown(name)} leads to inode {number}, whose frame {pfn:#x} is not marked "
            "as one of inodes"
        )
        mark = Remedy(
            Stage.BITMAPS, "the frame is marked", lambda r: r.mark_inodes(pfn, is_marked=True)
        )
        self._error("directory", why, directory, mark)
        return True

    # The tree

    def _look_at_tree(self) -> None:
        _, circles = self._reached()
        for number, parent in sorted(self._census.parents.items()):
            homes = self._census.homes.get(number, [])
            if number == ROOT:
                self._look_at_root(parent)
            elif not homes:
                self._look_at_nameless_directory(number)
            elif number in circles:
                why = "it is in a circle of directories that the root does not lead to"
                self._unreachable(number, why, homes)
            else:
                self._look_at_home(number, parent, homes)

    def _reached(self) -> tuple[set[int], set[int]]:
        """The directories that the root leads to, and of each circle the one to break it at."""
        reached, lost, circles = {ROOT}, set[int](), set[int]()
        for number in self._census.parents:
            way: dict[int, None] = {}
            at: int | None = number
            while at is not None and at not in reached and at not in lost and at not in way:
                way[at] = None
                at = self._home(at)
            if at in way:
                circle = list(way)
                circles.add(min(circle[circle.index(at) :]))
            (reached if at in reached else lost).update(way)
        return reached, circles

    def _home(self, number: int) -> int | None:
        """The directory in which a directory counts as being."""
        homes = self._census.homes.get(number)
        if not homes:
            return None
        parent = self._census.parents.get(number)
        return parent if parent in homes else homes[0]

    def _look_at_root(self, parent: int) -> None:
        if parent != ROOT:
            self._error(
                "directory", f"the root says that it is in inode {parent}", ROOT,
                Remedy(Stage.TREE, "it is in itself again", lambda r: r.set_parent(ROOT, ROOT)),
            )  # fmt: skip

    def _look_at_nameless_directory(self, number: int) -> None:
        if number in self._census.empty_directories:
            self._unnamed(number)
        else:
            self._unreachable(number, "no name leads to this directory")

    def _look_at_home(self, number: int, parent: int, homes: list[int]) -> None:
        home = self._home(number)
        assert home is not None
        if len(homes) > 1:
            others = ", ".join(map(str, homes))
            keep = Remedy(
                Stage.TREE, f"the name in directory {home} is kept, the others are removed",
                lambda r: r.keep_one_name(number, home, sorted(set(homes))),
            )  # fmt: skip
            why = f"{len(homes)} names lead to this directory, in the directories {others}"
            self._error("directory", why, number, keep)
        elif parent != home:
            there = Remedy(Stage.TREE, f"it says {home} then", lambda r: r.set_parent(number, home))
            why = f"it is in directory {home}, and says that it is in {parent}"
            self._error("directory", why, number, there)

    def _unreachable(self, number: int, why: str, homes: list[int] | None = None) -> None:
        there = Remedy(
            Stage.TREE, f"it becomes lost+found/#{number}",
            lambda r: r.reconnect(number, sorted(set(homes or ()))),
        )  # fmt: skip
        self._error("inode", why, number, there)

    def _unnamed(self, number: int) -> None:
        free = Remedy(Stage.LEAKS, "it is freed", lambda r: r.free_unnamed(number))
        self._leak("inode", "removed while it was in use, and never freed", number, free)

    # Link counts

    def _look_at_counts(self) -> None:
        census = self._census
        for position, number in enumerate(self._numbers()):
            type_, names = census.types[position], census.names[position]
            if type_ in (_FREE, _DAMAGED):
                continue
            if type_ == DIRECTORY_TYPE:
                if names or number == ROOT:
                    self._look_at_count(number, 1, position)
            elif names:
                self._look_at_count(number, names, position)
            elif census.links[position]:
                self._unreachable(number, "no name leads to this inode")
            else:
                self._unnamed(number)

    def _look_at_count(self, number: int, right: int, position: int) -> None:
        said = self._census.links[position]
        if said == right:
            return
        set_it = Remedy(
            Stage.COUNTS, f"it says {right} then", lambda r: r.set_link_count(number, right)
        )
        names = "name leads" if right == 1 else "names lead"
        self._error("inode", f"{right} {names} to it, and it says {said}", number, set_it)

    # Frames

    def _look_at_bitmaps(self) -> None:
        leaked = FrameSet(self._geometry.first_pfn)
        leaked_frames = 0
        for group in range(self._geometry.group_count):
            if group % 16 == 0:
                self._progress("bitmaps", group, self._geometry.group_count)
            self._look_at_marks(group)
            free = self._allocator.group(group).masks
            self._allocator.forget(group)
            for chunk, managed in enumerate(self._allocator.managed(group)):
                number = group * GROUP_CHUNKS + chunk
                owned = self._metadata.mask(number) | self._data.mask(number)
                self._verdict.used_frames += owned.bit_count()
                self._unmarked.add_mask(number, owned & free[chunk])
                nobodys = managed & ~free[chunk] & ~owned
                leaked.add_mask(number, nobodys)
                leaked_frames += nobodys.bit_count()
        self._say_leaks(leaked, leaked_frames)

    def _look_at_marks(self, group: int) -> None:
        frames, kept = self._geometry.frames_of(group), self._geometry.kept_of(group)
        impossible = self._table.marked(group) & ~((1 << frames) - (1 << kept))
        if impossible:
            clear = Remedy(
                Stage.BITMAPS, "they are cleared", lambda r: r.clear_marks(group, impossible)
            )
            why = f"in group {group}, {impossible.bit_count()} bits are of no possible frame"
            self._error("inode bitmap", why, remedy=clear)

    def _say_leaks(self, leaked: FrameSet, leaked_frames: int) -> None:
        if leaked:
            self._verdict.leaked_frames = leaked_frames
            free = Remedy(
                Stage.LEAKS, "they are freed", lambda r: r.free_frames(leaked),
                needs_force=self._has_unreadable,
            )  # fmt: skip
            why = f"{_frames(leaked_frames)} used that nobody owns"
            if self._has_unreadable:
                why += " that can be read"
            self._leak("bitmap", why, remedy=free)
        if self._ahead_inodes:
            inodes = self._ahead_inodes
            trim = Remedy(Stage.LEAKS, "they are freed", lambda r: r.trim(inodes))
            why = (
                f"{_frames(self._ahead_frames)} behind the sizes of {len(inodes)} files, where "
                "more was expected to be written"
            )
            self._leak("files", why, remedy=trim)

    def _look_at_owners(self) -> None:
        """Whose the frames are of which something is wrong."""
        if self._unmarked:
            unmarked = self._unmarked
            mark = Remedy(Stage.BITMAPS, "they are marked as used", lambda r: r.mark_used(unmarked))
            count = sum(mask.bit_count() for _, mask in unmarked.chunks())
            why = f"{_frames(count)} free in it, and have an owner; these are named with this"
            self._error("bitmap", why, remedy=mark)
        if not self._unmarked and not self._shared:
            return
        seen = FrameSet(self._geometry.first_pfn)
        frames = [Run(pfn, 1) for pfn in self._census.first]
        self._say_unmarked(0, "a frame of inodes", frames)
        seen.add(self._shared.meeting(frames))
        files = []
        for position, number in enumerate(self._numbers()):
            if self._census.types[position] in (_FREE, _DAMAGED):
                continue
            inode = self._read(number)
            assert inode is not None, "it was read before"
            self._say_unmarked(number, "its log", log_runs(inode.log))
            self._look_at_shared_log(inode, seen)
            if len(inode.extents):
                self._say_unmarked(number, "its content", inode.runs())
                if self._shared.meeting(inode.runs()):
                    files.append(number)
        for number in files:
            inode = self._read(number)
            assert inode is not None, "it was read before"
            self._look_at_shared_content(inode, seen)

    def _say_unmarked(self, number: int, what: str, runs: list[Run]) -> None:
        found = self._unmarked.meeting(runs)
        if found:
            where = _run_list(found)
            self._error(
                "inode" if number else "bitmap", f"{what} is in free frames {where}", number
            )

    def _look_at_shared_log(self, inode: Inode, seen: FrameSet) -> None:
        met = seen.add(self._shared.meeting(log_runs(inode.log)))
        if not met:
            return
        number = inode.number
        shared = {run.pfn + at << PAGE_SHIFT for run in met for at in range(run.frame_count)}
        move = Remedy(
            Stage.SHARED, "its log is written anew elsewhere",
            lambda r: r.move_log(number, shared),
        )  # fmt: skip
        why = f"its log is in frames that others own: {_run_list(met)}"
        self._error("inode", why, number, move)

    def _look_at_shared_content(self, inode: Inode, seen: FrameSet) -> None:
        number = inode.number
        lost: list[MappedExtent] = []
        for index, pfn, count in inode.extents:
            for run in self._shared.meeting([Run(pfn, count)]):
                for met in seen.add([run]):
                    lost.append(MappedExtent(index + met.pfn - pfn, met.pfn, met.frame_count))
        if lost:
            copy = Remedy(
                Stage.SHARED, "they are copied, so that both keep what they read",
                lambda r: r.copy_frames(number, lost),
            )  # fmt: skip
            runs = [Run(extent.pfn, extent.frame_count) for extent in lost]
            why = f"its content is in frames that others own: {_run_list(runs)}"
            self._error("inode", why, number, copy)

    # Findings

    def _error(
        self, what: str, sentence: str, inode: int = 0, remedy: Remedy | None = None
    ) -> None:
        self._add(Problem(what, True, sentence, inode, remedy))

    def _leak(self, what: str, sentence: str, inode: int = 0, remedy: Remedy | None = None) -> None:
        self._add(Problem(what, False, f"leak: {sentence}", inode, remedy))

    def _add(self, problem: Problem) -> None:
        problems = self._verdict.problems
        if len(problems) < MOST_PROBLEMS:
            problems.append(problem)
        else:
            self._verdict.uncounted += 1
            if problem.is_error and not self._verdict.has_errors:
                problems[-1] = problem

    def _find_paths(self) -> None:
        """Say where the inodes are that something is wrong with."""
        wanted = {problem.inode for problem in self._verdict.problems if problem.inode}
        paths = {ROOT: b"/"} if ROOT in wanted else {}
        if wanted - paths.keys():
            found = self._names_of(wanted)
            above: set[int] = set()
            for directory, _ in found.values():
                above |= self._above(directory)
            found |= self._names_of(above)
            for number in wanted & found.keys():
                paths[number] = self._path(number, found)
        for problem in self._verdict.problems:
            problem.path = paths.get(problem.inode, b"")

    def _names_of(self, wanted: set[int]) -> dict[int, tuple[int, bytes]]:
        """A name for each of these inodes that has one, and the directory it is in."""
        found: dict[int, tuple[int, bytes]] = {}
        for directory in self._census.parents if wanted else ():
            for name, entry in self._entries(directory):
                if entry.inode in wanted and (
                    entry.inode not in found or self._home(entry.inode) == directory
                ):
                    found[entry.inode] = (directory, name)
        return found

    def _above(self, number: int | None) -> set[int]:
        """A directory and those it is in."""
        above: set[int] = set()
        while number is not None and number not in above:
            above.add(number)
            number = self._home(number)
        return above

    def _path(self, number: int, names: dict[int, tuple[int, bytes]]) -> bytes:
        parts: list[bytes] = []
        while number != ROOT:
            if number not in names or len(parts) > _DEEPEST_PATH:
                parts.append(b"...")
                break
            number, name = names[number]
            parts.append(name)
        return b"/" + b"/".join(reversed(parts))


def _covering_size(inode: Inode) -> int:
    """A size that covers all that a file has."""
    size_bytes = max(inode.state.size_bytes, inode.extents.end << PAGE_SHIFT)
    return min(size_bytes, SIZE_LIMIT_BYTES - 1)


def _shown(name: bytes) -> str:
    return repr(name)[1:]


def _frames(count: int) -> str:
    return "1 frame is" if count == 1 else f"{count} frames are"


def _run_list(runs: list[Run]) -> str:
    """Some runs, as pfns."""
    some = [
        f"{run.pfn:#x}" + (f"-{run.pfn + run.frame_count - 1:#x}" if run.frame_count > 1 else "")
        for run in runs[:4]
    ]
    return ", ".join(some) + (f" and {len(runs) - 4} more runs" if len(runs) > 4 else "")
