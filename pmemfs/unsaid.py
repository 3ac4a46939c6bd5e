"""Reports as JSON values, and what a daemon of another version did not say in them: a value for
the code, and null for programs.

The code goes on with 0, "" or nothing, so that no command has to ask at every member. But a program
that reads JSON must not take a 0 for what was counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Unsaid:
    """Marks a value that nobody has said."""


class UnsaidInt(Unsaid, int):
    """A number, or a yes or no."""


class UnsaidFloat(Unsaid, float):
    """A number."""


class UnsaidText(Unsaid, str):
    """A text."""


class UnsaidList(Unsaid, tuple[Any, ...]):
    """Several values, of which there is none."""


class UnsaidMapping(Unsaid, dict[Any, Any]):
    """Names and values, of which there is none."""


def with_nulls(value: Any) -> Any:
    """Values for JSON, with None for what nobody has said."""
    if isinstance(value, Unsaid):
        return None
    if isinstance(value, Mapping):
        return {key: with_nulls(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(item) for item in value]
    return value


def json_values(report: NamedTuple) -> dict[str, Any]:
    """A report as JSON values: what it is made of by name, however deep."""
    return {name: _json_value(member) for name, member in report._asdict().items()}


def _json_value(member: Any) -> Any:
    if isinstance(member, Unsaid):
        return member
    if hasattr(member, "_asdict"):
        return json_values(member)
    if isinstance(member, dict):
        return {key: _json_value(value) for key, value in member.items()}
    if isinstance(member, list | tuple):
        return [_json_value(item) for item in member]
    return member
