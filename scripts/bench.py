"""Entry of ``scripts/bench``: the command line, the order of events, what is shown and written."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmark import chart, fio, goals, host, markdown, parts, report, verdicts
from benchmark.cells import GIB, MIB, parse_size_bytes
from benchmark.errors import BenchError
from benchmark.parts import KINDS, Choice, Context, Kind
from benchmark.report import Part
from benchmark.stage import Interrupts, Settings
from benchmark.subjects import DEFAULT_SUBJECTS, SUBJECTS

OPTIONAL = ", ".join(name for name in SUBJECTS if name not in DEFAULT_SUBJECTS)


def _listed_parts(indent: str, words_of: Callable[[Kind], Sequence[str]]) -> str:
    width = len(indent) + 10
    return "\n".join(
        fill(
            ", ".join(words_of(kind)),
            width=90,
            initial_indent=f"{indent + kind.name:<{width}}",
            subsequent_indent=" " * width,
        )
        for kind in KINDS.values()
    )


HELP = f"""Compare pmemfs with tmpfs, the kernel's loop device, ext4 and other FUSE servers.

It has eight parts, which --only chooses from. Each subject is measured in turn within one run, so
that what else the machine does hits all alike. Everything lives in /dev/shm and is removed
afterwards, whatever happens. At the end stands which goals were met.

The other servers, nbdfuse, qsd (qemu-storage-daemon), s3backer, fuse2fs, gocryptfs, passthrough_hp
and memfs_ll, are skipped where they are not installed; scripts/install-peers installs them. Origins
of caches need nbdkit and, for one cell, Ceph; scripts/install-origins --tests installs them.

\b
{_listed_parts("", lambda kind: [kind.what])}

\b
Cells:
{_listed_parts("  ", lambda kind: [cell.name for cell in kind.cells])}

\b
Subjects:
{_listed_parts("  ", lambda kind: kind.subjects)}
"""


@click.command(help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="PARTS", help=f"Only these parts of {', '.join(KINDS)}.")
@click.option("--cells", metavar="NAMES", help="Only these cells: names or patterns, with commas.")
@click.option("--subjects", metavar="NAMES", help=f"Default: all but {OPTIONAL}.")
@click.option(
    "--files",
    type=click.IntRange(2),
    help="Files that cells of metadata work on.  [default: 20000; quick: 1000]",
)
@click.option(
    "--many-files",
    type=click.IntRange(1),
    help="Files in the pool whose mount is timed.  [default: 1000000; quick: 10000]",
)
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
    choices = parts.choose(options["only"], options["cells"], options["subjects"])
    if options["chart_path"] and not chart.available():
        raise BenchError("--chart needs matplotlib: install the project's extra 'bench'")
    json_path, chart_path = result_paths(options)
    machine: dict[str, Any] = host.describe()
    asked = {**asdict(settings), "quick": options["quick"]}
    if any(choice.kind.name in ("io", "cache", "transform") for choice in choices):
        tool = fio.probe(options["deep_engine"])
        machine["fio"], asked["deep_engine"] = tool.version, tool.deep_engine

    measured, failed = measure(settings, options["deep_engine"], choices, interrupts)
    judged = {
        part.name: verdicts.judge(goals.GOALS[part.name], part.subjects, part.runs, part.readings)
        for part in measured
    }
    show_report(measured, judged, is_quick=options["quick"])
    document = report.document(machine, asked, measured)
    document["goals"] = {
        name: [asdict(verdict) for verdict in found] for name, found in judged.items()
    }
    json_path.write_text(json.dumps(document, indent=1) + "\n")
    click.echo(f"figures: {json_path}")
    sections = [(KINDS[part.name].what, part, judged[part.name]) for part in measured]
    title = chart_title(settings, machine)
    markdown_path = json_path.with_suffix(".md")
    markdown_path.write_text(markdown.document(title, sections))
    click.echo(f"sections: {markdown_path}")
    for part in measured:
        if KINDS[part.name].chart_bases:
            click.echo(draw_chart(chart_path, part, title))
    missing = options["subjects"] and any(one.skipped for part in measured for one in part.subjects)
    return 1 if failed or missing else 0


def show_report(
    measured: Sequence[Part], judged: dict[str, list[verdicts.Verdict]], is_quick: bool
) -> None:
    """Print the figures and what they say about the goals."""
    for part in measured:
        click.echo(f"\n{part.name}: {KINDS[part.name].what}\n")
        shown = Group(report.show_part(part), verdicts.table(judged[part.name]))
        report.show(Console(), shown)
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
        files=given("files", 20_000, 1000),
        many_files=given("many_files", 1_000_000, 10_000),
        idle_seconds=3.0 if quick else 30.0,
        cache_bytes=(16 if quick else 1024) * GIB,
    )


def measure(
    settings: Settings, deep_engine: str, choices: Sequence[Choice], interrupts: Interrupts
) -> tuple[list[Part], bool]:
    """Set up, measure and tear down each part, with a progress bar on stderr; and whether something
    failed. A part that can't be measured at all is left out where there are others.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task("starting", total=None)
    context = Context(
        settings,
        deep_engine,
        interrupts,
        say=lambda text: progress.update(task, description=text),
        warn=lambda text: progress.console.print(f"bench: {text}", markup=False, soft_wrap=True),
        expect=lambda steps: progress.reset(task, total=steps),
        advance=lambda: progress.advance(task),
    )
    measured, problems, failed = [], [], False
    with progress:
        for choice in choices:
            try:
                part, has_failed = parts.measure(choice, context)
            except BenchError as problem:
                context.warn(f"{choice.kind.name}: {problem}")
                problems.append(problem)
                continue
            measured.append(part)
            failed = failed or has_failed
    if not measured:
        raise problems[0]
    return measured, failed or bool(problems)


def draw_chart(path: Path, part: Part, title: str) -> str:
    """Draw if that is possible; returns the sentence to print about it."""
    if not chart.available():
        return "chart: not drawn, matplotlib is missing (the project's extra 'bench')"
    if part.name != "io":
        path = path.with_stem(f"{path.stem}-{part.name}")
    try:
        bases = KINDS[part.name].chart_bases
        chart.draw(path, part.cells, part.subjects, part.runs, title, bases)
    except BenchError as problem:
        return f"{part.name}: {problem}"
    return f"chart: {path}"


def chart_title(settings: Settings, machine: dict[str, Any]) -> str:
    """What the reader of a chart or of a table must know of the run."""
    rounds = f"{settings.rounds} round{'s' if settings.rounds > 1 else ''}"
    return (
        f"{settings.size_bytes // MIB} MiB or {settings.files:,} files each, {rounds} of "
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
