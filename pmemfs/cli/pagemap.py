"""The map of `pmemfs pages --map`: a letter for each cell, and a legend that says what it means.

Plain characters say everything; colours, where a terminal has them, only help to see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import ascii_lowercase
from typing import Literal, NamedTuple

from pmemfs.cli.layout import table_lines
from pmemfs.cli.output import Painted
from pmemfs.media.pagereport import PageOwner
from pmemfs.observe.answers import PageCell, PageMap
from pmemfs.units import format_size

By = Literal["state", "reads", "writes", "owner"]
Line = Sequence[Painted]

UNTOUCHED = "."
OTHERS = "+"
NOBODY = "-"
LEVELS = 9
"""Of transfers: a digit each."""

_FAINT = "2"
_STATE_COLOURS = {"c": "32", "d": "33", "u": "1;31"}
_HEAT_COLOURS = [f"30;48;5;{number}" for number in (17, 18, 54, 90, 126, 162, 202, 214, 226)]
_HEAT_COLOURS[:4] = [colour.replace("30;", "97;") for colour in _HEAT_COLOURS[:4]]
_OWNER_COLOURS = ("36", "33", "35", "32", "34", "31")

_PIPE_COLUMNS, _PIPE_LINES = 64, 16
_MOST_COLUMNS, _LEAST_COLUMNS, _MOST_LINES = 256, 8, 32
_MARGIN_COLUMNS = 16
"""For the number in front of each row."""
_LEGEND_LINES = 8


class Shape(NamedTuple):
    """How many cells a row has, and how many rows there may be."""

    columns: int
    lines: int


def shape_of(terminal: tuple[int, int] | None, by: By) -> Shape:
    """What fits a terminal, and leaves room for the legend. Columns are a power of two, so that
    rows begin at round numbers."""
    if terminal is None:
        return Shape(_PIPE_COLUMNS, _PIPE_LINES)
    columns, lines = terminal
    room = max(_LEAST_COLUMNS, min(columns - _MARGIN_COLUMNS, _MOST_COLUMNS))
    legend = _LEGEND_LINES * 2 if by == "owner" else _LEGEND_LINES
    return Shape(1 << (room.bit_length() - 1), min(max(lines - legend, 2), _MOST_LINES))


def map_lines(report: PageMap, by: By, columns: int) -> Iterator[Line]:
    """The map and its legend."""
    size = format_size(report.page_size_bytes)
    yield [Painted(f"{report.scheme}: {report.page_count} pages of {size}")]
    yield []
    cells = {cell.cell: cell for cell in report.cells}
    count = -(-report.page_count // report.pages_per_cell)
    frames = report.page_size_bytes >> 12
    paint = _painter(report, by)
    first_pfns = [
        f"{report.first_pfn + start * report.pages_per_cell * frames:#x}"
        for start in range(0, count, columns)
    ]
    margin = max(map(len, first_pfns), default=0)
    for pfn, start in zip(first_pfns, range(0, count, columns), strict=True):
        row = [paint(cells.get(cell)) for cell in range(start, min(start + columns, count))]
        yield [Painted(f"{pfn:>{margin}}  "), *_joined(row)]
    yield []
    yield from _legend(report, by, columns)


class _Painter:
    """What a cell looks like."""

    def __init__(self, report: PageMap, by: By) -> None:
        self.report, self.by = report, by
        self.base = heat_base(report, by) if by in ("reads", "writes") else 0
        self.letters = letters_of(report)

    def __call__(self, cell: PageCell | None) -> Painted:
        if cell is None:
            return Painted(UNTOUCHED, _FAINT)
        if self.by == "state":
            letter = state_letter(cell, pages_in(self.report, cell.cell))
            return Painted(letter, _STATE_COLOURS[letter.lower()])
        if self.by == "owner":
            letter = self.letters.get(cell.owner, OTHERS if cell.owner else NOBODY)
            return Painted(letter, owner_colour(letter))
        level = heat_level(transfers(cell, self.by), self.base)
        return Painted(str(level), _HEAT_COLOURS[level - 1]) if level else Painted("0", _FAINT)


_painter = _Painter


def pages_in(report: PageMap, cell: int) -> int:
    """The pages of a cell: the last one may have fewer."""
    return min(report.pages_per_cell, report.page_count - cell * report.pages_per_cell)


def state_letter(cell: PageCell, page_count: int) -> str:
    """The strongest state in a cell; a capital letter if all of its pages are in it."""
    for letter, count in (("u", cell.in_use), ("d", cell.dirty), ("c", cell.clean)):
        if count:
            return letter.upper() if count == page_count else letter
    return UNTOUCHED


def transfers(cell: PageCell, by: By) -> int:
    """What heats a cell."""
    return cell.reads if by == "reads" else cell.writes


def heat_base(report: PageMap, by: By) -> int:
    """So many times as many transfers make the next digit: what lets the hottest cell be a 9, or
    less if few counts differ."""
    hottest = max((transfers(cell, by) for cell in report.cells), default=0)
    base = 2
    while base**LEVELS <= hottest:
        base += 1
    return base


def heat_level(count: int, base: int) -> int:
    """The digit for some transfers: 0 for none, 1 from 1 on, 2 from `base`, 3 from base², …"""
    level = 0
    while count > 0 and level < LEVELS:
        count //= base
        level += 1
    return level


def letters_of(report: PageMap) -> dict[int, str]:
    """The letters of the largest owners, by inode."""
    inodes = (share.owner.inode for share in report.owners)
    return dict(zip(inodes, ascii_lowercase, strict=False))


def owner_colour(letter: str) -> str:
    """The colour of an owner; neighbours in the legend differ."""
    if letter not in ascii_lowercase:
        return _FAINT
    return _OWNER_COLOURS[ascii_lowercase.index(letter) % len(_OWNER_COLOURS)]


def owner_text(owner: PageOwner | None, inode: int = 0) -> str:
    """An owner for people: a path, or what is known instead; `inode` if the daemon says no more."""
    if owner is None:
        return f"inode {inode}" if inode else "-"
    if not owner.path:
        return f"inode {owner.inode} ({owner.note})" if owner.note else f"inode {owner.inode}"
    return f"{owner.path} (has left it)" if owner.has_left else owner.path


def _joined(row: list[Painted]) -> Iterator[Painted]:
    """Neighbours of one colour as one part, so that a line has few escapes."""
    text, colour = "", ""
    for part in row:
        if part.colour != colour and text:
            yield Painted(text, colour)
            text = ""
        text, colour = text + part.text, part.colour
    if text:
        yield Painted(text, colour)


def _legend(report: PageMap, by: By, columns: int) -> Iterator[Line]:
    pages = report.pages_per_cell
    size = format_size(pages * report.page_size_bytes)
    row = format_size(columns * pages * report.page_size_bytes)
    count = "1 page" if pages == 1 else f"{pages} pages"
    yield [Painted(f"A cell is {count}, {size}; a row is {row}, and begins at this pfn.")]
    if by == "state":
        yield from _state_legend()
    elif by == "owner":
        yield from _owner_legend(report)
    else:
        yield from _heat_legend(report, by)


def _state_legend() -> Iterator[Line]:
    names = {"c": "clean", "d": "dirty", "u": "in use"}
    line = [Painted(UNTOUCHED, _FAINT), Painted(" untouched")]
    for letter, name in names.items():
        line += [Painted("   "), Painted(letter, _STATE_COLOURS[letter]), Painted(f" {name}")]
    yield line
    yield [Painted("A mixed cell shows what comes last in this list. C, D, U: all of its pages.")]


def _heat_legend(report: PageMap, by: By) -> Iterator[Line]:
    base = heat_base(report, by)
    line = [Painted(UNTOUCHED, _FAINT), Painted(" untouched   "), Painted("0", _FAINT)]
    line.append(Painted(f" no {by}   "))
    for level in range(1, LEVELS + 1):
        line.append(Painted(str(level), _HEAT_COLOURS[level - 1]))
    yield [*line, Painted(f" from 1 to {base**LEVELS - 1} {by} of all pages of a cell")]
    yield [Painted(f"Each digit begins at {base} times as many as the one before: 1, {base}, "
                   f"{base**2}, …")]  # fmt: skip


def _owner_legend(report: PageMap) -> Iterator[Line]:
    yield [
        Painted("A mixed cell shows the owner of most of its touched pages. A page belongs to the")
    ]
    yield [Painted("file of its last transfer.")]
    yield []
    letters = letters_of(report)
    rows = [
        (letters[share.owner.inode], owner_text(share.owner), str(share.page_count),
         format_size(share.page_count * report.page_size_bytes))
        for share in report.owners if share.owner.inode in letters
    ]  # fmt: skip
    hidden = sum(share.page_count for share in report.owners[len(rows) :]) + report.other_pages
    if hidden:
        size = format_size(hidden * report.page_size_bytes)
        rows.append((f"{OTHERS} {NOBODY}", "other files, and no file", str(hidden), size))
    headings = ("", "OWNER", "PAGES", "SIZE")
    for number, line in enumerate(table_lines(rows, headings=headings, right={2, 3})):
        letter = rows[number - 1][0] if number else ""
        yield [Painted(line[:1], owner_colour(letter) if letter else ""), Painted(line[1:])]
