"""Many changes of a cache that share their fences, in any order, and the power fails at each.

So it is on media whose fence is msync: a change waits for the fence in a thread, and others go on
meanwhile. As in a volume, one block is changed by one task at a time.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Collection, Generator

import pytest

from kit.cache_crash import (
    BLOCKS,
    ZEROES,
    Judge,
    Seen,
    Start,
    World,
    small_groups,
    started,
    template,
)
from kit.fs_crash import Moment
from pmemfs.errors import SetBusy
from pmemfs.media.cache import TagState
from pmemfs.volume.cache.index import Publication

SCALE = float(os.environ.get("PMEMFS_POWER_FAILURE", "1"))
TASKS = 5
STEPS = 250

pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(300, int(SCALE * 3600)))]

Task = Generator[None, None, None]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch.setattr)


@functools.cache
def start() -> Start:
    def build(w: World) -> None:
        for block in range(26):
            w.fetch(block)
        w.write(0)

    return started(build)


def write(w: World, block: int) -> Task:
    data = w.new_text(block)
    found = w.index.find(block)
    (place,) = yield from w.index.reserving([block], w.choose)
    if place is None:
        return
    try:
        w.medium.put(place.pool_offset, data)
        item = Publication(place, block, TagState.DIRTY, found)
        (published,) = yield from w.index.publishing([item])
        assert published
        w.content[block] = data
    finally:
        w.index.release(place)


def fetch(w: World, block: int) -> Task:
    if w.index.find(block):
        return
    (place,) = yield from w.index.reserving([block], w.choose)
    if place is None:
        return
    try:
        w.medium.put(place.pool_offset, w.origin[block])
        item = Publication(place, block, TagState.CLEAN, None)
        yield from w.index.publishing([item])
    finally:
        w.index.release(place)


def clean(w: World, block: int) -> Task:
    yield from w.groups.seeing([w.stored.ground.set_of(block)])
    found = w.index.find(block)
    if found and found.tag.state is TagState.DIRTY:
        w.write_origin(block, w.content[block])
        yield from w.index.cleaning([found])


def drop(w: World, block: int) -> Task:
    found = w.index.find(block)
    if found and not found.tag.is_dirty:
        yield from w.index.clearing([found])


def trim(w: World, block: int) -> Task:
    found = w.index.find(block)
    if not found:
        return
    w.changing(block, ZEROES)
    yield from w.index.zeroing([found])
    w.content[block] = ZEROES
    w.write_origin(block, ZEROES)
    zero = w.index.find(block)
    assert zero
    yield from w.index.clearing([zero])


def close(w: World, block: int) -> Task:
    """Of a group whose number is that of the block; it has nothing to do with the block."""
    closing = w.groups.begin_closing([block % w.groups.count])
    yield from w.groups.finish_closing(closing)


def is_dirty(w: World, block: int) -> bool:
    found = w.index.find(block)
    return bool(found and found.tag.is_dirty)


KINDS: list[Callable[[World, int], Task]] = [write, write, write, fetch, drop, trim]


class Tasks:
    """Runs tasks in any order, each until it needs a fence, and fences now and then."""

    def __init__(self, w: World, rng: random.Random, judge: Judge) -> None:
        self.w = w
        self.rng = rng
        self.judge = judge
        self.ready: dict[int, tuple[Task, bytes]] = {}
        self.waiting: dict[int, tuple[Task, bytes]] = {}
        """By their blocks, each with what the block was when it began."""
        self.done_count = self.busy_count = 0
        self.violations: list[str] = []

    def step(self) -> None:
        """Begin a task, go on with one, or fence."""
        count = len(self.ready) + len(self.waiting)
        if self.ready and self.rng.random() < 0.7:
            self.advance(self.rng.choice(list(self.ready)))
        elif count < TASKS and self.rng.random() < 0.7:
            # Few are dirty at a time, so that groups are closed, and opened again at once.
            dirty = [block for block in BLOCKS if is_dirty(self.w, block)]
            block = self.rng.choice(dirty if dirty and self.rng.random() < 0.6 else BLOCKS)
            if block not in self.ready and block not in self.waiting:
                kinds = [clean, close] if block in dirty else [*KINDS, close]
                kind = self.rng.choice(kinds)
                self.ready[block] = kind(self.w, block), self.w.content[block]
        elif self.waiting:
            self.fence()

    def advance(self, block: int) -> None:
        task, before = self.ready.pop(block)
        try:
            next(task)
        except StopIteration:
            self.done_count += 1
            self.w.under_way.pop(block, None)
        except SetBusy:
            # It comes again, as a request does. What it wanted to write, nobody has seen.
            self.busy_count += 1
            self.w.under_way.pop(block, None)
        else:
            self.waiting[block] = task, before

    def fence(self) -> None:
        w = self.w
        legal: dict[int, Collection[bytes]] = {
            block: {content, w.under_way.get(block, content)}
            for block, content in w.content.items()
        }
        for block, (_, before) in (self.ready | self.waiting).items():
            legal[block] = {*legal[block], before}
        seen = Seen(Moment.of(w.medium), dict(w.origin))
        self.violations += self.judge.why_not(seen, legal, 6)
        # What is stored from here on may be durable as well, but nobody may rely on it.
        waiting, self.waiting = self.waiting, {}
        w.medium.fence()
        self.ready |= waiting


@pytest.mark.parametrize("seed", range(max(1, int(6 * SCALE))))
@pytest.mark.parametrize("is_settled", [True, False])
def test_changes_that_share_fences_leave_blocks_old_or_new(seed: int, is_settled: bool) -> None:
    rng = random.Random(seed)
    w = start().world(is_settled=is_settled)
    tasks = Tasks(w, rng, Judge(template()))
    for _ in range(STEPS):
        tasks.step()
    assert tasks.violations == []
    while tasks.ready or tasks.waiting:
        for block in list(tasks.ready):
            tasks.advance(block)
        tasks.fence()
    assert tasks.violations == []
    assert {block: w.read(block) for block in BLOCKS} == w.content
    print(f"{tasks.done_count} done, {tasks.busy_count} busy, {tasks.judge.states} states")
    assert tasks.done_count > 20
    assert tasks.judge.states > 50
