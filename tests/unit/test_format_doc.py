"""docs/format.md is generated, and fresh."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import run_command

SCRIPT = Path(__file__).parents[2] / "scripts/format-doc"


def test_the_format_document_says_what_the_declarations_say() -> None:
    result = run_command(sys.executable, SCRIPT, "--check")
    assert result.code == 0, result.err
