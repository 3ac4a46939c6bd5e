"""Checks a pool that isn't mounted: everything that is stored, against what it must be.

In every mode that is the label, its copy, and the zones that they describe; page structures are not
persistent. Mode `fs` adds the file system, mode `cache` the head and the tags. Only `repair_pool`
writes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from pmemfs.errors import InvalidPool
from pmemfs.media.label import Mode
from pmemfs.medium.base import Medium
from pmemfs.pool import Pool
from pmemfs.pool.label_check import (
    Finding,
    agreement,
    has_errors,
    label_finding,
    state_finding,
    zone_findings,
)
from pmemfs.pool.labels import read_labels
from pmemfs.text import counted
from pmemfs.volume.fs.check import check_filesystem
from pmemfs.volume.fs.findings import Problem, Progress, Verdict
from pmemfs.volume.fs.repair import doable, repair_filesystem, say_left

_LABEL_REMEDY = "both copies are written anew"


def check_pool(medium: Medium, progress: Progress = lambda *_: None) -> list[Finding]:
    """The findings, in the order of the checks. Raises NotAPool."""
    findings = [label_finding(reading) for reading in read_labels(medium)]
    try:
        pool = Pool.open(medium)
    except InvalidPool as error:
        return [*findings, Finding("pool", True, str(error))]
    labels = [*findings, agreement(pool)]
    findings = [replace(f, remedy=_LABEL_REMEDY) if f.is_error else f for f in labels]
    findings += [*zone_findings(pool), state_finding(pool)]
    if pool.label.mode == Mode.FS:
        findings += _filesystem_findings(check_filesystem(pool, progress))
    if pool.label.mode == Mode.CACHE:
        findings += _cache_findings(pool, progress)
    return findings


def repair_pool(
    medium: Medium, say: Callable[[Finding], object], progress: Progress = lambda *_: None,
    *, force: bool = False,
) -> int:  # fmt: skip
    """Repair what can be repaired; how many repairs were made.

    `say` is called with each repair. It is also called, with an error, for each repair that failed
    or that may change or lose a user's data and was not asked for by `force`. Raises NotAPool,
    InvalidPool, and OSError if the medium can't be written.
    """
    pool = Pool.open(medium)
    labels = [*map(label_finding, pool.readings), agreement(pool)]
    content = _content_of(pool, say, progress, force=force)
    if not has_errors(labels) and not content.has_work:
        content.say_left()
        return 0
    done = 0
    # A writable mount writes both copies of the label anew. This does the same.
    pool.begin_mount()
    if has_errors(labels):
        why = "; ".join(label.sentence for label in labels if label.is_error)
        say(Finding("label", False, f"{why}: {_LABEL_REMEDY}"))
        done += 1
    done += content.repair()
    pool.end_mount()
    return done


class _Content(NamedTuple):
    """What there is to repair in the data of a pool, in its mode."""

    has_work: bool = False
    say_left: Callable[[], object] = lambda: None
    repair: Callable[[], int] = lambda: 0


def _content_of(
    pool: Pool, say: Callable[[Finding], object], progress: Progress, *, force: bool
) -> _Content:
    if pool.label.mode == Mode.FS:
        verdict = check_filesystem(pool, progress)

        def say_problem(problem: Problem, failure: str) -> None:
            remedy = problem.remedy.sentence if problem.remedy else ""
            found = _problem_finding(problem)
            sentence = f"{found.sentence}: {failure or remedy}"
            say(Finding(found.what, bool(failure), sentence, found.inode, found.path))

        return _Content(
            bool(doable(verdict, force=force)),
            lambda: say_left(verdict, say_problem, force=force),
            lambda: repair_filesystem(pool, verdict, say_problem, progress, force=force),
        )
    if pool.label.mode == Mode.CACHE:
        return _cache_content(pool, say, progress, force=force)
    return _Content()


def _cache_content(
    pool: Pool, say: Callable[[Finding], object], progress: Progress, *, force: bool
) -> _Content:
    # Imported here, because it loads numpy, which the other modes don't need.
    from pmemfs.volume.cache.tagcheck import (
        CacheProblem,
        check_cache,
        repair_cache,
        say_left_of_cache,
    )

    verdict = check_cache(pool, progress)

    def say_problem(problem: CacheProblem, failure: str) -> None:
        remedy = problem.remedy.sentence if problem.remedy else ""
        say(Finding(problem.what, bool(failure), f"{problem.sentence}: {failure or remedy}"))

    return _Content(
        bool(verdict.doable(force=force)),
        lambda: say_left_of_cache(verdict, say_problem, force=force),
        lambda: repair_cache(pool, verdict, say_problem, progress, force=force),
    )


def _cache_findings(pool: Pool, progress: Progress) -> list[Finding]:
    from pmemfs.volume.cache.tagcheck import check_cache

    verdict = check_cache(pool, progress)
    findings = []
    for problem in verdict.problems:
        remedy = problem.remedy.sentence if problem.remedy else None
        if problem.remedy and problem.remedy.needs_force:
            remedy = f"only with --force: {remedy}"
        findings.append(Finding(problem.what, problem.is_error, problem.sentence, remedy=remedy))
    if verdict.uncounted:
        why = f"{verdict.uncounted} more things were found than are listed"
        findings.append(Finding("cache", verdict.has_errors, why))
    if verdict.summary:
        findings.append(Finding("cache", False, verdict.summary))
    return findings


def _filesystem_findings(verdict: Verdict) -> list[Finding]:
    findings = [_problem_finding(problem) for problem in verdict.problems]
    if verdict.uncounted:
        why = f"{verdict.uncounted} more things were found than are listed"
        findings.append(Finding("file system", verdict.has_errors, why))
    summary = (
        f"{verdict.file_count} files, {verdict.directory_count} directories, "
        f"{verdict.other_count} others; {verdict.used_frames} frames in use, "
        f"{verdict.leaked_frames} leaked"
    )
    return [*findings, *_key_findings(verdict), Finding("file system", False, summary)]


def _key_findings(verdict: Verdict) -> list[Finding]:
    """Whether the master keys themselves are sound, only who unlocks them can tell."""
    if not verdict.way_count:
        return []
    keys = counted(verdict.key_count, "key", "keys")
    ways = counted(verdict.way_count, "way", "ways")
    return [
        Finding("keys", False, f"{keys}, {ways} to unlock, {verdict.damaged_way_count} damaged")
    ]


def _problem_finding(problem: Problem) -> Finding:
    path = problem.path.decode("utf-8", "backslashreplace") if problem.path else None
    what = f"{problem.what} {problem.inode}" if problem.inode else problem.what
    remedy = problem.remedy.sentence if problem.remedy else None
    if problem.remedy and problem.remedy.needs_force:
        remedy = f"only with --force: {remedy}"
    return Finding(
        what,
        problem.is_error,
        problem.sentence,
        problem.inode or None,
        path,
        remedy,
    )
