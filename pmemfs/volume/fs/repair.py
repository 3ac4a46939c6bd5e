"""Repairs a file system that is not mounted, if the user asks for it.

A repair checks, carries out the remedies of the lowest stage that has any, and checks again, until
no remedy is left. So no remedy has to foresee what another one does. Invariants:
- each step says what it does and what is lost with it, before it does it;
- each step leaves after a power failure what the next repair finds again (see `mending`);
- frames are freed last, when everything in use has an owner. Freed earlier, they could be given to
  a file while the inode that owns them is still unreadable;
- what may be a user's data is neither freed nor changed, unless the user asks for that as well.
"""

from __future__ import annotations

from collections.abc import Callable

from pmemfs.errors import DamagedFileSystem
from pmemfs.memmap.none import NoMemmap
from pmemfs.pool import Pool
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.findings import Problem, Progress, Remedy, Stage, Verdict
from pmemfs.volume.fs.mending import Mending

_MOST_ROUNDS = 1000

Say = Callable[[Problem, str], object]
"""Called with each problem that was worked on, and with why that failed ("": it was done)."""


def repair_filesystem(
    pool: Pool, verdict: Verdict, say: Say = lambda *_: None, progress: Progress = lambda *_: None,
    *, force: bool = False,
) -> int:  # fmt: skip
    """Repair the file system on a writable pool, beginning with this verdict; how many steps.

    Without `force`, problems that need it are left alone and reported last.
    """
    done_count = 0
    for _ in range(_MOST_ROUNDS):
        stages = [remedy.stage for _, remedy in doable(verdict, force=force)]
        if not stages:
            break
        done = _carry_out(pool, verdict, min(stages), say, force)
        if not done and Stage.LEAKS in stages:
            # Most likely the pool is full. Freeing what has leaked makes room.
            done = _carry_out(pool, verdict, Stage.LEAKS, say, force)
        done_count += done
        if not done:
            break
        verdict = check_filesystem(pool, progress)
    say_left(verdict, say, force=force)
    if done_count and not verdict.has_errors and not verdict.leaked_frames:
        filesystem = FileSystem(pool, NoMemmap())
        filesystem.store.begin_writing()
        filesystem.store.ground.may_have_leaks = False
        filesystem.end()
    return done_count


def doable(verdict: Verdict, *, force: bool) -> list[tuple[Problem, Remedy]]:
    """What can be done about the problems of a verdict.

    Without `force` nothing is done to an inode that has any problem which needs `force`.
    """
    found = [(problem, problem.remedy) for problem in verdict.problems if problem.remedy]
    if force:
        return found
    left = {problem.inode for problem, remedy in found if remedy.needs_force} - {0}
    return [
        (problem, remedy)
        for problem, remedy in found
        if not remedy.needs_force and problem.inode not in left
    ]


def say_left(verdict: Verdict, say: Say, *, force: bool) -> None:
    """Report what is not repaired because the user did not ask for that."""
    for problem in () if force else verdict.problems:
        if problem.remedy and problem.remedy.needs_force:
            say(problem, f"only with --force: {problem.remedy.sentence}")


def _carry_out(pool: Pool, verdict: Verdict, stage: int, say: Say, force: bool) -> int:
    """Carry out one stage; how many steps went well."""
    mending = Mending(pool)
    done = 0
    for problem, remedy in doable(verdict, force=force):
        if remedy.stage != stage:
            continue
        try:
            remedy.carry_out(mending)
        except (OSError, DamagedFileSystem) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            say(problem, f"could not be done: {why}")
            if mending.is_stuck:
                # More is wrong than the check has seen, so check again before anything else.
                break
        else:
            done += 1
            say(problem, "")
    pool.medium.fence()
    return done
