"""Daemons of a mount are killed while programs do nothing but operations on names.

Each of these would fail, or do too much, if it were carried out twice; the programs know what each
call has to answer. PMEMFS_KILL_ROUNDS in the environment says how often the test kills.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kit import unbroken
from kit.commands import pmemfs
from kit.killing import BOTH, DAEMON, PLANE, Kills, Load, mount_kept
from kit.mounts import NATIVE_ONLY, PoolMaker

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(1800), *NATIVE_ONLY]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "4"))
PROGRAMS = 3


@pytest.mark.parametrize("victim", [DAEMON, PLANE, BOTH])
def test_operations_on_names_are_carried_out_once(
    pools: PoolMaker, tmp_path: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than a few deaths in a minute end a mount otherwise.
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")
    pool = pools.create("once", "256M", "--mode", "fs")
    mounted = mount_kept(pools, pool)
    unbroken.prepare_common(mounted.mountpoint)
    # Rings that die may take requests with them, and say so.
    load = Load(tmp_path, cancels=pools.engine.transport == "uring" and victim != DAEMON)
    kills = Kills(mounted, load)
    with load.working():
        for number in range(PROGRAMS):
            load.add("names", mounted.mountpoint / f"names{number}", number)
        for _ in range(ROUNDS):
            kills.kill(victim, wait=0.1)
    print(kills.summary())
    assert load.outcome.wrong == []
    assert load.outcome.tally
    pools.umount(mounted)
    assert pmemfs("check", pool).code == 0
