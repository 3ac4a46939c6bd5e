"""What scripts/setup and scripts/install say while they install the system's packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit.commands import Result, run_command

SHARED = Path(__file__).parents[2] / "scripts/system.sh"
INSTALLS = f"set -euo pipefail; . {SHARED}; printf 'fuse3\\nfio\\n' | install_packages; echo after"


def installing(tmp_path: Path, code: int) -> Result:
    """Install two packages with an apt-get that is as noisy as the real one without a terminal."""
    for name, body in (
        ("apt-get", f'echo "debconf: delaying" >&2; echo "$@" >>{tmp_path}/asked; exit {code}'),
        ("sudo", 'exec "$@"'),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    path = f"PATH={tmp_path}:/usr/bin:/bin"
    return run_command("env", path, "bash", "-c", INSTALLS, "setup")


def test_what_apt_says_is_not_for_people(tmp_path: Path) -> None:
    done = installing(tmp_path, 0)
    assert (done.code, done.out) == (0, "after\n")
    assert done.err == "setup: installing missing packages: fuse3 fio \n"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "update -qq"
    assert asked[1].endswith("fuse3 fio")


def test_where_apt_fails_all_that_it_said_is_there(tmp_path: Path) -> None:
    done = installing(tmp_path, 100)
    assert (done.code, done.out) == (1, "")
    *_, said, last = done.err.splitlines()
    assert said == "debconf: delaying"
    assert last.startswith("setup: apt-get failed; all of its output is in ")
    log = Path(last.rpartition(" ")[2])
    assert log.read_text() == "debconf: delaying\n"
    log.unlink()


@pytest.mark.parametrize("script", ["setup", "install", "install-origins", "quickstart"])
def test_a_script_says_what_it_does_and_refuses_words_that_it_does_not_know(script: str) -> None:
    told = run_command(SHARED.parent / script, "--help")
    assert told.code == 0
    assert len(told.out.split()) > 10
    assert "#" not in told.out
    done = run_command(SHARED.parent / script, "--nonsense")
    assert done.code in (1, 2)
    assert done.err == f"{script}: unknown argument: --nonsense\n"
