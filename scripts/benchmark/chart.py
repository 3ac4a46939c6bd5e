"""The chart: for each cell one group of bars, each a subject's IOPS as a multiple of the base's.

Bars start at 1, the base: on a logarithmic axis "twice" and "half" are then equally long, up and
down. A cell's base is the first of those named (``loop``, ``tmpfs``) that was measured in it; where
that is another than the axis's, the cell's label says so.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from benchmark.errors import BenchError
from benchmark.report import BASES, Run, Spread, SubjectState, Workload, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_WIDTH_INCHES, CELL_WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 16, 1.2, 6.8, 100
GROUP_WIDTH = 0.84
LABEL_CHARACTERS = 20
# colours that stay apart for colour-blind readers (Okabe and Ito), and two greys
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"),
    *("#000000", "#777777", "#bbbbbb"),
)


def available() -> bool:
    """Whether matplotlib is installed (the project's extra ``bench``)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(
    path: Path,
    cells: Sequence[Workload],
    subjects: Sequence[SubjectState],
    runs: Sequence[Run],
    title: str,
    bases: Sequence[str] = BASES,
) -> None:
    """Write the PNG, of the cells in which a base and something to compare with it were measured.

    Raises BenchError if there is no such cell.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base_of = cell_bases(runs, bases)
    ratios = {
        (one.cell, one.subject): one.ratios.get(base_of[one.cell])
        for one in summarise(runs)
        if one.cell in base_of and one.subject != base_of[one.cell]
    }
    shown = [cell for cell in cells if any(name == cell.name for name, _ in ratios)]
    names = [one.name for one in subjects if any(name == one.name for _, name in ratios)]
    if not shown:
        raise BenchError(f"no chart: it takes {' or '.join(bases)} and one more subject to compare")
    width_inches = max(LEAST_WIDTH_INCHES, CELL_WIDTH_INCHES * len(shown))
    figure = Figure(figsize=(width_inches, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bar_width = GROUP_WIDTH / len(names)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * bar_width
        bars = {at + offset: ratios.get((cell.name, name)) for at, cell in enumerate(shown)}
        _draw_bars(axes, bars, bar_width, name, COLOURS[index % len(COLOURS)])
    _dress(axes, shown, [base_of[cell.name] for cell in shown], title)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.savefig(path, format="png")


def cell_bases(runs: Sequence[Run], bases: Sequence[str] = BASES) -> dict[str, str]:
    """For each cell in which one was measured, the first of ``bases`` that was."""
    measured = {(run.cell, run.subject) for run in runs if run.figures}
    return {cell: base for base in reversed(bases) for cell, name in measured if name == base}


def _draw_bars(
    axes: "Axes", bars: Mapping[float, Spread | None], width: float, name: str, colour: str
) -> None:
    """Bars of one subject, at their places, with whiskers from the lowest round to the highest."""
    shown = {at: ratio for at, ratio in bars.items() if ratio and ratio.lowest > 0}
    medians = [ratio.median for ratio in shown.values()]
    axes.bar(
        list(shown), [one - 1 for one in medians], width * 0.94, bottom=1, color=colour, label=name
    )
    below = [ratio.median - ratio.lowest for ratio in shown.values()]
    above = [ratio.highest - ratio.median for ratio in shown.values()]
    axes.errorbar(
        list(shown), medians, [below, above], fmt="none", ecolor="#444444", capsize=2, lw=0.9
    )
    for at, ratio in shown.items():
        up = ratio.median >= 1
        axes.annotate(
            f"{ratio.median:.2g}" if ratio.median < 10 else f"{ratio.median:.0f}",
            (at, ratio.highest if up else ratio.lowest),
            xytext=(0, 3 if up else -3),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            fontsize=7,
        )


def _dress(axes: "Axes", cells: Sequence[Workload], bases: Sequence[str], title: str) -> None:
    """Axes, grid and words. The first cell's base is the axis's; cells with another say so."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.margins(x=0.02, y=0.08)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.yaxis.set_minor_formatter("")
    axes.grid(axis="y", which="major", color="#cccccc", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.axhline(1, color="black", linewidth=1.2)
    for edge in range(1, len(cells)):
        axes.axvline(edge - 0.5, color="#e5e5e5", linewidth=0.8)
    labels = [
        _label(cell, "" if base == bases[0] else f"(x {base})")
        for cell, base in zip(cells, bases, strict=True)
    ]
    axes.set_xticks(range(len(cells)), labels, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"IOPS as a multiple of {bases[0]} (log)")
    axes.set_title(title, fontsize=10, loc="left")


def _label(cell: Workload, remark: str) -> str:
    """The cell's name in narrow lines."""
    parts = (cell.group, cell.caption, remark)
    return "\n".join(line for part in parts for line in wrap(part, LABEL_CHARACTERS))
