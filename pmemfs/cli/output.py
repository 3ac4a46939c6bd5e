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


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows under headings; numbers are right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = list(rows)
    for position, column in enumerate(columns):
        is_number = all(isinstance(row[position], int | float) for row in rows)
        table.add_column(column, justify="right" if rows and is_number else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    _print(table)


def warn(sentence: str) -> None:
    """Something that a user should know, though the command goes on."""
    print(f"pmemfs: warning: {sentence}", file=sys.stderr)


def _print(table: Table) -> None:
    from rich.console import Console

    # A pipe gets whole lines, however wide; a terminal gets what fits.
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else 1000, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
