"""Random steps on a mount of mode `fs` and on tmpfs: the same answers, the same tree."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Engine, PoolMaker
from endtoend_tools import mounted_tmpfs
from fs_mounts import FsMount
from fs_oracle import Comparison, Side, Step
from fs_steps import KILL_DAEMON, KILL_DATA_PLANE, REMOUNT, RESTARTS, cases
from hypothesis import HealthCheck, Phase, given, settings

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.usefixtures("engine")]

EXAMPLES = int(os.environ.get("PMEMFS_ORACLE_EXAMPLES", "0"))
"""More examples, each time others, for a longer search than the suite's."""

PYTHON_LACKS = frozenset({"fallocate", "make_unnamed"})


class Rig:
    """A mount of mode fs beside a tmpfs; each case has a directory of its own in both."""

    def __init__(self, mount: FsMount, reference: Path, unsupported: frozenset[str]) -> None:
        self.mount = mount
        self.reference = reference
        self.unsupported = unsupported
        self.count = 0

    def run(self, steps: list[Step]) -> None:
        """One case. A failed one leaves a new pool to the next."""
        try:
            self.attempt(steps)
        except BaseException:
            self.mount.renew()
            raise

    def attempt(self, steps: list[Step]) -> None:
        self.count += 1
        # A link to `..` may lead out of the inner directory, and then meets the outer one.
        homes = [root / f"case-{self.count}" for root in (self.mount.directory, self.reference)]
        for home in homes:
            (home / "inner").mkdir(parents=True)
            (home / "inner").chmod(0o777)
        comparison = Comparison(*(Side(home / "inner") for home in homes), self.unsupported)
        try:
            for number, step in enumerate(steps):
                if step in RESTARTS:
                    self.restart(comparison, step)
                    comparison.compare_trees()
                else:
                    comparison.run(step)
                    if number % 16 == 15:
                        comparison.compare_trees()
            comparison.close_all()
            comparison.ours.root, comparison.reference.root = homes
            comparison.compare_trees()
        finally:
            comparison.close_all()
        for home in homes:
            shutil.rmtree(home)

    def restart(self, comparison: Comparison, step: Step) -> None:
        """What was open is closed, by us or by the crash."""
        if step == REMOUNT:
            comparison.close_all()
            self.mount.remount()
            return
        kill = {KILL_DAEMON: self.mount.kill_daemon, KILL_DATA_PLANE: self.mount.kill_data_plane}
        kill[step]()
        comparison.close_all()
        self.mount.mount_again()


@contextmanager
def rig(pools: PoolMaker, engine: Engine, tmp_path: Path) -> Iterator[Rig]:
    """Both sides; in the end the file system must be whole."""
    before = os.umask(0o022)
    try:
        with (
            FsMount.made(pools, size="96M") as mount,
            mounted_tmpfs(tmp_path / "reference", "nosuid,nodev,size=96M") as reference,
        ):
            yield Rig(mount, reference, PYTHON_LACKS if engine.name == "python" else frozenset())
            mount.check()
    finally:
        os.umask(before)


def how(examples: int) -> settings:
    """Settings of hypothesis: the suite's are always the same, a longer search never."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        print_blob=False,
    )


def test_steps_have_the_same_results_as_on_tmpfs(
    pools: PoolMaker, engine: Engine, tmp_path: Path
) -> None:
    with rig(pools, engine, tmp_path) as both:

        @how(150)
        @given(cases(80))
        def run(steps: list[Step]) -> None:
            both.run(steps)

        run()


@pytest.mark.timeout(600)
def test_what_was_answered_is_there_after_remounts_and_kill_9(
    pools: PoolMaker, engine: Engine, tmp_path: Path
) -> None:
    with rig(pools, engine, tmp_path) as both:

        @how(12)
        @given(cases(60, restarts=True))
        def run(steps: list[Step]) -> None:
            both.run(steps)

        run()
