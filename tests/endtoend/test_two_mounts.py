"""Two mounts of two pools at once."""

from __future__ import annotations

import threading

import pytest

from kit.device_oracle import Oracle
from kit.mounts import PoolMaker, Session

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]


def test_two_busy_mounts_keep_their_data_apart(pools: PoolMaker) -> None:
    mounts = [
        pools.mount(pools.create("one", "24M")),
        pools.mount(pools.create("two", "24M", "--scheme", "on-demand")),
    ]
    sessions = [Session.of(mounted) for mounted in mounts]
    assert len({session.pid for session in sessions}) == 2
    oracles = [Oracle(mounted.device, seed) for seed, mounted in enumerate(mounts)]
    failures: list[BaseException] = []

    def exercise(oracle: Oracle) -> None:
        try:
            oracle.exercise(600)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=exercise, args=(oracle,)) for oracle in oracles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for oracle in oracles:
        oracle.compare()

    # One that ends leaves the other alone.
    pools.umount(mounts[0])
    sessions[0].assert_ended()
    oracles[1].exercise(50)
    oracles[1].compare()
    pools.mount(mounts[0].pool, at="again")
    oracles[0].path = pools.mountpoint("again") / "one"
    oracles[0].compare()
    assert mounts[1].pid == sessions[1].pid
