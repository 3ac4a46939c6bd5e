"""Processes that work in the same directories of mode `fs` at the same time.

PMEMFS_CONCURRENCY_SECONDS says for how long, PMEMFS_CONCURRENCY_SEED with which random numbers.
"""

from __future__ import annotations

import os

import pytest

from kit.fs_mounts import FsMount
from kit.fs_workers import differences, prepare, work
from kit.mounts import PoolMaker

SECONDS = float(os.environ.get("PMEMFS_CONCURRENCY_SECONDS", "6"))
SEED = int(os.environ.get("PMEMFS_CONCURRENCY_SEED", "1"))

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.usefixtures("engine"),
    pytest.mark.timeout(SECONDS * 3 + 300),
]

MIB = 1 << 20
encrypted = pytest.mark.parametrize("is_encrypted", [False, True], ids=["plain", "encrypted"])


@encrypted
def test_four_processes_find_what_each_of_them_left(pools: PoolMaker, is_encrypted: bool) -> None:
    with FsMount.made(pools, size="128M", is_encrypted=is_encrypted) as mount:
        prepare(mount.directory)
        outcome = work(mount.directory, ["all"] * 4, SECONDS, SEED)
        assert outcome.wrong == []
        assert differences(mount.directory, outcome) == []
        mount.check()
        assert differences(mount.directory, outcome) == []
        for kind in ("own_rename", "slot_put", "slot_read", "count_rename", "tree_rename"):
            assert outcome.tally[kind] >= 12, outcome.tally


@encrypted
def test_no_read_returns_another_files_bytes_while_pages_change_hands(
    pools: PoolMaker, is_encrypted: bool
) -> None:
    with FsMount.made(pools, size="24M", is_encrypted=is_encrypted) as mount:
        prepare(mount.directory)
        outcome = work(mount.directory, ["read", "read", "churn", "churn"], SECONDS / 2, SEED)
        assert outcome.wrong == []
        assert outcome.tally["bytes written"] >= 4 * 24 * MIB, "pages change hands"
        assert outcome.tally["bytes read"] >= 24 * MIB
        assert differences(mount.directory, outcome) == []
        mount.check()
        assert differences(mount.directory, outcome) == []
