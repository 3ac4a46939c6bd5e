"""A file system on a loop device on the mount, when nearly all memory is used up: no deadlock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import NATIVE_ONLY, PoolMaker, run_command
from endtoend_tools import MIB, fio, loop_device

pytestmark = [pytest.mark.mount, pytest.mark.slow, *NATIVE_ONLY]

LEFT_BYTES = 700 * MIB
HOG = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x8000)
print("full", flush=True)
sys.stdin.read()
"""


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable")


@contextmanager
def used_up(leaving_bytes: int) -> Iterator[None]:
    """All memory but that much belongs to a process that would be the first to be killed."""
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(available_bytes() - leaving_bytes)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: Path("/proc/self/oom_score_adj").write_text("1000"),
    )  # fmt: skip
    try:
        assert hog.stdout is not None
        assert hog.stdout.readline() == "full\n"
        yield
        assert hog.poll() is None, "the kernel had to kill somebody"
    finally:
        hog.kill()
        hog.communicate()


def test_ext4_on_the_mount_writes_back_with_the_memory_nearly_full(
    pools: PoolMaker, tmp_path: Path
) -> None:
    mounted = pools.mount(pools.create("pmem0", "512M"))
    inside = pools.mountpoint("ext4")
    with loop_device(mounted.device) as loop:
        for words in (("mkfs.ext4", "-q", "-F", loop), ("mount", loop, inside)):
            assert run_command(*words).code == 0
        with used_up(LEFT_BYTES):
            # Through the page cache, more than is left, and synced.
            done = fio(
                tmp_path, inside / "file", "--direct=0", "--rw=randwrite", "--bs=64k",
                "--size=300m", "--io_size=400m", "--fsync=500", "--end_fsync=1",
                "--verify=crc32c", "--verify_state_save=0", timeout=100,
            )  # fmt: skip
            assert done.code == 0, done.err
            os.sync()
        assert run_command("umount", inside).code == 0
        assert run_command("fsck.ext4", "-f", "-n", loop).code == 0
    pools.umount(mounted)
