"""What a daemon of another version did not say: a value for the code, and null for programs.

The code goes on with 0, "" or nothing, so that no command has to ask at every member. But a program
that reads JSON must not take a 0 for what was counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
