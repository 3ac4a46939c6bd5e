"""The tools that look for differences find one, and say it with as few steps as it takes.

What is wrong is played by a file or directory whose calls do less than they should.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from kit import fs_fsx
from kit.commands import run_command
from kit.fs_oracle import Comparison, Side, Step, tree
from kit.fs_steps import PRELUDE, Chooser, smallest
from kit.fs_workers import strange, words

ROOT = Path(__file__).parents[2]


class Forgetful(fs_fsx.File):
    """A file whose punched holes keep their last byte."""

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        if mode & fs_fsx.PUNCH and length > 1:
            length -= 1
        super().fallocate(mode, offset, length)


def test_random_io_finds_a_byte_that_is_left(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fs_fsx, "File", Forgetful)
    with pytest.raises(AssertionError, match=r"seed 1, step .* not b'") as caught:
        fs_fsx.Run(shm).explore(1, 2000)
    steps = str(caught.value).splitlines()[2:]
    assert "punch" in steps[-1]
    assert len(steps) <= 4, steps


def test_random_io_finds_nothing_on_tmpfs(shm: Path) -> None:
    fs_fsx.Run(shm).explore(1, 300)


class Careless(Side):
    """A directory where chmod forgets the sticky bit and its like."""

    def chmod(self, path: str, mode: int) -> object:
        return super().chmod(path, mode & ~0o7000)


def case(steps: list[Step], ours: Side, reference: Side) -> bool:
    """Whether a comparison fails."""
    comparison = Comparison(ours, reference, wait_every=1)
    try:
        for step in steps:
            comparison.run(step)
        comparison.compare_trees()
    except AssertionError:
        return True
    finally:
        comparison.close_all()
    return False


@pytest.mark.skipif(os.geteuid() != 0, reason="the steps are root's and nobody's")
@pytest.mark.slow
def test_the_oracle_finds_a_bit_that_is_forgotten_and_the_step_that_does_it(shm: Path) -> None:
    count = 0

    def fails(steps: list[Step]) -> bool:
        nonlocal count
        count += 1
        homes = [shm / f"{side}-{count}" for side in ("ours", "reference")]
        for home in homes:
            home.mkdir()
        return case(steps, Careless(homes[0]), Side(homes[1]))

    chance = random.Random(1)
    steps = list(PRELUDE)
    (shm / "look").mkdir()
    side = Side(shm / "look")
    for step in steps:
        side.run(step)
    for _ in range(250):
        steps.append(Chooser(chance, side).step())
        side.run(steps[-1])
    side.close_all()
    assert fails(steps)
    fewest = smallest(steps, fails)
    assert fewest[-1].name == "chmod"
    assert len(fewest) <= 3, fewest


def test_a_tree_tells_hard_links_from_copies(shm: Path) -> None:
    for name, make in (("linked", os.link), ("copied", lambda one, two: two.write_bytes(b"x"))):
        (shm / name).mkdir()
        (shm / name / "a").write_bytes(b"x")
        make(shm / name / "a", shm / name / "b")
    assert tree(shm / "linked") != tree(shm / "copied")


def test_what_belongs_to_another_file_or_place_is_strange() -> None:
    right = words(7, 4096, 4096)
    assert strange(right, 7, 4096) is None
    assert strange(right[:1000], 7, 4096) is None
    assert strange(bytes(4096), 7, 4096) is None
    assert strange(right[:100] + bytes(100) + right[200:203], 7, 4096) is None
    assert strange(right, 8, 4096) is not None
    assert strange(right, 7, 0) is not None
    assert strange(bytes(4000) + words(9, 8096, 16), 7, 4096) is not None


@pytest.mark.slow
def test_the_script_exercises_any_directory_and_leaves_nothing(shm: Path) -> None:
    result = run_command(ROOT / "scripts/fsx", "--seconds", 2, "--seed", 5, shm)
    assert result.code == 0, result.err
    assert "seeds 5 to" in result.out
    assert "no difference" in result.out
    assert list(shm.iterdir()) == []
