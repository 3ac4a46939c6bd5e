"""Random steps on a mount of mode `fs` and on tmpfs: the same answers, the same tree.

What fails is printed as the shortest list of steps that was found to fail, ready to be put into
`FAILED_ONCE`. For a longer search than the suite's: PMEMFS_ORACLE_SECONDS, and PMEMFS_ORACLE_SEED.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kit.fs_mounts import FsMount
from kit.fs_oracle import Comparison, Side, Step
from kit.fs_steps import PRELUDE, REMOUNT, RESTARTS, Chooser, smallest
from kit.mounts import Engine, PoolMaker
from kit.sources import mounted_tmpfs
from kit.users import NOBODY

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

SECONDS = int(os.environ.get("PMEMFS_ORACLE_SECONDS", "0"))
FIRST_SEED = int(os.environ.get("PMEMFS_ORACLE_SEED", "1"))

PYTHON_LACKS = frozenset({"fallocate", "make_unnamed"})


class Rig:
    """A mount of mode fs beside a tmpfs; each case has a directory of its own in both."""

    def __init__(
        self, mount: FsMount, reference: Path, unsupported: frozenset[str] = frozenset()
    ) -> None:
        self.mount = mount
        self.reference = reference
        self.unsupported = unsupported
        self.count = 0

    def explore(self, seed: int, step_count: int, restarts: float = 0) -> None:
        """One case of random steps. If it fails, the message has the steps that it takes."""
        chance = random.Random(seed)
        done: list[Step] = []
        prelude = list(PRELUDE) if chance.random() < 0.7 else []

        def next_step(comparison: Comparison) -> Step | None:
            if len(done) == step_count:
                return None
            if len(done) < len(prelude):
                step = prelude[len(done)]
            elif chance.random() < restarts:
                step = chance.choice(RESTARTS)
            else:
                step = Chooser(chance, comparison.reference).step()
            done.append(step)
            return step

        try:
            self.attempt(next_step)
        except (AssertionError, OSError) as error:
            self.mount.renew()
            steps = smallest(done, self.fails)
            lines = "\n".join(f"    {step!r}," for step in steps)
            raise AssertionError(f"seed {seed}: {error}\nsteps that fail:\n{lines}") from error

    def replay(self, steps: list[Step]) -> None:
        """A case of given steps."""
        remaining = iter(steps)
        self.attempt(lambda _: next(remaining, None), wait_every=1)

    def fails(self, steps: list[Step]) -> bool:
        """Whether a case fails; the next one has a pool of its own then."""
        try:
            self.replay(steps)
        except (AssertionError, OSError):
            self.mount.renew()
            return True
        return False

    def attempt(self, next_step: Callable[[Comparison], Step | None], wait_every: int = 8) -> None:
        """Make the calls, compare whole trees now and then and in the end."""
        self.count += 1
        # A link to `..` may lead out of the inner directory, and then meets the outer one.
        homes = [root / f"case-{self.count}" for root in (self.mount.directory, self.reference)]
        for home in homes:
            (home / "inner").mkdir(parents=True)
            (home / "inner").chmod(0o777)
        ours, reference = (Side(home / "inner") for home in homes)
        comparison = Comparison(ours, reference, self.unsupported, wait_every)
        try:
            while step := next_step(comparison):
                if step in RESTARTS:
                    self.restart(comparison, step)
                    comparison.compare_trees()
                else:
                    comparison.run(step)
                    if comparison.count % 16 == 0:
                        comparison.compare_trees()
            comparison.close_all()
            comparison.ours.root, comparison.reference.root = homes
            comparison.compare_trees()
            for home in homes:
                shutil.rmtree(home)
        finally:
            comparison.close_all()
            shutil.rmtree(homes[1], ignore_errors=True)

    def restart(self, comparison: Comparison, step: Step) -> None:
        """What was open is closed, by us or by the crash."""
        if step == REMOUNT:
            comparison.close_all()
        self.mount.restart(step.name)
        comparison.close_all()


@contextmanager
def rig(pools: PoolMaker, engine: Engine) -> Iterator[Rig]:
    """Both sides; in the end the file system must be whole."""
    # pyfuse3 can't leave the umask to the daemon, and the kernel's doesn't know of default lists.
    before = os.umask(0 if engine.name == "python" else 0o022)
    try:
        with (
            FsMount.made(pools, size="96M") as mount,
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
