"""Runs of the tests beside each other share a setting of the machine, and the last restores it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.shared_setting import kept_at

TESTS = Path(__file__).parents[1]
RUN = """
import sys
from pathlib import Path
from kit.shared_setting import kept_at
with kept_at(Path(sys.argv[1]), "Y", Path(sys.argv[2])):
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    path = tmp_path / "setting"
    path.write_text("N\n")
    return path


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "note"


@contextmanager
def other_run(setting: Path, note: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that keeps the setting until its input ends."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN, setting, note],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TESTS,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process


def test_the_last_run_restores_the_setting_whichever_changed_it(setting: Path, note: Path) -> None:
    with kept_at(setting, "Y", note):
        with other_run(setting, note):
            assert setting.read_text() == "Y"
        # The one that came later has left.
        assert setting.read_text() == "Y"
    assert setting.read_text() == "N"


def test_the_run_that_changed_it_leaves_it_to_those_that_stay(setting: Path, note: Path) -> None:
    with other_run(setting, note) as first:
        with kept_at(setting, "Y", note):
            first.communicate()
            assert first.returncode == 0
            assert setting.read_text() == "Y"
        assert setting.read_text() == "N"


def test_a_setting_that_is_right_already_is_left_alone(setting: Path, note: Path) -> None:
    setting.write_text("Y\n")
    with kept_at(setting, "Y", note), kept_at(setting, "Y", note):
        assert setting.read_text() == "Y\n"
    assert setting.read_text() == "Y\n"


def test_what_a_killed_run_has_left_the_next_one_restores(setting: Path, note: Path) -> None:
    with other_run(setting, note) as killed:
        killed.send_signal(signal.SIGKILL)
    assert setting.read_text() == "Y"
    with kept_at(setting, "Y", note):
        assert setting.read_text() == "Y"
    assert setting.read_text() == "N"
