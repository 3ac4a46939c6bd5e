"""How the commands speak: tables for people, JSON for programs, warnings for both."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

# rich takes longer to load than a command that prints JSON takes to run.
if TYPE_CHECKING:
    from rich.table import Table

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def print_json(value: Any) -> None:
    """A report for programs."""
    print(json.dumps(value, indent=2))


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values, one to a line."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts:
        table.add_row(name, str(value))
    _print(table)


def print_json_line(value: Any) -> None:
    """One of several reports for programs, which read them as they come."""
    print(json.dumps(value), flush=True)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int | None = None
) -> None:
    """Rows under headings; numbers are right-aligned.

    With `text_columns`, all columns after so many are of numbers, written out, and no terminal is
    too narrow to show them whole.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = list(rows)
    for position, column in enumerate(columns):
        is_number = all(isinstance(row[position], int | float) for row in rows)
        if text_columns is not None:
            is_number = position >= text_columns
        table.add_column(column, justify="right" if rows and is_number else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    _print(table, must_fit=text_columns is None)


def warn(sentence: str) -> None:
    """Something that a user should know, though the command goes on."""
    print(f"pmemfs: warning: {sentence}", file=sys.stderr)


def _print(table: Table, *, must_fit: bool = True) -> None:
    from rich.console import Console

    # A pipe gets whole lines, however wide; a terminal gets what fits.
    is_bounded = must_fit and sys.stdout.isatty()
    console = Console(width=None if is_bounded else 1000, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
