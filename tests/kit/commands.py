"""Running the installed program, and others, as a user does."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from kit.forked import run_program
from pmemfs.cli.commands import pmemfs as program
from pmemfs.cli.commands import run

BIN = Path(sys.executable).parent
_HERE = threading.Lock()


@dataclass
class Result:
    """What a command answered."""

    code: int
    out: str
    err: str


def run_command(*words: object, timeout: float = 240) -> Result:
    """Run a program; nothing is raised for its exit code."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def pmemfs(*words: object, timeout: float = 120) -> Result:
    """Run the installed program as a user does; a traceback is always a failure.

    Its modules are loaded already; see `kit/forked`.
    """
    done = run_program([str(BIN / "pmemfs"), *map(str, words)], timeout)
    out, err = (_text(said) for said in (done.stdout, done.stderr))
    result = Result(done.returncode, out, err)
    assert "Traceback" not in result.err, result.err
    return result


def _text(said: bytes) -> str:
    """As subprocess's text."""
    return said.decode(errors="surrogateescape").replace("\r\n", "\n").replace("\r", "\n")


def pmemfs_ok(*words: object, timeout: float = 120) -> str:
    """Run the program; its output. It must succeed."""
    result = pmemfs(*words, timeout=timeout)
    assert result.code == 0, result.err
    return result.out


def pmemfs_here(*words: object) -> str:
    """Run a command in this process; its output. It must succeed.

    For what a test needs and does not prove: to start the program takes longer than what it does.
    """
    out, err = io.StringIO(), io.StringIO()
    with _HERE, redirect_stdout(out), redirect_stderr(err):
        code = run(program, [str(word) for word in words])
    assert code == 0, err.getvalue()
    return out.getvalue()


def refused(result: Result, code: int, *words: str) -> str:
    """A command that failed as it should: the exit code and one sentence that has these words."""
    assert result.code == code, result
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def fio(directory: Path, file: Path, *words: object, timeout: float = 120) -> Result:
    """Run fio, which leaves files where it runs. Direct and psync, unless the words say else."""
    command = ["fio", "--name=v", f"--filename={file}", "--direct=1", *map(str, words)]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def resize(target: Path, size: str) -> tuple[int, int]:
    """`pmemfs resize`; the old and the new size in bytes."""
    said = json.loads(pmemfs_ok("resize", target, "--size", size, "--json"))
    return said["old_bytes"], said["new_bytes"]
