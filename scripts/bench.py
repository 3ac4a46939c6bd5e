"""Entry of ``scripts/bench``: the command line, the order of events, what is shown and written."""

import json
import os
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from benchmark import chart, fio, goals, host, report, verdicts
from benchmark.cells import CELLS, MIB, Cell, choose_names, parse_size_bytes
from benchmark.errors import BenchError
from benchmark.run import Bench, Interrupts, Settings
from benchmark.subjects import DEFAULT_SUBJECTS, SUBJECTS, Subject
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SUBJECT_NAMES = tuple(SUBJECTS)
OPTIONAL = ", ".join(name for name in SUBJECTS if name not in DEFAULT_SUBJECTS)
HELP = f"""Compare pmemfs with tmpfs, the kernel's loop device and other FUSE servers, with fio.

Each subject is measured in turn within one run: for each cell, for each round, each subject once.
Everything lives in /dev/shm and is removed afterwards, whatever happens. At the end stands which
goals were met.

The other servers, nbdfuse and qsd (qemu-storage-daemon), are skipped where they are not installed;
scripts/install-peers installs them.

\b
Cells:    {", ".join(cell.name for cell in CELLS[:4])},
          {", ".join(cell.name for cell in CELLS[4:8])},
          {", ".join(cell.name for cell in CELLS[8:])}
Subjects: {", ".join(SUBJECT_NAMES[:6])},
          {", ".join(SUBJECT_NAMES[6:])}
"""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cells", metavar="NAMES", help="Only these cells: names or patterns, with commas.")
@click.option("--subjects", metavar="NAMES", help=f"Default: all but {OPTIONAL}.")
@click.option(
    "--size", metavar="SIZE", help="Working set of each subject.  [default: 1G; quick: 64M]"
)
@click.option("--rounds", type=click.IntRange(1), help="[default: 5; quick: 1]")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1),
    help="Measured time of one run.  [default: 1.2; quick: 1]",
)
@click.option(
    "--ramp",
    type=click.FloatRange(0),
    help="Seconds before that, not counted.  [default: 0.3; quick: 0]",
)
@click.option(
    "--deep-engine",
    type=click.Choice(["auto", "io_uring", "libaio"]),
    default="auto",
    show_default=True,
    help="fio's engine where many requests are in flight; auto prefers io_uring.",
)
@click.option(
    "--quick", is_flag=True, help="A smoke run: does everything work? The figures mean little."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Where to write every figure."
)
@click.option(
    "--chart", "chart_path", type=click.Path(path_type=Path), help="Where to draw the PNG."
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("bench-results"),
    show_default=True,
    help="Folder of the files whose place is not given otherwise.",
)
def main(**options: Any) -> None:
    """Run, and end with 0, 1 (something failed) or 130 (interrupted)."""
    interrupts = Interrupts()
    interrupts.install()
    try:
        code = bench(options, interrupts)
    except BenchError as problem:
        click.echo(f"bench: {problem}", err=True)
        code = 1
    except OSError as problem:
        click.echo(f"bench: {problem.filename or 'the system'}: {problem.strerror}", err=True)
        code = 1
    except KeyboardInterrupt:
        click.echo("bench: interrupted; what it had set up is removed", err=True)
        code = 130
    sys.exit(code)


def bench(options: dict[str, Any], interrupts: Interrupts) -> int:
    """The whole run; returns the exit code. Raises BenchError where nothing can be measured."""
    settings = make_settings(options)
    cells, names = choose(options["cells"], options["subjects"])
    subjects = [SUBJECTS[name]() for name in names]
    if options["chart_path"] and not chart.available():
        raise BenchError("--chart needs matplotlib: install the project's extra 'bench'")
    json_path, chart_path = result_paths(options)
    tool = fio.probe(options["deep_engine"])
    machine = {**host.describe(), "fio": tool.version}
    asked = {**asdict(settings), "quick": options["quick"], "deep_engine": tool.deep_engine}

    runner, runs = measure(settings, tool, cells, subjects, interrupts)
    judged = verdicts.judge(goals.GOALS, runner.states, runs)
    show_report(cells, runner.states, runs, judged, is_quick=options["quick"])
    document = report.document(machine, asked, cells, runner.states, runs)
    document["goals"] = [asdict(verdict) for verdict in judged]
    json_path.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(f"figures: {json_path}")
    title = chart_title(settings, machine)
    click.echo(draw_chart(chart_path, cells, runner, runs, title))
    missing = options["subjects"] and any(one.skipped for one in runner.states)
    return 1 if runner.failed or missing else 0


