"""How the commands speak: tables for people, JSON for programs, warnings for both.

All output of all commands is made here. Invariant: what is said to people has no character that a
terminal would not show as it is, whoever chose the names and sentences in it. Without that, the
name of a file could clear the screen, or forge the rows of a table.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

import click

from pmemfs.errors import OutputLost
from pmemfs.text import printable

# rich takes longer to load than a command that prints JSON takes to run.
if TYPE_CHECKING:
    from rich.table import Table

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")

_PIPE_WIDTH = 1 << 20


def say(line: str = "", *, flush: bool = False) -> None:
    """One line."""
    print(printable(line), flush=flush)


def complain(sentence: str) -> None:
    """What went wrong."""
    _print_error(f"pmemfs: {printable(sentence)}")


def _print_error(line: str) -> None:
    """A line for standard error. Where nobody takes it the exit code has to say enough."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        _forget(sys.stderr)


class _HeardOutput:
    """Standard output whose failures are OutputLost, whoever writes: we, click or rich.

    click takes an OSError for one of its own, and ends the program with an exit code of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputLost(error) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputLost(error) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def heard_output() -> Iterator[None]:
    """All that is said meanwhile reaches somebody, or this ends by OutputLost."""
    stream = sys.stdout
    sys.stdout = cast(TextIO, _HeardOutput(stream))
    try:
        yield
        sys.stdout.flush()
    except OutputLost:
        _forget(stream)
        raise
    finally:
        sys.stdout = stream


def _forget(stream: TextIO) -> None:
    """Lose what a stream still holds. Python would try again at exit, and end with 120 itself."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def warn(sentence: str) -> None:
    """Something that a user should know, though the command goes on."""
    complain(f"warning: {sentence}")


def show_usage_error(error: click.ClickException) -> None:
    """What click has to say of a command line, which may have any words in it."""
    shown = io.StringIO()
    error.show(file=shown)
    for line in shown.getvalue().split("\n")[:-1]:
        _print_error(printable(line))


def print_json(value: Any) -> None:
    """A report for programs. It is in ASCII, and escapes the rest."""
    print(json.dumps(value, indent=2))


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values, one to a line."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts:
        table.add_row(printable(name), printable(str(value)))
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
        table.add_row(*(printable(str(cell)) for cell in row))
    _print(table, must_fit=text_columns is None)


def _print(table: Table, *, must_fit: bool = True) -> None:
    from rich.console import Console

    # A pipe gets whole lines, however wide; a terminal gets what fits.
    is_bounded = must_fit and sys.stdout.isatty()
    # No name is a picture: rich would make one of ":bomb:".
    console = Console(
        width=None if is_bounded else _PIPE_WIDTH, highlight=False, markup=False, emoji=False
    )
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().split("\n")[:-1]))
