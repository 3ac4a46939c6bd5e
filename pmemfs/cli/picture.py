"""The map of `pmemfs pages --picture` as a file: drawn by matplotlib, which few need."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from pmemfs.cli.pagemap import By, heat_base, owner_text, pages_in, transfers
from pmemfs.errors import BadUsage, NoPicture, sentence_of
from pmemfs.observe.answers import PageMap
from pmemfs.text import printable
from pmemfs.units import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 64
MOST_CELLS = COLUMNS * 64
ENDINGS = (".svg", ".png")

_STATES = {"untouched": "#f2f2f2", "clean": "#4daf4a", "dirty": "#ff9f1c", "in use": "#d7263d"}
_OWNER_COLOURS = 20


def check_picture(path: str) -> None:
    """Raise BadUsage for what is no picture, and NoPicture if nothing can draw."""
    if os.path.splitext(path)[1].lower() not in ENDINGS:
        raise BadUsage(why=f"--picture draws a .svg or a .png, and '{path}' ends in neither")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        why = f"matplotlib is not installed; '{sys.executable} -m pip install matplotlib' does it"
        raise NoPicture(path=path, why=why) from None


def draw(report: PageMap, by: By, path: str, title: str) -> None:
    """Draw a map. Raises NoPicture."""
    # Not pyplot, which looks for a display.
    from matplotlib.figure import Figure

    count = -(-report.page_count // report.pages_per_cell)
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(10, 1.6 + max(1.2, rows * 0.1)), layout="constrained")
    axes = figure.subplots()
    _HOW[by](report, axes, rows)
    size = format_size(report.pages_per_cell * report.page_size_bytes)
    axes.set_title(f"{_plain(title)}: pages by {by}, {report.scheme}", loc="left")
    axes.set_xlabel(f"a cell is {size}; a row is {COLUMNS} cells")
    axes.set_ylabel("pfn")
    frames = COLUMNS * report.pages_per_cell * (report.page_size_bytes >> 12)
    step = max(1, rows // 8)
    places = range(0, rows, step)
    axes.set_yticks([row + 0.5 for row in places],
                    [f"{report.first_pfn + row * frames:#x}" for row in places])  # fmt: skip
    axes.set_xticks([])
    axes.invert_yaxis()
    try:
        figure.savefig(path)
    except OSError as error:
        raise NoPicture(path=path, why=sentence_of(error)) from None


def _grid(report: PageMap, rows: int, values: dict[int, float]) -> Any:
    import numpy as np

    grid = np.full(rows * COLUMNS, np.nan)
    grid[: -(-report.page_count // report.pages_per_cell)] = 0
    for cell, value in values.items():
        grid[cell] = value
    return grid.reshape(rows, COLUMNS)


def _draw_states(report: PageMap, axes: Axes, rows: int) -> None:
    """A colour for the strongest state of a cell, paler the fewer of its pages are in it."""
    import numpy as np
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    grid = _grid(report, rows, {})
    colours = np.ones((*grid.shape, 3))
    colours[~np.isnan(grid)] = to_rgb(_STATES["untouched"])
    for cell in report.cells:
        for name, count in (("in use", cell.in_use), ("dirty", cell.dirty), ("clean", cell.clean)):
            if count:
                share = 0.4 + 0.6 * count / pages_in(report, cell.cell)
                colour = np.array(to_rgb(_STATES[name]))
                colours[cell.cell // COLUMNS, cell.cell % COLUMNS] = 1 - share * (1 - colour)
                break
    axes.pcolormesh(colours)
    _show_legend(axes, [Patch(facecolor=colour, label=name) for name, colour in _STATES.items()])


def _draw_heat(by: By, report: PageMap, axes: Axes, rows: int) -> None:
    from matplotlib.colors import LogNorm

    heat: dict[int, float] = {
        cell.cell: transfers(cell, by) for cell in report.cells if transfers(cell, by)
    }
    grid = _grid(report, rows, heat)
    grid[grid == 0] = float("nan")
    axes.set_facecolor(_STATES["untouched"])
    most = max(heat.values(), default=heat_base(report, by))
    mesh = axes.pcolormesh(grid, norm=LogNorm(1, max(2, most)), cmap="inferno")
    figure = axes.figure
    assert figure is not None
    figure.colorbar(mesh, ax=axes, label=f"{by} of all pages of a cell")


def _draw_owners(report: PageMap, axes: Axes, rows: int) -> None:
    import matplotlib
    from matplotlib.patches import Patch

    shown = report.owners[: _OWNER_COLOURS - 1]
    numbers = {share.owner.inode: number for number, share in enumerate(shown, 1)}
    values: dict[int, float] = {
        cell.cell: numbers.get(cell.owner, _OWNER_COLOURS) for cell in report.cells
    }
    grid = _grid(report, rows, values)
    grid[grid == 0] = float("nan")
    axes.set_facecolor(_STATES["untouched"])
    colours = matplotlib.colormaps["tab20"]
    axes.pcolormesh(grid, cmap=colours, vmin=1, vmax=_OWNER_COLOURS)
    patches = [
        Patch(facecolor=colours((number - 1) / (_OWNER_COLOURS - 1)),
              label=_plain(owner_text(share.owner)))
        for number, share in enumerate(shown, 1)
    ]  # fmt: skip
    others = Patch(facecolor=colours(1.0), label="other files, and no file")
    is_hidden = report.other_pages or len(report.owners) > len(shown)
    _show_legend(axes, [*patches, *([others] if is_hidden else [])])


def _plain(text: str) -> str:
    """A text as it is: matplotlib takes what stands between dollars for mathematics."""
    return printable(text).replace("$", r"\$")


def _show_legend(axes: Axes, patches: list[Any]) -> None:
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


_HOW = {
    "state": _draw_states,
    "reads": lambda *given: _draw_heat("reads", *given),
    "writes": lambda *given: _draw_heat("writes", *given),
    "owner": _draw_owners,
}
