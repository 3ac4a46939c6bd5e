"""What pools are put on: sparse files, small file systems, block devices."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import run_command

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and attach loops")


def sparse_file(path: Path, size_bytes: int) -> Path:
    """A file that has no memory behind it."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


@contextmanager
def mounted_tmpfs(directory: Path, *options: str) -> Iterator[Path]:
    """A tmpfs on a directory, with options such as size=16M."""
    directory.mkdir(parents=True, exist_ok=True)
    done = run_command("mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", directory)
    assert done.code == 0, done.err
    try:
        yield directory
    finally:
        if run_command("umount", directory).code:
            run_command("umount", "--lazy", directory)


@contextmanager
def small_tmpfs(size_bytes: int) -> Iterator[Path]:
    """A tmpfs on a directory of its own, that is soon full."""
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-tmpfs-"))
    try:
        with mounted_tmpfs(directory, f"size={size_bytes}"):
            yield directory
    finally:
        directory.rmdir()


@contextmanager
def loop_device(file: Path, *, direct_io: bool = True) -> Iterator[Path]:
    """A loop device over a file, detached whatever happens."""
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("there are no loop devices here")
    direct = "on" if direct_io else "off"
    # A device that could only be read stays so, and losetup makes do with that.
    run_command("blockdev", "--setrw", run_command("losetup", "--find").out.strip())
    done = run_command("losetup", "--find", "--show", f"--direct-io={direct}", file)
    assert done.code == 0, done.err
    device = Path(done.out.strip())
    try:
        yield device
    finally:
        run_command("umount", device)
        run_command("losetup", "--detach", device)
