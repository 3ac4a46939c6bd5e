"""What is generated is fresh: documents, the native structures, the manual and completion."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kit.commands import run_command

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    "script", ["api-docs", "format-doc", "format-native", "man-pages", "completions"]
)
def test_what_is_generated_says_what_the_declarations_say(script: str) -> None:
    result = run_command(sys.executable, SCRIPTS / script, "--check")
    assert result.code == 0, result.err
