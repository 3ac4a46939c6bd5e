"""`pmemfs compare`: the four answers of 2015 on this machine, side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from pmemfs.cli.options import Count, reporting
from pmemfs.cli.output import note, print_json, print_table, progress_line, say, warn
from pmemfs.cli.paths import A_DIRECTORY, ANY_PATH
from pmemfs.errors import BadUsage
from pmemfs.units import format_size, parse_size

# Whoever asks for help waits for nothing that measures.
if TYPE_CHECKING:
    from pmemfs.compare.rows import Reading
    from pmemfs.compare.run import Comparison, Settings

_LEAST_SECONDS, _MOST_SECONDS = 0.05, 600.0
_MOST_IDLE_SECONDS = 3600.0


class Seconds(click.ParamType[float]):
    """A number of seconds of some range, or 0 where that means "not at all"."""

    name = "seconds"

    def __init__(self, least: float, most: float, *, may_be_zero: bool = False) -> None:
        self._least, self._most, self._may_be_zero = least, most, may_be_zero

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number. Raises BadParameter."""
        try:
            seconds = float(str(value))
        except ValueError:
            self.fail(f"'{value}' is not a number of seconds", param, ctx)
        if self._may_be_zero and seconds == 0:
            return seconds
        if not self._least <= seconds <= self._most:
            self.fail(f"{value} is not from {self._least:g} to {self._most:g}", param, ctx)
        return seconds


@click.command()
@click.option(
    "--medium",
    type=A_DIRECTORY,
    default="/dev/shm",
    show_default=True,
    help="A directory where the pools are made, one at a time.",
)
@click.option(
    "--size",
    default="2304M",
    show_default=True,
    metavar="SIZE",
    help="Size of each pool; pages of 1G need more than 2G.",
)
@click.option(
    "--rounds",
    type=Count(1, 1000),
    default=5,
    show_default=True,
    metavar="N",
    help="How often each answer has its turn; a verdict needs 5.",
)
@click.option(
    "--seconds",
    type=Seconds(_LEAST_SECONDS, _MOST_SECONDS),
    default=0.5,
    show_default=True,
    metavar="S",
    help="How long each of four kinds of I/O is measured.",
)
@click.option(
    "--idle",
    type=Seconds(1, _MOST_IDLE_SECONDS, may_be_zero=True),
    default=100,
    show_default=True,
    metavar="S",
    help="How long to wait, once, for idle structures to be dropped; 0: not at all.",
)
@click.option(
    "--device",
    type=ANY_PATH,
    metavar="PATH",
    help="A device or file that transfers are read from.  [default: a file in /var/tmp]",
)
@click.option(
    "--report",
    type=ANY_PATH,
    metavar="FILE.html",
    help="Write a report with plots, too, one file that needs no other.",
)
@reporting
def compare(
    medium: str,
    size: str,
    rounds: int,
    seconds: float,
    idle: float,
    device: str | None,
    report: str | None,
    as_json: bool,
) -> None:
    """Compare the ways to keep page structures, side by side.

    The answers of 2015 are the schemes pmem, on-demand and none, and pmem with pages of 2M and
    of 1G. Each has a pool of the same size on the same medium, and does the same work: fio where
    it is installed, else a small loop of direct I/O. They take turns in rounds. Shown are memory
    for page structures, times, rates, what pins and direct transfers cost, and what fails, with
    the program's own sentence.

    A figure is the median of the rounds; behind it stands how far the farthest round lies from it.
    An answer is called better or worse than pmem only after five rounds, and only if every round of
    the one lies on the same side of every round of the other.

    A pool with its mount exists only during a turn. Everything is removed again, also after
    Ctrl-C, SIGTERM or an error. The device is only read.
    """  # fmt: skip
    from pmemfs.compare.run import Settings, check_settings, room_bytes
    from pmemfs.compare.run import compare as run

    settings = Settings(
        medium=os.path.abspath(medium) if medium else medium,
        size_bytes=parse_size(size), rounds=rounds, seconds=seconds, idle_seconds=idle,
        device=device, report=report,
    )  # fmt: skip
    check_settings(settings)
    if report is not None:
        _check_report(report)
    note(f"{settings.medium}: taking up to {format_size(room_bytes(settings))}, one pool at a time")
    if not as_json:
        say(
            f"Pools of {format_size(settings.size_bytes)} in {settings.medium}, one at a time; up "
            f"to {format_size(room_bytes(settings))} are taken, and given back.",
            flush=True,
        )
    _warn_if_busy()
    with progress_line() as progress:
        comparison = run(settings, progress)
    if report is not None:
        _write_report(report, comparison)
    if as_json:
        print_json(as_json_values(comparison))
    else:
        _print(comparison, settings)


