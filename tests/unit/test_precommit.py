"""What runs before each commit is what CI runs first, and it runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from kit.commands import BIN, run_command
from kit.documents import ROOT

CONFIGURATION = ROOT / ".pre-commit-config.yaml"
HOOKS = [
    hook for repo in yaml.safe_load(CONFIGURATION.read_text())["repos"] for hook in repo["hooks"]
]


def test_the_hooks_begin_with_what_the_whole_suite_begins_with() -> None:
    script = (ROOT / "scripts/test").read_text().splitlines()
    first = [re.split(r" [|&]", line)[0] for line in script if line.startswith(".venv/bin/")]
    assert [hook["entry"] for hook in HOOKS][: len(first)] == first


def test_what_the_hooks_run_is_there() -> None:
    for hook in HOOKS:
        program, *words = hook["entry"].split()
        assert (ROOT / program).exists()
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word).exists()


@pytest.mark.slow
def test_the_hooks_pass(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    result = run_command(
        "env", "-C", ROOT, f"PRE_COMMIT_HOME={tmp_path}", f"PATH={os.environ['PATH']}",
        # All others of these tests are in this run anyway.
        "PYTEST_ADDOPTS=-k no_modules_import_each_other",
        BIN / "pre-commit", "run", "--all-files", timeout=280,
    )  # fmt: skip
    assert result.code == 0, result.out + result.err
    assert result.out.count("Passed") == len(HOOKS)
