"""Random steps on a mount of mode `fs` and on a reference, until one tells them apart."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from kit.fs_mounts import FsMount
from kit.fs_oracle import Comparison, Side, Step
from kit.fs_steps import PRELUDE, REMOUNT, RESTARTS, Chooser, smallest

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
