"""`pmemfs check`: verify a pool that is not mounted; repair it if asked. Answers like fsck(8)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field

import click

from pmemfs.check import Finding, check_pool, has_errors, repair_pool
from pmemfs.cli.output import complain, json_option, print_facts, print_json, say
from pmemfs.errors import PmemfsError
from pmemfs.medium.mapped import MappedMedium
from pmemfs.volume.fs.check import Progress

_EXIT_CLEAN = 0
_EXIT_CORRECTED = 1
_EXIT_ERRORS_LEFT = 4
_EXIT_CANNOT_CHECK = 8


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
@click.argument("pool")
@click.option("--repair", is_flag=True, help="Repair what is wrong, and free what has leaked.")
@click.option(
    "--force", is_flag=True,
    help="With --repair: also where that may lose or change what is in files.",
)  # fmt: skip
@click.option(
    "-n", "--dry-run", is_flag=True, help="Say what --repair would do first; write nothing."
)
@json_option
def check(pool: str, repair: bool, force: bool, dry_run: bool, as_json: bool) -> int:
    """Verify everything that is stored on POOL, which must not be mounted.

    Nothing is written without --repair. What one repair uncovers is repaired too, so that it may do
    more than --dry-run can say. What may lose or change the content of a file is left alone, and
    said, unless --force is given too.

    Exit codes: 0 nothing wrong, 1 errors were corrected, 4 errors were found (and left as they
    are), 8 it could not be checked, 2 bad usage.
    """
    is_repair = repair and not dry_run
    try:
        with closing(MappedMedium.open(pool, read_only=not is_repair)) as medium, _bar() as bar:
            if is_repair:
                outcome = _repaired(medium, bar, force)
            else:
                outcome = _Outcome(check_pool(medium, bar))
    except (PmemfsError, OSError) as error:
        complain(str(error))
        return _EXIT_CANNOT_CHECK
    if as_json:
        _print_as_json(pool, outcome)
    else:
        _print_as_text(pool, outcome, with_remedies=dry_run)
    return outcome.exit_code


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
    for done in outcome.repairs:
        say(f"{'NOT ' if done.is_error else ''}repaired: {_where(done)}: {done.sentence}")
    print_facts(
        (_where(f), f"{'ERROR: ' if f.is_error else ''}{f.sentence}") for f in outcome.findings
    )
    if with_remedies:
        for finding in outcome.findings:
            if finding.remedy:
                say(f"would repair: {_where(finding)}: {finding.sentence}: {finding.remedy}")
    if has_errors(outcome.findings):
        said = "errors are left" if outcome.repairs else "errors were found"
    else:
        said = "errors were corrected" if outcome.done_count else "no errors"
    say(f"{pool}: {said}")


def _where(finding: Finding) -> str:
    return finding.what if finding.path is None else f"{finding.what} ({finding.path})"


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar for whoever waits at a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as shown:
        tasks = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield update
