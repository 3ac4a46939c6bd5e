"""TRIM gives memory back: the pool's file shrinks, the range reads as zeroes and is a hole."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from multiprocessing import get_context
from pathlib import Path

import pytest

from kit.commands import fio, pmemfs_ok, run_command
from kit.ext4 import assert_sound
from kit.mounts import NATIVE_ONLY, Mounted, PoolMaker
from kit.posix import opened
from kit.sources import loop_device, mounted_tmpfs
from pmemfs.fuse.handlers.ranges import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, *NATIVE_ONLY]

KIB = 1024


def used_bytes(pool: Path) -> int:
    """What du counts."""
    return pool.stat().st_blocks * 512


def succeed(*words: object) -> str:
    result = run_command(*words)
    assert result.code == 0, (words, result.out, result.err)
    return result.out


def sync(inside: Path) -> None:
    """Write what is dirty of one file system. sync(2) would write that of all other tests, too."""
    succeed("sync", "--file-system", inside)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    wide = ctypes.c_int64
    if libc.fallocate(fd, mode, wide(offset), wide(length)):
        raise OSError(ctypes.get_errno(), "fallocate failed")


def punch(fd: int, offset: int, length: int) -> None:
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)


def write_pieces(fd: int, length: int) -> None:
    for offset in range(0, length, 64 * KIB):
        os.pwrite(fd, b"y" * (64 * KIB), offset)


def filled(pools: PoolMaker, size: str, *options: object) -> tuple[Mounted, int]:
    """A mount whose device holds letters everywhere, and how large it is."""
    mounted = pools.mount(pools.create("pmem0", size, *options))
    length = mounted.device.stat().st_size
    with opened(mounted.device) as fd:
        for offset in range(0, length, MIB):
            os.pwrite(fd, b"x" * min(MIB, length - offset), offset)
    return mounted, length


@pytest.mark.quick
def test_a_punched_range_reads_as_zeroes_and_its_memory_is_free(pools: PoolMaker) -> None:
    mounted, length = filled(pools, "32M")
    before = used_bytes(mounted.pool)
    succeed("fallocate", "-p", "-o", 5 * MIB + 100, "-l", 10 * MIB, mounted.device)
    assert before - used_bytes(mounted.pool) == 10 * MIB - 4 * KIB
    with opened(mounted.device) as fd:
        assert os.pread(fd, 200, 5 * MIB) == b"x" * 100 + bytes(100)
        assert os.pread(fd, MIB, 9 * MIB) == bytes(MIB)
        assert os.pread(fd, 200, 15 * MIB) == bytes(100) + b"x" * 100
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 5 * MIB + 4 * KIB
        assert os.lseek(fd, 6 * MIB, os.SEEK_DATA) == 15 * MIB
        # What was read did not get memory by that; what is written does.
        assert before - used_bytes(mounted.pool) == 10 * MIB - 4 * KIB
        os.pwrite(fd, b"again", 8 * MIB)
        assert before - used_bytes(mounted.pool) == 10 * MIB - 8 * KIB
        assert os.pread(fd, 10, 8 * MIB - 2) == b"\0\0again\0\0\0"
    assert mounted.device.stat().st_size == length
    mounted.wait_until_idle()
    pools.umount(mounted)
    pools.mount(mounted.pool)
    with opened(mounted.device) as fd:
        assert os.pread(fd, 10, 8 * MIB - 2) == b"\0\0again\0\0\0"
        assert os.pread(fd, 3, 16 * MIB) == b"xxx"


def test_a_trimmed_page_is_not_dirty(pools: PoolMaker) -> None:
    mounted, length = filled(pools, "8M")
    assert mounted.pages()["counts"]["dirty"] == length // 4096
    with opened(mounted.device) as fd:
        # fallocate(1) would fsync.
        punch(fd, 4096, length - 8192)
    counts = mounted.pages()["counts"]
    assert (counts["dirty"], counts["uninitialised"]) == (2, 0)


def test_zeroing_keeps_the_memory_of_a_pool_that_was_reserved(pools: PoolMaker) -> None:
    mounted, _ = filled(pools, "16M")
    before = used_bytes(mounted.pool)
    succeed("fallocate", "-z", "-o", 100, "-l", 4 * MIB, mounted.device)
    assert used_bytes(mounted.pool) == before
    with opened(mounted.device) as fd:
        assert os.pread(fd, 4 * MIB + 200, 0) == b"x" * 100 + bytes(4 * MIB) + b"x" * 100
    assert mounted.info()["pool"]["reserved"]


def test_reserving_gets_memory_for_a_sparse_pool_and_never_grows_a_device(
    pools: PoolMaker,
) -> None:
    mounted = pools.mount(pools.create("pmem0", "32M", "--sparse"))
    before = used_bytes(mounted.pool)
    succeed("fallocate", "-l", 8 * MIB, mounted.device)
    assert used_bytes(mounted.pool) - before == 8 * MIB
    size = mounted.device.stat().st_size
    for words in (("-l", size + 1), ("-n", "-l", 1 << 40), ("-o", size, "-l", 1)):
        assert "No space left" in run_command("fallocate", *words, mounted.device).err
    assert mounted.device.stat().st_size == size
    # Of a range behind the end, nothing is there to be punched.
    succeed("fallocate", "-p", "-o", size - 10, "-l", 4096, mounted.device)


def test_a_read_only_mount_takes_no_memory_away(pools: PoolMaker) -> None:
    mounted, _ = filled(pools, "8M")
    pools.umount(mounted)
    before = used_bytes(mounted.pool)
    pools.mount(mounted.pool, "-o", "ro")
    assert run_command("fallocate", "-p", "-l", 4096, mounted.device).code != 0
    assert used_bytes(mounted.pool) == before


def test_copy_file_range_copies_within_the_device(pools: PoolMaker) -> None:
    mounted, length = filled(pools, "16M")
    with opened(mounted.device) as fd:
        data = os.urandom(3 * MIB)
        os.pwrite(fd, data, 777)
        assert os.copy_file_range(fd, fd, len(data), 777, 8 * MIB + 1) == len(data)
        assert os.pread(fd, len(data) + 2, 8 * MIB) == b"x" + data + b"x"
        # As far as there is room.
        assert os.copy_file_range(fd, fd, 2 * MIB, 777, length - MIB) == MIB
        with pytest.raises(OSError, match="Invalid") as caught:
            os.copy_file_range(fd, fd, MIB, 0, 100)
        assert caught.value.errno == errno.EINVAL
    assert mounted.device.stat().st_size == length


@pytest.mark.slow
def test_a_loop_device_passes_its_discards_on(pools: PoolMaker, tmp_path: Path) -> None:
    mounted, length = filled(pools, "64M")
    before = used_bytes(mounted.pool)
    with loop_device(mounted.device) as loop:
        queue = Path("/sys/block") / loop.name / "queue"
        assert int((queue / "discard_granularity").read_text()) == 4096
        succeed("blkdiscard", "--offset", 8 * MIB, "--length", 16 * MIB, loop)
        assert before - used_bytes(mounted.pool) == 16 * MIB
        with opened(mounted.device) as fd:
            assert os.pread(fd, 16 * MIB, 8 * MIB) == bytes(16 * MIB)
            assert os.pread(fd, 1, 24 * MIB) == b"x"
        done = fio(tmp_path, loop, "--rw=trim", "--bs=1m", "--offset=32m", "--size=16m")
        assert done.code == 0, done.err
        assert before - used_bytes(mounted.pool) == 32 * MIB
        succeed("blkdiscard", loop)
    assert used_bytes(mounted.pool) <= before - length + MIB


@pytest.mark.slow
def test_a_pool_on_a_block_device_is_trimmed_and_served_on(
    pools: PoolMaker, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(32 * MIB))
    with loop_device(image) as device:
        pmemfs_ok("create", device, "--name", "dev")
        mounted = pools.mount(device)
        with opened(mounted.mountpoint / "dev") as fd:
            os.pwrite(fd, b"x" * (8 * MIB), 0)
            for mode in (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE):
                os.pwrite(fd, b"y" * MIB, MIB)
                fallocate(fd, mode, MIB + 10, MIB - 20)
                wanted = b"x" * 5 + b"y" * 10 + bytes(MIB - 20) + b"y" * 10 + b"x" * 5
                assert os.pread(fd, MIB + 10, MIB - 5) == wanted
            os.pwrite(fd, b"again", MIB + 100)
            assert os.pread(fd, 7, MIB + 99) == b"\0again\0"
            os.fsync(fd)
        assert mounted.info()["pool"]["reserved"]
        pools.umount(mounted)


@pytest.mark.slow
def test_fstrim_gives_back_what_ext4_does_not_use(pools: PoolMaker) -> None:
    mounted, _ = filled(pools, "256M")
    inside = pools.mountpoint("ext4")
    with loop_device(mounted.device) as loop:
        succeed("mkfs.ext4", "-q", "-F", loop)
        assert used_bytes(mounted.pool) < 64 * MIB, "mkfs discards what it finds"
        succeed("mount", loop, inside)
        (inside / "kept").write_bytes(b"kept" * MIB)
        (inside / "gone").write_bytes(b"gone" * (16 * MIB))
        sync(inside)
        full = used_bytes(mounted.pool)
        (inside / "gone").unlink()
        sync(inside)
        succeed("fstrim", inside)
        assert full - used_bytes(mounted.pool) > 60 * MIB
        assert (inside / "kept").read_bytes() == b"kept" * MIB
        succeed("umount", inside)
        assert_sound(loop)


@pytest.mark.slow
def test_mkfs_on_a_large_sparse_pool_writes_no_gigabytes_of_zeroes(pools: PoolMaker) -> None:
    mounted = pools.mount(pools.create("pmem0", "64G", "--sparse"))
    with loop_device(mounted.device) as loop:
        succeed("mkfs.ext4", "-q", "-F", loop)
    assert mounted.info()["io"]["written_bytes"] < 200 * MIB
    assert used_bytes(mounted.pool) < 200 * MIB


def trim_and_verify(device: Path, first: int, slots: int, slot_bytes: int, seed: int) -> None:
    """A process that writes, trims and reads slots of its own, and knows what is in each."""
    chance = random.Random(seed)
    expected: dict[int, bytes] = {}
    empty = bytes(slot_bytes)
    with opened(device) as fd:
        for slot in range(slots):
            os.pwrite(fd, empty, first + slot * slot_bytes)
        for _ in range(8000):
            slot = chance.randrange(slots)
            at = first + slot * slot_bytes
            what = chance.random()
            if what < 0.45:
                expected[slot] = chance.randbytes(slot_bytes)
                assert os.pwrite(fd, expected[slot], at) == slot_bytes
            elif what < 0.6:
                punch(fd, at, slot_bytes)
                expected.pop(slot, None)
            else:
                assert os.pread(fd, slot_bytes, at) == expected.get(slot, empty), f"slot {slot}"


@pytest.mark.slow
def test_trims_under_load_show_no_old_data_and_lose_none(pools: PoolMaker) -> None:
    """Slots of several sizes lie mixed within the same chunks of 2 MiB."""
    mounted, _ = filled(pools, "16M")
    fork = get_context("fork")
    workers = []
    for number, slot_bytes in enumerate((4096, 12288, 5000, 65536)):
        arguments = (mounted.device, number * 3 * MIB, 40, slot_bytes, number)
        workers.append(fork.Process(target=trim_and_verify, args=arguments))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    mounted.wait_until_idle()


@pytest.mark.slow
def test_a_trimmed_pool_on_a_full_tmpfs_says_so_and_serves_on(pools: PoolMaker) -> None:
    """What was given back may be gone to somebody else."""
    with mounted_tmpfs(pools.directory / "small", "size=24M") as directory:
        pool = directory / "pmem0"
        succeed("truncate", "-s", "0", pool)
        pmemfs_ok("create", pool, "--size", "20M")
        mounted = pools.mount(pool)
        with opened(mounted.device) as fd:
            os.pwrite(fd, b"x" * (8 * MIB), 0)
            succeed("fallocate", "-p", "-l", 4 * MIB, mounted.device)
            succeed("fallocate", "-l", 7 * MIB, directory / "other")
            with pytest.raises(OSError, match="No space left") as caught:
                write_pieces(fd, 4 * MIB)
            assert caught.value.errno == errno.ENOSPC
            assert os.pread(fd, 10, 6 * MIB) == b"x" * 10
            os.pwrite(fd, b"z", 6 * MIB)
            (directory / "other").unlink()
            os.pwrite(fd, b"y" * (4 * MIB), 0)
            assert os.pread(fd, 4 * MIB, 0) == b"y" * (4 * MIB)
        pools.umount(mounted)
