"""What is made of the runs: medians, ratios, the table and the JSON document.

Invariants: a ratio compares two runs of one round only, and is the median over rounds of such
ratios (not the ratio of medians), for neighbours in time share the machine's noise; a failed run
enters no figure.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any, Literal, Protocol

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmark.cells import MIB
from benchmark.fio import Figures

JSON_FORMAT = 3
BASES = ("loop", "tmpfs")
# in the JSON also what page structures cost, and files beside a device
ALL_BASES = (
    *(*BASES, "none", "pmemfs", "fuse2fs", "ext4"),
    *("passthrough_hp", "passthrough_hp-uring", "memfs_ll", "memfs_ll-uring"),
)
Unit = Literal["s", "bytes", "ratio", "share", "rate"]


class Workload(Protocol):
    """What is shown of a cell."""

    @property
    def name(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def caption(self) -> str: ...

    def takes(self, subject: str) -> bool:
        """Whether the cell is for the subject of this name."""


@dataclass(frozen=True)
class Look:
    """How the figures of one part of the run are shown: what is counted, what it is compared with,
    what does the work beside the daemon, and whether the daemon's time for each is of interest."""

    rate: str = "IOPS"
    bases: tuple[str, ...] = BASES
    worker: str = "fio"
    has_server_time: bool = False


IO_LOOK = Look()


@dataclass(frozen=True)
class Reading:
    """Something that is no rate: ``values`` as often as it was measured, or an ``error``, or what
    is ``lacking`` on this machine.

    ``cell`` is what it belongs to, ``key`` its own name.
    """

    cell: str
    key: str
    what: str
    unit: Unit
    values: Sequence[float] = ()
    error: str | None = None
    lacking: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of an instrument: either ``figures`` or ``error``. ``position`` is its turn in the
    round.

    CPU use is in percent of one CPU, summed over all callers or all serving processes;
    ``daemon_cpu_percent`` is None where the kernel serves. ``forwarded_share`` is of the requests
    meanwhile that the control plane of pmemfs answered, None where nobody counts them.
    """

    cell: str
    subject: str
    round: int
    position: int
    command: Sequence[str]
    figures: Figures | None = None
    fio_cpu_percent: float | None = None
    daemon_cpu_percent: float | None = None
    forwarded_share: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Spread:
    """A median with the extremes it lies between."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Summary:
    """One subject in one cell, over all rounds. ``ratios`` are of IOPS, by the base's name;
    ``daemon_us`` is the daemon's CPU time for one operation."""

    cell: str
    subject: str
    iops: Spread
    mib_per_second: Spread | None
    p50_us: Spread | None
    p99_us: Spread | None
    fio_cpu_percent: Spread | None
    daemon_cpu_percent: Spread | None
    daemon_us: Spread | None
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

    def over(field: str) -> Spread | None:
        values = [getattr(one.figures, field) for one in good]
        return None if None in values else spread(values)

    iops = over("iops")
    assert iops is not None
    return Summary(
        cell=cell,
        subject=subject,
        iops=iops,
        mib_per_second=over("mib_per_second"),
        p50_us=over("p50_us"),
        p99_us=over("p99_us"),
        fio_cpu_percent=spread(
            one.fio_cpu_percent for one in good if one.fio_cpu_percent is not None
        ),
        daemon_cpu_percent=spread(
            one.daemon_cpu_percent for one in good if one.daemon_cpu_percent is not None
        ),
        daemon_us=spread(
            one.daemon_cpu_percent / 100 / one.figures.iops * 1e6
            for one in good
            if one.daemon_cpu_percent is not None and one.figures
        ),
        ratios=ratios,
    )


@dataclass(frozen=True)
class Part:
    """All that one part of the run came to."""

    name: str
    look: Look
    cells: Sequence[Workload]
    subjects: Sequence[SubjectState] = ()
    runs: Sequence[Run] = ()
    readings: Sequence[Reading] = ()


def document(
    machine: Mapping[str, Any], settings: Mapping[str, Any], parts: Sequence[Part]
) -> dict[str, Any]:
    """Everything, for ``json.dump``: the machine, the settings, every run, and the summaries."""
    return {
        "format": JSON_FORMAT,
        "units": "iops: requests/s or files/s; mib: 2**20 bytes; us: microseconds; "
        "cpu_percent: of one CPU",
        "machine": dict(machine),
        "settings": dict(settings),
        "parts": {part.name: _part_document(part) for part in parts},
    }


def _part_document(part: Part) -> dict[str, Any]:
    return {
        "cells": [asdict(cell) for cell in part.cells],  # type: ignore[call-overload]
        "subjects": [asdict(subject) for subject in part.subjects],
        "runs": [asdict(run) for run in part.runs],
        "summaries": [asdict(summary) for summary in summarise(part.runs)],
        "readings": [asdict(reading) for reading in part.readings],
    }


# -- the tables -----------------------------------------------------------------------------------


def show_part(part: Part) -> Group:
    """The tables of a part, whatever it has."""
    shown: list[Table | Group] = []
    if part.readings:
        shown.append(readings_table(part.readings))
    if part.subjects:
        shown.append(table(part.cells, part.subjects, part.runs, part.look))
    return Group(*shown)


