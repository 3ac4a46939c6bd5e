"""Tables in columns, as wide as what is in them; on a terminal, no wider than it is.

Only text is broken, at spaces where that is possible: no number is. Where not even that helps,
each row becomes a list of its facts, so that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

_GAP = "  "
_LEAST_COLUMNS = 12
"""No column of text becomes narrower than that."""


def table_lines(
    rows: Sequence[Sequence[str]],
    *,
    headings: Sequence[str] = (),
    right: Collection[int] = (),
    width: int | None = None,
) -> Iterator[str]:
    """The lines of a table; columns in `right` are right-aligned.

    `width` is that of the terminal, in its columns; None for as wide as it takes.
    """
    all_rows = [headings, *rows] if headings else rows
    if not all_rows:
        return
    natural = [max(map(columns_of, column)) for column in zip(*all_rows, strict=True)]
    widths = _fitted(natural, right, width)
    if widths is None:
        yield from _records(rows, headings)
        return
    for row in all_rows:
        yield from _row_lines(row, widths, right)


def natural_columns(rows: Sequence[Sequence[str]]) -> int:
    """How many columns of a terminal a table takes that nothing is broken in."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: two for most letters of East Asia."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(
        0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text
    )


def _fitted(natural: list[int], right: Collection[int], width: int | None) -> list[int] | None:
    """The widths of columns of which the widest text gives way first; None if none can."""
    widths = list(natural)
    if width is None:
        return widths
    texts = [position for position in range(len(widths)) if position not in right]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        widest = max(texts, key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= _LEAST_COLUMNS:
            return None
        widths[widest] -= 1
    return widths


def _records(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> Iterator[str]:
    """Each row as lines of "HEADING  cell"; an empty line between two rows."""
    for number, row in enumerate(rows):
        if number and headings:
            yield ""
        names = headings or row[:1]
        widest = max(map(columns_of, names))
        cells = row if headings else row[1:]
        for name, cell in zip(names, cells, strict=False):
            yield f"{_padded(name, widest)}{_GAP}{cell}".rstrip()


def _row_lines(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> Iterator[str]:
    broken = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
    for number in range(max(map(len, broken))):
        cells = [lines[number] if number < len(lines) else "" for lines in broken]
        shown = (
            _padded(cell, width, is_right=position in right)
            for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        yield _GAP.join(shown).rstrip()


def _padded(text: str, width: int, *, is_right: bool = False) -> str:
    spaces = " " * (width - columns_of(text))
    return spaces + text if is_right else text + spaces


def _broken(text: str, width: int) -> list[str]:
    """A text on lines of at most so many columns, broken at spaces where that is possible."""
    lines = []
    while columns_of(text) > width:
        fitting = width
        while columns_of(text[:fitting]) > width:
            fitting -= 1
        at = text.rfind(" ", 0, fitting + 1)
        if at <= 0:
            at = max(fitting, 1)
        lines.append(text[:at].rstrip())
        text = text[at:].lstrip()
    return [*lines, text]
