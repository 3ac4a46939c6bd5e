"""The scripts that people are told to run do what they say, and take everything away again."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from kit.commands import run_command
from pmemfs.mountinfo import mounts

pytestmark = [pytest.mark.mount, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def test_the_quickstart_runs_to_its_end_and_leaves_nothing_behind() -> None:
    result = run_command(ROOT / "scripts/quickstart", timeout=200)
    assert result.code == 0, result.err
    assert "no errors" in result.out
    assert not [mount for mount in mounts() if "quickstart" in mount.mountpoint]
    assert not [name for name in os.listdir("/dev/shm") if "quickstart" in name]


@pytest.mark.timeout(700)
def test_the_data_plane_runs_clean_under_the_sanitizers() -> None:
    end_to_end = "tests/endtoend/test_planes.py"
    result = run_command(
        ROOT / "scripts/sanitize", "tests/unit/test_requests.py", "tests/unit/test_tables.py",
        "tests/unit/test_guarded_mapping.py", "tests/unit/test_memory_faults.py",
        "tests/conformance/test_differential.py",
        f"{end_to_end}::test_a_pool_that_is_cut_off_answers_eio_there_and_serves_the_rest",
        timeout=650,
    )  # fmt: skip
    assert result.code == 0, result.out[-5000:] + result.err[-5000:]


def test_the_bench_measures_every_subject_and_draws_a_chart(tmp_path: Path) -> None:
    cells = "seqread,randwrite-deep"
    result = run_command(
        ROOT / "scripts/bench", "--quick", "--seconds", "0.3", "--cells", cells,
        "--output-dir", tmp_path, timeout=200,
    )  # fmt: skip
    assert result.code == 0, result.out + result.err
    (report,) = [json.loads(path.read_text()) for path in tmp_path.glob("**/*.json")]
    text = json.dumps(report)
    for subject in ("tmpfs", "loop", "pmemfs", "none"):
        assert f'"{subject}"' in text
    assert [path for path in tmp_path.glob("**/*.png") if path.stat().st_size > 1000]


def test_the_bench_measures_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("nbdkit") is None:
        pytest.skip("nbdkit is not installed; scripts/install-origins --tests installs it")
    bytecode = Path(cache_from_source(str(ROOT / "daemons/mountd.py")))
    bytecode.unlink(missing_ok=True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    result = run_command(
        ROOT / "scripts/bench", "--quick", "--seconds", "0.3", "--only", "cache",
        "--cells", "misses-prompt,attach", "--output-dir", tmp_path, timeout=200,
    )  # fmt: skip
    assert result.code == 0, result.out + result.err
    (report,) = [json.loads(path.read_text()) for path in tmp_path.glob("**/*.json")]
    readings = {one["key"]: one["values"] for one in report["parts"]["cache"]["readings"]}
    for key in ("misses-prompt", "attach-ratio", "attach-memory"):
        assert all(value > 0 for value in readings[key])
        assert len(readings[key]) == 1
    outcomes = {one["goal"].get("reading"): one for one in report["goals"]["cache"]}
    assert outcomes["misses-prompt"]["outcome"] != "not measured"
    assert outcomes["zipf-loss"]["outcome"] == "not measured"
    assert outcomes["zipf-loss"]["remark"] == "no reading of zipf"
    assert bytecode.exists(), "mounts that were timed compiled the sources"
