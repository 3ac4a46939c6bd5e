"""What is made of the runs: medians, ratios, the table and the JSON document.

Invariants: a ratio compares two runs of one round only, and is the median over rounds of such
ratios (not the ratio of medians), for neighbours in time share the machine's noise; a failed run
enters no figure.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmark.cells import MIB, Cell
from benchmark.fio import Figures

JSON_FORMAT = 2
BASES = ("loop", "tmpfs")
# in the JSON also what page structures cost
ALL_BASES = (*BASES, "none")


@dataclass(frozen=True)
class Run:
    """One run of fio: either ``figures`` or ``error``. ``position`` is its turn in the round.

    CPU use is in percent of one CPU, summed over all callers or all serving processes;
    ``daemon_cpu_percent`` is None where the kernel serves.
    """

    cell: str
    subject: str
    round: int
    position: int
    command: Sequence[str]
    figures: Figures | None = None
    fio_cpu_percent: float | None = None
    daemon_cpu_percent: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Spread:
    """A median with the extremes it lies between."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Summary:
    """One subject in one cell, over all rounds. ``ratios`` are of IOPS, by the base's name."""

    cell: str
    subject: str
    iops: Spread
    mib_per_second: Spread
    p50_us: Spread
    p99_us: Spread
    fio_cpu_percent: Spread | None
    daemon_cpu_percent: Spread | None
    ratios: Mapping[str, Spread]


@dataclass(frozen=True)
class SubjectState:
    """What became of a subject: ``skipped`` is the reason it was not measured, or None.

    ``private_bytes`` is the memory of its processes after all cells, where that is of interest.
    """

    name: str
    description: str
    notes: Sequence[str]
    direct: bool | None
    skipped: str | None = None
    private_bytes: int | None = None


def spread(values: Iterable[float]) -> Spread | None:
    """Median and extremes; None of nothing."""
    ordered = sorted(values)
    return Spread(median(ordered), ordered[0], ordered[-1]) if ordered else None


def round_ratios(of: Sequence[Run], base: Sequence[Run]) -> list[float]:
    """IOPS of ``of`` over those of ``base``, round by round; rounds lacking either are left out.

    Of several base runs in one round the best counts.
    """
    base_iops: dict[int, float] = {}
    for run in base:
        if run.figures:
            base_iops[run.round] = max(run.figures.iops, base_iops.get(run.round, 0.0))
    return [
        run.figures.iops / base_iops[run.round]
        for run in of
        if run.figures and base_iops.get(run.round)
    ]


def ratio_spread(of: Sequence[Run], base: Sequence[Run]) -> Spread | None:
    """Median and extremes of `round_ratios`; None without a common round."""
    return spread(round_ratios(of, base))


def summarise(runs: Iterable[Run]) -> list[Summary]:
    """Summaries in the order of first appearance; a subject that never succeeded has none."""
    by_key: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_key.setdefault((run.cell, run.subject), []).append(run)
    summaries = []
    for (cell, subject), own in by_key.items():
        ratios = {base: ratio_spread(own, by_key.get((cell, base), [])) for base in ALL_BASES}
        summary = _summary(cell, subject, own, {name: r for name, r in ratios.items() if r})
        if summary:
            summaries.append(summary)
    return summaries


def _summary(
    cell: str, subject: str, runs: Sequence[Run], ratios: Mapping[str, Spread]
) -> Summary | None:
    good = [run for run in runs if run.figures]
    if not good:
        return None

    def over(field: str) -> Spread:
        found = spread(getattr(one.figures, field) for one in good)
        assert found is not None
        return found

    return Summary(
        cell=cell,
        subject=subject,
        iops=over("iops"),
        mib_per_second=over("mib_per_second"),
        p50_us=over("p50_us"),
        p99_us=over("p99_us"),
        fio_cpu_percent=spread(
            one.fio_cpu_percent for one in good if one.fio_cpu_percent is not None
        ),
        daemon_cpu_percent=spread(
            one.daemon_cpu_percent for one in good if one.daemon_cpu_percent is not None
        ),
        ratios=ratios,
    )


