"""A file system of mode `fs` that is full, or whose medium fails.

Whatever finds no room fails wholly: the tree is as before, in memory and after a mount, and no
frame is leaked. Of a full file system everything can be deleted. A medium that fails leaves
what was before the operation or what is after it, and nothing but OSError reaches the caller.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kit.fs_crash import (
    DIRECTORY,
    FILE,
    FRAME,
    ROOT,
    Judge,
    Moment,
    Op,
    Tree,
    Versions,
    World,
    built,
    difference,
    file_system,
    on_medium,
    snapshot,
    template,
)
from kit.fs_operations import IMAGES, OPERATIONS, attributed, link, make
from pmemfs.medium.recording import RecordingMedium
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.filesystem import FileSystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CASES = [(kind, op) for kind, ops in OPERATIONS.items() for op in ops]


START_NS = 2 * 10**18


@dataclass
class Clock:
    """A clock that can be set back, so that two runs give the same times."""

    now_ns: int = START_NS

    def __call__(self, *_: int) -> int:
        self.now_ns += 1
        return self.now_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    # Their times are before the clock's, whichever test runs first.
    for image in IMAGES.values():
        image()
    clock = Clock()
    monkeypatch.setattr(time, "time_ns", clock)
    monkeypatch.setattr(time, "clock_gettime_ns", clock)
    return clock


class SparseMedium(RecordingMedium):
    """A medium with memory behind what was stored to; for another frame there may be none."""

    def __init__(self, image: bytes, stale: bytes) -> None:
        super().__init__(image)
        self.backed = {
            at // FRAME
            for at in range(0, len(image), FRAME)
            if image[at : at + FRAME] != stale[at : at + FRAME]
        }
        self.left = -1
        """How many frames more there is memory for; -1: no end."""

    def store(self, offset_bytes: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for frame in range(offset_bytes // FRAME, (offset_bytes + len(view) - 1) // FRAME + 1):
            if frame not in self.backed:
                if self.left == 0:
                    raise OSError(errno.ENOSPC, "no memory for a frame")
                self.left -= 1
                self.backed.add(frame)
        super().store(offset_bytes, view)


def checked(world: World) -> str:
    """What is wrong with a file system, in memory and after a mount of what is stored."""
    judge = Judge(world.pool)
    image = bytes(world.medium.read(0, world.medium.size_bytes))
    report = judge.checker.check(image)
    if report.problems:
        return report.problems[0]
    busy = {pfn + at for pfn, count in world.fs.store.busy.runs() for at in range(count)}
    if set(report.leaked) - busy:
        return f"{report.leaked} are leaked"
    if world.fs.space().free_frames != report.free_frames:
        return f"{world.fs.space().free_frames} frames are free, not {report.free_frames}"
    pool = on_medium(world.pool, RecordingMedium(image))
    again = snapshot(file_system(pool))
    return difference(again, world.tree, {}, blocks=True)


def refuse_at(fs: FileSystem, n: int) -> Callable[[], bool]:
    """Let allocation number n, counted from 0, and all after it find nothing; whether it came."""
    real, count = fs.allocator.allocate, 0

    def allocate(frame_count: int, **wishes: object) -> list[Run]:
        nonlocal count
        count += 1
        if count > n:
            raise OSError(errno.ENOSPC, "nothing is free")
        return real(frame_count, **wishes)  # type: ignore[arg-type]

    fs.allocator.allocate = allocate  # type: ignore[method-assign]
    return lambda: count > n


def failed_wholly(world: World, op: Op, before: Tree, what: str) -> list[str]:
    wrong = []
    if world.error and world.error.errno != errno.ENOSPC:
        wrong.append(f"{what}: {world.error!r}")
    is_atomic = op.name not in NOT_ATOMIC
    if world.error and is_atomic and (why := difference(world.tree, before, {}, blocks=op.blocks)):
        wrong.append(f"{what}, in memory: {why}")
    if why := checked(world):
        wrong.append(f"{what}: {why}")
    return wrong


NOT_ATOMIC = {"tidy", "end", "read-only and back", "remount", "link unnamed",
              "punch q 126976 36864"}  # fmt: skip
"""Several operations in one: that punch writes a piece anew, and then makes a hole."""


@pytest.mark.parametrize("kind", IMAGES)
def test_an_operation_that_finds_no_frame_fails_wholly(kind: str) -> None:
    image = IMAGES[kind]()
    wrong, failures = [], 0
    for op in OPERATIONS[kind]:
        for n in range(100):
            world = World(image)
            before = world.tree
            was_reached = refuse_at(world.fs, n)
            world.run(op)
            wrong += failed_wholly(world, op, before, f"{op.name}, allocation {n}")
            failures += world.error is not None
            if not was_reached():
                break
    print(f"{kind}: {failures} operations failed")
    assert "\n".join(wrong) == ""
    assert failures > 5


@pytest.mark.parametrize("kind", IMAGES)
def test_an_operation_for_which_a_sparse_pool_has_no_memory_fails_wholly(kind: str) -> None:
    image = IMAGES[kind]()
    stale = built(lambda w: None)
    wrong, failures = [], 0
    for op in OPERATIONS[kind]:
        for n in range(100):
            medium = SparseMedium(image, stale)
            world = World(image, medium=medium)
            before = world.tree
            medium.left = n
            world.run(op)
            wrong += failed_wholly(world, op, before, f"{op.name}, frame {n}")
            failures += world.error is not None
            if medium.left > 0:
                break
    print(f"{kind}: {failures} operations failed")
    assert "\n".join(wrong) == ""
    # What is free among packed files had memory before they were packed.
    assert failures > 5 or kind == "packed"


@pytest.mark.parametrize("kind", IMAGES)
def test_where_the_medium_fails_the_operation_is_there_wholly_or_not_at_all(
    kind: str, clock: Clock
) -> None:
    image = IMAGES[kind]()
    judge = Judge(template(len(image)))
    wrong = []
    for op in OPERATIONS[kind]:
        if op.name in NOT_ATOMIC:
            continue
        clock.now_ns = START_NS
        world = World(image)
        first = world.medium.call_count
        legal = [world.tree]
        world.run(op)
        legal.append(world.tree)
        judge.passed = {}
        for call in range(first, world.medium.call_count):
            clock.now_ns = START_NS
            wrong += with_failure(image, op, call, legal, world.relaxed, judge)
    print(f"{kind}: {judge.states} states")
    assert "\n".join(wrong) == ""


def with_failure(
    image: bytes, op: Op, call: int, legal: list[Tree], relaxed: dict[int, Versions], judge: Judge
) -> list[str]:
    failing = World(image, failures={call: OSError(errno.EIO, "lost")})
    failing.run(op)
    what = f"{op.name}, call {call}"
    if failing.error is None:
        return [f"{what}: nobody learns that the medium failed"]
    if failing.error.errno not in (errno.EIO, errno.EROFS):
        return [f"{what}: {failing.error!r}"]
    wrong = [
        f"{what}, left: {why}"
        for why in judge.why_not(Moment.of(failing.medium), legal, relaxed, op.blocks, 6)
    ]
    # Nothing else than an error comes of what follows, and what can be read stays readable.
    for after in (make("zz", FILE), link("b", "zy"), attributed("b", mode=0o600)):
        try:
            after.run(failing)
        except OSError:
            continue
        wrong.append(f"{what}: {after.name} works afterwards")
    snapshot(failing.fs)
    return wrong


# Truly full


def fill(world: World, make_one: Callable[[int], object]) -> int:
    """Make things until there is no room; how many."""
    for at in range(100_000):
        try:
            make_one(at)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return at
    raise AssertionError("it never fills")


def test_of_a_file_system_full_of_data_everything_can_be_deleted() -> None:
    image = built(lambda w: None)
    world = World(image)
    fs = world.fs
    free = fs.space().free_frames

    def one(at: int) -> None:
        number = fs.make(ROOT, b"%d" % at, FILE)
        fs.write(number, 0, b"x" * 5000)

    count = fill(world, one)
    assert count > 50
    world.tree = snapshot(fs)
    assert checked(world) == ""
    for name in fs.names(ROOT):
        fs.unlink(ROOT, name)
    world.tree = snapshot(fs)
    assert checked(world) == ""
    # But for frames of inodes and of the root's log, all is free again.
    assert fs.space().free_frames > free - count // 8 - 20


@pytest.mark.parametrize("order", ["as made", "backwards"])
def test_of_a_file_system_full_of_empty_files_everything_can_be_deleted(order: str) -> None:
    """What gives back nothing needs room for its records all the same."""
    world = World(built(lambda w: None))
    fs = world.fs
    directory = fs.make(ROOT, b"d", DIRECTORY)
    count = fill(world, lambda at: fs.make(directory, b"%d" % at, FILE))
    assert count > 500
    names = [b"%d" % at for at in range(count)]
    if order == "backwards":
        names.reverse()
    for name in names:
        fs.unlink(directory, name)
    fs.rmdir(ROOT, b"d")
    world.tree = snapshot(fs)
    assert checked(world) == ""


def test_a_full_file_system_can_be_truncated_and_written_to_again() -> None:
    world = World(built(lambda w: None))
    fs = world.fs
    number = fs.make(ROOT, b"a", FILE)
    fill(world, lambda at: fs.write(number, at * FRAME, b"x" * FRAME))
    before = snapshot(fs)
    with pytest.raises(OSError, match="space"):
        fs.write(number, fs.attributes(number).size_bytes, b"y" * 100 * FRAME)
    after = snapshot(fs)
    assert difference(after, before, {}, blocks=False) == ""
    fs.punch(number, FRAME, 4 * FRAME)
    fs.write(number, FRAME, b"z" * 2 * FRAME)
    fs.set_attributes(number, size_bytes=10)
    fs.set_attributes(number, size_bytes=0)
    fs.unlink(ROOT, b"a")
    world.tree = snapshot(fs)
    assert checked(world) == ""
