"""What a check finds, and what a repair would do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from pmemfs.volume.fs.mending import Mending

MOST_PROBLEMS = 10_000
"""What is found beyond these is counted only."""

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
    carry_out: Callable[[Mending], None]
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

    problems: list[Problem] = field(default_factory=list)
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

    def error(self, what: str, sentence: str, inode: int = 0, remedy: Remedy | None = None) -> None:
        """Something is wrong."""
        self.add(Problem(what, True, sentence, inode, remedy))

    def leak(self, what: str, sentence: str, inode: int = 0, remedy: Remedy | None = None) -> None:
        """Something is used by nobody."""
        self.add(Problem(what, False, f"leak: {sentence}", inode, remedy))

    def add(self, problem: Problem) -> None:
        """A problem more; beyond the bound an error still takes the place of what is none."""
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
