"""What a check has found, and what a repair would do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from pmemfs.volume.fs.mending import Mending

MOST_PROBLEMS = 10_000
"""Problems beyond this number are only counted."""

Progress = Callable[[str, int, int], object]
"""Called now and then with what is being checked, how much of it is done, and how much there is."""


class Stage(IntEnum):
    """The order of repairs: a stage relies on all stages before it being done."""

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
    """What it does, and what is lost with it."""
    carry_out: Callable[[Mending], None]
    needs_force: bool = False
    """Whether it may change or lose what a user wrote."""


@dataclass(slots=True)
class Problem:
    """One thing that was found."""

    what: str
    is_error: bool
    sentence: str
    inode: int = 0
    """The inode with the problem; 0 if it is not about one inode."""
    remedy: Remedy | None = None
    path: bytes = b""
    """Where the inode lies in the tree, if a name leads to it."""


@dataclass(slots=True)
class Verdict:
    """What a check has found."""

    problems: list[Problem] = field(default_factory=list)
    uncounted: int = 0
    """Errors and leaks that `problems` had no room for."""
    file_count: int = 0
    directory_count: int = 0
    other_count: int = 0
    used_frames: int = 0
    leaked_frames: int = 0
    key_count: int = 0
    way_count: int = 0
    """Ways to unlock a key, damaged ones too."""
    damaged_way_count: int = 0

    @property
    def has_errors(self) -> bool:
        """Whether anything is wrong."""
        return any(problem.is_error for problem in self.problems)

    def error(self, what: str, sentence: str, inode: int = 0, remedy: Remedy | None = None) -> None:
        """Report that something is wrong."""
        self.add(Problem(what, True, sentence, inode, remedy))

    def leak(self, what: str, sentence: str, inode: int = 0, remedy: Remedy | None = None) -> None:
        """Report that something is used but not owned."""
        self.add(Problem(what, False, f"leak: {sentence}", inode, remedy))

    def add(self, problem: Problem) -> None:
        """Add a problem. Once the list is full, the first error still replaces a leak."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)
        else:
            self.uncounted += 1
            if problem.is_error and not self.has_errors:
                self.problems[-1] = problem


def shown(name: bytes) -> str:
    """A name, for a sentence."""
    return repr(name)[1:]


def frames_are(count: int) -> str:
    """The subject of a sentence about frames."""
    return "1 frame is" if count == 1 else f"{count} frames are"
