"""`fstrim` and `pmemfs trim`: what no file uses goes back to what is below the pool."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import struct
import threading
from pathlib import Path

import pytest

from kit.commands import pmemfs, pmemfs_ok, run_command
from kit.mounts import Engine, Mounted, PoolMaker, native_only
from kit.posix import opened, pattern
from kit.processes import wait_until
from kit.sources import loop_device
from pmemfs.fuse.handlers.ioctls import FITRIM

pytestmark = [pytest.mark.mount, pytest.mark.usefixtures("engine")]

MIB = 1 << 20
FEW = pattern(MIB) * 5
MANY = pattern(MIB, 5) * 64
LATER = pattern(MIB, 7) * 64


def taken(path: Path) -> int:
    return path.stat().st_blocks * 512


def mounted(pools: PoolMaker, *options: object) -> Mounted:
    return pools.mount(pools.create("sparse", "256M", "--mode", "fs", *options))


def trim(mount: Mounted) -> int:
    """`pmemfs trim`; how much was given back."""
    return int(json.loads(pmemfs_ok("trim", mount.mountpoint, "--json"))["given_back_bytes"])


def trimmed(mount: Mounted) -> int:
    """All that a sparse pool gives back, once the frames of files that were deleted are free."""
    found = 0

    def has_all() -> bool:
        nonlocal found
        # What becomes free behind the place that is being trimmed is found the next time.
        given_back = trim(mount)
        found += given_back
        return found > 62 * MIB and not given_back

    wait_until(has_all, "the frames are free")
    return found


@pytest.mark.parametrize("scheme", ["pmem", "none"])
def test_a_sparse_pool_gives_back_what_was_deleted(pools: PoolMaker, scheme: str) -> None:
    mount = mounted(pools, "--sparse", "--scheme", scheme)
    (mount.mountpoint / "kept").write_bytes(FEW)
    (mount.mountpoint / "gone").write_bytes(MANY)
    before = taken(mount.pool)
    assert before > 69 * MIB
    (mount.mountpoint / "gone").unlink()
    assert 62 * MIB < trimmed(mount) < 80 * MIB
    assert taken(mount.pool) < before - 62 * MIB
    assert trim(mount) == 0
    assert "0 bytes) trimmed" in pmemfs_ok("trim", mount.mountpoint)
    assert (mount.mountpoint / "kept").read_bytes() == FEW
    # What was given back is there again for whoever needs it.
    (mount.mountpoint / "new").write_bytes(LATER)
    pools.umount(mount)
    assert pmemfs("check", mount.pool).code == 0
    again = pools.mount(mount.pool)
    assert (again.mountpoint / "new").read_bytes() == LATER


@pytest.mark.skipif(not shutil.which("fstrim"), reason="there is no fstrim")
def test_fstrim_does_the_same(pools: PoolMaker, engine: Engine) -> None:
    mount = mounted(pools, "--sparse")
    (mount.mountpoint / "gone").write_bytes(MANY)
    before = taken(mount.pool)
    (mount.mountpoint / "gone").unlink()
    if engine.name != "native":
        # pyfuse3 passes no ioctl on.
        assert run_command("fstrim", mount.mountpoint).code != 0
        return
    said = ""

    def is_given_back() -> bool:
        nonlocal said
        result = run_command("fstrim", "-v", mount.mountpoint)
        assert result.code == 0, result.err
        said = result.out
        return taken(mount.pool) < before - 60 * MIB

    wait_until(is_given_back, "it was trimmed")
    assert "trimmed" in said
    result = run_command("fstrim", "-v", "-o", "16M", "-l", "16M", "-m", "1G", mount.mountpoint)
    assert result.code == 0
    assert "0 B" in result.out


@native_only
def test_of_a_range_behind_the_end_there_is_nothing_to_trim(pools: PoolMaker) -> None:
    mount = mounted(pools, "--sparse")
    with opened(mount.mountpoint, os.O_RDONLY) as fd:
        for start in (1 << 40, (1 << 63) - 1, (1 << 64) - 1):
            answer = fcntl.ioctl(fd, FITRIM, struct.pack("<3Q", start, (1 << 64) - 1, 0))
            assert struct.unpack("<3Q", answer)[1] == 0


def test_a_pool_keeps_the_memory_that_it_was_promised(pools: PoolMaker) -> None:
    mount = mounted(pools)
    (mount.mountpoint / "gone").write_bytes(pattern(8 * MIB))
    (mount.mountpoint / "gone").unlink()
    before = taken(mount.pool)
    result = pmemfs("trim", mount.mountpoint)
    assert result.code != 0
    assert "created with memory for all of it" in result.err
    assert "Traceback" not in result.err
    assert run_command("fstrim", mount.mountpoint).code != 0
    assert taken(mount.pool) == before


def test_a_device_says_who_trims_it(pools: PoolMaker) -> None:
    mount = pools.mount(pools.create("block", "64M", "--sparse"))
    result = pmemfs("trim", mount.mountpoint)
    assert result.code != 0
    assert "it is one device" in result.err


def test_a_pool_on_a_block_device_is_trimmed(pools: PoolMaker, shm: Path) -> None:
    image = shm / "image"
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    with loop_device(image) as device:
        pmemfs_ok("create", device, "--mode", "fs", "--force")
        mount = pools.mount(Path(device))
        (mount.mountpoint / "kept").write_bytes(FEW)
        (mount.mountpoint / "gone").write_bytes(MANY)
        run_command("sync", "-f", mount.mountpoint)
        before = taken(image)
        (mount.mountpoint / "gone").unlink()

        def is_given_back() -> bool:
            # A device doesn't say what has memory: each trim gives back all that is free.
            return trim(mount) > 62 * MIB and taken(image) < before - 50 * MIB

        wait_until(is_given_back, "the frames are free, and the image has less memory")
        assert (mount.mountpoint / "kept").read_bytes() == FEW
        pools.umount(mount)
        assert pmemfs("check", device).code == 0


def test_files_that_come_and_go_beside_it_are_whole(pools: PoolMaker) -> None:
    mount = mounted(pools, "--sparse")
    chance = random.Random(7)
    is_over = threading.Event()
    errors: list[BaseException] = []

    def keep_trimming() -> None:
        try:
            while not is_over.is_set():
                trim(mount)
        except BaseException as error:
            errors.append(error)

    trimming = threading.Thread(target=keep_trimming)
    trimming.start()
    lengths: dict[int, int] = {}
    try:
        for at in range(120):
            length = chance.choice([100, 5000, 70_000, 300_000])
            (mount.mountpoint / str(at)).write_bytes(pattern(length, at))
            lengths[at] = length
            if len(lengths) > 12:
                gone = chance.choice(list(lengths))
                data = (mount.mountpoint / str(gone)).read_bytes()
                assert data == pattern(lengths.pop(gone), gone)
                os.unlink(mount.mountpoint / str(gone))
    finally:
        is_over.set()
        trimming.join()
    assert errors == []
    for at, length in lengths.items():
        assert (mount.mountpoint / str(at)).read_bytes() == pattern(length, at)
    pools.umount(mount)
    assert pmemfs("check", mount.pool).code == 0
