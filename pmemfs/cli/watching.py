"""Reports that come again and again, until somebody has seen enough: --watch and --count."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from pmemfs.cli.options import Count
from pmemfs.errors import BadUsage

_LEAST_SECONDS, _MOST_SECONDS = 0.01, 86400.0


def parse_seconds(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """The time between two reports; a click error for what is none."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        why = f"{text!r} is not a number of seconds; the mount goes before it"
        raise click.BadParameter(why) from None
    if not _LEAST_SECONDS <= seconds <= _MOST_SECONDS:
        raise click.BadParameter(f"{text} is not from {_LEAST_SECONDS} to {_MOST_SECONDS:.0f}")
    return seconds


def watch_options(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options --watch, as `interval_seconds`, and --count; `what` says what is reported."""

    def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
        command = click.option("--count", type=Count(1, 1 << 31), metavar="N",
                               help="End --watch after N reports.")(command)  # fmt: skip
        return click.option(
            "--watch",
            "interval_seconds",
            is_flag=False,
            flag_value="1",
            callback=parse_seconds,
            metavar="[SECONDS]",
            help=f"Report again every so many seconds (1){what}, until Ctrl-C.",
        )(command)

    return with_options


def check_watch(interval_seconds: float | None, count: int | None) -> None:
    """Raise BadUsage where --count has nothing to count."""
    if count is not None and interval_seconds is None:
        raise BadUsage(why="--count says how often --watch reports: give --watch, too")


def ticks(interval_seconds: float, count: int | None) -> Iterator[None]:
    """The instants of reports: the first at once, then one after each interval."""
    due = time.monotonic()
    yield
    for _ in range(count - 1) if count else itertools.count():
        # What a late answer made late is not caught up.
        due = max(due + interval_seconds, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        yield
