"""Mode cache, mounted: programs on the file, the origin behind it, and what ends a mount."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kit.caches import ORIGIN_BYTES, ask, cache_of, make_cache, new_origin
from kit.commands import pmemfs, pmemfs_ok, refused
from kit.mounts import NATIVE, Mounted, PoolMaker, Session, begin_end
from kit.origins import NbdServer
from kit.processes import is_running, wait_until
from pmemfs.medium.writeback import punch_hole
from pmemfs.mountinfo import mount_at
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", seed=b"o")


def test_a_mount_shows_the_origin_and_gives_it_what_was_written(
    pools: PoolMaker, origin: Path
) -> None:
    wanted = bytearray(origin.read_bytes())
    mounted = pools.mount(cache_of(pools, origin))
    assert mounted.device.stat().st_size == ORIGIN_BYTES
    assert mounted.device.read_bytes() == wanted
    chance = random.Random(1)
    with mounted.device.open("r+b", buffering=0) as file:
        for _ in range(60):
            offset = chance.randrange(ORIGIN_BYTES)
            data = chance.randbytes(chance.choice([1, 512, 4096, 9000, 70_000]))
            data = data[: ORIGIN_BYTES - offset]
            assert os.pwrite(file.fileno(), data, offset) == len(data)
            wanted[offset : offset + len(data)] = data
        os.fsync(file.fileno())
    assert mounted.device.read_bytes() == wanted
    flushed = ask(mounted, "cache-flush")
    assert flushed["dirty"] == 0
    assert origin.read_bytes() == wanted
    pools.umount(mounted)


def test_a_remount_has_what_was_clean_and_what_was_dirty(pools: PoolMaker, origin: Path) -> None:
    before = origin.read_bytes()
    pool = cache_of(pools, origin, max_dirty_age_seconds=0)
    mounted = pools.mount(pool)
    with mounted.device.open("r+b") as file:
        file.write(b"new" * 10_000)
    pools.umount(mounted)
    assert origin.read_bytes() == before
    mounted = pools.mount(pool)
    with mounted.device.open("rb") as file:
        assert file.read(30_000) == b"new" * 10_000
    assert ask(mounted, "cache-info")["dirty"] == 8
    ask(mounted, "cache-flush")
    pools.umount(mounted)
    assert origin.read_bytes() == b"new" * 10_000 + before[30_000:]


def test_a_killed_daemon_loses_nothing(pools: PoolMaker, origin: Path) -> None:
    before = origin.read_bytes()
    pool = cache_of(pools, origin, max_dirty_age_seconds=0)
    mounted = pools.mount(pool)
    with mounted.device.open("r+b", buffering=0) as file:
        file.write(b"kept" * 5000)
    Session.of(mounted).kill()
    subprocess.run(["umount", "-l", mounted.mountpoint], check=False, capture_output=True)
    mounted = pools.mount(pool)
    with mounted.device.open("rb") as file:
        assert file.read(20_000) == b"kept" * 5000
        assert file.read(4) == before[20_000:20_004]
    wait_until(lambda: not ask(mounted, "cache-info")["is_searching"], "the search is over")
    assert ask(mounted, "cache-info")["dirty"] == 5
    assert ask(mounted, "cache-flush") == {"cleaned": 5, "dirty": 0}
    pools.umount(mounted)
    assert origin.read_bytes() == b"kept" * 5000 + before[20_000:]


def test_another_origin_or_a_changed_one_is_refused(pools: PoolMaker, origin: Path) -> None:
    pool = cache_of(pools, origin)
    pools.umount(pools.mount(pool))
    with origin.open("r+b") as file:
        file.write(b"somebody else")
    at = pools.mountpoint()
    result = pmemfs("mount", pool, at, *pools.engine.options)
    assert result.code == 32
    assert "somebody has written to it since" in result.err
    os.rename(origin, origin.with_name("moved"))
    new_origin(origin)
    result = pmemfs("mount", pool, at, *pools.engine.options)
    assert result.code == 32
    assert "it is another one" in result.err
    origin.unlink()
    result = pmemfs("mount", pool, at, *pools.engine.options)
    assert result.code == 32
    assert "Traceback" not in result.err
    pmemfs_ok("mount", pool, at, "-o", "degraded", *pools.engine.options)
    assert mount_at(str(at)) is not None


def test_an_origin_serves_one_pool_at_a_time(pools: PoolMaker, origin: Path) -> None:
    first = cache_of(pools, origin)
    second = pools.directory / "pmem1"
    make_cache(second, str(origin), pool_bytes=8 * MIB)
    pools.mount(first)
    result = pmemfs("mount", second, pools.mountpoint("second"), *pools.engine.options)
    assert result.code == 32
    assert "is in use" in result.err


def test_an_origin_that_is_away_and_back(pools: PoolMaker, origin: Path) -> None:
    server = NbdServer("file", origin)
    try:
        pool = cache_of(pools, server.text, origin_timeout_seconds=1, max_dirty_age_seconds=0)
        mounted = pools.mount(pool)
        with mounted.device.open("r+b", buffering=0) as file:
            fd = file.fileno()
            known = os.pread(fd, 4096, 0)
            server.end()
            assert os.pread(fd, 4096, 0) == known
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(fd, 4096, 4 * MIB)
            assert os.pwrite(fd, b"dirty..." * 1024, 0) == 8192
        report = ask(mounted, "cache-info")
        assert report["origin"]["state"] == "away"
        assert report["dirty"] == 2
        # From here on the origin may be slow.
        ask(mounted, "cache-set", origin_timeout_seconds=60)
        server.start()
        with mounted.device.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, 4 * MIB).startswith(b"o4194304 ")
        assert ask(mounted, "cache-flush")["dirty"] == 0
        assert ask(mounted, "cache-info")["origin"]["state"] == "present"
        pools.umount(mounted)
    finally:
        server.end()
    assert origin.read_bytes()[:8192] == b"dirty..." * 1024


def test_each_policy_gives_the_origin_the_same(pools: PoolMaker, origin: Path) -> None:
    wanted = bytearray(origin.read_bytes())
    mounted = pools.mount(cache_of(pools, origin))
    chance = random.Random(2)
    with mounted.device.open("r+b", buffering=0) as file:
        for policy in ("write-through", "write-around", "write-back", "write-around"):
            assert ask(mounted, "cache-set", policy=policy)["policy"] == policy
            for _ in range(15):
                offset = chance.randrange(ORIGIN_BYTES - 9000)
                data = chance.randbytes(chance.choice([512, 4096, 9000]))
                os.pwrite(file.fileno(), data, offset)
                wanted[offset : offset + len(data)] = data
            os.fsync(file.fileno())
            if policy != "write-back":
                assert ask(mounted, "cache-info")["dirty"] <= 40
        ask(mounted, "cache-set", policy="read-only")
        with pytest.raises(OSError, match="Read-only") as caught:
            os.pwrite(file.fileno(), b"x", 0)
        assert caught.value.errno == errno.EROFS
    assert mounted.device.read_bytes() == wanted
    ask(mounted, "cache-set", policy="write-back")
    ask(mounted, "cache-flush")
    assert ask(mounted, "cache-verify")["differing"] == 0
    pools.umount(mounted)
    assert origin.read_bytes() == wanted


@pytest.mark.parametrize("engine", [NATIVE[1]], indirect=True, ids=str)
def test_an_fsync_flushes_an_origin_that_was_given_zeroes(
    pools: PoolMaker, origin: Path, tmp_path: Path
) -> None:
    """Although workers answer an fsync by themselves under write-back."""
    log = tmp_path / "log"
    server = NbdServer("--filter=log", "file", origin, f"logfile={log}",
                       socket_path=pools.directory / "socket")  # fmt: skip
    try:
        mounted = pools.mount(cache_of(pools, server.text))
        with mounted.device.open("r+b", buffering=0) as file:
            for number in range(1, 4):
                punch_hole(file.fileno(), MIB, MIB)
                os.fsync(file.fileno())
                assert log.read_text().count(" Flush id") >= number
        pools.umount(mounted)
    finally:
        server.end()


def test_an_origin_that_has_grown_is_served_at_its_new_size(pools: PoolMaker, origin: Path) -> None:
    mounted = pools.mount(cache_of(pools, origin))
    os.truncate(origin, ORIGIN_BYTES + MIB)
    said = pmemfs_ok("resize", mounted.mountpoint)
    assert said == "the file of cache 'pmem0' has 25MiB now, and had 24MiB\n"
    assert mounted.device.stat().st_size == ORIGIN_BYTES + MIB
    with mounted.device.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"end", ORIGIN_BYTES + MIB - 3) == 3
    os.truncate(origin, MIB)
    refused(pmemfs("resize", mounted.mountpoint), 1, "has become smaller, 1MiB instead of 25MiB")
    os.truncate(origin, ORIGIN_BYTES + MIB)
    pools.umount(mounted)
    assert pools.mount(mounted.pool).device.stat().st_size == ORIGIN_BYTES + MIB


def test_reads_that_miss_are_served_where_their_blocks_were_brought(
    pools: PoolMaker, origin: Path
) -> None:
    wanted = origin.read_bytes()
    mounted = pools.mount(cache_of(pools, origin))
    pmemfs_ok("cache", "set", mounted.mountpoint, "--read-ahead", "0")
    chance = random.Random(2)
    blocks = chance.sample(range(ORIGIN_BYTES // 4096), 200)
    with mounted.device.open("rb", buffering=0) as file, ThreadPoolExecutor(16) as readers:
        found = readers.map(lambda block: os.pread(file.fileno(), 4000, 4096 * block + 96), blocks)
        for block, data in zip(blocks, found, strict=True):
            assert data == wanted[4096 * block + 96 : 4096 * (block + 1)]
    figures = ask(mounted, "cache-info")
    assert (figures["misses"], figures["read_hits"], figures["inserted"]) == (200, 0, 200)
    # What was read once counts as that, however it was answered.
    pages = json.loads(pmemfs_ok("pages", mounted.mountpoint, "--hottest", "1", "--json"))
    assert pages["hottest"][0]["reads"] == 1
    if pools.engine.name == "native":
        # A worker may count a request after it has answered it.
        wait_until(lambda: reads_of(mounted)[:2] == (200, 200 * 4000), "all reads are counted")
    if pools.engine.transport == "uring":
        native = reads_of(mounted)[2]
        assert (native["native"], native["forwarded"]) == (200, 0)


def reads_of(mounted: Mounted) -> tuple[int, int, dict[str, int]]:
    """How many reads of a native mount were counted, their bytes, and what its workers counted."""
    stat = json.loads(pmemfs_ok("stat", mounted.mountpoint, "--json"))
    native, others = stat["operations"]["read"], stat["control_plane"]["read"]
    moved_bytes = native["moved_bytes"] + others["moved_bytes"]
    return native["native"] + others["requests"], moved_bytes, native


def test_a_reader_that_is_killed_does_not_wait_for_the_origin(
    pools: PoolMaker, origin: Path
) -> None:
    if pools.engine.name == "python":
        pytest.skip("pyfuse3 tells nobody of interrupts")
    server = NbdServer("file", origin)
    try:
        pool = cache_of(pools, server.text, origin_timeout_seconds=600)
        mounted = pools.mount(pool)
        server.stop()
        reader = subprocess.Popen(
            ["dd", f"if={mounted.device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"],
            stderr=subprocess.DEVNULL,
        )
        wait_until(lambda: ask(mounted, "cache-info")["misses"] > 0, "the reader waits")
        reader.kill()
        assert reader.wait(timeout=60) == -signal.SIGKILL
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.end()


def test_hits_do_not_wait_for_misses(pools: PoolMaker, origin: Path) -> None:
    server = NbdServer("file", origin)
    try:
        mounted = pools.mount(cache_of(pools, server.text, origin_timeout_seconds=600))
        with mounted.device.open("rb", buffering=0) as file:
            known = os.pread(file.fileno(), 4096, 0)
            server.stop()
            words = ["dd", f"if={mounted.device}", "of=/dev/null", "bs=4096", "count=1", "skip=512"]
            reader = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            wait_until(lambda: ask(mounted, "cache-info")["misses"] > 1, "the reader waits")
            assert os.pread(file.fileno(), 4096, 0) == known
            assert reader.poll() is None
            os.kill(server.pid, signal.SIGCONT)
            assert reader.wait(timeout=60) == 0
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.end()


def test_an_origin_that_hangs_keeps_no_mount_from_ending(pools: PoolMaker, origin: Path) -> None:
    server = NbdServer("file", origin)
    try:
        mounted = pools.mount(cache_of(pools, server.text, origin_timeout_seconds=1))
        with mounted.device.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"kept" * 1024, 0)
            server.stop()
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(file.fileno(), 4096, MIB)
        pools.umount(mounted)
        os.kill(server.pid, signal.SIGCONT)
        with pools.mount(mounted.pool).device.open("rb") as file:
            assert file.read(4096) == b"kept" * 1024
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.end()


@pytest.mark.parametrize("engine", [NATIVE[1]], indirect=True, ids=str)
@pytest.mark.parametrize("how", ["umount", "SIGTERM", "abort"])
def test_a_mount_ends_though_its_server_stands_still_that_nobody_has_asked(
    pools: PoolMaker, origin: Path, how: str
) -> None:
    server = NbdServer("file", origin)
    try:
        mounted = pools.mount(cache_of(pools, server.text, origin_timeout_seconds=1))
        with mounted.device.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"kept" * 1024, 0)
        session = Session.of(mounted)
        server.stop()
        begin_end(mounted, how)
        wait_until(lambda: not is_running(session.pid), "the daemon has ended")
        subprocess.run(["umount", "-l", mounted.mountpoint], check=False, capture_output=True)
        os.kill(server.pid, signal.SIGCONT)
        with pools.mount(mounted.pool).device.open("rb") as file:
            assert file.read(4096) == b"kept" * 1024
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.end()


def test_a_read_only_cache_serves_misses_and_changes_nothing(
    pools: PoolMaker, origin: Path
) -> None:
    before = origin.read_bytes()
    pool = cache_of(pools, origin)
    mounted = pools.mount(pool)
    with mounted.device.open("r+b") as file:
        file.write(b"new" * 1000)
    pmemfs_ok("mount", "-o", "remount,ro", mounted.mountpoint)
    assert Session.of(mounted).pool_state() == "clean"
    assert mounted.device.read_bytes() == b"new" * 1000 + before[3000:]
    assert ask(mounted, "cache-info")["inserted"] <= 1
    pmemfs_ok("mount", "-o", "remount,rw", mounted.mountpoint)
    with mounted.device.open("r+b") as file:
        file.write(b"old" * 1000)
    pools.umount(mounted)
    mounted = pools.mount(pool, "-o", "ro")
    assert mounted.device.read_bytes() == b"old" * 1000 + before[3000:]
    pools.umount(mounted)
    assert origin.read_bytes() == before
