"""Directories of a crafted pool that lead to themselves: an error and never a hang."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from kit.commands import pmemfs
from kit.mounts import Engine, Mounted, PoolMaker, abort_connection
from kit.posix import fails_with
from kit.processes import wait_until
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import open_memmap
from pmemfs.mountinfo import mount_at
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import MIB
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.inode import DIRECTORY_TYPE

pytestmark = pytest.mark.mount

PATIENCE_SECONDS = 60
WAYS = {"root": "deep", "itself": "deep", "above": "deep", "beside": "near"}
"""Where the last directory leads to, and the directory in which that entry is."""


def craft(path: Path, way: str) -> None:
    """A pool with the directories `above/deep` and `near`, and one entry that is wrong."""
    path.write_bytes(bytes(16 * MIB))
    with closing(MappedMedium.open(str(path))) as medium:
        pool = Pool.create(medium, PoolSpec(name=path.name, mode=Mode.FS))
        pool.begin_mount()
        FileSystem.format(pool)
        fs = FileSystem(pool, open_memmap(pool))
        new = NewInode(0o40755, os.getuid(), os.getgid())
        above = fs.make(ROOT, b"above", new)
        deep, near = fs.make(above, b"deep", new), fs.make(ROOT, b"near", new)
        fs.write(fs.make(ROOT, b"sound", NewInode(0o100644, 0, 0)), 0, b"read me")
        leads_to = {"root": ROOT, "itself": deep, "above": above, "beside": deep}[way]
        add_entry(fs, near if way == "beside" else deep, leads_to)
        fs.end()
        pool.end_mount()


def add_entry(fs: FileSystem, directory: int, number: int) -> None:
    """What no operation does: a name for a directory that has one, with all checksums right."""
    inode = fs.inode(directory)
    inode.add_entry(b"wrong", number, DIRECTORY_TYPE)
    with fs.store.change() as change:
        # Written anew, the log says all that the directory has in memory.
        change.compact(inode)


def walk(mounted: Mounted, *command: object) -> subprocess.Popen[str]:
    """Run a command that walks the mount. If it never ends, the connection does, and the test."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: process.poll() is not None, f"{command} ended", PATIENCE_SECONDS)
    except BaseException:
        mount = mount_at(str(mounted.mountpoint))
        assert mount is not None
        abort_connection(mount)
        process.kill()
        raise
    return process


def ends_with_an_error(mounted: Mounted, *command: object) -> None:
    with walk(mounted, *command) as process:
        out, err = process.communicate()
        assert process.returncode == 1, (out, err)
        assert "Input/output error" in err, (out, err)


@pytest.mark.parametrize("way", WAYS)
def test_a_directory_that_leads_to_itself_is_an_error_and_no_hang(
    pools: PoolMaker, engine: Engine, way: str
) -> None:
    pool = pools.directory / "crafted"
    craft(pool, way)
    mounted = pools.mount(pool)
    wrong = mounted.mountpoint / ("near" if way == "beside" else "above/deep") / "wrong"
    ends_with_an_error(mounted, "find", mounted.mountpoint, "-size", "-1")
    ends_with_an_error(mounted, "stat", wrong)
    # What is sound is served on, and nothing is written any more.
    assert (mounted.mountpoint / "sound").read_bytes() == b"read me"
    with fails_with(errno.EROFS):
        (mounted.mountpoint / "new").touch()
    pools.umount(mounted)
    assert pmemfs("check", pool).code == 4
