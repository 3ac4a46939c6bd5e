"""Random steps on a mount of mode `fs` and on tmpfs: the same answers, the same tree.

What fails is printed as the shortest list of steps that was found to fail, ready to be put into
`FAILED_ONCE`. For a longer search than the suite's: PMEMFS_ORACLE_SECONDS, and PMEMFS_ORACLE_SEED.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kit.fs_mounts import FsMount
from kit.fs_oracle import Step
from kit.fs_rig import PYTHON_LACKS, Rig
from kit.mounts import Engine, PoolMaker
from kit.sources import mounted_tmpfs
from kit.users import NOBODY

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

SECONDS = int(os.environ.get("PMEMFS_ORACLE_SECONDS", "0"))
FIRST_SEED = int(os.environ.get("PMEMFS_ORACLE_SEED", "1"))


@contextmanager
def rig(pools: PoolMaker, engine: Engine, *, is_encrypted: bool = False) -> Iterator[Rig]:
    """Both sides; in the end the file system must be whole."""
    # pyfuse3 can't leave the umask to the daemon, and the kernel's doesn't know of default lists.
    before = os.umask(0 if engine.name == "python" else 0o022)
    try:
        with (
            FsMount.made(pools, size="96M", is_encrypted=is_encrypted) as mount,
            mounted_tmpfs(pools.directory / "reference", "nosuid,nodev,size=96M") as reference,
        ):
            yield Rig(mount, reference, PYTHON_LACKS if engine.name == "python" else frozenset())
            mount.check()
    finally:
        os.umask(before)


def seeds(count: int) -> Iterator[int]:
    """The suite's seeds are always the same; a longer search goes on until its time is up."""
    end = time.monotonic() + SECONDS
    seed = FIRST_SEED
    while time.monotonic() < end if SECONDS else seed < FIRST_SEED + count:
        yield seed
        seed += 1


@pytest.mark.timeout(SECONDS + 300)
def test_steps_have_the_same_results_as_on_tmpfs(pools: PoolMaker, engine: Engine) -> None:
    with rig(pools, engine) as both:
        for seed in seeds(25):
            both.explore(seed, 100)


@pytest.mark.timeout(SECONDS + 300)
def test_what_was_answered_is_there_after_remounts_and_kill_9(
    pools: PoolMaker, engine: Engine
) -> None:
    with rig(pools, engine) as both:
        for seed in seeds(3):
            both.explore(seed, 100, restarts=0.03)
            both.mount.check()


@pytest.mark.timeout(SECONDS + 300)
def test_in_an_encrypted_directory_steps_have_the_same_results(
    pools: PoolMaker, engine: Engine
) -> None:
    with rig(pools, engine, is_encrypted=True) as both:
        for seed in seeds(8):
            both.explore(seed, 100)
        both.explore(FIRST_SEED, 100, restarts=0.03)


FAILED_ONCE = {
    "the name of an attribute is only a prefix": [
        Step("open", (3, "f", os.O_RDWR | os.O_CREAT, 0o644)),
        Step("setxattr", ("f", "user.", b"v", 0, False)),
        Step("getxattr", ("f", "user.", True)),
    ],
    "an attribute of a namespace that is none": [
        Step("open", (1, "f", os.O_RDWR | os.O_CREAT, 0o644)),
        Step("getxattr", ("f", "bad.a", False)),
        Step("setxattr", ("f", "bad.a", b"v", os.XATTR_REPLACE, False)),
    ],
    "a file is emptied by a reader": [
        Step("open", (3, "b", os.O_RDWR | os.O_CREAT, 0o755)),
        Step("write", (3, 1, 300_000)),
        Step("open", (3, "b", os.O_RDONLY | os.O_TRUNC, 0o777)),
    ],
    "a directory that was open before is listed": [
        Step("mkdir", ("a", 0o755)),
        Step("open", (4, "a", os.O_RDONLY | os.O_DIRECTORY, 0o777)),
        Step("mkdir_in", (4, "b", 0o755)),
        Step("list_open", (4,)),
    ],
    "a write by others takes set-user-ID away": [
        Step("open", (2, "d", os.O_RDWR | os.O_CREAT, 0o6777), NOBODY),
        Step("chmod", ("d", 0o6777)),
        Step("pwrite", (2, 183, 12_288, 6066), NOBODY),
    ],
}
"""The shortest steps that failed, here or on the way here."""


def test_steps_that_failed_once(pools: PoolMaker, engine: Engine) -> None:
    with rig(pools, engine) as both:
        for what, steps in FAILED_ONCE.items():
            try:
                both.replay(steps)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from error
