"""The quick tier has a few mounts of each kind, and long files come first in every run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kit.commands import run_command
from kit.mounts import ENGINES

ROOT = Path(__file__).parents[2]
END_TO_END = "tests/endtoend/"
BLOCK, FS = f"{END_TO_END}test_dd.py", f"{END_TO_END}test_fs_lifecycle.py"
SHORT = "tests/unit/test_units.py"


def collected(*words: str) -> list[str]:
    """The tests that pytest would run, in its order."""
    result = run_command(
        sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
        f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}",
        *words, *(str(ROOT / name) for name in (SHORT, BLOCK, FS)),
    )  # fmt: skip
    assert result.code == 0, result.out + result.err
    return re.findall(r"^(tests/\S+::.+)$", result.out, re.MULTILINE)


def test_the_quick_tier_mounts_each_mode_with_each_engine_and_leaves_other_mounts_out() -> None:
    (expression,) = re.findall(r"-m '(.+?)'", (ROOT / "scripts/test").read_text())
    quick = collected("-m", expression)
    for file in (BLOCK, FS):
        for engine in map(str, ENGINES):
            assert [name for name in quick if name.startswith(file) and engine in name], (
                f"{file} with {engine}"
            )
    left_out = set(collected()) - set(quick)
    assert len([name for name in left_out if name.startswith(FS)]) > 20


def test_files_with_slow_tests_come_before_those_without() -> None:
    files = list(dict.fromkeys(name.partition("::")[0] for name in collected()))
    assert files == [FS, SHORT, BLOCK]
