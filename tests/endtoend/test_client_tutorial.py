"""The program of docs/tutorial-python.md runs as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.documents import ROOT, blocks
from kit.mounts import PoolMaker, native_only

pytestmark = [pytest.mark.mount, pytest.mark.slow]


@native_only
def test_the_python_of_the_tutorial_runs_as_it_stands_there(
    pools: PoolMaker, tmp_path: Path
) -> None:
    mounted = pools.mount(pools.create("tutorial", "256M", "--mode", "fs"))
    (tmp_path / "pmem").symlink_to(mounted.mountpoint)
    program = "\n".join(blocks(ROOT / "docs/tutorial-python.md", "python"))
    (tmp_path / "tutorial.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", tmp_path / "tutorial.py"],
        env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
