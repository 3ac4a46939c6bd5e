"""Two programs write the same blocks of an encrypted file, also while its processes are killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from kit.commands import pmemfs_here
from kit.hammering import Hammers
from kit.keys import add_key, encrypted
from kit.killing import DAEMON, PLANE, VICTIMS, Kills, Load, mount_kept
from kit.mounts import NATIVE, Mounted, PoolMaker, may_pass
from kit.processes import wait_until
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
    wait_until(lambda: hammers.begun_turns() > 1, "each begins again")
    assert hammers.end() > 1


def write_and_read(file: Path) -> None:
    """Write and read any bytes of an open file, a hundred times."""
    with file.open("r+b", buffering=0) as opened:
        for at in range(0, LENGTH - 100, 83):
            data = bytes([at & 0xFF]) * 100
            assert os.pwrite(opened.fileno(), data, at) == 100
            assert os.pread(opened.fileno(), 90, at + 5) == data[5:95]


def answered_by_workers(mounted: Mounted) -> tuple[int, int]:
    """How many reads and writes workers have answered, and how many they have handed over."""
    told = json.loads(pmemfs_here("stat", mounted.mountpoint, "--json"))["operations"]
    counts = [told[name] for name in ("read", "write")]
    return sum(it["native"] for it in counts), sum(it["forwarded"] for it in counts)


@native
def test_workers_have_the_keys_of_a_mount_also_those_that_come_later(
    pools: PoolMaker, tmp_path: Path
) -> None:
    may_pass(pools)
    mounted = mount_kept(pools, pools.create("fs0", "64M", "--mode", "fs"), "-o", "allow_other")
    # They run before there is any key.
    add_key(mounted)
    file = encrypted(mounted) / "file"
    file.write_bytes(bytes(LENGTH))
    kills = Kills(mounted, Load(tmp_path))
    for victim in (None, PLANE, DAEMON):
        if victim:
            kills.kill(victim)
        before = answered_by_workers(mounted)
        write_and_read(file)
        answered, forwarded = (
            now - then for now, then in zip(answered_by_workers(mounted), before, strict=True)
        )
        # The file is published at its second write.
        assert forwarded <= 8
        assert answered >= 150


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
    wait_until(lambda: hammers.begun_turns() > 1, "each begins again")
    assert hammers.end() > 1
