"""Random I/O on one file of mode `fs`: always what was written, mapped, cut off, punched, copied.

For hours of it: scripts/fsx.
"""

from __future__ import annotations

import pytest
from conftest import PoolMaker
from fs_fsx import Run
from fs_mounts import FsMount

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_file_is_what_was_written_to_it(pools: PoolMaker, seed: int) -> None:
    with FsMount.made(pools, size="64M") as mount:
        Run(mount.directory, mount.restart, mount.renew).explore(seed, 1200)
        mount.check()


@pytest.mark.parametrize("seed", [11, 12])
def test_a_file_is_what_was_written_to_it_before_kill_9(pools: PoolMaker, seed: int) -> None:
    with FsMount.made(pools, size="64M") as mount:
        Run(mount.directory, mount.restart, mount.renew).explore(seed, 250, restarts=0.02)
        mount.check()
