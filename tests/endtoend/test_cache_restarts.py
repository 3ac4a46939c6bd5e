"""A kept mount of a cache outlives its processes, before every kind of origin.

fio verifies what it reads while they are killed; afterwards the origin has all of it.
PMEMFS_KILL_ROUNDS in the environment says how often each test kills, instead of 3 times.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit.caches import ask, cache_of, new_origin
from kit.commands import pmemfs
from kit.killing import DAEMON, KEPT, VICTIMS, Kills, Load, processes_of
from kit.mounts import NATIVE, PoolMaker
from kit.origins import NbdServer
from kit.processes import wait_until
from kit.sources import loop_device
from pmemfs.units import MIB

pytestmark = [
    pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine"),
    pytest.mark.skipif("PMEMFS_KILL_ROUNDS" not in os.environ, reason="they don't survive yet"),
]  # fmt: skip

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "3"))
ORIGIN_BYTES = 32 * MIB
native = pytest.mark.parametrize("engine", NATIVE, indirect=True, ids=str)


@pytest.fixture(autouse=True)
def many_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return new_origin(tmp_path / "origin", ORIGIN_BYTES, seed=b"o")


@pytest.fixture(params=["file", "device", "nbd"])
def text(request: pytest.FixtureRequest, origin: Path) -> Iterator[str]:
    """What names an origin of a kind, with that file behind it."""
    with ExitStack() as stack:
        if request.param == "nbd":
            server = NbdServer("file", origin)
            stack.callback(server.end)
            yield server.text
        elif request.param == "device":
            if os.geteuid() != 0:
                pytest.skip("loop devices are root's")
            yield str(stack.enter_context(loop_device(origin)))
        else:
            yield str(origin)


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_fio_verifies_a_cache_whose_processes_are_killed(
    pools: PoolMaker, tmp_path: Path, origin: Path, text: str, victim: str
) -> None:
    mounted = pools.mount(cache_of(pools, text, max_dirty_percent=30), *KEPT)
    load = Load(tmp_path, cancels=pools.engine.transport == "uring" and victim != DAEMON)
    kills = Kills(mounted, load)
    with load.working():
        load.add_fio(mounted.device, "4m")
        for _ in range(ROUNDS):
            kills.kill(victim)
    print(kills.summary())
    assert load.outcome.wrong == []
    wanted = mounted.device.read_bytes()
    wait_until(lambda: not ask(mounted, "cache-info")["is_searching"], "the search is over")
    assert ask(mounted, "cache-flush")["dirty"] == 0
    assert ask(mounted, "cache-verify")["differing"] == 0
    pools.umount(mounted)
    wait_until(lambda: not processes_of(pools.directory), "all of its processes have ended")
    assert origin.read_bytes() == wanted
    checked = pmemfs("check", mounted.pool)
    assert checked.code == 0, checked.out + checked.err
