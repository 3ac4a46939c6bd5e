"""Checks names: that each leads to an inode, that directories form a tree, that counts are right.

Invariant: each problem gets at most one remedy, at the place that decides what is kept. Two
remedies for one problem could remove both of two names.
"""

from __future__ import annotations

from pmemfs.media.inode import ROOT, SLOT_BYTES
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.fs.census import DAMAGED, FREE, Census
from pmemfs.volume.fs.entries import Entry
from pmemfs.volume.fs.findings import Progress, Remedy, Stage, Verdict, shown
from pmemfs.volume.fs.framecheck import Owners
from pmemfs.volume.fs.inode import DIRECTORY_TYPE
from pmemfs.volume.fs.table import InodeTable

_DEEPEST_PATH = 4096
_ALLOWED_LINKS = 0xFFFF_FFFF


class TreeCheck:
    """The look at all names, once all inodes were looked at."""

    def __init__(
        self, table: InodeTable, census: Census, owners: Owners, verdict: Verdict,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._table = table
        self._census = census
        self._owners = owners
        self._verdict = verdict
        self._progress = progress

    def look_at_directories(self) -> None:
        """Look where each entry of each directory leads."""
        numbers = sorted(self._census.parents)
        for done, number in enumerate(numbers):
            if done % 128 == 0:
                self._progress("directories", done, len(numbers))
            for name, entry in self._census.entries(number):
                self._look_at_entry(number, name, entry)

    def _look_at_entry(self, directory: int, name: bytes, entry: Entry) -> None:
        number, census = entry.inode, self._census
        position = self._census.position(number)
        type_ = census.types[position] if position is not None else FREE
        remove = Remedy(
            Stage.ENTRIES, f"the name {shown(name)} is removed from it",
            lambda m: m.remove_entry(directory, name),
        )  # fmt: skip
        if position is None or type_ == FREE:
            if not self._is_inode_in_unmarked_frame(directory, name, number):
                why = f"its entry {shown(name)} leads to inode {number}, which does not exist"
                self._verdict.error("directory", why, directory, remove)
            return
        if type_ == DAMAGED:
            census.names[position] += 1
            why = f"its entry {shown(name)} leads to inode {number}, which is damaged"
            # No remedy: once that inode is repaired or freed, this entry leads somewhere or to
            # nothing, and the next check says so.
            self._verdict.error("directory", why, directory)
            return
        if number == ROOT:
            why = f"its entry {shown(name)} leads to the root"
            self._verdict.error("directory", why, directory, remove)
            return
        census.names[position] = min(census.names[position] + 1, _ALLOWED_LINKS)
        if type_ == DIRECTORY_TYPE:
            census.homes.setdefault(number, []).append(directory)
        if entry.type != type_:
            why = f"its entry {shown(name)} gives inode {number} a type that it does not have"
            retype = Remedy(
                Stage.ENTRIES, "the entry gets the type of the inode",
                lambda m: m.retype_entry(directory, name, type_),
            )  # fmt: skip
            self._verdict.error("directory", why, directory, retype)

    def _is_inode_in_unmarked_frame(self, directory: int, name: bytes, number: int) -> bool:
        """Whether an entry leads into a frame that looks as if it held inodes but has no bit."""
        pfn = number * SLOT_BYTES >> PAGE_SHIFT
        if not self._table.geometry.is_usable(pfn, 1) or pfn in self._census.first:
            return False
        if self._owners.has_any(pfn):
            # A user's bytes may look like anything.
            return False
        if not self._table.looks_like_inodes(pfn):
            return False
        why = (
            f"its entry {shown(name)} leads to inode {number}, whose frame {pfn:#x} is not marked "
            "as holding inodes"
        )
        mark = Remedy(
            Stage.BITMAPS, "the frame is marked", lambda m: m.mark_inodes(pfn, is_marked=True)
        )
        self._verdict.error("directory", why, directory, mark)
        return True

    # The tree

    def look_at_tree(self) -> None:
        """Look whether the root leads to each directory, and on one way only."""
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
        """The directories that the root leads to, and for each circle the one to break it at."""
        reached, lost, circles = {ROOT}, set[int](), set[int]()
        for number in self._census.parents:
            way: dict[int, None] = {}
            at: int | None = number
            while at is not None and at not in reached and at not in lost and at not in way:
                way[at] = None
                at = self._census.home(at)
            if at in way:
                circle = list(way)
                circles.add(min(circle[circle.index(at) :]))
            (reached if at in reached else lost).update(way)
        return reached, circles

    def _look_at_root(self, parent: int) -> None:
        if parent != ROOT:
            self._verdict.error(
                "directory", f"the root says that it is in inode {parent}", ROOT,
                Remedy(Stage.TREE, "it is in itself again", lambda m: m.set_parent(ROOT, ROOT)),
            )  # fmt: skip

    def _look_at_nameless_directory(self, number: int) -> None:
        if number in self._census.empty_directories:
            self._unnamed(number)
        else:
            self._unreachable(number, "no name leads to this directory")

    def _look_at_home(self, number: int, parent: int, homes: list[int]) -> None:
        home = self._census.home(number)
        assert home is not None
        if len(homes) > 1:
            others = ", ".join(map(str, homes))
            keep = Remedy(
                Stage.TREE, f"the name in directory {home} is kept, the others are removed",
                lambda m: m.keep_one_name(number, home, sorted(set(homes))),
            )  # fmt: skip
            why = f"{len(homes)} names lead to this directory, in the directories {others}"
            self._verdict.error("directory", why, number, keep)
        elif parent != home:
            there = Remedy(Stage.TREE, f"it says {home} then", lambda m: m.set_parent(number, home))
            why = f"it is in directory {home}, and says that it is in {parent}"
            self._verdict.error("directory", why, number, there)

    def _unreachable(self, number: int, why: str, homes: list[int] | None = None) -> None:
        there = Remedy(
            Stage.TREE, f"it becomes lost+found/#{number}",
            lambda m: m.reconnect(number, sorted(set(homes or ()))),
        )  # fmt: skip
        self._verdict.error("inode", why, number, there)

    def _unnamed(self, number: int) -> None:
        free = Remedy(Stage.LEAKS, "it is freed", lambda m: m.free_unnamed(number))
        self._verdict.leak("inode", "removed while it was in use, and never freed", number, free)

    # Link counts

    def look_at_counts(self) -> None:
        """Look whether each inode counts as many names as it has."""
        census = self._census
        for position, number in enumerate(self._census.numbers()):
            type_, names = census.types[position], census.names[position]
            if type_ in (FREE, DAMAGED):
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
            Stage.COUNTS, f"it says {right} then", lambda m: m.set_link_count(number, right)
        )
        names = "name leads" if right == 1 else "names lead"
        self._verdict.error("inode", f"{right} {names} to it, and it says {said}", number, set_it)

    # Paths

    def find_paths(self) -> None:
        """Find out where the inodes lie in the tree that something is wrong with."""
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
        """For each of these inodes that has a name: a name, and the directory that has it."""
        found: dict[int, tuple[int, bytes]] = {}
        for directory in self._census.parents if wanted else ():
            for name, entry in self._census.entries(directory):
                if entry.inode in wanted and (
                    entry.inode not in found or self._census.home(entry.inode) == directory
                ):
                    found[entry.inode] = (directory, name)
        return found

    def _above(self, number: int | None) -> set[int]:
        """A directory and all those above it."""
        above: set[int] = set()
        while number is not None and number not in above:
            above.add(number)
            number = self._census.home(number)
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
