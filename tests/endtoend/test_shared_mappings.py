"""mmap(MAP_SHARED) of the device by another program, coherent with direct I/O after msync."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
from conftest import NATIVE_ONLY, PoolMaker
from endtoend_tools import MIB, opened

pytestmark = [pytest.mark.mount, *NATIVE_ONLY]

OTHER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 2 << 20)
    assert mapped[5000:5009] == b"by write\\0", mapped[5000:5009]
    mapped[1 << 20 : (1 << 20) + 6] = b"mapped"
    mapped.flush()
"""


def test_what_one_program_maps_another_reads(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"by write\0", 5000)
        done = subprocess.run(
            [sys.executable, "-c", OTHER, str(mounted.device)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert os.pread(fd, 8, (1 << 20) - 1) == b"\0mapped\0"
    # msync is an fsync too.
    counts = mounted.pages()["counts"]
    assert counts["clean"] >= 2
    pools.umount(mounted)
    pools.mount(mounted.pool)
    with opened(mounted.device) as fd:
        assert os.pread(fd, 6, 1 << 20) == b"mapped"


def test_two_mappings_share_what_they_hold(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as first, opened(mounted.device) as second:
        one, other = mmap.mmap(first, MIB), mmap.mmap(second, MIB)
        for page in range(0, MIB, 4096):
            one[page : page + 4] = page.to_bytes(4, "little")
        assert all(
            other[page : page + 4] == page.to_bytes(4, "little") for page in range(0, MIB, 4096)
        )
        one.flush()
        assert os.pread(first, 4, 4096 * 7) == (4096 * 7).to_bytes(4, "little")
        one.close()
        other.close()


def test_a_private_mapping_keeps_its_changes_to_itself(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create(size="16M"))
    with opened(mounted.device) as fd:
        os.pwrite(fd, b"theirs", 0)
        mapped = mmap.mmap(fd, 4096, flags=mmap.MAP_PRIVATE)
        mapped[:6] = b"secret"
        assert os.pread(fd, 6, 0) == b"theirs"
        mapped.close()
