"""Programs on a mounted cache: fio, dd, ext4 over loop; and killed processes under their writes."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from kit.caches import ask, cache_of, new_origin
from kit.commands import fio, run_command
from kit.ext4 import assert_is_on_ext4, make_tree, needs_ext4, put_on_ext4
from kit.mounts import UNKEPT, Mounted, PoolMaker, Session, native_only
from kit.origins import NbdServer
from kit.posix import opened
from kit.processes import is_running, wait_until
from kit.records import WRITERS, Writer, writing
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

SIZE_BYTES = 24 * MIB


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", SIZE_BYTES)


def verify(mounted: Mounted, directory: Path, *words: object) -> None:
    """Run fio with crc32c in every block, a cache that is smaller than what it writes."""
    done = fio(
        directory, mounted.device, "--verify=crc32c", "--verify_fatal=1", "--ioengine=libaio",
        "--iodepth=32", *words,
    )  # fmt: skip
    assert done.code == 0, done.err


def test_fio_reads_back_what_four_jobs_wrote(
    pools: PoolMaker, tmp_path: Path, origin: Path
) -> None:
    mounted = pools.mount(cache_of(pools, origin, max_dirty_percent=30))
    verify(mounted, tmp_path, "--rw=randwrite", "--bs=4k", "--size=2m", "--numjobs=4",
           "--offset_increment=6m")  # fmt: skip
    verify(mounted, tmp_path, "--rw=randwrite", "--bsrange=4k-256k", "--size=12m")
    wanted = mounted.device.read_bytes()
    assert ask(mounted, "cache-flush")["dirty"] == 0
    pools.umount(mounted)
    assert origin.read_bytes() == wanted


@pytest.mark.parametrize("policy", ["write-through", "write-around"])
def test_fio_reads_back_what_it_wrote_by_each_policy(
    pools: PoolMaker, tmp_path: Path, origin: Path, policy: str
) -> None:
    mounted = pools.mount(cache_of(pools, origin))
    ask(mounted, "cache-set", policy=policy)
    verify(mounted, tmp_path, "--rw=randwrite", "--bs=4k", "--size=4m", "--fsync=64")
    verify(mounted, tmp_path, "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512",
           "--size=4m", "--offset=8m")  # fmt: skip
    wanted = mounted.device.read_bytes()
    pools.umount(mounted)
    assert origin.read_bytes() == wanted


def test_a_device_that_errs_now_and_then_loses_nothing(
    pools: PoolMaker, tmp_path: Path, origin: Path
) -> None:
    errs = tmp_path / "errs"
    server = NbdServer(
        "--filter=error", "file", origin, "error-rate=10%", "error=EIO", f"error-file={errs}"
    )
    try:
        mounted = pools.mount(cache_of(pools, server.text, max_dirty_percent=30))
        errs.touch()
        chance = random.Random(3)
        with opened(mounted.device) as fd:
            for number in range(1, 400):
                os.pwrite(fd, bytes([number % 255 + 1]) * 4096, chance.randrange(6000) * 4096)

        def is_flushed() -> bool:
            return pmemfs_flush(mounted) == 0

        wait_until(is_flushed, "the origin has all", seconds=60)
        assert ask(mounted, "cache-info")["origin"]["errors"] > 0
        errs.unlink()
        wanted = mounted.device.read_bytes()
        pools.umount(mounted)
        assert origin.read_bytes() == wanted
    finally:
        server.end()


def pmemfs_flush(mounted: Mounted) -> int:
    """How many blocks are dirty after a flush that may fail."""
    try:
        return int(ask(mounted, "cache-flush")["dirty"])
    except Exception:
        return -1


def test_a_writer_above_the_limit_waits_for_as_much_as_it_writes(
    pools: PoolMaker, origin: Path
) -> None:
    # All that is dirty at the limit takes this origin longer than a write may wait.
    server = NbdServer("--filter=delay", "file", origin, "wdelay=100ms")
    try:
        mounted = pools.mount(
            cache_of(pools, server.text, pool_bytes=18 * MIB, origin_timeout_seconds=5)
        )
        blocks = list(range(SIZE_BYTES // 4096))[::2]
        random.Random(6).shuffle(blocks)
        limit = ask(mounted, "cache-info")["place_count"] // 2
        with opened(mounted.device) as fd:
            for block in blocks[: limit + 700]:
                assert os.pwrite(fd, b"x" * 4096, block * 4096) == 4096
        if pools.engine.name == "python":
            # Workers write on until they are told, which takes some milliseconds.
            assert ask(mounted, "cache-info")["limit_waits"] > 0
    finally:
        server.end()


@pytest.mark.parametrize("victim", ["daemon", "data plane"])
def test_what_was_acknowledged_survives_kill_9(pools: PoolMaker, origin: Path, victim: str) -> None:
    if victim == "data plane" and pools.engine.name == "python":
        pytest.skip("it has one process")
    mounted = pools.mount(cache_of(pools, origin, max_dirty_percent=30), *UNKEPT)
    writers = [Writer(name) for name in range(WRITERS)]
    for _ in range(3):
        session = Session.of(mounted)
        plane = mounted.data_plane_pid if victim == "data plane" else 0
        with writing(writers, mounted.device):
            wait_until(lambda: all(w.count or w.error for w in writers), "all writers write")
            time.sleep(0.3)
            if plane:
                os.kill(plane, 9)
                pid = session.pid
                wait_until(lambda pid=pid: not is_running(pid), "the daemon has ended")  # type: ignore[misc]
            else:
                session.kill()
        pools.mount(mounted.pool, *UNKEPT)
        with opened(mounted.device) as fd:
            for writer in writers:
                writer.check(fd)
    wanted = mounted.device.read_bytes()
    wait_until(lambda: not ask(mounted, "cache-info")["is_searching"], "the search is over")
    assert ask(mounted, "cache-flush")["dirty"] == 0
    assert ask(mounted, "cache-info")["dirty"] == 0
    pools.umount(mounted)
    assert origin.read_bytes() == wanted


@native_only
@needs_ext4
def test_ext4_on_a_cache_is_whole_without_us(
    pools: PoolMaker, tmp_path: Path, origin: Path
) -> None:
    mounted = pools.mount(cache_of(pools, origin, pool_bytes=6 * MIB, max_dirty_percent=40))
    tree = make_tree(tmp_path / "tree")
    put_on_ext4(mounted.device, tree)
    assert ask(mounted, "cache-flush")["dirty"] == 0
    pools.umount(mounted)
    assert_is_on_ext4(origin, tree)


def test_a_pool_with_a_loop_device_as_its_origin(pools: PoolMaker, origin: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    loop = run_command("losetup", "--direct-io=on", "-f", "--show", origin).out.strip()
    try:
        mounted = pools.mount(cache_of(pools, loop))
        with opened(mounted.device) as fd:
            for at in range(0, SIZE_BYTES, MIB):
                os.pwrite(fd, b"%16d" % at * 256, at)
            os.fsync(fd)
        ask(mounted, "cache-flush")
        pools.umount(mounted)
    finally:
        run_command("losetup", "-d", loop)
    data = origin.read_bytes()
    assert all(data[at : at + 16] == b"%16d" % at for at in range(0, SIZE_BYTES, MIB))