def choose(cell_patterns: str | None, subject_patterns: str | None) -> tuple[list[Cell], list[str]]:
    """The cells and the names of subjects that were asked for and have something to do.

    Raises BenchError if no cell is for any of the subjects.
    """
    wanted = subject_patterns or ",".join(DEFAULT_SUBJECTS)
    names = choose_names(wanted, SUBJECTS, "subject")
    cell_names = choose_names(cell_patterns, (cell.name for cell in CELLS), "cell")
    cells = [cell for cell in CELLS if cell.name in cell_names]
    taken = [cell for cell in cells if any(cell.takes(name) for name in names)]
    if not taken:
        raise BenchError(f"{', '.join(cell_names)}: not measured for {', '.join(names)}")
    return taken, [name for name in names if any(cell.takes(name) for cell in taken)]


def show_report(
    cells: list[Cell],
    states: list[report.SubjectState],
    runs: list[report.Run],
    judged: list[verdicts.Verdict],
    is_quick: bool,
) -> None:
    """Print the figures and what they say about the goals."""
    report.show(Console(), Group(report.table(cells, states, runs), verdicts.table(judged)))
    if is_quick:
        click.echo("a quick run: neither the figures nor the verdicts mean much")


def make_settings(options: dict[str, Any]) -> Settings:
    """What was asked for, with the defaults of a full or a quick run."""
    quick = options["quick"]

    def given(name: str, usual: Any, hasty: Any) -> Any:
        value = options[name]
        return value if value is not None else hasty if quick else usual

    return Settings(
        size_bytes=parse_size_bytes(given("size", "1G", "64M")),
        rounds=given("rounds", 5, 1),
        timing=fio.Timing(
            ramp_ms=round(1000 * given("ramp", 0.3, 0)),
            runtime_ms=round(1000 * given("seconds", 1.2, 1)),
        ),
    )


def measure(
    settings: Settings,
    tool: fio.Fio,
    cells: list[Cell],
    subjects: list[Subject],
    interrupts: Interrupts,
) -> tuple[Bench, list[report.Run]]:
    """Set up, measure and tear down, with a progress bar on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("starting", total=None)
    runner = Bench(
        settings,
        tool,
        say=lambda text: progress.update(task, description=text),
        warn=lambda text: progress.console.print(f"bench: {text}", markup=False, soft_wrap=True),
    )
    with progress, runner.ready(subjects, interrupts) as working:
        steps = settings.rounds * sum(cell.takes(one.name) for cell in cells for one in working)
        progress.update(task, total=steps)
        return runner, runner.measure(cells, working, lambda: progress.advance(task))


def draw_chart(
    path: Path, cells: list[Cell], runner: Bench, runs: list[report.Run], title: str
) -> str:
    """Draw if that is possible; returns the sentence to print about it."""
    if not chart.available():
        return "chart: not drawn, matplotlib is missing (the project's extra 'bench')"
    try:
        chart.draw(path, cells, runner.states, runs, title)
    except BenchError as problem:
        return str(problem)
    return f"chart: {path}"


def chart_title(settings: Settings, machine: dict[str, Any]) -> str:
    """What the chart's reader must know of the run."""
    rounds = f"{settings.rounds} round{'s' if settings.rounds > 1 else ''}"
    return (
        f"{settings.size_bytes // MIB} MiB each, {rounds} of "
        f"{settings.timing.runtime_ms / 1000:g} s, median with lowest and highest; "
        f"{machine['cpu_count']} CPUs, kernel {machine['kernel']}, {machine['date'][:10]}"
    )


def result_paths(options: dict[str, Any]) -> tuple[Path, Path]:
    """Where the JSON and the chart go. Their folders are made now, so that no run is lost later.

    The default folder keeps itself out of git.
    """
    folder = options["output_dir"]
    stamp = datetime.now().strftime("%Y-%m-%dT%H%M%S")
    json_path: Path = options["json_path"] or folder / f"{stamp}.json"
    chart_path: Path = options["chart_path"] or folder / f"{stamp}.png"
    if folder in (json_path.parent, chart_path.parent) and not folder.exists():
        folder.mkdir(parents=True)
        (folder / ".gitignore").write_text("*\n")
    for path in (json_path, chart_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise BenchError(f"{path} cannot be written")
    return json_path, chart_path


if __name__ == "__main__":
    main(prog_name="scripts/bench")