def readings_table(readings: Sequence[Reading]) -> Table:
    """A line for each."""
    result = Table(title="readings", title_justify="left", title_style="bold")
    result.add_column("what", overflow="fold")
    for heading in ("median", "min..max", "n"):
        result.add_column(heading, justify="right", no_wrap=True)
    for reading in readings:
        measured = spread(reading.values)
        if measured is None:
            why = f"not measured: {reading.lacking}"
            why = why if reading.error is None else f"failed: {reading.error}"
            result.add_row(Text(f"{reading.what}: {why}"), "-", "-", "-")
            continue
        extremes = (quantity(one, reading.unit) for one in (measured.lowest, measured.highest))
        result.add_row(
            Text(reading.what),
            quantity(measured.median, reading.unit),
            "..".join(extremes),
            str(len(reading.values)),
        )
    return result


def quantity(value: float, unit: Unit) -> str:
    """A value with its unit, as people read it."""
    match unit:
        case "s":
            return f"{value:.3g} s"
        case "bytes":
            return f"{value / MIB:,.0f} MiB"
        case "share":
            return f"{100 * value:.2f} %"
        case "rate":
            return f"{rate(value)}/s"
        case "ratio":
            return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def table(
    cells: Sequence[Workload],
    subjects: Sequence[SubjectState],
    runs: Sequence[Run],
    look: Look = IO_LOOK,
) -> Group:
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
        names = {cell.name for cell in cells_here}
        columns = _columns([one for one in summaries.values() if one.cell in names], look)
        one = _empty_table(title, columns, lacking, bool(errors))
        for cell in cells_here:
            measured = [one.name for one in subjects if not one.skipped and cell.takes(one.name)]
            for name in measured:
                key = (cell.name, name)
                caption = cell.caption if name == measured[0] else ""
                row = _row(columns, summaries.get(key), errors.get(key))
                one.add_row(
                    caption, name, *row[: len(one.columns) - 2], end_section=name == measured[-1]
                )
        tables.append(one)
    return Group(*tables, *_notes(subjects, look))


Column = tuple[str, Callable[[Summary], str]]


def _columns(summaries: Sequence[Summary], look: Look) -> list[Column]:
    """What is shown of a summary; nothing that none of these has."""
    columns: list[Column] = [
        (look.rate, lambda one: rate(one.iops.median)),
        ("min..max", lambda one: f"{rate(one.iops.lowest)}..{rate(one.iops.highest)}"),
    ]
    if not summaries or any(one.mib_per_second for one in summaries):
        columns.append(("MiB/s", lambda one: _median(one.mib_per_second, "{:,.0f}")))
    if not summaries or any(one.p99_us for one in summaries):
        columns.append(("p99 µs", lambda one: _median(one.p99_us, "{:,.1f}")))
    columns += [(f"x {base}", partial(_ratio_to, base)) for base in look.bases]
    columns.append(("CPU %", _cpu))
    if look.has_server_time:
        columns.append(("server µs", lambda one: _median(one.daemon_us, "{:,.0f}")))
    return columns


def _empty_table(
    title: str, columns: Sequence[Column], skipped: Sequence[SubjectState], with_remarks: bool
) -> Table:
    result = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    result.add_column("cell", no_wrap=True)
    result.add_column("subject", no_wrap=True)
    for heading, _ in columns:
        result.add_column(heading, justify="right", no_wrap=True)
    if with_remarks:
        result.add_column("remark", overflow="fold")
    if skipped:
        result.caption = Text("\n".join(f"{one.name}: skipped: {one.skipped}" for one in skipped))
    return result


def _row(columns: Sequence[Column], summary: Summary | None, error: str | None) -> list[Text]:
    remark = f"failed: {error}" if error else ""
    shown = [show(summary) if summary else "-" for _, show in columns]
    return [Text(cell) for cell in (*shown, remark)]


def rate(value: float) -> str:
    """So many in a second, as people read it."""
    return f"{value / 1000:,.1f}k" if value >= 10_000 else f"{value:,.0f}"


def _median(measured: Spread | None, style: str) -> str:
    return style.format(measured.median) if measured else "-"


def _ratio_to(base: str, summary: Summary) -> str:
    ratio = summary.ratios.get(base)
    return quantity(ratio.median, "ratio") if ratio else "-"


def _cpu(summary: Summary) -> str:
    used = [one for one in (summary.fio_cpu_percent, summary.daemon_cpu_percent) if one]
    return "+".join(f"{one.median:.0f}" for one in used) or "-"


def _notes(subjects: Sequence[SubjectState], look: Look) -> list[Text]:
    lines = [
        f"CPU %: {look.worker} + the daemon, of one CPU. Ratios: {look.rate}, the median of the "
        "rounds' ratios."
    ]
    if look.has_server_time:
        lines[0] += " Server µs: the daemon's CPU time for one operation."
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
        console.width = max(console.width, 170)
    console.print(renderable)
