"""What all tests share: memory to put pools in, and real mounts that are cleaned up after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pmemfs.mountinfo import mount_at

BIN = Path(sys.executable).parent


@dataclass
class Result:
    """What a command answered."""

    code: int
    out: str
    err: str


def run_command(*words: object, timeout: float = 120) -> Result:
    """Run a program; nothing is raised for its exit code."""
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def pmemfs(*words: object, timeout: float = 120) -> Result:
    """Run the installed program as a user does; a traceback is always a failure."""
    result = run_command(BIN / "pmemfs", *words, timeout=timeout)
    assert "Traceback" not in result.err, result.err
    return result


def pmemfs_ok(*words: object, timeout: float = 120) -> str:
    """Run the program; its output. It must succeed."""
    result = pmemfs(*words, timeout=timeout)
    assert result.code == 0, result.err
    return result.out


@dataclass
class Mounted:
    """A pool that is mounted."""

    pool: Path
    mountpoint: Path

    @property
    def device(self) -> Path:
        """The file of mode `block`."""
        return self.mountpoint / self.pool.name

    def info(self) -> dict[str, Any]:
        """`pmemfs info`."""
        return dict(json.loads(pmemfs_ok("info", self.mountpoint, "--json")))

    def pages(self, hottest: int = 10) -> dict[str, Any]:
        """`pmemfs pages`."""
        return dict(
            json.loads(pmemfs_ok("pages", self.mountpoint, "--json", "--hottest", hottest))
        )

    @property
    def pid(self) -> int:
        """The daemon."""
        return int(self.info()["pid"])


@dataclass
class PoolMaker:
    """Creates and mounts pools in a directory of /dev/shm, and takes everything away at the end."""

    directory: Path
    mountpoints: list[Path] = field(default_factory=list)

    def create(self, name: str = "pmem0", size: str = "64M", *options: object) -> Path:
        """`pmemfs create`; the path of the pool."""
        path = self.directory / name
        pmemfs_ok("create", path, "--size", size, *options)
        return path

    def mountpoint(self, name: str = "mnt") -> Path:
        """A directory to mount on."""
        path = self.directory / "mounts" / name
        path.mkdir(parents=True, exist_ok=True)
        self.mountpoints.append(path)
        return path

    def mount(self, pool: Path, *options: object, at: str | None = None) -> Mounted:
        """`pmemfs mount`."""
        mountpoint = self.mountpoint(at or f"of-{pool.name}")
        pmemfs_ok("mount", pool, mountpoint, *options)
        return Mounted(pool, mountpoint)

    def umount(self, mounted: Mounted) -> None:
        """`pmemfs umount`."""
        pmemfs_ok("umount", mounted.mountpoint)

    def clean_up(self) -> None:
        """Unmount what is left, whatever state it is in."""
        for mountpoint in reversed(self.mountpoints):
            while mount_at(str(mountpoint)):
                if pmemfs("umount", mountpoint, timeout=30).code:
                    run_command("umount", "--lazy", mountpoint, timeout=30)
        with suppress(OSError):
            shutil.rmtree(self.directory)


@pytest.fixture
def shm() -> Iterator[Path]:
    """A directory in memory, gone after the test."""
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def pools(tmp_path: Path) -> Iterator[PoolMaker]:
    """A maker of pools and mounts; needs root or fusermount3, and /dev/fuse."""
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse here")
    maker = PoolMaker(Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm")))
    yield maker
    maker.clean_up()
