"""A kept mount of a cache outlives its processes, before every kind of origin.

Programs verify what they read while processes are killed in turn; afterwards the origin has all of
it. PMEMFS_KILL_ROUNDS in the environment says how often each test kills, instead of 3 times.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kit.caches import ask, cache_of, make_cache, new_origin
from kit.ceph_node import CephNode, Image
from kit.commands import BIN, pmemfs
from kit.killing import DAEMON, VICTIMS, Kills, Load, mount_kept, processes_of
from kit.mounts import NATIVE, Mounted, PoolMaker
from kit.origins import named_as
from kit.posix import opened
from kit.processes import wait_until
from kit.sources import needs_root
from pmemfs.logs import log_file
from pmemfs.media.cache import Policy
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "3"))
ORIGIN_BYTES = 32 * MIB
KINDS = [
    pytest.param(NATIVE[0], "file", id="uring-file"),
    pytest.param(NATIVE[0], "slow-nbd", id="uring-slow-nbd"),
    pytest.param(NATIVE[1], "device", id="fd-device"),
    pytest.param(NATIVE[1], "nbd", id="fd-nbd"),
]
one_native = pytest.mark.parametrize("engine", NATIVE[:1], indirect=True, ids=str)


@pytest.fixture(autouse=True)
def many_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", ORIGIN_BYTES, seed=b"o")


@pytest.fixture
def text(kind: str, origin: Path) -> Iterator[str]:
    milliseconds = {"slow-nbd": 5, "very-slow-nbd": 30}.get(kind, 0)
    slow = (f"rdelay={milliseconds // 5}ms", f"wdelay={milliseconds}ms")
    # With more threads a client that dies may take nbdkit 1.32 with it: one of them sends an answer
    # while another one closes the connection (raw_send_socket).
    server = ("--threads=1", "--filter=delay", "file", origin, *slow)
    with named_as(kind, origin, *server) as text:
        yield text


def kill_in_turn(pools: PoolMaker, mounted: Mounted, directory: Path, job_size: str = "4m") -> None:
    """Kill processes while programs verify what they read and write."""
    load = Load(directory, cancels=pools.engine.transport == "uring")
    kills = Kills(mounted, load)
    with load.working():
        load.add("reader", mounted.device, 1)
        load.add_fio(mounted.device, job_size, offset="4m")
        for number in range(ROUNDS):
            kills.kill(VICTIMS[number % len(VICTIMS)])
    print(kills.summary())
    assert load.outcome.wrong == []


def end_flushed(pools: PoolMaker, mounted: Mounted, read_origin: Callable[[], bytes]) -> None:
    """Let the origin be complete, and compare it with what the mount has shown."""
    wanted = mounted.device.read_bytes()
    wait_until(lambda: not ask(mounted, "cache-info")["is_searching"], "the search is over")
    assert ask(mounted, "cache-flush")["dirty"] == 0
    assert ask(mounted, "cache-info")["dirty"] == 0
    assert ask(mounted, "cache-verify")["differing"] == 0
    pools.umount(mounted)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert read_origin() == wanted
    checked = pmemfs("check", mounted.pool)
    assert checked.code == 0, checked.out + checked.err


@pytest.mark.parametrize(("engine", "kind"), KINDS, indirect=["engine"])
def test_programs_notice_a_pause_before_any_origin(
    pools: PoolMaker, tmp_path: Path, origin: Path, text: str
) -> None:
    mounted = mount_kept(pools, cache_of(pools, text, max_dirty_percent=30))
    kill_in_turn(pools, mounted, tmp_path)
    end_flushed(pools, mounted, origin.read_bytes)


@one_native
def test_programs_notice_a_pause_where_a_fence_is_msync(
    pools: PoolMaker, tmp_path: Path, origin: Path
) -> None:
    make_cache(tmp_path / "pmem0", str(origin), pool_bytes=8 * MIB, max_dirty_percent=30)
    mounted = mount_kept(pools, tmp_path / "pmem0")
    kill_in_turn(pools, mounted, tmp_path, "256k")
    end_flushed(pools, mounted, origin.read_bytes)


@needs_root
@one_native
def test_programs_notice_a_pause_before_an_image_of_ceph(
    pools: PoolMaker, tmp_path: Path, ceph: CephNode
) -> None:
    image = Image(ceph, f"rbd/{uuid.uuid4().hex[:12]}")
    ceph.rbd("create", "--size", f"{ORIGIN_BYTES // MIB}M", image.spec)
    mounted = mount_kept(pools, cache_of(pools, image.text, max_dirty_percent=30))
    kill_in_turn(pools, mounted, tmp_path)
    exported = tmp_path / "exported"
    end_flushed(pools, mounted, lambda: image.exported(exported).read_bytes())
    # Nobody has waited for a dead client to be forgotten.
    assert "no answer from client" not in log_file(str(mounted.pool)).read_text()


@one_native
@pytest.mark.parametrize("kind", ["file"])
@pytest.mark.parametrize(
    "policy", [Policy.WRITE_THROUGH, Policy.WRITE_AROUND], ids=lambda policy: policy.word
)
def test_the_origin_has_what_was_written_to_it_after_any_death(
    pools: PoolMaker, tmp_path: Path, origin: Path, text: str, policy: Policy
) -> None:
    mounted = mount_kept(pools, cache_of(pools, text, policy=policy))
    kill_in_turn(pools, mounted, tmp_path)
    wanted = mounted.device.read_bytes()
    with opened(mounted.device) as fd:
        os.fsync(fd)
    # What was answered is there without a flush of the cache.
    assert origin.read_bytes() == wanted
    end_flushed(pools, mounted, origin.read_bytes)


@one_native
@pytest.mark.parametrize("kind", ["very-slow-nbd"])
def test_a_flush_goes_on_when_the_daemon_dies(
    pools: PoolMaker, tmp_path: Path, origin: Path, text: str
) -> None:
    pool = cache_of(pools, text, max_dirty_percent=90, max_dirty_age_seconds=0)
    mounted = mount_kept(pools, pool)
    with opened(mounted.device) as fd:
        for at in range(0, 4 * MIB, 8192):
            # One at a time, so that it takes a while.
            os.pwrite(fd, b"%08d" % at * 512, at)
    kills = Kills(mounted, Load(tmp_path))
    words = [BIN / "pmemfs", "flush", str(mounted.mountpoint)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as flush:
        for _ in range(2):
            wait_until(lambda: ask(mounted, "cache-info")["origin"]["written_bytes"] > 0,
                       "the origin gets some")  # fmt: skip
            assert flush.poll() is None
            kills.kill(DAEMON)
        said, _ = flush.communicate()
    assert flush.returncode == 0
    assert "the origin is complete" in said
    assert origin.read_bytes() == mounted.device.read_bytes()
    end_flushed(pools, mounted, origin.read_bytes)
