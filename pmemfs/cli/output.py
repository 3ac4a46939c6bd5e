"""How the commands speak: tables for people, JSON for programs, errors and warnings for both.

All output of all commands is made here. Invariant: what is said to people has no character that a
terminal would not show as it is, whoever chose the names and sentences in it. Without that, the
name of a file could clear the screen, or forge the rows of a table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import errorcode
from typing import Any, NamedTuple, TextIO, cast

from pmemfs.cli.layout import natural_columns, table_lines
from pmemfs.errors import OutputLost, PmemfsError
from pmemfs.text import printable
from pmemfs.unsaid import with_nulls

_LINE_START = "\r\x1b[K"
"""Back to the start of a terminal's line, which becomes empty."""
_SCREEN_START, _LINE_END, _SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"
"""The first place of a terminal; what stands behind in its line, and in all lines, goes."""
_MOST_DIGITS = 9


class Manner:
    """How this command line wants to be spoken to."""

    def __init__(self) -> None:
        self.is_json = False
        """Errors and warnings are JSON too, one object to a line."""
        self.is_quiet = False
        """Nothing is said but errors."""
        self.is_verbose = False
        """What is done is said, and why."""


manner = Manner()
"""Of the command that runs; `speaking` makes it afresh for each."""


@contextmanager
def speaking(*, as_json: bool) -> Iterator[None]:
    """Be plain, or speak JSON from before the command line is read, which may be wrong itself."""
    vars(manner).update(vars(Manner()), is_json=as_json)
    try:
        yield
    finally:
        vars(manner).update(vars(Manner()))


def say(line: str = "", *, flush: bool = False) -> None:
    """One line."""
    if not manner.is_quiet:
        print(printable(line), flush=flush)


def begin_line() -> None:
    """After an interrupt: a terminal shows ^C where the next line is to begin."""
    if sys.stderr.isatty():
        print(_LINE_START, end="", file=sys.stderr)


def complain(sentence: str, *, exit_code: int, error: BaseException | None = None) -> None:
    """What went wrong, on standard error: a sentence, or for programs a line of JSON.

    Standard output has reports only, so whoever reads one there never takes an error for it.
    """
    if not manner.is_json:
        _print_error(f"pmemfs: {printable(sentence)}")
        return
    number = getattr(error, "errno", None)
    _print_json_error(
        {
            "error": error.kind if isinstance(error, PmemfsError) else type(error).__name__,
            "message": sentence,
            "exit_code": exit_code,
            "errno": errorcode.get(number) if number else None,
        }
    )


def warn(sentence: str) -> None:
    """Something that a user should know, though the command goes on."""
    if manner.is_quiet:
        return
    if manner.is_json:
        _print_json_error({"warning": sentence})
    else:
        _print_error(f"pmemfs: warning: {printable(sentence)}")


def note(sentence: str) -> None:
    """What is done, and why, for whoever has asked for more by -v. On standard error."""
    if not manner.is_verbose or manner.is_quiet:
        return
    if manner.is_json:
        _print_json_error({"note": sentence})
    else:
        _print_error(f"pmemfs: {printable(sentence)}")


def _print_json_error(value: dict[str, Any]) -> None:
    import json

    _print_error(json.dumps(value))


def _print_error(line: str) -> None:
    """A line for standard error. Where nobody takes it the exit code has to say enough."""
    try:
        print(line, file=sys.stderr)
    except OSError:
        _forget(sys.stderr)


