"""A daemon that its command has forked before it knows what for: it never outlives its command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.processes import is_running, wait_until

PREPARES = """
import os, sys
from pmemfs.control import prepared
prepared.prepare()
print(prepared._prepared.process.pid, flush=True)
{then}
"""


def prepares(then: str) -> list[str]:
    """A program that prepares a daemon, says its number, and does something then."""
    return [sys.executable, "-P", "-c", PREPARES.format(then=then)]


@pytest.mark.parametrize("then", ["os._exit(0)", "os.kill(os.getpid(), 9)", "prepared.discard()"])
def test_it_ends_with_a_command_that_has_told_it_nothing(then: str) -> None:
    # Nor does it hold the standard output of its command: this would wait for it.
    pid = int(run_command(*prepares(then)).out)
    if "discard" in then:
        assert not os.path.exists(f"/proc/{pid}"), "it was ended, and seen to"
    wait_until(lambda: not is_running(pid), "it has ended")


def test_it_has_nothing_of_its_command(tmp_path: Path) -> None:
    with (
        (tmp_path / "file").open("w") as file,
        subprocess.Popen(
            prepares("sys.stdin.read()"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=tmp_path, pass_fds=[file.fileno()],
        ) as command,
    ):  # fmt: skip
        assert command.stdin is not None
        assert command.stdout is not None
        pid = int(command.stdout.readline())
        wait_until(lambda: kinds_of_descriptors(pid) == WAITS_FOR_WORDS, "it has nothing else")
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert os.getsid(pid) == pid
        command.stdin.close()


WAITS_FOR_WORDS = {0: "/dev/null", 1: "/dev/null", 2: "/memfd", 3: "socket", 4: "socket"}


def kinds_of_descriptors(pid: int) -> dict[int, str]:
    """What a process has open, without what tells two of a kind apart."""
    found = Path(f"/proc/{pid}/fd").iterdir()
    # One that is closed meanwhile is none.
    with suppress(FileNotFoundError):
        return {int(fd.name): str(fd.readlink()).partition(":")[0] for fd in found}
    return {}


def test_a_signal_ends_it_before_it_has_been_told_anything() -> None:
    with subprocess.Popen(
        prepares("sys.stdin.read(); prepared.discard()"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        pid = int(command.stdout.readline())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_running(pid), "it has ended")
        command.stdin.close()
        assert command.wait() == 0
