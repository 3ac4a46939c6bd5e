"""Random I/O on one file of mode `fs`: always what was written, mapped, cut off, punched, copied.

For hours of it: scripts/fsx.
"""

from __future__ import annotations

import pytest

from kit.fs_fsx import Run
from kit.fs_mounts import FsMount
from kit.mounts import Engine, PoolMaker

LACKS = {
    # The kernel's FUSE refuses these two itself.
    "native": {"collapse", "insert"},
    "python": {"collapse", "insert", "allocate", "punch", "zero", "read_mapped", "write_mapped"},
}

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_file_is_what_was_written_to_it(pools: PoolMaker, engine: Engine, seed: int) -> None:
    with FsMount.made(pools, size="64M") as mount:
        run = Run(mount.directory, mount.restart, mount.renew)
        run.explore(seed, 1200)
        assert run.refused == LACKS[engine.name]
        mount.check()


@pytest.mark.parametrize("seed", [11])
def test_a_file_is_what_was_written_to_it_before_kill_9(pools: PoolMaker, seed: int) -> None:
    with FsMount.made(pools, size="64M") as mount:
        Run(mount.directory, mount.restart, mount.renew).explore(seed, 300, restarts=0.02)
        mount.check()


@pytest.mark.parametrize("seed", [21])
def test_an_encrypted_file_is_what_was_written_to_it(
    pools: PoolMaker, engine: Engine, seed: int
) -> None:
    with FsMount.made(pools, size="64M", is_encrypted=True) as mount:
        run = Run(mount.directory, mount.restart, mount.renew)
        run.explore(seed, 1200)
        assert run.refused == LACKS[engine.name]
        run.explore(seed, 300, restarts=0.02)
        mount.check()
