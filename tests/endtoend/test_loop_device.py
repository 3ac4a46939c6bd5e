"""A file system of the kernel's on the device: loop, mkfs, mount, a real tree, fsck."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kit.commands import Result, run_command
from kit.ext4 import assert_sound
from kit.mounts import PoolMaker
from kit.sources import loop_device

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

PACKAGES = ("asyncio", "email", "encodings", "importlib", "unittest", "xml", "idlelib")


def succeed(*words: object) -> Result:
    result = run_command(*words)
    assert result.code == 0, (words, result.out, result.err)
    return result


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Some packages of the standard library, with links of both kinds and a file with a hole."""
    library = Path(os.__file__).parent
    tree = tmp_path / "tree"
    for package in PACKAGES:
        without_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(library / package, tree / package, ignore=without_caches)
    (tree / "hard").hardlink_to(tree / "email/message.py")
    (tree / "soft").symlink_to("email/message.py")
    with (tree / "hole").open("wb") as file:
        file.seek(5_000_000)
        file.write(b"end")
    return tree


@pytest.mark.parametrize("options", [(), ("--scheme", "on-demand", "--sparse")])
def test_ext4_on_a_loop_device_keeps_a_tree(
    pools: PoolMaker, tree: Path, options: tuple[str, ...]
) -> None:
    mounted = pools.mount(pools.create("pmem0", "160M", *options))
    inside = pools.mountpoint("ext4")
    with loop_device(mounted.device) as loop:
        assert run_command("losetup", "--noheadings", "-O", "DIO", loop).out.strip() == "1"
        succeed("mkfs.ext4", "-q", loop)
        succeed("mount", loop, inside)
        succeed("cp", "-a", tree, inside)
        succeed("diff", "-r", tree, inside / "tree")
        succeed("umount", inside)
        assert_sound(loop)
        succeed("mount", loop, inside)
        succeed("diff", "-r", tree, inside / "tree")
        succeed("umount", inside)
        # This also waits until no mount namespace of another test has it: then the loop goes.
        assert_sound(loop)
    pools.umount(mounted)

    # And again from a new mount of the pool.
    again = pools.mount(mounted.pool)
    with loop_device(again.device) as loop:
        assert_sound(loop)
        succeed("mount", "-o", "ro", loop, inside)
        succeed("diff", "-r", tree, inside / "tree")
        succeed("umount", inside)
