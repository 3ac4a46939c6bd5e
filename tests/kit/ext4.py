"""A file system of the kernel's own on a file of ours, and what is left of it without us."""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.commands import run_command
from kit.processes import wait_until
from pmemfs.units import KIB

needs_ext4 = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mkfs.ext4") is None, reason="needs root and mkfs.ext4"
)


def assert_sound(device: Path, how: str = "-n") -> None:
    """The ext4 on a device that was unmounted is sound, or is mended (-p) without questions."""

    def is_free() -> bool:
        nonlocal checked
        checked = run_command("fsck.ext4", "-f", how, device)
        return "is in use" not in checked.out

    checked = None
    # A mount namespace that another test has just made has the mounts of then for a moment.
    wait_until(is_free, f"nobody else has {device}")
    assert checked is not None
    assert checked.code == 0, checked.out


def make_tree(tree: Path, seed: int = 4) -> Path:
    """A directory with files of some sizes."""
    chance = random.Random(seed)
    for number in range(40):
        path = tree / f"d{number % 7}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(chance.choice([10, 5000, 200 * KIB])))
    return tree


def put_on_ext4(device: Path, tree: Path, *, is_new: bool = True) -> None:
    """Copy a tree to an ext4 on a loop device, delete a file of it, here as there, and trim."""
    loop = run_command("losetup", "--direct-io=on", "-f", "--show", device).out.strip()
    try:
        if is_new:
            made = run_command("mkfs.ext4", "-q", loop)
            assert made.code == 0, made.err
        with _mounted(loop) as at:
            shutil.copytree(tree, at / tree.name)
            for top in (tree, at / tree.name):
                (top / "d0" / "f0").unlink()
            run_command("fstrim", at)
    finally:
        run_command("losetup", "-d", loop)


def assert_is_on_ext4(image: Path, *trees: Path) -> None:
    """An image has a whole ext4 with some trees on it, byte for byte."""
    assert_sound(image)
    with _mounted(image, "-o", "loop,ro") as at:
        for tree in trees:
            compared = filecmp.dircmp(tree, at / tree.name)
            assert not compared.left_only
            assert not compared.right_only
            for path in tree.rglob("f*"):
                there = at / tree.name / path.relative_to(tree)
                assert there.read_bytes() == path.read_bytes(), there


@contextmanager
def _mounted(source: object, *options: object) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        done = run_command("mount", *options, source, directory)
        assert done.code == 0, done.err
        try:
            yield Path(directory)
        finally:
            assert run_command("umount", directory).code == 0