def _warn_if_busy() -> None:
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cpus / 2:
        warn(f"the machine is busy (a load of {load:.1f} on {cpus} CPUs): times and rates will "
             "differ from round to round")  # fmt: skip


def _check_report(path: str) -> None:
    """Refuse what can't be written before anything is measured. Raises BadUsage, NeedsPackage."""
    from pmemfs.compare.plots import require_matplotlib

    require_matplotlib()
    directory = os.path.dirname(os.path.abspath(path))
    if not path or os.path.isdir(path):
        raise BadUsage(why=f"--report: {path or repr('')} is no file; name one, such as r.html")
    if not path.lower().endswith((".html", ".htm")):
        raise BadUsage(why=f"--report writes HTML, and {path!r} does not end in .html")
    if not os.path.isdir(directory):
        raise BadUsage(why=f"--report: there is no directory {directory}; make it first")
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise BadUsage(why=f"--report: {path} can't be written by this user; name another file")


def _write_report(path: str, comparison: Comparison) -> None:
    from pmemfs.compare.report import html_report

    text = html_report(comparison)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def as_json_values(comparison: Comparison) -> dict[str, object]:
    """All that came of it, for programs: each reading of each round, and the verdicts."""
    from pmemfs.compare.rows import BASE, ROWS, verdicts

    return {
        "command": comparison.command,
        "conditions": dict(comparison.facts),
        "answers": [answer._asdict() for answer in comparison.answers],
        "rows": [row._asdict() for row in ROWS],
        "readings": [{**r._asdict(), "error": r.error or None} for r in comparison.readings],
        "verdicts": [
            {**one._asdict(), "ratio": one.ratio._asdict(), "base": BASE}
            for one in verdicts(comparison.readings)
        ],
        "steps": list(comparison.steps),
    }


def _print(comparison: Comparison, settings: Settings) -> None:
    from pmemfs.compare.rows import ANSWERS, GROUPS, ROWS, failures

    readings = comparison.readings
    numbers = {sentence: n for n, (sentence, _, _) in enumerate(failures(readings), 1)}
    for group in GROUPS:
        say()
        rows = [row for row in ROWS if row.group == group]
        print_table(
            [group.upper(), *(answer.name for answer in ANSWERS)],
            [
                (row.name, *(_cell(readings, row.key, each.name, numbers) for each in ANSWERS))
                for row in rows
            ],
        )
    for heading, lines in (
        ("What fails, and with which sentence:", _failure_lines(readings)),
        ("Against pmem, where all rounds are on one side:", _verdict_lines(readings)),
        ("How to repeat it:", _how_to_repeat(comparison)),
    ):
        if shown := list(lines):
            for line in ("", heading, *shown):
                say(line)
    if settings.report is not None:
        say()
        say(f"The report is in {settings.report}.")


def _cell(readings: Sequence[Reading], key: str, answer: str, numbers: dict[str, int]) -> str:
    from pmemfs.compare.rows import ROWS, cell_of, with_spread

    unit = next(row.unit for row in ROWS if row.key == key)
    cell = cell_of(readings, key, answer)
    if cell.error:
        return f"fails [{numbers[cell.error]}]"
    return with_spread(cell.spread, unit) if cell.spread else "-"


def _failure_lines(readings: Sequence[Reading]) -> Iterator[str]:
    from pmemfs.compare.rows import failures

    for number, (sentence, _, answers) in enumerate(failures(readings), 1):
        yield f"  [{number}] {', '.join(answers)}: {sentence}"


def _verdict_lines(readings: Sequence[Reading]) -> Iterator[str]:
    """What all rounds say, a line for each answer; why nothing is said, where that is so."""
    from pmemfs.compare.rows import ANSWERS, ROWS, VERDICT_ROUNDS, verdicts

    found = verdicts(readings)
    if found and all(one.says == "too few rounds" for one in found):
        yield f"  nothing: a verdict needs {VERDICT_ROUNDS} rounds"
        return
    names = {row.key: row.name for row in ROWS}
    for answer in ANSWERS:
        mine = [one for one in found if one.answer == answer.name]
        for word in ("better", "worse"):
            said = [f"{names[v.row]} x {v.ratio.median:.2f}" for v in mine if v.says == word]
            if said:
                yield f"  {answer.name} is {word}: {'; '.join(said)}"
        if mine and not any(one.says in ("better", "worse") for one in mine):
            yield f"  {answer.name}: no difference seen"


def _how_to_repeat(comparison: Comparison) -> Iterator[str]:
    yield f"  {comparison.command}"
    for fact in comparison.facts:
        yield f"  {fact.name}: {fact.value}"
