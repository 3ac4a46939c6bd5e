"""What a command says may not reach anybody: then it has failed, and its exit code says so.

Otherwise `check` would say "errors were corrected" of a pool that nobody has touched, and a script
would take half of a report for all of it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs_ok
from kit.mounts import PoolMaker


def unheard(*words: object, full: bool) -> tuple[int, str]:
    """Run the program where nobody takes its output; its exit code and what it complained of.

    `full`: a full disk takes it; else a reader who has gone already.
    """
    command = [str(BIN / "pmemfs"), *map(str, words)]
    if full:
        with open("/dev/full", "wb") as out:
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=60)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
        finally:
            os.close(writer)
    return done.returncode, done.stderr.decode()


@pytest.fixture
def pool(shm: Path) -> Path:
    path = shm / "pmem0"
    pmemfs_ok("create", path, "--size", "16M", "--mode", "fs")
    return path


@pytest.mark.parametrize("full", [True, False], ids=["full", "gone"])
@pytest.mark.parametrize("options", [(), ("--json",), ("-n",), ("--repair",), ("--help",)])
def test_a_check_that_nobody_heard_is_an_operational_error(
    pool: Path, options: tuple[str, ...], full: bool
) -> None:
    code, complaint = unheard("check", *options, pool, full=full)
    assert code == 8
    assert_one_sentence(complaint, full=full, as_json="--json" in options)


@pytest.mark.parametrize("full", [True, False], ids=["full", "gone"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list"], 1),
        (["list", "--json"], 1),
        (["doctor"], 1),
        (["--help"], 1),
        (["--version"], 1),
        (["mount", "--help"], 32),
        (["umount", "--help"], 32),
    ],
    ids=str,
)
def test_a_command_that_nobody_heard_has_failed(words: list[str], code: int, full: bool) -> None:
    assert_failed(unheard(*words, full=full), code, full=full, as_json="--json" in words)


@pytest.mark.parametrize("full", [True, False], ids=["full", "gone"])
def test_a_pool_is_made_although_nobody_heard_of_it(shm: Path, full: bool) -> None:
    path = shm / "pmem1"
    assert_failed(unheard("create", path, "--size", "16M", full=full), 1, full=full)
    assert "no errors" in pmemfs_ok("check", path)


@pytest.mark.parametrize("full", [True, False], ids=["full", "gone"])
def test_a_mount_is_asked_and_nobody_hears_the_answer(pools: PoolMaker, full: bool) -> None:
    mounted = pools.mount(pools.create("pmem0", "16M", "--mode", "fs"))
    for words in (
        ["info"], ["info", "--json"], ["pages"], ["pages", "--json"], ["stat"], ["stat", "--json"],
    ):  # fmt: skip
        outcome = unheard(*words, mounted.mountpoint, full=full)
        assert_failed(outcome, 1, full=full, as_json="--json" in words)


def test_a_complaint_that_nobody_hears_changes_no_exit_code(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        for words, code in ((["check", tmp_path], 8), (["mount", tmp_path, tmp_path], 32)):
            command = [str(BIN / "pmemfs"), *map(str, words)]
            assert subprocess.run(command, stderr=full, timeout=60).returncode == code


def assert_failed(
    outcome: tuple[int, str], code: int, *, full: bool, as_json: bool = False
) -> None:
    assert outcome[0] == code, outcome
    assert_one_sentence(outcome[1], full=full, as_json=as_json)


def assert_one_sentence(complaint: str, *, full: bool, as_json: bool = False) -> None:
    """A reader who has gone wanted no more; of a full disk the user is told."""
    said = "standard output cannot be written: no space left on device"
    if full and as_json:
        assert json.loads(complaint)["message"] == said
        assert json.loads(complaint)["errno"] == "ENOSPC"
    else:
        assert complaint == (f"pmemfs: {said}\n" if full else "")
