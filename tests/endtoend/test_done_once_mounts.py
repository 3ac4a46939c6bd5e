"""Processes of a mount are killed while programs do nothing but operations that count.

Each call would fail, or do too much, if it were carried out twice. The programs know what each of
them has to answer. PMEMFS_KILL_ROUNDS in the environment says how often the tests kill.
"""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit import churn, unbroken
from kit.commands import pmemfs
from kit.killing import BOTH, DAEMON, PLANE, Kills, Load, mount_kept
from kit.mounts import NATIVE_ONLY, PoolMaker
from kit.stepped import address_in, kill_after_store
from pmemfs.dataplane.tables import NAME, SharedMemory
from pmemfs.observe.shared import open_memory

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(1800), *NATIVE_ONLY]

ROUNDS = int(os.environ.get("PMEMFS_KILL_ROUNDS", "4"))
PROGRAMS = 3
MOST_STEPS = 60_000
"""So many instructions after the note, the operation has its answer."""


@pytest.fixture(autouse=True)
def many_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    """No keeper gives up, however often a test kills."""
    monkeypatch.setenv("PMEMFS_MOST_DEATHS", "1000000")


@contextmanager
def churning(root: Path) -> Iterator[list[tuple[int, list[str]]]]:
    """Programs change names meanwhile; in the end, how often each went round, and what was
    wrong."""
    programs = []
    for number in range(PROGRAMS):
        directory = root / f"churn{number}"
        directory.mkdir()
        programs.append(subprocess.Popen(
            [sys.executable, "-S", churn.__file__, str(directory)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
    said: list[tuple[int, list[str]]] = []
    try:
        yield said
    finally:
        for program in programs:
            said.append(json.loads(program.communicate(timeout=60)[0]))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs its debug registers")
@pytest.mark.parametrize("victim", [DAEMON, BOTH])
def test_what_was_carried_out_is_known_after_a_death(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
    if pools.engine.transport == "uring" and victim == BOTH:
        pytest.skip("rings that die may take requests with them")
    pool = pools.create("once", "256M", "--mode", "fs")
    mounted = mount_kept(pools, pool)
    kills = Kills(mounted, Load(tmp_path))
    memory, _ = open_memory(str(mounted.mountpoint))
    decision = SharedMemory(memory, read_only=True).areas.answers
    chance = random.Random(ROUNDS)
    with churning(mounted.mountpoint) as said:
        for _ in range(ROUNDS):
            before = kills.planes()
            daemon, plane = before.daemon, before.plane
            # From the note that an operation is about to be carried out, to about its answer.
            address = address_in(daemon, NAME, decision)
            kill_after_store(daemon, address, chance.randrange(MOST_STEPS))
            if victim == BOTH:
                os.kill(plane, signal.SIGKILL)
            dead = set(before.pids(victim))
            kills.planes(lambda now, dead=dead: not dead & {now.daemon, now.plane})
    os.close(memory)
    assert [wrong for _, wrong in said] == [[]] * PROGRAMS
    pools.umount(mounted)
    assert pmemfs("check", pool).code == 0


@pytest.mark.parametrize("victim", [DAEMON, PLANE, BOTH])
def test_operations_on_names_are_carried_out_once(
    pools: PoolMaker, tmp_path: Path, victim: str
) -> None:
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
