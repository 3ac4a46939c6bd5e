"""Options that several commands have, and the kinds of values that options take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from pmemfs.cli import output
from pmemfs.cli.catalogue import VERSION_LINE, VERSION_OPTIONS
from pmemfs.text import did_you_mean
from pmemfs.version import VERSION


class OneOf(click.Choice[str]):
    """One of some words; of any other, the sentence says which it is near to.

    `same` has other ways to write a word, `elsewhere` what others call it, which is only advice.
    """

    def __init__(
        self,
        choices: Sequence[str],
        *,
        same: Mapping[str, str] | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(choices)
        self._same = same or {}
        self._elsewhere = elsewhere

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word. Raises BadParameter."""
        word = self._same.get(str(value).lower(), str(value))
        if word not in self.choices:
            meant = did_you_mean(word, self.choices, self._elsewhere)
            self.fail(f"'{value}' is none of {', '.join(self.choices)}{meant}", param, ctx)
        return word


class Count(click.ParamType[int]):
    """A whole number of some range."""

    name = "count"

    def __init__(self, least: int, most: int) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number. Raises BadParameter."""
        try:
            number = int(value)
        except ValueError:
            self.fail(f"'{value}' is not a whole number", param, ctx)
        if not self._least <= number <= self._most:
            self.fail(f"{value} is not from {self._least} to {self._most}", param, ctx)
        return number


def _be_quiet(_: click.Context, __: click.Parameter, is_set: bool) -> None:
    if is_set:
        output.manner.is_quiet = True


def _be_verbose(_: click.Context, __: click.Parameter, is_set: bool) -> None:
    if is_set:
        output.manner.is_verbose = True


def _is_json(_: click.Context, __: click.Parameter, is_set: bool) -> bool:
    """Whether JSON is asked for, before the name of the command or after it."""
    output.manner.is_json |= is_set
    return output.manner.is_json


def manner_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command, before its name and after it, that say how much is said."""
    for option in (
        click.version_option(VERSION, *VERSION_OPTIONS, message=VERSION_LINE),
        click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_be_verbose,
                     help="Say more: what is done, and why."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_be_quiet,
                     help="Say nothing but errors."),
    ):  # fmt: skip
        command = option(command)
    return command


def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that reports: `manner_options`, and JSON as its `as_json`."""
    json_option = click.option("--json", "as_json", is_flag=True, callback=_is_json,
                               help="Print JSON for programs; errors too.")  # fmt: skip
    return json_option(manner_options(command))
