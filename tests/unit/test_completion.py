"""A shell completes commands, options and paths of pmemfs, with the files that are installed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kit.processes import end_process

pytestmark = pytest.mark.slow

SHARE = Path(__file__).parents[2] / "share"
PROMPT = "ready> "
_PATIENCE_SECONDS = 60

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "--interactive"],
}
PREPARED = {
    # bash-completion reads such a file when the command is completed for the first time.
    "bash": [f"source {SHARE}/bash-completion/completions/pmemfs", f"PS1='{PROMPT}'"],
    "zsh": [f"fpath=({SHARE}/zsh/site-functions $fpath)", "autoload -Uz compinit",
            "compinit -D -u", "zstyle ':completion:*' menu no", f"PS1='{PROMPT}'"],
    "fish": [f"set -p fish_complete_path {SHARE}/fish/vendor_completions.d",
             f"function fish_prompt; echo -n '{PROMPT}'; end"],
}  # fmt: skip


class Shell:
    """A shell at a terminal, and somebody who types."""

    def __init__(self, name: str, directory: Path) -> None:
        self._program = directory / "bin/pmemfs"
        self._program.parent.mkdir()
        self._program.write_text(f"#!/bin/sh\necho run >{directory}/was-run\n")
        self._program.chmod(0o755)
        path = f"{self._program.parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "TERM": "dumb", "HOME": str(directory), "LANG": "C.UTF-8"}
        self._name = name
        self._said_at = directory / "said"
        self._terminal, other_end = pty.openpty()
        self._shows = select.poll()
        self._shows.register(self._terminal, select.POLLIN)
        self._process = subprocess.Popen(
            # The terminal is that of the shell's own session, as fish wants it.
            ["setsid", "--ctty", *SHELLS[name]], stdin=other_end, stdout=other_end,
            stderr=other_end, cwd=directory, env=environment,
        )  # fmt: skip
        os.close(other_end)
        for line in PREPARED[name]:
            self._type(f"{line}\r")
        self._type(f"echo there >{self._said_at}\r")
        assert self._said() == "there"

    def completed(self, typed: str) -> str:
        """The command line that a press of TAB makes of what was typed."""
        # What stands before it then makes it the words of `echo`.
        self._type(f"{typed}\t")
        self._type(f"\x01echo \x05 >{self._said_at}\r")
        return self._said()

    def _type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _said(self) -> str:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        shown = b""
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                if (said := self._said_at.read_text()).endswith("\n"):
                    self._said_at.unlink()
                    return said.strip()
            # What nobody reads would stop it.
            if self._shows.poll(50):
                shown += os.read(self._terminal, 65536)
        raise AssertionError(f"{self._name} has not answered; on its terminal stands {shown!r}")

    def end(self) -> None:
        """End it."""
        end_process(self._process.pid, seconds=0)
        self._process.wait()
        os.close(self._terminal)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    """Each shell that is here, with our file."""
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param} here")
    shell = Shell(request.param, tmp_path)
    yield shell
    shell.end()


def test_a_shell_completes_commands_options_and_paths(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/some-pool").touch()
    (tmp_path / "files/another one").mkdir()
    assert shell.completed("pmemfs exten") == "pmemfs extents"
    assert shell.completed("pmemfs create --spa") == "pmemfs create --sparse"
    assert shell.completed("pmemfs create --mode bl") == "pmemfs create --mode block"
    assert shell.completed("pmemfs mount --engine na") == "pmemfs mount --engine native"
    assert shell.completed("pmemfs check files/some-p") == "pmemfs check files/some-pool"
    # A directory for the second word of mount, with its space.
    said = shell.completed("pmemfs mount files/some-pool files/an")
    assert re.fullmatch(r"pmemfs mount files/some-pool files/another one/?", said)
    assert re.fullmatch(r"pmemfs list --dir files/another one/?",
                        shell.completed("pmemfs list --dir files/an"))  # fmt: skip


def test_a_shell_knows_what_belongs_to_which_word(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mount-point").mkdir()
    (tmp_path / "mount-file").touch()
    # Options stand before the command and after it, with their value or before it.
    assert shell.completed("pmemfs --json exten") == "pmemfs --json extents"
    assert shell.completed("pmemfs create --size 4G --mode=bl") == (
        "pmemfs create --size 4G --mode=block"
    )
    assert shell.completed("pmemfs mount -o ro,nosu") in (
        "pmemfs mount -o ro,nosuid", "pmemfs mount -o ro,nosuid,",
    )  # fmt: skip
    assert shell.completed("pmemfs mount -o ro,transport=ur").rstrip(",") == (
        "pmemfs mount -o ro,transport=uring"
    )
    # No pool, which is a file, where only a directory can be, and none where there is a number.
    assert shell.completed("pmemfs trim mount-").rstrip("/") == "pmemfs trim mount-point"
    assert shell.completed("pmemfs pages --hottest mount-p") == "pmemfs pages --hottest mount-p"
    assert shell.completed("pmemfs doctor mount-p") == "pmemfs doctor mount-p"


def test_a_shell_completes_without_the_program(shell: Shell, tmp_path: Path) -> None:
    for typed in (
        "pmemfs exten",
        "pmemfs create --spa",
        "pmemfs create --mode bl",
        "pmemfs info s",
    ):
        shell.completed(typed)
    assert not (tmp_path / "was-run").exists()