class _HeardOutput:
    """Standard output whose failures are OutputLost, whoever writes: we or click.

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


def print_json(value: Any) -> None:
    """A report for programs. It is in ASCII, and escapes the rest; null is what nobody has said."""
    import json

    if not manner.is_quiet:
        print(json.dumps(with_nulls(value), indent=2))


def print_json_line(value: Any) -> None:
    """One of several reports for programs, which read them as they come."""
    import json

    if not manner.is_quiet:
        print(json.dumps(with_nulls(value)), flush=True)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values, one to a line."""
    rows = [(printable(name), printable(str(value))) for name, value in facts]
    _print_lines(table_lines(rows, width=_width()))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    text_columns: int | None = None,
    spare: Sequence[str] = (),
) -> None:
    """Rows under headings; numbers are right-aligned.

    A terminal that is too narrow goes without the `spare` columns, the first of them first.

    With `text_columns`, all columns after so many are of numbers, written out, and no terminal is
    too narrow to show them whole.
    """
    rows = list(rows)
    width = _width() if text_columns is None else None
    for column in spare if width is not None else ():
        shown = [[printable(str(cell)) for cell in row] for row in (columns, *rows)]
        if natural_columns(shown) <= (width or 0):
            break
        at = columns.index(column)
        columns = [*columns[:at], *columns[at + 1 :]]
        rows = [[*row[:at], *row[at + 1 :]] for row in rows]
    right = {
        position
        for position in range(len(columns))
        if (
            rows and all(isinstance(row[position], int | float) for row in rows)
            if text_columns is None
            else position >= text_columns
        )
    }
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    _print_lines(table_lines(cells, headings=columns, right=right, width=width))


class Painted(NamedTuple):
    """A part of a line in a colour, as `ESC [ … m` has it; "" for the terminal's own."""

    text: str
    colour: str = ""


def print_painted(
    lines: Iterable[Sequence[Painted]], *, in_colour: bool, instead: bool = False
) -> None:
    """Lines of painted parts; `instead` of all that the terminal shows.

    Whoever chose the texts, only colours of ours are obeyed.
    """
    if manner.is_quiet:
        return
    end = _LINE_END if instead else ""
    shown = [f"{''.join(_painted(part, in_colour) for part in line)}{end}" for line in lines]
    if instead:
        # Over what was there and not after clearing it, so that nothing flickers.
        print(_SCREEN_START, end="")
    print("\n".join(shown))
    if instead:
        print(_SCREEN_END, end="", flush=True)


def _painted(part: Painted, in_colour: bool) -> str:
    text = printable(part.text)
    return f"\x1b[{part.colour}m{text}\x1b[0m" if in_colour and part.colour else text


def wants_colour(wish: str) -> bool:
    """Whether to paint: `always`, `never`, or (`auto`) on a terminal, unless NO_COLOR is set."""
    if wish != "auto":
        return wish == "always"
    is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return is_terminal() and not is_plain


def is_terminal() -> bool:
    """Whether what is said goes to a terminal."""
    return sys.stdout.isatty()


def terminal_size() -> tuple[int, int] | None:
    """The columns and lines of a terminal; None for a pipe, and if the terminal has not said."""
    columns = _width()
    lines = os.get_terminal_size(sys.stdout.fileno()).lines if columns else 0
    return (columns, lines) if columns and lines else None


def _print_lines(lines: Iterable[str]) -> None:
    if not manner.is_quiet:
        for line in lines:
            print(line)


def _width() -> int | None:
    """The columns of a terminal; None for a pipe, which gets whole lines, however wide."""
    if not sys.stdout.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    # Of more digits Python makes no number. A terminal that has not been told its size has 0.
    is_number = asked.isascii() and asked.isdecimal() and len(asked) <= _MOST_DIGITS
    asked_columns = int(asked) if is_number else 0
    return asked_columns or os.get_terminal_size(sys.stdout.fileno()).columns or None


@contextmanager
def progress_line() -> Iterator[Callable[[str, int, int], None]]:
    """A line that says how far something is, for whoever waits at a terminal; it goes away."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    shown = ""

    def update(what: str, done: int, total: int) -> None:
        nonlocal shown
        line = f"{printable(what)}: {done * 100 // max(total, 1)} %"
        if line != shown:
            shown = line
            print(f"{_LINE_START}{line}", end="", file=sys.stderr, flush=True)

    try:
        yield update
    finally:
        if shown:
            print(_LINE_START, end="", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that says how much of so many bytes is done, for whoever waits at a terminal."""
    if not sys.stderr.isatty() or manner.is_quiet:
        yield lambda *_: None
        return
    import click

    with ExitStack() as stack:
        bar = None

        def update(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                label = printable(what)
                bar = stack.enter_context(
                    click.progressbar(length=total, label=label, file=sys.stderr)
                )
            bar.update(done - bar.pos)

        yield update