def document(
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    cells: Sequence[Cell],
    subjects: Sequence[SubjectState],
    runs: Sequence[Run],
) -> dict[str, Any]:
    """Everything, for ``json.dump``: the machine, the settings, every run, and the summaries."""
    return {
        "format": JSON_FORMAT,
        "units": "iops: requests/s; mib: 2**20 bytes; us: microseconds; cpu_percent: of one CPU",
        "machine": dict(machine),
        "settings": dict(settings),
        "cells": [asdict(cell) for cell in cells],
        "subjects": [asdict(subject) for subject in subjects],
        "runs": [asdict(run) for run in runs],
        "summaries": [asdict(summary) for summary in summarise(runs)],
    }


# -- the table ------------------------------------------------------------------------------------


def table(cells: Sequence[Cell], subjects: Sequence[SubjectState], runs: Sequence[Run]) -> Group:
    """One table for each group of cells, then the notes that belong to the subjects.

    A skipped subject stands with its reason at the foot of each table that it belongs in.
    """
    summaries = {(one.cell, one.subject): one for one in summarise(runs)}
    errors = {(run.cell, run.subject): run.error for run in runs if run.error}
    tables = []
    for title, members in groupby(cells, key=lambda cell: cell.group):
        cells_here = list(members)
        lacking = [
            one
            for one in subjects
            if one.skipped and any(cell.takes(one.name) for cell in cells_here)
        ]
        one = _empty_table(title, lacking, bool(errors))
        for cell in cells_here:
            measured = [one.name for one in subjects if not one.skipped and cell.takes(one.name)]
            for name in measured:
                key = (cell.name, name)
                caption = cell.caption if name == measured[0] else ""
                row = _row(summaries.get(key), errors.get(key))
                one.add_row(
                    caption, name, *row[: len(one.columns) - 2], end_section=name == measured[-1]
                )
        tables.append(one)
    return Group(*tables, *_notes(subjects))


def _empty_table(title: str, skipped: Sequence[SubjectState], with_remarks: bool) -> Table:
    result = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    result.add_column("cell", no_wrap=True)
    result.add_column("subject", no_wrap=True)
    for heading in ("IOPS", "min..max", "MiB/s", "p99 µs", "x loop", "x tmpfs", "CPU %"):
        result.add_column(heading, justify="right", no_wrap=True)
    if with_remarks:
        result.add_column("remark", overflow="fold")
    if skipped:
        result.caption = Text("\n".join(f"{one.name}: skipped: {one.skipped}" for one in skipped))
    return result


def _row(summary: Summary | None, error: str | None) -> list[Text]:
    remark = f"failed: {error}" if error else ""
    if summary is None:
        return [Text("-")] * 7 + [Text(remark)]
    used = [one for one in (summary.fio_cpu_percent, summary.daemon_cpu_percent) if one]
    cells = [
        _count(summary.iops.median),
        f"{_count(summary.iops.lowest)}..{_count(summary.iops.highest)}",
        f"{summary.mib_per_second.median:,.0f}",
        f"{summary.p99_us.median:,.1f}",
        *(_ratio(summary.ratios.get(base)) for base in BASES),
        "+".join(f"{one.median:.0f}" for one in used) or "-",
        remark,
    ]
    return [Text(cell) for cell in cells]


def _count(value: float) -> str:
    return f"{value / 1000:,.1f}k" if value >= 10_000 else f"{value:,.0f}"


def _ratio(ratio: Spread | None) -> str:
    if ratio is None:
        return "-"
    digits = 2 if ratio.median >= 0.1 else 3
    return f"{ratio.median:.{digits}f}"


def _notes(subjects: Sequence[SubjectState]) -> list[Text]:
    lines = ["CPU %: fio + the daemon, of one CPU. Ratios: IOPS, the median of the rounds' ratios."]
    for subject in subjects:
        if not subject.skipped:
            direct = f"O_DIRECT: {'yes' if subject.direct else 'no'}"
            notes = [subject.description, direct, *subject.notes]
            if subject.private_bytes is not None:
                notes.append(f"private memory afterwards: {subject.private_bytes / MIB:.1f} MiB")
            lines.append(f"{subject.name}: {'; '.join(notes)}")
    return [Text(line) for line in lines]


def show(console: Console, renderable: Group) -> None:
    """Print; a console that is not a terminal is given the width that the table needs."""
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(renderable)
