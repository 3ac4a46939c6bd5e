"""`pmemfs doctor`, on this machine as it is, and as an ordinary user."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kit.commands import BIN, pmemfs, pmemfs_ok, refused, run_command
from kit.mounts import PoolMaker
from kit.namespaces import Run, let_go_of_others, nobody_copies_mounts
from pmemfs.mount.transport import ENABLE_URING, choose_transport, known_problem, read_offer

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change settings")

PARAMETER = Path("/") / ENABLE_URING
SETTINGS = [
    PARAMETER.with_name("max_user_bgreq"),
    PARAMETER.with_name("max_user_congthresh"),
    Path("/proc/sys/net/core/wmem_max"),
]
"""What --fix may touch beside the parameter, which tests that run beside this one need."""


@pytest.fixture
def settings() -> Iterator[dict[Path, str]]:
    """What the settings are; those of SETTINGS are that again after the test."""
    found = {p: p.read_text().strip() for p in (PARAMETER, *SETTINGS) if p.exists()}
    try:
        yield found
    finally:
        for path in found.keys() & set(SETTINGS):
            path.write_text(found[path])


@dataclass
class Disabled:
    """A place where FUSE over io_uring is there and disabled, for whoever runs there alone.

    All of the machine has one parameter, so another file lies on it in a namespace of mounts.
    """

    parameter: Path
    """What lies on the parameter there."""

    def doctor(self, *words: object) -> str:
        """`pmemfs doctor` there; its output. It must succeed."""
        others = let_go_of_others(self.parameter.parent)
        lay = f'{others}; mount --bind "$0" {PARAMETER} && exec "$@"'
        with nobody_copies_mounts():
            result = run_command(
                "unshare", "--mount", "--propagation", "private",
                "sh", "-c", lay, self.parameter, BIN / "pmemfs", "doctor", *words,
            )  # fmt: skip
        assert result.code == 0, result
        return result.out


@pytest.fixture
def disabled(settings: dict[Path, str], tmp_path: Path) -> Disabled:
    """A kernel that could do FUSE over io_uring and has it disabled."""
    if not PARAMETER.exists() or known_problem(os.uname().release):
        pytest.skip("this kernel has no FUSE over io_uring that may be enabled")
    parameter = tmp_path / "enable_uring"
    parameter.write_text("N\n")
    return Disabled(parameter)


def check(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in report["checks"] if entry["name"] == name)


def test_doctor_says_that_this_machine_can_mount_and_what_auto_chooses() -> None:
    out = pmemfs_ok("doctor")
    assert out.splitlines()[0].split() == ["CHECK", "STATE", "FOUND", "THEREFORE"]
    assert out.splitlines()[-1] == "pmemfs can mount here"
    assert os.uname().release in out
    choice = choose_transport("auto", read_offer())
    row = next(line for line in out.splitlines() if line.startswith("transport "))
    assert choice.transport in row.split()
    assert choice.sentence.partition("; ")[2] in row


def test_json_has_every_check_with_its_state() -> None:
    report = json.loads(pmemfs_ok("doctor", "--json"))
    assert report["can_mount"] is True
    assert report["changes"] == []
    for entry in report["checks"]:
        assert entry["state"] in ("ok", "could be faster", "missing", "unknown")
        assert entry["found"]
        assert entry["therefore"]
    assert check(report, "kernel")["found"] == os.uname().release
    assert check(report, "/dev/fuse")["found"].startswith("c")


@needs_root
def test_doctor_says_how_to_enable_io_uring_and_does_not_do_it(disabled: Disabled) -> None:
    out = disabled.doctor()
    assert f"  enable_uring: echo Y > {PARAMETER}" in out.splitlines()
    assert disabled.parameter.read_text() == "N\n"


@needs_root
def test_fix_enables_io_uring_says_so_and_looks_again(disabled: Disabled) -> None:
    out = disabled.doctor("--fix")
    assert f"echo Y > {PARAMETER}: it was N and is Y; to undo: echo N > {PARAMETER}" in out
    assert disabled.parameter.read_text().strip() == "Y"
    row = next(line for line in out.splitlines() if line.startswith("transport "))
    assert row.split()[:3] == ["transport", "ok", "uring"]
    assert "What was changed:\n  nothing" in disabled.doctor("--fix")


@needs_root
def test_fix_says_what_it_changed_to_programs_too(disabled: Disabled) -> None:
    report = json.loads(disabled.doctor("--fix", "--json"))
    changes = {change["command"]: change for change in report["changes"]}
    change = changes[f"echo Y > {PARAMETER}"]
    assert (change["before"], change["after"], change["error"]) == ("N", "Y", None)
    assert check(report, "transport")["found"] == "uring"


@needs_root
def test_where_fuse_is_hidden_doctor_names_what_is_missing_and_fails(shm: Path) -> None:
    hide = (
        f"{let_go_of_others(shm)}; mount -t tmpfs none {shm} && mount --bind {shm} /dev && "
        f"exec {BIN / 'pmemfs'} doctor"
    )
    with nobody_copies_mounts():
        result = run_command("unshare", "--mount", "--propagation", "private", "sh", "-c", hide)
    assert result.code == 1, result
    assert result.out.splitlines()[-1] == "pmemfs can't mount here: /dev/fuse"
    assert "Traceback" not in result.err


@pytest.mark.mount
@pytest.mark.slow
@needs_root
def test_an_ordinary_user_is_told_what_holds_for_users_and_may_not_fix(
    pools: PoolMaker,
    user: Run,
    settings: dict[Path, str],
) -> None:
    program = BIN / "pmemfs"
    result = user(program, "doctor", "--json")
    assert result.code == 0, result
    report = json.loads(result.out)
    assert "fusermount3" in check(report, "right to mount")["found"]
    assert check(report, "/dev/fuse")["therefore"] == "this user can mount"
    refused(user(program, "doctor", "--fix"), 1, "doctor --fix is for root")
    assert {path: path.read_text().strip() for path in settings} == settings

    denied = user("setpriv", "--no-new-privs", program, "doctor")
    assert denied.code == 1, denied
    assert denied.out.splitlines()[-1] == "pmemfs can't mount here: right to mount"


def test_doctor_loads_neither_numpy_nor_pyfuse3() -> None:
    code = "import sys, pmemfs.cli.doctor; print({'numpy', 'pyfuse3', 'trio'} & set(sys.modules))"
    assert run_command(sys.executable, "-c", code).out == "set()\n"


def test_an_unknown_option_is_bad_usage() -> None:
    assert pmemfs("doctor", "--mend").code == 2
