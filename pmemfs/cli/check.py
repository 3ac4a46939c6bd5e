"""`pmemfs check`: verify a pool that is not mounted; repair it if asked. Answers like fsck(8)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field

import click

from pmemfs.cli.options import reporting
from pmemfs.cli.output import complain, print_facts, print_json, progress_line, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.errors import EXIT_CANNOT_CHECK, BadUsage, PmemfsError, SourceBusy, sentence_of
from pmemfs.medium.mapped import MappedMedium
from pmemfs.mount.mountpoint import resolve
from pmemfs.mountinfo import mount_at
from pmemfs.pool.label_check import Finding, has_errors
from pmemfs.volume.fs.findings import Progress
from pmemfs.volume.pool_check import check_pool, repair_pool

_EXIT_CLEAN = 0
_EXIT_CORRECTED = 1
_EXIT_ERRORS_LEFT = 4


_MOST_OF_A_KIND = 20
_PARTICULARS = re.compile(
    r"""(?: '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | 0x[0-9a-f]+ | [0-9]+ | ,\s | [-\s] )+""",
    re.VERBOSE,
)
"""Names and numbers of a sentence, and lists of them."""
_Kind = tuple[str, bool, str]


@dataclass
class _Outcome:
    findings: list[Finding]
    repairs: list[Finding] = field(default_factory=list)
    done_count: int = 0

    @property
    def exit_code(self) -> int:
        if has_errors(self.findings):
            return _EXIT_ERRORS_LEFT
        return _EXIT_CORRECTED if self.done_count else _EXIT_CLEAN


@click.command()
@click.argument("pool", type=ANY_PATH)
@click.option("--repair", is_flag=True, help="Repair what is wrong, and free what has leaked.")
@click.option(
    "--force", is_flag=True,
    help="With --repair: also where that may lose or change what is in files.",
)  # fmt: skip
@click.option(
    "-n", "--dry-run", is_flag=True, help="Say what --repair would do first; write nothing."
)
@reporting
def check(pool: str, repair: bool, force: bool, dry_run: bool, as_json: bool) -> int:
    """Verify a pool that is not mounted, and repair it.

    Everything that is stored on POOL is verified. Nothing is written without --repair. What one
    repair uncovers is repaired too, so that it may do more than --dry-run can say. What may lose or
    change the content of a file is left alone, and said, unless --force is given too.

    Exit codes: 0 nothing wrong, 1 errors were corrected, 4 errors were found (and left as they
    are), 8 it could not be checked, 2 bad usage.
    """
    _check_usage(repair, force, dry_run)
    try:
        _refuse_mountpoint(pool)
        with (
            closing(MappedMedium.open(pool, read_only=not repair)) as medium,
            progress_line() as bar,
        ):
            checked = _repaired(medium, bar, force) if repair else None
            outcome = checked or _Outcome(check_pool(medium, bar))
    except (PmemfsError, OSError) as error:
        complain(sentence_of(error), exit_code=EXIT_CANNOT_CHECK, error=error)
        return EXIT_CANNOT_CHECK
    if as_json:
        _print_as_json(pool, outcome)
    else:
        _print_as_text(pool, outcome, with_remedies=dry_run)
    return outcome.exit_code


def _check_usage(repair: bool, force: bool, dry_run: bool) -> None:
    """Raise BadUsage for options that contradict each other, before anything is looked at."""
    if repair and dry_run:
        raise BadUsage(why="--dry-run writes nothing and --repair does: give one of them")
    if force and not repair:
        raise BadUsage(why="--force says how to repair, and nothing is repaired without --repair")


def _refuse_mountpoint(pool: str) -> None:
    """Raise SourceBusy for the directory or the file that a pool is mounted on."""
    mount = mount_at(resolve(pool)) if pool else None
    if mount and mount.is_ours:
        why = f"mounted on {mount.mountpoint}; unmount it, then check the pool"
        raise SourceBusy(path=mount.source, why=why)


def _repaired(medium: MappedMedium, bar: Progress, force: bool) -> _Outcome:
    repairs: list[Finding] = []
    done_count = repair_pool(medium, repairs.append, bar, force=force)
    return _Outcome(check_pool(medium, bar), repairs, done_count)


def _print_as_json(pool: str, outcome: _Outcome) -> None:
    print_json(
        {
            "pool": pool,
            "ok": not has_errors(outcome.findings),
            "findings": [asdict(finding) for finding in outcome.findings],
            "repairs": [asdict(repair) for repair in outcome.repairs],
        }
    )


def _print_as_text(pool: str, outcome: _Outcome, *, with_remedies: bool) -> None:
    for done, more in _some_of_each_kind(outcome.repairs):
        say(f"{'NOT ' if done.is_error else ''}repaired: {_where(done)}: {done.sentence}")
        if more:
            say(_more_like_it(more))
    facts: list[tuple[str, str]] = []
    for found, more in _some_of_each_kind(outcome.findings):
        facts.append((_where(found), f"{'ERROR: ' if found.is_error else ''}{found.sentence}"))
        if more:
            facts.append(("", _more_like_it(more)))
    print_facts(facts)
    if with_remedies:
        curable = (finding for finding in outcome.findings if finding.remedy)
        for found, more in _some_of_each_kind(curable):
            say(f"would repair: {_where(found)}: {found.sentence}: {found.remedy}")
            if more:
                say(_more_like_it(more))
    if has_errors(outcome.findings):
        said = "errors are left" if outcome.repairs else "errors were found"
    else:
        said = "errors were corrected" if outcome.done_count else "no errors"
    say(f"{pool}: {said}")


def _some_of_each_kind(findings: Iterable[Finding]) -> Iterator[tuple[Finding, int]]:
    """The first findings of each kind; beside the last of these, how many more of it there are.

    One scribbled frame of a bitmap makes thousands of findings, which would hide all the others.
    """
    kinds = [(finding, _kind(finding)) for finding in findings]
    left, seen = Counter(kind for _, kind in kinds), Counter[_Kind]()
    for finding, kind in kinds:
        seen[kind] += 1
        left[kind] -= 1
        if seen[kind] <= _MOST_OF_A_KIND:
            yield finding, left[kind] if seen[kind] == _MOST_OF_A_KIND else 0


def _kind(finding: Finding) -> _Kind:
    """Findings that differ in names and numbers only are of one kind."""
    what, sentence = (_PARTICULARS.sub("", text) for text in (finding.what, finding.sentence))
    return what, finding.is_error, sentence


def _more_like_it(count: int) -> str:
    return f"… and {count} more like it"


def _where(finding: Finding) -> str:
    return finding.what if finding.path is None else f"{finding.what} ({finding.path})"
