"""Ctrl-C at any moment of a command: it ends with 130, and nobody sees a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """
import os, signal, sys
wanted, program = sys.argv[1:3]
sys.argv = sys.argv[2:]
def hook(event, details):
    if event == "import" and details[0] == wanted:
        print("there", flush=True)
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
exec(compile(open(program).read(), program, "exec"))
"""
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("program", "words", "module"),
    [
        ("pmemfs", ["info", "/dev/null"], module)
        for module in ("pmemfs.cli.commands", "click", "click.core", "pmemfs.errors",
                       "pmemfs.cli.find")
    ]
    + [("mount.pmemfs", ["/dev/null", "/"], module) for module in ("click", "pmemfs.cli.mount")],
)  # fmt: skip
def test_an_interrupt_while_modules_are_loaded_is_quiet(
    program: str, words: list[str], module: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, BIN / program, *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "there\n", "")


def test_an_ignored_interrupt_stays_ignored() -> None:
    done = subprocess.run(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", INTERRUPTED,
         "click", BIN / "pmemfs", "--version"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "pmemfs" in done.stdout


def test_what_is_installed_takes_care_before_python_loads_anything(tmp_path: Path) -> None:
    # A file of the environment that `site` runs, where Python would call it a fatal error.
    installed = tmp_path / "pmemfs"
    installed.write_text((ROOT / "scripts/installed").read_text())
    installed.chmod(0o755)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "here.pth").write_text("import os, signal; print('there', flush=True); "
                                   "os.kill(os.getpid(), signal.SIGINT)\n")  # fmt: skip
    done = subprocess.run([installed], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "there\n", "")
