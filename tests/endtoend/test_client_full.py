"""Clients of sparse pools on a full file system: a refusal in a sentence, and never a SIGBUS."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import pmemfs
from kit.clients import FRAME, assert_clean, program, write_file
from kit.commands import pmemfs_here, run_command
from kit.mounts import Engine, PoolMaker, each_engine
from kit.processes import wait_until
from kit.sources import mounted_tmpfs, needs_root
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, needs_root]

SUM = """
import sys
import pmemfs
path, mode = sys.argv[1:]
array = pmemfs.connect(path).map(path, mode=mode)
print(int(array.sum()))
if mode == "c":
    array[:] = 3
    print(int(array.sum()))
"""


@pytest.fixture
def small(pools: PoolMaker) -> Iterator[Path]:
    """A tmpfs of 16 MiB of its own."""
    with mounted_tmpfs(pools.directory / "small", "size=16M") as directory:
        yield directory
        for mountpoint in pools.mountpoints:
            run_command("umount", mountpoint)


def fill(directory: Path) -> Path:
    """Leave no memory in a tmpfs; what takes it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(FRAME))
    return filler


def no_room(call: Callable[[], object]) -> str:
    """What a call says that fails for want of memory."""
    with pytest.raises(OSError, match=r"(?i)no space left") as refused:
        call()
    assert refused.value.errno == errno.ENOSPC
    return str(refused.value)


def sparse_pool(small: Path, name: str, *options: object) -> Path:
    pool = small / name
    pmemfs_here("create", pool, "--sparse", "--size", "100M", *options)
    return pool


@each_engine
def test_on_a_full_file_system_pages_without_memory_are_refused(
    pools: PoolMaker, small: Path, engine: Engine
) -> None:
    mounted = pools.mount(sparse_pool(small, "fs0", "--mode", "fs"))
    root = mounted.mountpoint
    content = write_file(root / "file", 10)
    os.truncate(root / "file", 20 * FRAME)
    with pmemfs.connect(root) as fs:
        cache = pmemfs.TensorCache(root / "kv")
        filler = fill(small)
        array = fs.map("file")
        assert (array[: len(content)] == content).all()
        assert not array[len(content) :].any()
        no_room(lambda: fs.map("file", mode="r+"))
        no_room(lambda: fs.create("new", 3 * MIB))
        said = no_room_in(cache)
        assert "what the cache holds is in use" in said
        assert cache.statistics().entry_count == 0
        filler.unlink()
        with fs.open("file", mode="r+") as mapping:
            mapping.array[:] = 3
        assert (root / "file").read_bytes() == b"\3" * 20 * FRAME
        cache.put("a", np.ones(1000))
        cache.close()
        del array, mapping
    assert_clean(pools, mounted)


def no_room_in(cache: pmemfs.TensorCache) -> str:
    with pytest.raises(pmemfs.CacheFull) as refused:
        cache.put("a", np.zeros(3 * MIB))
    return str(refused.value)


