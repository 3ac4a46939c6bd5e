"""docs/limits.md says the numbers of the code."""

from __future__ import annotations

import importlib
import re
from datetime import UTC, datetime, timedelta

import pytest

from kit.documents import ROOT
from pmemfs.units import GIB, KIB, MIB, TIB
from pmemfs.volume.fs.attributes import _TIME_LIMIT

LIMITS = (ROOT / "docs/limits.md").read_text()
UNITS = {"": 1, "bytes": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
WORDS = {"four": 4}
CONSTANT = re.compile(r"`((?:[a-z_]+\.)+_?[A-Z][A-Z_]+)`")


def numbers(text: str) -> list[int]:
    """All numbers of a text, with their units: [4096, 2097152] of "4 KiB or 2 MiB"."""
    for word, number in WORDS.items():
        text = text.replace(word, str(number))
    found = re.findall(r"\b(\d+)(?: (bytes|[KMGT]iB)|\b(?![.\d]))", text)
    return [int(number) * UNITS[unit] for number, unit in found]


def constant(name: str) -> object:
    """The constant with that name, below `pmemfs`."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"pmemfs.{module}"), attribute)


ROWS = [
    (match[1], line.rpartition(match[0])[0])
    for line in LIMITS.splitlines()
    for match in [CONSTANT.search(line)]
    if match
]


def test_most_limits_name_a_constant() -> None:
    assert len(ROWS) >= 20


@pytest.mark.parametrize(("name", "said"), ROWS, ids=[name for name, _ in ROWS])
def test_a_limit_is_what_its_constant_says(name: str, said: str) -> None:
    value = constant(name)
    wanted = list(value) if isinstance(value, tuple) else [value]
    assert set(wanted) <= set(numbers(said)), f"{name} is {value}"


def test_the_first_and_the_last_time_are_those_that_can_be_stored() -> None:
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    reach = timedelta(microseconds=_TIME_LIMIT // 1000)
    assert f"{(epoch - reach).date()} to {(epoch + reach).date()}" in LIMITS
