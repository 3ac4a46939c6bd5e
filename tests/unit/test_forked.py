"""Commands that are forked for the tests are what they are when somebody starts them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kit.commands import BIN
from kit.forked import fresh_starts, run_program
from kit.processes import is_running

TOLD = """#!{python}
import json, os, resource, signal, sys
from pathlib import Path
sys.stderr.write("said\\n")
print(json.dumps({{
    "words": Path("/proc/self/cmdline").read_bytes().decode().rstrip("\\0").split("\\0")[1:],
    "argv": sys.argv,
    "name": Path("/proc/self/comm").read_text(),
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "mask": Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0],
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "open": sorted(os.listdir("/proc/self/fd"))[:-1],
    "group": os.getpgrp(),
    "interrupt": str(signal.getsignal(signal.SIGINT)),
    "module": __name__,
    "pyfuse3": "pyfuse3" in sys.modules,
    "numpy": "numpy" in sys.modules,
}}))
sys.exit({code})
"""


def program(directory: Path, code: object = 3) -> Path:
    """A program that tells of itself."""
    path = directory / "told"
    path.write_text(TOLD.format(python=sys.executable, code=code))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "words", [["--version"], ["mistake"], ["create", "/nowhere/pool", "--size", "1M"], ["--help"]]
)
def test_a_command_says_the_same(words: list[str]) -> None:
    command = [str(BIN / "pmemfs"), *words]
    with fresh_starts():
        fresh = run_program(command, 60)
    forked = run_program(command, 60)
    assert (forked.returncode, forked.stdout, forked.stderr) == (
        fresh.returncode, fresh.stdout, fresh.stderr
    )  # fmt: skip


def test_it_has_what_it_would_have_been_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(program(tmp_path)), "a b", "", "ä"]
    run_program(words, 60)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_THIS_TEST", "\udcff")
    mask = os.umask(0o27)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        forked = run_program(words, 60)
        with fresh_starts():
            fresh = run_program(words, 60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.umask(mask)
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)
    assert forked.returncode == fresh.returncode == 3
    assert forked.stderr == fresh.stderr == b"said\n"


@pytest.mark.parametrize("code", ["None", "0", "255", "'a sentence'", "open('/nowhere')"])
def test_it_ends_as_it_would_have(tmp_path: Path, code: str) -> None:
    words = [str(program(tmp_path, code))]
    with fresh_starts():
        fresh = run_program(words, 60)
    forked = run_program(words, 60)
    assert forked.returncode == fresh.returncode
    assert forked.stderr.splitlines()[-1] == fresh.stderr.splitlines()[-1]


def test_one_that_does_not_end_is_ended(tmp_path: Path) -> None:
    waits = tmp_path / "waits"
    pid_file = tmp_path / "pid"
    waits.write_text(f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
                     "time.sleep(100)\n")  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        run_program([str(waits)], 10)
    deadline = time.monotonic() + 60
    while is_running(int(pid_file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)
