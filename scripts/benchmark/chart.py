"""The chart: for each cell one group of bars, each a subject's IOPS as a multiple of the base's.

Bars start at 1, the base: on a logarithmic axis "twice" and "half" are then equally long, up and
down.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.cells import Cell
from benchmark.errors import BenchError
from benchmark.report import BASES, Run, Spread, SubjectState, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 12, 6.4, 100
GROUP_WIDTH = 0.84
# colours that stay apart for colour-blind readers (Okabe and Ito)
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")


def available() -> bool:
    """Whether matplotlib is installed (the project's extra ``bench``)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw(
    path: Path,
    cells: Sequence[Cell],
    subjects: Sequence[SubjectState],
    runs: Sequence[Run],
    title: str,
) -> None:
    """Write the PNG. The base is ``loop`` if it was measured, else ``tmpfs``.

    Raises BenchError if there are not a base and a subject to compare with it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = {run.subject for run in runs if run.figures}
    base = next((name for name in BASES if name in measured), None)
    names = [one.name for one in subjects if one.name in measured and one.name != base]
    if base is None or not names:
        raise BenchError("no chart: it takes loop or tmpfs and one more subject to compare")
    ratios = {(one.cell, one.subject): one.ratios.get(base) for one in summarise(runs)}
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bar_width = GROUP_WIDTH / len(names)
    for index, name in enumerate(names):
        offset = (index - (len(names) - 1) / 2) * bar_width
        bars = {at + offset: ratios.get((cell.name, name)) for at, cell in enumerate(cells)}
        _draw_bars(axes, bars, bar_width, name, COLOURS[index % len(COLOURS)])
    _dress(axes, cells, base, title)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=9, frameon=False)
    figure.savefig(path, format="png")


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
            fontsize=8,
        )


def _dress(axes: "Axes", cells: Sequence[Cell], base: str, title: str) -> None:
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
    labels = [f"{cell.group}\n{cell.caption}".replace(" random", "\nrandom") for cell in cells]
    labels = [label.replace(" sequential", "\nsequential").replace(", ", ",\n") for label in labels]
    axes.set_xticks(range(len(cells)), labels, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"IOPS as a multiple of {base} (log)")
    axes.set_title(title, fontsize=10, loc="left")
