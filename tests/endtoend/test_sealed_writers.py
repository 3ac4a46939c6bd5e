"""Two programs write the same blocks of an encrypted file, also while its processes are killed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kit.hammering import Hammers
from kit.keys import add_key, encrypted
from kit.killing import VICTIMS, Kills, Load, mount_kept
from kit.mounts import NATIVE, PoolMaker, may_pass
from pmemfs.pfn import FRAME_BYTES

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]
native = pytest.mark.parametrize("engine", NATIVE, indirect=True, ids=str)

SECONDS = 3.0
ROUNDS = 3
LENGTH = 2 * FRAME_BYTES + 100


def test_what_two_programs_write_into_the_same_blocks_is_all_there(pools: PoolMaker) -> None:
    may_pass(pools)
    mounted = pools.mount(pools.create("fs0", "64M", "--mode", "fs"), "-o", "allow_other")
    add_key(mounted)
    hammers = Hammers(encrypted(mounted) / "shared", LENGTH)
    over_at = time.monotonic() + SECONDS
    while time.monotonic() < over_at:
        assert hammers.wrong() == []
    assert hammers.end() > 1


@native
@pytest.mark.parametrize("victim", VICTIMS)
def test_neither_loses_a_byte_when_processes_of_the_mount_are_killed(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    may_pass(pools)
    mounted = mount_kept(pools, pools.create("fs0", "64M", "--mode", "fs"), "-o", "allow_other")
    add_key(mounted)
    hammers = Hammers(encrypted(mounted) / "shared", LENGTH)
    kills = Kills(mounted, Load(tmp_path))
    for _ in range(ROUNDS):
        kills.kill(victim)
        assert hammers.wrong() == []
    assert hammers.end() > 1
