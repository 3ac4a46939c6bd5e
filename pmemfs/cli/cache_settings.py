"""The settings of a cache as options, for `create` and `cache set`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pmemfs.cli.options import OneOf
from pmemfs.errors import BadSize
from pmemfs.units import format_size, parse_size

POLICIES = ("write-back", "write-through", "write-around", "read-only")
_POLICIES_ELSEWHERE = {
    "writeback": "write-back", "wb": "write-back", "back": "write-back",
    "writethrough": "write-through", "wt": "write-through", "through": "write-through",
    "writearound": "write-around", "wa": "write-around", "around": "write-around",
    "ro": "read-only", "readonly": "read-only", "none": "write-around",
}  # fmt: skip
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}
_MOST_SECONDS = 1 << 31
MOST_READ_AHEAD_BYTES = 16 << 20


class _Percent(click.ParamType[int]):
    """A share, such as 20%."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).removesuffix("%")
        if not (text.isascii() and text.isdecimal() and len(text) < 4 and 1 <= int(text) <= 100):
            self.fail(f"'{value}' is not from 1% to 100%", param, ctx)
        return int(text)


class _Seconds(click.ParamType[int]):
    """A time, such as 30s or 5m; in whole seconds."""

    name = "seconds"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().lower()
        number = text.rstrip("smh")
        factor = _SECONDS.get(text[len(number) :])
        is_number = number.isascii() and number.isdecimal() and len(number) < 10
        if factor is None or not is_number:
            self.fail(f"'{value}' is not a time, such as 30s, 5m or 1h", param, ctx)
        seconds = int(number) * factor
        if not self._least <= seconds <= _MOST_SECONDS:
            self.fail(f"{value} is not from {self._least}s to {_MOST_SECONDS}s", param, ctx)
        return seconds


class _SizeOrNone(click.ParamType[int]):
    """A size, or 0 for none."""

    name = "size"

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value).strip() in ("0", "off", "none"):
            return 0
        try:
            size_bytes = parse_size(str(value))
        except BadSize as error:
            self.fail(str(error), param, ctx)
        if size_bytes > self._most_bytes:
            self.fail(f"{value} is more than {format_size(self._most_bytes)}", param, ctx)
        return size_bytes


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all settings; what is not given is None."""
    options = (
        click.option("--policy", type=OneOf(POLICIES, elsewhere=_POLICIES_ELSEWHERE),
                     help="Where a write goes before it is answered: to the pool, to the pool and "
                     "the origin, to the origin alone, or nowhere."),
        click.option("--max-dirty", "max_dirty_percent", type=_Percent(), metavar="PERCENT",
                     help="More dirty blocks than this share make writes wait; a new cache: 50%."),
        click.option("--max-dirty-age", "max_dirty_age_seconds", type=_Seconds(0),
                     metavar="TIME",
                     help="How old a dirty block may get, such as 30s or 5m; 0: any age; a new "
                     "cache: 30s."),
        click.option("--origin-timeout", "origin_timeout_seconds", type=_Seconds(1),
                     metavar="TIME", help="How long a miss waits for the origin before it fails; a "
                     "new cache: 30s."),
        click.option("--read-ahead", "read_ahead_bytes",
                     type=_SizeOrNone(MOST_READ_AHEAD_BYTES), metavar="SIZE",
                     help="Fetch so much ahead of a sequential reader; 0: nothing; a new cache: "
                     "1M."),
        click.option("--bypass-sequential", "bypass_bytes", type=_SizeOrNone((1 << 63) - 1),
                     metavar="SIZE",
                     help="Keep no blocks of longer sequential reads; 0, as in a new cache: keep "
                     "them."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def as_option(name: str) -> str:
    """How a setting is called on the command line."""
    words = {
        "max_dirty_percent": "max-dirty", "max_dirty_age_seconds": "max-dirty-age",
        "origin_timeout_seconds": "origin-timeout", "read_ahead_bytes": "read-ahead",
        "bypass_bytes": "bypass-sequential",
    }  # fmt: skip
    return f"--{words.get(name, name)}"
