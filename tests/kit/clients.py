"""Programs that map files of a mount: in this process, and in others that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import pmemfs
from kit.commands import pmemfs as run_pmemfs
from kit.mounts import Mounted, PoolMaker
from kit.processes import wait_until
from pmemfs.medium.writeback import punch_hole

FRAME = 4096


def write_file(path: Path, frames: int, seed: int = 1) -> np.ndarray:
    """Make a file of random words; what is in it."""
    content = np.random.default_rng(seed).integers(0, 256, frames * FRAME, dtype="u1")
    path.write_bytes(content.tobytes())
    return content


def write_in_pieces(path: Path, frames: int) -> np.ndarray:
    """Make a file whose frames do not lie side by side, by writing two files in turns."""
    content = np.random.default_rng(7).integers(0, 256, frames * FRAME, dtype="u1")
    other = path.with_name(path.name + ".between")
    with path.open("wb", buffering=0) as file, other.open("wb", buffering=0) as between:
        # The last first, so that nothing comes to lie behind what it is behind in the file.
        for at in reversed(range(0, frames * FRAME, FRAME)):
            os.pwrite(file.fileno(), content[at : at + FRAME].tobytes(), at)
            os.pwrite(between.fileno(), bytes(FRAME), at)
    other.unlink()
    return content


def write_scattered(path: Path, frames: int) -> np.ndarray:
    """Make a file hardly two frames of which lie side by side, in a pool that is filled up for it.
    Needs the native engine."""
    filler = path.with_name("filler")
    with filler.open("wb", buffering=0) as file:
        size = (free_bytes(path.parent) // FRAME - 200) * FRAME
        os.posix_fallocate(file.fileno(), 0, size)
        for at in range(0, 2 * (frames + 200) * FRAME, 2 * FRAME):
            punch_hole(file.fileno(), at, FRAME)
    content = write_file(path, frames)
    filler.unlink()
    # The kernel forgets it a moment later.
    wait_until(lambda: free_bytes(path.parent) > frames * FRAME, "there is room")
    return content


@contextmanager
def program(text: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A Python program that runs until its end, or the context's; it may be spoken with."""
    command = [sys.executable, "-c", text, *map(str, words)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()


def hears(child: subprocess.Popen[str]) -> str:
    """The next line of a program."""
    assert child.stdout is not None
    return child.stdout.readline().strip()


def own_pins(fs: pmemfs.Mount, pid: int | None = None) -> list[pmemfs.PinReport]:
    """The pins of a process, by default this one."""
    return [pin for pin in fs.pins() if pin.pid == (pid or os.getpid())]


def wait_for_pins(fs: pmemfs.Mount, count: int) -> None:
    """The daemon hears of ends by itself, and a moment later."""
    wait_until(lambda: len(fs.pins()) == count, f"there are {count} pins")


def free_bytes(mountpoint: Path) -> int:
    """What a mount has free."""
    room = os.statvfs(mountpoint)
    return room.f_bfree * room.f_frsize


def assert_clean(pools: PoolMaker, mounted: Mounted) -> None:
    """Unmount, and look for errors."""
    pools.umount(mounted)
    result = run_pmemfs("check", mounted.pool)
    assert result.code == 0, f"{result.out}\n{result.err}"
