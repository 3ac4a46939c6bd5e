"""A mount as the upper and work directory of overlayfs, which asks more of a file system than most.

Source: Documentation/filesystems/overlayfs.rst of Linux, "Upper and lower".
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.mounts import Engine, Mounted
from kit.posix import names

# The kernel's log does not say which overlay a line is about. And a mount namespace of another test
# may have a copy of one that was unmounted, whose directories are in use by that.
pytestmark = [pytest.mark.mount, pytest.mark.alone]

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def kernel_messages() -> Iterator[list[str]]:
    """What the kernel says of overlayfs meanwhile, as far as this user may know."""
    said: list[str] = []
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        yield said
        return
    try:
        os.lseek(log, 0, os.SEEK_END)
        yield said
        while True:
            try:
                line = os.read(log, 8192).decode(errors="replace")
            except BlockingIOError:
                break
            said += [line] if "overlayfs" in line else []
    finally:
        os.close(log)


@contextmanager
def overlay(lower: Path, root: Path, *options: str) -> Iterator[Path]:
    """An overlay whose changes go to directories of a mount."""
    place = root.parent / f"{root.name}-merged"
    for directory in (root / "upper", root / "work", place):
        directory.mkdir(exist_ok=True)
    words = [f"lowerdir={lower}", f"upperdir={root}/upper", f"workdir={root}/work", *options]
    done = run_command("mount", "-t", "overlay", "-o", ",".join(words), "overlay", place)
    assert done.code == 0, done.err
    try:
        yield place
    finally:
        assert run_command("umount", place).code == 0
        place.rmdir()


@pytest.fixture
def lower(shm: Path) -> Path:
    """A tree that is never changed."""
    path = shm / "lower"
    for name in ("kept", "removed", "renamed", "replaced"):
        (path / "directory" / name).mkdir(parents=True)
        (path / "directory" / name / "inside").write_bytes(name.encode())
        (path / name).write_bytes(name.encode())
    (path / "link").symlink_to("kept")
    return path


def change(merged: Path) -> None:
    """Changes of each kind that overlayfs treats in its own way."""
    (merged / "new").write_bytes(b"new")
    with (merged / "kept").open("ab") as file:
        file.write(b", and more")
    (merged / "removed").unlink()
    (merged / "renamed").rename(merged / "under another name")
    (merged / "new").rename(merged / "replaced")
    directory = merged / "directory"
    (directory / "removed" / "inside").unlink()
    (directory / "removed").rmdir()
    # Without redirects, rename(2) refuses what is below, and mv(1) copies it.
    assert run_command("mv", directory / "renamed", merged / "moved").code == 0
    (directory / "replaced" / "inside").unlink()
    (directory / "replaced").rmdir()
    (directory / "replaced").mkdir()
    (directory / "made").mkdir()
    (directory / "made" / "inside").write_bytes(b"made")
    (directory / "made").rename(merged / "made")
    os.link(merged / "kept", merged / "linked")
    os.setxattr(merged / "link", "trusted.x", b"y", follow_symlinks=False)
    (merged / "kept").chmod(0o640)


def assert_changed(merged: Path) -> None:
    assert names(merged) == {
        "kept", "linked", "under another name", "replaced", "directory", "moved", "made", "link",
    }  # fmt: skip
    assert (merged / "kept").read_bytes() == b"kept, and more"
    assert (merged / "linked").samefile(merged / "kept")
    assert (merged / "under another name").read_bytes() == b"renamed"
    assert (merged / "replaced").read_bytes() == b"new"
    assert names(merged / "directory") == {"kept", "replaced"}
    assert names(merged / "directory" / "replaced") == set()
    assert (merged / "moved" / "inside").read_bytes() == b"renamed"
    assert (merged / "made" / "inside").read_bytes() == b"made"
    assert (merged / "directory" / "kept" / "inside").read_bytes() == b"kept"


@pytest.mark.parametrize("options", [(), ("redirect_dir=on", "index=on")], ids=["plain", "index"])
def test_a_mount_takes_what_an_overlay_changes(
    lower: Path, root: Path, file_system: tuple[Engine, Mounted], options: tuple[str, ...]
) -> None:
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in lower.rglob("*"))
    with kernel_messages() as said:
        with overlay(lower, root, *options) as merged:
            change(merged)
            assert_changed(merged)
        with overlay(lower, root, *options) as merged:
            assert_changed(merged)
    if file_system[0].name == "python":
        # pyfuse3 has no O_TMPFILE, without which overlayfs has other ways.
        said = [line for line in said if "does not support tmpfile" not in line]
    assert said == []
    removed = (root / "upper" / "removed").lstat()
    assert (stat.S_IFMT(removed.st_mode), removed.st_rdev) == (stat.S_IFCHR, 0)
    assert sorted((str(path), path.lstat().st_mtime_ns) for path in lower.rglob("*")) == before
