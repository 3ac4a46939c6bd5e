"""A file system on a loop device on the mount, when nearly all memory is used up: no deadlock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit.commands import fio, run_command
from kit.ext4 import assert_sound
from kit.mounts import NATIVE_ONLY, PoolMaker
from kit.sources import loop_device
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.alone, *NATIVE_ONLY]

POOL_BYTES = 512 * MIB
LEFT_BYTES = 500 * MIB
HOG = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
memory.madvise(23)  # MADV_POPULATE_WRITE
print("full", flush=True)
sys.stdin.read()
"""


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable")


@pytest.fixture(scope="module")
def hogs() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have nearly all memory, and would be the first to be killed for more.

    One for each CPU, since the kernel clears all that memory first.
    """
    count = os.cpu_count() or 1
    each_bytes = (available_bytes() - POOL_BYTES - LEFT_BYTES) // count
    with ExitStack() as stack:
        processes = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", HOG, str(each_bytes)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                preexec_fn=lambda: Path("/proc/self/oom_score_adj").write_text("1000"),
            )  # fmt: skip
            stack.callback(process.communicate)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "full\n"
        yield processes


def test_ext4_on_the_mount_writes_back_with_the_memory_nearly_full(
    pools: PoolMaker, tmp_path: Path, hogs: list[subprocess.Popen[str]]
) -> None:
    mounted = pools.mount(pools.create("pmem0", str(POOL_BYTES)))
    inside = pools.mountpoint("ext4")
    with loop_device(mounted.device) as loop:
        for words in (("mkfs.ext4", "-q", "-F", loop), ("mount", loop, inside)):
            assert run_command(*words).code == 0
        # Through the page cache, and synced.
        done = fio(
            tmp_path, inside / "file", "--direct=0", "--rw=randwrite", "--bs=64k",
            "--size=300m", "--io_size=400m", "--fsync=500", "--end_fsync=1",
            "--verify=crc32c", "--verify_state_save=0", timeout=240,
        )  # fmt: skip
        assert done.code == 0, done.err
        os.sync()
        assert [hog.poll() for hog in hogs] == [None] * len(hogs), "the kernel had to kill somebody"
        assert run_command("umount", inside).code == 0
        assert_sound(loop)
    pools.umount(mounted)
