"""The sdist and the wheel, made as who releases pmemfs makes them, in directories of a test."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]

_CAN_DO = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"

LEFT_OVER = ("pmemfs/volume/left.c", "pmemfs/medium/old.so", "tests/kit/left.pyc", "core.1234",
             "build/lib/pmemfs/left.py", "docs/design.md~", "scripts/verify.0.state")  # fmt: skip
"""What people who work in a checkout leave there, and nobody else wants."""


def copied_checkout(to: Path) -> Path:
    """A copy of this checkout as it is, with all that is built in it, and without git's part."""
    # Other tests compile modules: first under another name, which is gone a moment later.
    kept_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "bench-results", "*.pyc.*"
    )
    shutil.copytree(ROOT, to, ignore=kept_out)
    return to


def sdist_of(checkout: Path, into: Path) -> Path:
    """Build the sdist with the build system that pyproject.toml names."""
    program = f"from setuptools import build_meta; print(build_meta.build_sdist({str(into)!r}))"
    said = _run(sys.executable, "-c", program, directory=checkout)
    return into / said.splitlines()[-1]


def unpacked(sdist: Path, into: Path) -> Path:
    """The one directory that is in it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(into, filter="data")
    (directory,) = into.iterdir()
    return directory


def wheel_of(source: Path, into: Path) -> Path:
    """Build the wheel as pip does: in an environment of its own, with what pyproject.toml wants."""
    _run(_python(), "-I", "-m", "venv", into / "venv")
    pip = (into / "venv/bin/python", "-I", "-m", "pip")
    _run(*pip, "wheel", "--no-deps", "--wheel-dir", into, source)
    (wheel,) = into.glob("*.whl")
    return wheel


def environment_with(wheel: Path, at: Path) -> Path:
    """A fresh environment with nothing but the wheel and what that wants; its `bin`."""
    _run(_python(), "-I", "-m", "venv", at)
    _run(at / "bin/python", "-I", "-m", "pip", "install", wheel)
    return at / "bin"


def _python() -> str:
    """The system's Python, for which scripts/install takes a wheel, or that of the tests."""
    words = ("/usr/bin/python3", "-I", "-c", _CAN_DO)
    with suppress(OSError):
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            return words[0]
    return sys.executable


def _run(*words: object, directory: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], cwd=directory, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
