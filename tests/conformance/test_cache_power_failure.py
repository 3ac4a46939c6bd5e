"""The power fails everywhere in what the index of a cache does; see `cache_crash` for the rules.

One operation at a time is looked at closely, on several caches; of sequences of two a sample, and
longer ones at random; and operations that were killed in the middle, whose cache another process
has mounted before the power fails. PMEMFS_POWER_FAILURE multiplies what is tried. The last part
removes each flush and each fence in turn, and asks that these tests notice.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator, Sequence

import pytest

from kit.cache_crash import (
    BLOCKS,
    Judge,
    Op,
    Start,
    World,
    small_groups,
    started,
    template,
)
from pmemfs.volume.cache.heads import StoredHead

SCALE = float(os.environ.get("PMEMFS_POWER_FAILURE", "1"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(max(300, int(SCALE * 3600)))]


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    small_groups(monkeypatch.setattr)


def scaled(count: int) -> int:
    return max(1, int(count * SCALE))


def blocks_of(set_number: int) -> list[int]:
    ground = StoredHead.open(start("empty").world().pool).ground
    return [block for block in BLOCKS if ground.set_of(block) == set_number]


def build_mixed(w: World) -> None:
    """Something of each kind in each set, and room."""
    for block in range(12):
        w.fetch(block)
    for block in range(8, 16):
        w.write(block)
    for block in (14, 15):
        w.make_zero(block)
    for block in (8, 9):
        w.clean(block)


def build_full(w: World) -> None:
    """One way of each set is free."""
    for block in range(30):
        w.fetch(block)
    for block in range(6):
        w.write(block)
    assert [w.free_ways(number) for number in range(2)] == [1, 1]


def build_dirty(w: World) -> None:
    """All ways of each set are dirty."""
    for block in range(32):
        w.write(block)
    assert [w.free_ways(number) for number in range(2)] == [0, 0]


def build_two_tags(w: World) -> None:
    """Both tags of some blocks are there, as a power failure leaves them."""
    build_mixed(w)
    for block in (0, 1, 10, 11):
        old = w.index.find(block)
        assert old
        w.write(block)
        w.medium.store(
            w.stored.ground.tag_offset(old.set_number, old.way), old.word.to_bytes(8, "little")
        )


BUILDERS = {
    "empty": lambda w: None,
    "mixed": build_mixed,
    "full": build_full,
    "dirty": build_dirty,
    "two tags": build_two_tags,
}


@functools.cache
def start(kind: str) -> Start:
    return started(BUILDERS[kind])


@functools.cache
def judge() -> Judge:
    return Judge(template())


def write(block: int, actor: int = 0) -> Op:
    return Op(f"write {block} by {actor}", lambda w: w.write(block, actor))


def fetch(block: int) -> Op:
    return Op(f"fetch {block}", lambda w: w.fetch(block))


def clean(block: int) -> Op:
    return Op(f"clean {block}", lambda w: w.clean(block))


def trim(block: int) -> Op:
    return Op(f"trim {block}", lambda w: w.trim(block))


def drop(block: int) -> Op:
    return Op(f"drop {block}", lambda w: w.drop(block))


def batch(*blocks: int) -> Op:
    return Op(f"batch {blocks}", lambda w: w.batch(blocks))


OPERATIONS: list[Op] = [
    *[write(block) for block in (0, 1, 9, 12, 14, 40)],
    *[write(block, actor) for block in (0, 12, 41) for actor in (1, 2)],
    *[fetch(block) for block in (0, 42)],
    *[clean(block) for block in (0, 12, 14)],
    *[trim(block) for block in (0, 12, 14, 43)],
    *[drop(block) for block in (0, 9)],
    *[Op(f"zero {block}", lambda w, b=block: w.make_zero(b)) for block in (0, 12)],  # type: ignore[misc]
    *[Op(f"write-through {b}", lambda w, b=b: w.write_through(b)) for b in (0, 12, 40)],  # type: ignore[misc]
    *[Op(f"write-around {b}", lambda w, b=b: w.write_around(b)) for b in (0, 12, 40)],  # type: ignore[misc]
    batch(1, 2), batch(12, 41),
    Op("write back", lambda w: w.write_back()),
    Op("close", lambda w: w.close(list(w.groups.suspects()))),
    Op("search", lambda w: w.find_dirty()),
    Op("remount", lambda w: w.remount()),
    Op("kill", lambda w: w.kill()),
    Op("set", lambda w: w.stored.rewrite(policy=2, max_dirty_percent=7)),
]  # fmt: skip


def new_world(kind: str, limit: int, **options: object) -> World:
    is_settled = kind != "two tags"
    return start(kind).world(limit=limit, judge=judge(), is_settled=is_settled, **options)


def explored(kind: str, ops: Sequence[Op], limit: int, *, all_of_them: bool = False) -> list[str]:
    """What is wrong in a sequence, of which by default only the last operation is looked at."""
    world = new_world(kind, limit)
    for op in ops[:-1]:
        world.run(op, explore=all_of_them)
    world.run(ops[-1])
    return [f"{kind}: {', '.join(op.name for op in ops)}: {why}" for why in world.violations]


@pytest.mark.parametrize("kind", BUILDERS)
def test_each_operation_leaves_blocks_old_or_new_at_every_store(kind: str) -> None:
    states = judge().states
    violations = [why for op in OPERATIONS for why in explored(kind, [op], scaled(12))]
    print(f"single operations, {kind}: {judge().states - states} states")
    assert violations == []
    assert judge().states - states > 4 * len(OPERATIONS)


def pairs(count: int) -> Iterator[tuple[Op, Op]]:
    rng = random.Random(5)
    for _ in range(count):
        yield rng.choice(OPERATIONS), rng.choice(OPERATIONS)


@pytest.mark.parametrize("kind", BUILDERS)
def test_of_two_operations_the_first_stays_while_the_second_is_under_way(kind: str) -> None:
    violations = [why for pair in pairs(scaled(24)) for why in explored(kind, pair, scaled(10))]
    assert violations == []


@pytest.mark.parametrize("seed", range(scaled(4)))
def test_long_sequences_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice(list(BUILDERS))
    world = new_world(kind, 4)
    for _ in range(60):
        block = rng.choice(BLOCKS)
        op = rng.choice(
            [write(block, rng.randrange(3)), fetch(block), clean(block), trim(block), drop(block),
             batch(block, (block + 1) % len(BLOCKS)), rng.choice(OPERATIONS)]
        )  # fmt: skip
        world.run(op, explore=rng.random() < 0.3)
        assert world.violations == [], (kind, op.name)


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_a_killed_process_has_left_is_durable_before_anything_relies_on_it(kind: str) -> None:
    rng = random.Random(7)
    violations: list[str] = []
    count = 0
    for op in OPERATIONS[:: max(1, int(3 / SCALE))]:
        for call in range(12):
            world = new_world(kind, 8)
            if not world.run_until_killed(op, call):
                break
            count += 1
            changed = next(iter(world.under_way), 0)
            for then in (
                rng.choice([write(changed), fetch(changed), clean(changed)]),
                rng.choice([write(44), fetch(46), Op("search", lambda w: w.find_dirty())]),
                rng.choice(OPERATIONS),
            ):
                world.run(then)
                violations += [f"{op.name} killed at {call}: {why}" for why in world.violations]
                world.violations.clear()
    print(f"{kind}: killed {count} times")
    assert violations == []
    assert count > 15


@functools.cache
def clean_start() -> Start:
    """Nothing is dirty, and one way of each set is free."""

    def build(w: World) -> None:
        for block in range(30):
            w.fetch(block)

    return started(build)


@pytest.mark.parametrize("op", [fetch(42), drop(0), drop(28)], ids=lambda op: op.name)
def test_an_unmount_makes_durable_what_an_earlier_process_has_left(op: Op) -> None:
    """Nothing near it was touched between the kill and the unmount."""
    violations: list[str] = []
    for call in range(12):
        world = clean_start().world(limit=8, judge=judge())
        if not world.run_until_killed(op, call):
            break
        world.find_dirty()
        world.remount()
        for block in (44, 46, 40):
            world.run(fetch(block))
        violations += world.violations
    assert violations == []


# The gate


GATED: list[tuple[str, list[Op], Op, list[Op]]] = [
    ("empty", [], write(1), []),
    ("mixed", [], write(1), [fetch(41)]),
    ("mixed", [], write(12, 1), [write(40, 2), write(40, 0)]),
    ("full", [], write(40, 1), []),
    ("full", [], fetch(42), [fetch(44)]),
    ("two tags", [], write(12), [write(12), fetch(42)]),
    ("mixed", [], Op("write back", lambda w: w.write_back()), [write(8)]),
    ("mixed", [], Op("write around", lambda w: w.write_around(0)), []),
    ("mixed", [], trim(12), []),
    ("mixed", [], Op("zero", lambda w: w.make_zero(0)), []),
    ("mixed", [Op("write back", lambda w: w.write_back())], write(8), []),
    ("mixed", [], Op("set", lambda w: w.stored.rewrite(policy=2)), []),
    ("mixed", [clean(8)], Op("remount", lambda w: w.remount()), [write(1)]),
    ("full", [clean(0)], Op("remount", lambda w: w.remount()), []),
    # The old tag comes back where the new one was dropped, if they lie in different lines.
    *[("full", [], write(block, 1), [clean(block), drop(block)]) for block in (0, 1, 6, 7, 12)],
    *[("two tags", [], clean(block), [drop(block)]) for block in (0, 1, 10, 11)],
    # What is evicted is filled at once.
    *[("dirty", [clean(0), clean(1)], op, []) for op in (fetch(40), write(41, 1))],
    ("full", [], Op("write back", lambda w: w.write_back()), []),
]
"""A kind of cache, what is done before, what is gated, and what comes after."""

KILLED: list[tuple[str, Op, list[Op]]] = [
    ("mixed", write(1), [write(1), fetch(41)]),
    ("mixed", trim(12), [fetch(41)]),
    ("mixed", Op("write back", lambda w: w.write_back()), [write(8)]),
    ("full", fetch(42), [fetch(44)]),
    ("full", write(12, 1), [clean(12), fetch(44)]),
    ("mixed", Op("set", lambda w: w.stored.rewrite(policy=2)),
     [Op("set", lambda w: w.stored.rewrite(policy=3))]),
]  # fmt: skip
"""A kind of cache, what is killed, and what comes after, which is gated."""

UNNEEDED = {
    "flush < finish_closing": "a group is searched in vain",
    "flush < _count_dirty": "a group is searched in vain",
}
"""What no power failure can tell from its absence, and why."""


@functools.cache
def sites() -> dict[str, list[tuple[int, int]]]:
    """All flushes and fences of what is gated, by who asks for them: where, and which calls."""
    found: dict[str, list[tuple[int, int]]] = {}
    for at, (kind, before, op, after) in enumerate(GATED):
        world = new_world(kind, 0)
        for step in before:
            world.run(step, explore=False)
        first = world.medium.call_count
        for step in (op, *after):
            world.run(step, explore=False)
        for call, site in enumerate(world.medium.sites[first:], first):
            if "<" in site:
                found.setdefault(site, []).append((at, call))
    return found


def is_noticed(at: int, call: int) -> bool:
    """Whether anything goes wrong where one call does nothing."""
    kind, before, op, after = GATED[at]
    world = new_world(kind, 12, ignored={call})
    for step in before:
        world.run(step, explore=False)
    for step in (op, *after):
        world.run(step)
        if world.violations:
            return True
    return False


def killed_sites() -> Iterator[tuple[str, int, int, int]]:
    """As `sites`, of what comes after a kill: which case, before which call it died, the call."""
    for at, (kind, op, after) in enumerate(KILLED):
        for dies_at in range(12):
            world = new_world(kind, 0, begins=op.name != "set")
            if not world.run_until_killed(op, dies_at):
                break
            first = world.medium.call_count
            for step in after:
                world.run(step, explore=False)
            for call, site in enumerate(world.medium.sites[first:], first):
                if "<" in site:
                    yield site, at, dies_at, call


def is_noticed_after_kill(at: int, dies_at: int, call: int) -> bool:
    kind, op, after = KILLED[at]
    # What is gated is the first write of the head.
    world = new_world(kind, 12, ignored={call}, begins=op.name != "set")
    world.run_until_killed(op, dies_at)
    for step in after:
        world.run(step)
        if world.violations:
            return True
    return False


def short(site: str) -> str:
    """The call and the innermost function, with its line where it is a fence."""
    return " < ".join(site.split(" < ")[:2])


def unnoticed_sites() -> dict[str, int]:
    """Flushes and fences that can be left out, and how often that was tried."""
    tried: dict[str, int] = {}
    noticed: set[str] = set()
    for site, places in sites().items():
        name = short(site)
        for place in places:
            if name in noticed:
                break
            tried[name] = tried.get(name, 0) + 1
            if is_noticed(*place):
                noticed.add(name)
    for site, *where in killed_sites():
        name = short(site)
        if name not in noticed:
            tried[name] = tried.get(name, 0) + 1
            if is_noticed_after_kill(*where):
                noticed.add(name)
    return {name: count for name, count in tried.items() if name not in noticed}


def test_without_any_one_flush_or_fence_a_power_failure_does_harm() -> None:
    unnoticed = unnoticed_sites()
    print(f"{len({short(site) for site in sites()})} places that flush or fence: {unnoticed}")
    assert {name.partition(":")[0] for name in unnoticed} == UNNEEDED.keys()
