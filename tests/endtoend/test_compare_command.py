"""`pmemfs compare` through real mounts: what it finds of each answer, and that nothing stays."""

from __future__ import annotations

import html
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok
from kit.namespaces import let_go_of_others, nobody_copies_mounts
from kit.processes import wait_until
from pmemfs.compare.rows import ANSWERS, ROWS
from pmemfs.mountinfo import mounts

pytestmark = [pytest.mark.mount, pytest.mark.slow]

TINY = ("--size", "64M", "--rounds", "1", "--seconds", "0.05", "--idle", "0")
WITH_PAGES = ("pmem", "on-demand", "pmem 2M")


@pytest.fixture(scope="module")
def medium() -> Iterator[Path]:
    """A directory for the pools, in memory."""
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm"))
    yield directory
    directory.rmdir()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the report is written."""
    return tmp_path_factory.mktemp("compare") / "report.html"


@pytest.fixture(scope="module")
def told(medium: Path, report: Path) -> dict[str, Any]:
    """What one comparison of tiny pools says, as JSON."""
    words = ("--medium", medium, *TINY, "--report", report, "--json")
    # On a quiet machine it takes half a minute.
    return dict(json.loads(pmemfs_ok("compare", *words, timeout=280)))


def value(told: dict[str, Any], row: str, answer: str) -> float | None:
    (found,) = (r["value"] for r in told["readings"] if (r["row"], r["answer"]) == (row, answer))
    return found


def error(told: dict[str, Any], row: str, answer: str) -> str:
    (found,) = (r["error"] for r in told["readings"] if (r["row"], r["answer"]) == (row, answer))
    return str(found)


def left_in(medium: Path) -> list[str]:
    """What is left of pools and mounts."""
    return [
        *map(str, medium.iterdir()),
        *(m.mountpoint for m in mounts() if str(medium) in m.source),
    ]


def test_every_row_is_read_of_every_answer_that_has_pages(told: dict[str, Any]) -> None:
    missing = {
        (row.key, answer)
        for row in ROWS
        for answer in WITH_PAGES
        if row.key != "in-dram-idle" and value(told, row.key, answer) is None
    }
    assert missing == set()


def test_structures_are_counted_where_the_scheme_has_them(told: dict[str, Any]) -> None:
    assert value(told, "structures", "none") == 0
    for answer in WITH_PAGES:
        assert value(told, "structures", answer)
    in_pool = {answer: value(told, "in-pool", answer) for answer in (*WITH_PAGES, "none")}
    assert in_pool["on-demand"] == in_pool["none"] == 0
    assert in_pool["pmem"] == value(told, "structures", "pmem") * 64  # type: ignore[operator]
    assert in_pool["pmem"] > 400 * in_pool["pmem 2M"]  # type: ignore[operator]


def test_what_fails_is_told_in_the_programs_own_words(told: dict[str, Any]) -> None:
    assert "does not have them; 'pmem' and 'on-demand' do" in error(told, "filled", "none")
    assert error(told, "create", "pmem 1G").startswith("a pool of 64MiB is too small")


def test_a_run_says_how_to_repeat_it(told: dict[str, Any], medium: Path, report: Path) -> None:
    assert told["command"] == f"pmemfs compare --medium {medium} " + " ".join(
        (*TINY, "--report", str(report))
    )
    assert {"kernel", "machine", "medium", "pmemfs", "workload"} <= told["conditions"].keys()
    shown = report.read_text()
    assert told["command"] in shown
    assert all(html.escape(answer.whose) in shown for answer in ANSWERS)


def test_nothing_stays(told: dict[str, Any], medium: Path) -> None:
    assert told["readings"]
    assert left_in(medium) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: str(n.name))
def test_a_signal_ends_it_and_nothing_stays(number: signal.Signals, medium: Path) -> None:
    words = [BIN / "pmemfs", "compare", "--medium", medium, *TINY[:-4], "--seconds", "30"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(str(medium) in m.source for m in mounts()), "a pool is mounted")
    os.kill(running.pid, number)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 128 + number, out
    # Above it may stand that the machine is busy.
    assert err.splitlines()[-1] == f"pmemfs: interrupted by {number.name}; nothing is mounted"
    assert left_in(medium) == []


def test_where_nothing_can_be_mounted_the_first_reason_is_the_commands(medium: Path) -> None:
    """As root this needs a namespace without /dev/fuse."""
    others = let_go_of_others(medium)
    hidden = f'{others}; mount --bind /dev/null /dev/fuse && exec "$@"'
    words = (BIN / "pmemfs", "compare", "--medium", medium, *TINY)
    with nobody_copies_mounts():
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", hidden, "sh", *words],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("pmemfs: cannot compare: cannot mount ")
    assert "Traceback" not in done.stderr
    assert left_in(medium) == []


def test_the_module_runs_as_the_program() -> None:
    words = [sys.executable, "-P", "-m", "pmemfs.cli.main", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == pmemfs("--version").out
