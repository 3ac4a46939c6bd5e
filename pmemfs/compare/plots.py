"""The plots of the report, as SVG. Needs matplotlib, which the extra `bench` installs.

Every plot has the answers in the same colours and order. What is compared with the base is shown as
a ratio within one round, with a line from the lowest round to the highest: a reader sees at once
whether two answers differ by more than the machine's noise.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pmemfs.compare.rows import (
    ANSWERS,
    BASE,
    IO,
    ROWS,
    Reading,
    Row,
    cell_of,
    quantity,
    verdicts,
)
from pmemfs.errors import NeedsPackage
from pmemfs.units import KIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_INCHES = 10.0
COLOURS = ("#0072B2", "#E69F00", "#777777", "#009E73", "#CC79A7")
"""Colours that the colour-blind can tell apart (Okabe and Ito), one for each answer."""
_NOTHING = "#555555"


class Plot(NamedTuple):
    """A picture, and what it says."""

    title: str
    caption: str
    svg: str


def require_matplotlib() -> None:
    """Raise NeedsPackage where there is none; to be asked before anything is measured."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise NeedsPackage(
            what="--report",
            package="matplotlib",
            remedy="'pip install \"pmemfs[bench]\"' installs it, and --json reports without it",
        )


def plots(readings: Sequence[Reading]) -> Iterator[Plot]:
    """All plots of which something was measured."""
    yield Plot(
        "What page structures cost in memory",
        "On a logarithmic scale: a bar of twice the length is far more than twice as much. One "
        "structure has 64 bytes. Larger pages need fewer of them, and lose more of the pool to "
        "their alignment.",
        _bars(readings, ["in-pool", "in-dram", "in-dram-idle", "unusable"], is_log=True),
    )
    yield Plot(
        "Speed of reads and writes",
        f"Each point is the median of the ratios to {BASE} within one round, each line goes from "
        "the lowest to the highest. A line that crosses 1 shows no difference; the table below "
        "judges more strictly.",
        _ratios(readings),
    )
    yield Plot(
        "What pages in use give",
        "CPU time of a device's transfer into pinned pages, and by a buffer that is copied; what "
        "two files of 1 MiB leave behind while 4 KiB of them are pinned (a logarithmic scale). "
        "Without page structures nothing can be pinned.",
        _bars(readings, ["direct-cpu", "buffered-cpu", "kept-busy"], is_log=False),
    )


def _bars(readings: Sequence[Reading], keys: Sequence[str], *, is_log: bool) -> str:
    """A panel of horizontal bars for each row."""
    rows = [next(row for row in ROWS if row.key == key) for key in keys]
    figure = _figure(2.7)
    panels = figure.subplots(1, len(rows), sharey=True)
    for axes, row in zip(panels, rows, strict=True):
        # Panels that show the same have the same scale, so that their bars can be compared.
        alike = [one.key for one in rows if is_log or one.unit == row.unit]
        highest = _highest(readings, alike)
        _bar_panel(axes, row, readings, highest, is_log=is_log or row.unit == "bytes")
    # The panels share the axis; to turn it in each of them would turn it back.
    panels[0].invert_yaxis()
    return _svg(figure)


def _highest(readings: Sequence[Reading], keys: Sequence[str]) -> float:
    cells = [cell_of(readings, key, answer.name) for key in keys for answer in ANSWERS]
    return max([*(cell.spread.highest for cell in cells if cell.spread), 1.0])


def _bar_panel(
    axes: Axes, row: Row, readings: Sequence[Reading], highest: float, *, is_log: bool
) -> None:
    cells = [cell_of(readings, row.key, answer.name) for answer in ANSWERS]
    values = [cell.spread.median if cell.spread else 0.0 for cell in cells]
    for place, (cell, value) in enumerate(zip(cells, values, strict=True)):
        axes.barh(place, value, color=COLOURS[place], height=0.62)
        label = "fails" if cell.error else quantity(value, row.unit) if cell.spread else "-"
        end = max(value, cell.spread.highest) if cell.spread else 0
        axes.annotate(
            label, (end, place), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=9, color="#a3260c" if cell.error else "#1b1b1b",
        )  # fmt: skip
        spread = cell.spread
        if spread and spread.lowest < spread.highest:
            axes.plot([spread.lowest, spread.highest], [place, place], color=_NOTHING, lw=1.2)
    axes.set_yticks(range(len(ANSWERS)), [answer.name for answer in ANSWERS])
    axes.set_title(_titled(row), fontsize=10, loc="left")
    if is_log:
        # From below one structure up; nothing at all is a bar of no length.
        axes.set_xscale("symlog", base=4, linthresh=64)
        axes.set_xlim(0, max(highest, KIB) * 4**4)
    else:
        axes.set_xlim(0, highest * 1.55)
    axes.set_xticks([])
    axes.minorticks_off()
    _bare(axes)


def _titled(row: Row) -> str:
    names = {
        "in-pool": "in the pool", "in-dram": "in DRAM, at work", "in-dram-idle": "in DRAM, idle",
        "unusable": "pool lost otherwise", "direct-cpu": "into pinned pages",
        "buffered-cpu": "by a buffer", "kept-busy": "kept back by a pin",
    }  # fmt: skip
    return names[row.key]


def _ratios(readings: Sequence[Reading]) -> str:
    """For each row of I/O, the ratio of each answer to the base, and its spread."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in ROWS if row.group == IO]
    found = {(one.row, one.answer): one.ratio for one in verdicts(readings)}
    others = [answer for answer in ANSWERS if answer.name != BASE]
    figure = _figure(3.4)
    axes = figure.subplots()
    axes.axvline(1, color=COLOURS[0], lw=1.5)
    edges = [1.0]
    for at, row in enumerate(rows):
        for place, answer in enumerate(others):
            ratio = found.get((row.key, answer.name))
            if ratio is None:
                continue
            y = at + (place - (len(others) - 1) / 2) * 0.19
            colour = COLOURS[ANSWERS.index(answer)]
            axes.plot([ratio.lowest, ratio.highest], [y, y], color=colour, lw=2, alpha=0.6)
            axes.plot(
                ratio.median, y, "o", color=colour, ms=6, label=answer.name if at == 0 else None
            )
            edges += [ratio.lowest, ratio.highest]
    reach = max(max(edge, 1 / edge) for edge in edges if edge > 0) * 1.1
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / reach, reach)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.xaxis.set_major_locator(LogLocator(2, subs=(1.0, 1.25, 1.5) if reach < 3 else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color="#e5e5e5", lw=0.8)
    axes.set_xlabel(f"slower than {BASE}  ←  ratio  →  faster than {BASE}", fontsize=10)
    axes.grid(axis="x", color="#e5e5e5", lw=0.8)
    axes.set_axisbelow(True)
    _bare(axes, keeps_bottom=True)
    if len(edges) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10)
    return _svg(figure)


def _figure(height_inches: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Axes, *, keeps_bottom: bool = False) -> None:
    for side in ("top", "right", *(() if keeps_bottom else ("bottom",))):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)


def _svg(figure: Figure) -> str:
    """The picture as an element, without the declarations of a file of its own."""
    import matplotlib as mpl

    file = io.StringIO()
    # The same figures give the same file, and text is drawn, so that it fits on every machine.
    with mpl.rc_context({"svg.hashsalt": "pmemfs", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
