"""Mode cache under fio verify, 4 jobs and 32 deep, while its processes die or its origin does.

PMEMFS_KILL_ROUNDS in the environment says how often each test kills, instead of 3 times, and
PMEMFS_STOP_SECONDS for how long an origin stands still, instead of 3 s.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.caches import ask, cache_of, new_origin
from kit.commands import fio, pmemfs_here, pmemfs_ok
from kit.mounts import NATIVE, UNKEPT, Engine, Mounted, PoolMaker, Session
from kit.origins import NbdServer, named_as
from kit.posix import opened
from kit.processes import is_running, wait_until
from kit.verified import BLOCK_BYTES, DEPTH, JOB_BYTES, JOBS, VerifiedBlocks
from pmemfs.logs import log_file
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "3"))
STOP_SECONDS = float(os.environ.get("PMEMFS_STOP_SECONDS", "3"))
SIZE_BYTES = 24 * MIB
LEAST_ACKNOWLEDGED = 64
"""So many blocks, at least, are acknowledged in each round before something is killed."""

KINDS = [
    pytest.param(NATIVE[0], "file", id="native-file"),
    pytest.param(NATIVE[1], "device", id="native-device"),
    pytest.param(NATIVE[0], "nbd", id="native-nbd"),
    pytest.param(Engine("python"), "nbd", id="python-nbd"),
]


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", SIZE_BYTES)


@pytest.fixture
def text(kind: str, origin: Path) -> Iterator[str]:
    with named_as(kind, origin) as text:
        yield text


def end_flushed(pools: PoolMaker, mounted: Mounted, origin: Path) -> None:
    """Let the origin be complete, and compare it with what the mount has shown."""
    wanted = mounted.device.read_bytes()
    wait_until(lambda: not ask(mounted, "cache-info")["is_searching"], "the search is over")
    assert ask(mounted, "cache-flush")["dirty"] == 0
    assert ask(mounted, "cache-info")["dirty"] == 0
    assert ask(mounted, "cache-verify")["differing"] == 0
    pools.umount(mounted)
    assert origin.read_bytes() == wanted


def write_count(mounted: Mounted) -> int:
    """How many writes have come, not all of which have an answer."""
    stat = json.loads(pmemfs_here("stat", mounted.mountpoint, "--json"))
    return int(stat["operations"]["write"]["requests"])


@pytest.mark.parametrize(("engine", "kind"), KINDS, indirect=["engine"])
def test_fio_finds_after_kill_9_what_was_acknowledged_to_it(
    pools: PoolMaker, tmp_path: Path, origin: Path, text: str
) -> None:
    mounted = pools.mount(cache_of(pools, text, max_dirty_percent=30), *UNKEPT)
    blocks = VerifiedBlocks(mounted.device, tmp_path)
    blocks.fill()
    chance, acknowledged = random.Random(7), 0
    for number in range(ROUNDS):
        session = Session.of(mounted)
        is_plane = number % 2 == 1 and pools.engine.name == "native"
        victim = mounted.data_plane_pid if is_plane else session.pid
        wanted = write_count(mounted) + LEAST_ACKNOWLEDGED + JOBS * DEPTH
        with blocks.writing():
            wait_until(lambda wanted=wanted: write_count(mounted) > wanted, "fio has answers")  # type: ignore[misc]
            time.sleep(chance.uniform(0.0, 0.4))
            os.kill(victim, 9)
            wait_until(lambda pid=session.pid: not is_running(pid), "the daemon has ended")  # type: ignore[misc]
        pools.mount(mounted.pool, *UNKEPT)
        blocks.check()
        acknowledged += len(blocks.acknowledged)
    assert acknowledged > ROUNDS * LEAST_ACKNOWLEDGED
    end_flushed(pools, mounted, origin)


@pytest.mark.parametrize("engine", [NATIVE[0]], indirect=True, ids=str)
def test_fio_does_not_notice_that_a_server_is_killed_and_started_again(
    pools: PoolMaker, tmp_path: Path, origin: Path
) -> None:
    server = NbdServer("file", origin)
    try:
        mounted = pools.mount(
            cache_of(pools, server.text, max_dirty_percent=30, origin_timeout_seconds=60)
        )

        def errors() -> int:
            return int(ask(mounted, "cache-info")["origin"]["errors"])

        # Slowly, so that fio is still at it when the server is killed.
        blocks = VerifiedBlocks(mounted.device, tmp_path, rate=200)
        blocks.fill()
        with blocks.writing() as writer:
            for _ in range(2):
                before = errors()
                server.end()
                wait_until(lambda before=before: errors() > before, "the origin is missed")  # type: ignore[misc]
                time.sleep(0.3)
                server.start()
                time.sleep(0.3)
        assert writer.returncode == 0
        assert len(blocks.acknowledged) == JOBS * JOB_BYTES // BLOCK_BYTES
        blocks.check()
        end_flushed(pools, mounted, origin)
    finally:
        server.end()


@pytest.mark.parametrize("engine", [NATIVE[0], Engine("python")], indirect=True, ids=str)
def test_hits_and_writes_with_room_go_on_while_a_server_stands_still(
    pools: PoolMaker, tmp_path: Path, origin: Path
) -> None:
    server = NbdServer("file", origin)
    try:
        mounted = pools.mount(
            cache_of(pools, server.text, max_dirty_age_seconds=1,
                     origin_timeout_seconds=max(1, int(STOP_SECONDS / 2)))
        )  # fmt: skip
        words = ["--verify=crc32c", "--verify_fatal=1", "--ioengine=libaio", "--iodepth=32",
                 "--numjobs=4", "--rw=randwrite", "--bs=4k", "--size=512k"]  # fmt: skip
        done = fio(tmp_path, mounted.device, *words, "--offset_increment=512k")
        assert done.code == 0, done.err
        server.stop()
        stopped_at = time.monotonic()
        number = 0
        while number == 0 or time.monotonic() < stopped_at + STOP_SECONDS:
            number += 1
            seeded = [*words, "--offset_increment=512k", f"--randseed={number}"]
            done = fio(tmp_path, mounted.device, *seeded)
            assert done.code == 0, done.err
        with opened(mounted.device) as fd, pytest.raises(OSError, match="Input/output error"):
            os.pread(fd, 4096, 20 * MIB)
        wait_until(lambda: ask(mounted, "cache-info")["origin"]["write_back_failures"] > 0,
                   "writing back was tried")  # fmt: skip
        report = ask(mounted, "cache-info")
        assert report["origin"]["state"] == "away"
        assert report["dirty"] > 256
        assert report["origin"]["timeouts"] > 0
        said = pmemfs_ok("info", mounted.mountpoint)
        assert "AWAY" in said
        assert f"{report['dirty']} blocks" in said
        log = log_file(str(mounted.pool)).read_text()
        assert f"the origin {server.text} is away" in log
        assert "dirty blocks could not be written to the origin" in log
        # From here on the origin may be slow.
        ask(mounted, "cache-set", origin_timeout_seconds=60)
        os.kill(server.pid, signal.SIGCONT)
        end_flushed(pools, mounted, origin)
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.end()
