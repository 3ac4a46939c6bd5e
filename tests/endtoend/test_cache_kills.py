"""Mode cache under fio verify, 4 jobs and 32 deep, while its processes die or its origin does.

PMEMFS_KILL_ROUNDS in the environment says how often each test kills, instead of 3 times.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit.caches import ask, cache_of, new_origin
from kit.mounts import NATIVE, Engine, Mounted, PoolMaker, Session
from kit.origins import NbdServer
from kit.processes import is_running, wait_until
from kit.sources import loop_device
from kit.verified import VerifiedBlocks
from pmemfs.units import MIB

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "3"))
SIZE_BYTES = 24 * MIB

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
    """What names an origin of a kind, with that file behind it."""
    with ExitStack() as stack:
        if kind == "nbd":
            server = NbdServer("file", origin)
            stack.callback(server.end)
            yield server.text
        elif kind == "device":
            if os.geteuid() != 0:
                pytest.skip("loop devices are root's")
            yield str(stack.enter_context(loop_device(origin)))
        else:
            yield str(origin)


def end_flushed(pools: PoolMaker, mounted: Mounted, origin: Path) -> None:
    """Let the origin be complete, and compare it with what the mount has shown."""
    wanted = mounted.device.read_bytes()
    wait_until(lambda: not ask(mounted, "cache-info")["is_searching"], "the search is over")
    assert ask(mounted, "cache-flush")["dirty"] == 0
    assert ask(mounted, "cache-info")["dirty"] == 0
    assert ask(mounted, "cache-verify")["differing"] == 0
    pools.umount(mounted)
    assert origin.read_bytes() == wanted


@pytest.mark.parametrize(("engine", "kind"), KINDS, indirect=["engine"])
def test_fio_finds_after_kill_9_what_was_acknowledged_to_it(
    pools: PoolMaker, tmp_path: Path, origin: Path, text: str
) -> None:
    mounted = pools.mount(cache_of(pools, text, max_dirty_percent=30))
    blocks = VerifiedBlocks(mounted.device, tmp_path)
    blocks.fill()
    chance, acknowledged = random.Random(7), 0
    for number in range(ROUNDS):
        session = Session.of(mounted)
        is_plane = number % 2 == 1 and pools.engine.name == "native"
        victim = mounted.data_plane_pid if is_plane else session.pid
        with blocks.writing():
            time.sleep(chance.uniform(0.0, 0.4))
            os.kill(victim, 9)
            wait_until(lambda pid=session.pid: not is_running(pid), "the daemon has ended")  # type: ignore[misc]
        pools.mount(mounted.pool)
        blocks.check()
        acknowledged += len(blocks.acknowledged)
    assert acknowledged > ROUNDS * 64
    end_flushed(pools, mounted, origin)
