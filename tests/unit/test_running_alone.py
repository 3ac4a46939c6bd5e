"""Tests that are to be alone wait for the others, and no test waits for itself."""

from __future__ import annotations

import fcntl
import sys
from contextlib import suppress
from pathlib import Path

from kit.commands import run_command

ROOT = Path(__file__).parents[2]


def test_a_run_within_a_test_does_not_wait_for_who_waits_to_be_alone() -> None:
    with open(ROOT / "pyproject.toml") as gate:
        # Where another process has it, it is the one that waits: for the end of this test.
        with suppress(BlockingIOError):
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        inner = "tests/unit/test_units.py"
        result = run_command(
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            ROOT / inner,
            timeout=200,
        )
    assert result.code == 0, result.out + result.err