@each_engine
def test_on_a_full_file_system_a_cache_uses_the_memory_of_what_it_evicts(
    pools: PoolMaker, small: Path, engine: Engine
) -> None:
    root = pools.mount(sparse_pool(small, "fs0", "--mode", "fs")).mountpoint
    with pmemfs.TensorCache(root / "kv") as cache:
        for number in range(4):
            cache.put(f"{number}", np.full(MIB, number, "u1"))
        kept = cache.get("2")
        filler = fill(small)
        for number in range(4, 12):
            cache.put(f"{number}", np.full(MIB // 2, number, "u1"))
            found = cache.get(f"{number}")
            assert found is not None
            assert (found == number).all()
        assert kept is not None
        assert (kept == 2).all()
        assert cache.statistics().evicted_count > 0
        filler.unlink()
        del kept, found


@each_engine
def test_on_a_full_file_system_what_is_removed_makes_room(
    pools: PoolMaker, small: Path, engine: Engine
) -> None:
    mounted = pools.mount(sparse_pool(small, "fs0", "--mode", "fs"))
    root = mounted.mountpoint
    for number in range(4):
        (root / f"{number}").write_bytes(bytes([number + 1]) * MIB)
    sparse = root / "sparse"
    sparse.touch()
    os.truncate(sparse, 64 * MIB)
    fill(small)
    for number in range(4, 40):
        with suppress(OSError):
            # What this gets before it fails must not be lost to others.
            (root / "too large").write_bytes(bytes(6 * MIB))
        before = os.statvfs(root).f_bfree
        (root / f"{number - 4}").unlink()
        (root / "too large").unlink(missing_ok=True)
        if engine.name == "python":
            # pyfuse3 may not read on while a request waits, and what was removed is free once it
            # has read so. Less may be free earlier, as what was not needed of the last file.
            least = before + 120
            wait_until(lambda least=least: os.statvfs(root).f_bfree > least, "it is free")
        with sparse.open("r+b", buffering=0) as file:
            # In one place after the other, where it has no frames yet.
            assert os.pwrite(file.fileno(), b"x" * FRAME, number * MIB) == FRAME
        content = bytes([number + 1]) * (MIB // 2)
        (root / f"{number}").write_bytes(content)
        assert (root / f"{number}").read_bytes() == content
    assert_clean(pools, mounted)


@each_engine
def test_on_a_full_file_system_commands_use_the_memory_of_free_frames(
    pools: PoolMaker, small: Path, engine: Engine
) -> None:
    mounted = pools.mount(sparse_pool(small, "fs0", "--mode", "fs"))
    root = mounted.mountpoint
    (root / "packed").write_bytes(b"as good as empty " * (2 * MIB // 17))
    if engine.name == "native":
        pmemfs_here("set", root / "packed", "compression=zstd")
        pmemfs_here("rewrite", root / "packed")
    for number in range(64):
        # Every other frame stays in use, so what is removed lies in pieces.
        (root / f"kept {number}").write_bytes(b"k" * FRAME)
        (root / f"gone {number}").write_bytes(b"g" * FRAME)
    (root / "large").write_bytes(bytes(4 * MIB))
    before = os.statvfs(root).f_bfree
    fill(small)
    for path in (root / "large", *root.glob("gone *")):
        path.unlink()
    wait_until(lambda: os.statvfs(root).f_bfree > before + 1024, "what was removed is free")
    if engine.name == "native":
        pmemfs_here("set", root / "packed", "compression=none")
        pmemfs_here("rewrite", root / "packed")
    with pmemfs.connect(root) as fs:
        assert fs.map("packed", contiguous=True)[:17].tobytes() == b"as good as empty "
    pmemfs_here("resize", root, "--size", "140M")
    for number in range(64):
        assert (root / f"kept {number}").read_bytes() == b"k" * FRAME
    assert_clean(pools, mounted)


@each_engine
@pytest.mark.parametrize("mode", ["r", "c"])
def test_a_sparse_pool_that_is_mounted_read_only_shows_its_holes_without_memory(
    pools: PoolMaker, small: Path, engine: Engine, mode: str
) -> None:
    pool = sparse_pool(small, "pmem0")
    mounted = pools.mount(pool)
    with mounted.device.open("r+b", buffering=0) as device:
        for at in (3 * MIB + FRAME, 7 * MIB, 50 * MIB):
            os.pwrite(device.fileno(), b"\1" * FRAME, at)
    pools.umount(mounted)
    mounted = pools.mount(pool, "-o", "ro")
    used = pool.stat().st_blocks
    fill(small)
    with program(SUM, mounted.device, mode) as child:
        out, _ = child.communicate(timeout=60)
    sums = {"r": [3 * FRAME], "c": [3 * FRAME, 3 * mounted.device.stat().st_size]}
    assert (child.returncode, [int(line) for line in out.split()]) == (0, sums[mode])
    assert pool.stat().st_blocks == used
