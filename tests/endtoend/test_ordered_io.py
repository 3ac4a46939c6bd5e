"""Reads that have one right answer, whatever else is under way: no two requests at one block."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kit import ordered_io
from kit.commands import resize
from kit.mounts import Engine, PoolMaker
from kit.processes import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]


@pytest.mark.parametrize("kind", [(), ("--sparse",)], ids=["plain", "sparse"])
def test_each_read_has_its_one_right_answer_while_the_pool_grows(
    pools: PoolMaker, engine: Engine, kind: tuple[str, ...]
) -> None:
    mounted = pools.mount(pools.create("pmem0", "32M", *kind))
    trims = ["--trims"] if engine.name == "native" else []
    command = [sys.executable, ordered_io.__file__, mounted.device, "1", *trims]
    work = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        for size in ("33M", "36M", "80M", "160M"):
            so_far = mounted.info()["io"]["writes"]
            wait_until(lambda at=so_far: mounted.info()["io"]["writes"] > at + 300, "I/O goes on")
            resize(mounted.mountpoint, size)
        said = json.loads(work.communicate(timeout=120)[0])
    finally:
        work.kill()
        work.wait()
    assert said["wrong"] == []
    assert set(said["tally"]) == {"reads", "writes"} | {"trims" for _ in trims}
