"""Which block of a set goes: against an exact LRU of as many blocks, and under scans."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import OrderedDict
from collections.abc import Collection, Sequence

import pytest

from pmemfs.media.cache import WAYS, Ground
from pmemfs.memmap.base import Usage
from pmemfs.volume.cache.eviction import ONCE, victim

SETS = 63
CAPACITY = SETS * WAYS
BLOCKS = 10 * CAPACITY
"""As in the measurement of sets that the design rests on."""
_GROUND = Ground(0, SETS, 12, 777)


def used(last_access_ns: int, accesses: int) -> Usage:
    return Usage(0, last_access_ns, accesses, 0)


def test_what_nobody_has_asked_for_since_the_mount_goes_first() -> None:
    assert victim([3, 4, 5], [used(1, 1), None, used(0, 1)]) == 4


def test_the_least_recently_used_goes() -> None:
    assert victim([3, 4, 5], [used(7, 2), used(5, 2), used(6, 9)]) == 4
    # Those that were accessed once are few, so they count as all others do.
    assert victim([3, 4, 5], [used(7, 1), used(5, 2), used(6, 1)]) == 4


def test_what_was_accessed_once_goes_before_the_rest_where_there_is_much_of_it() -> None:
    ways = list(range(WAYS))
    pages = [used(100 + way, 1 if way < ONCE else 2) for way in ways]
    assert victim(ways, pages[ONCE:] + pages[:ONCE]) == WAYS - ONCE
    assert victim(ways, [used(1, 2), *pages[1:]]) == 0
    # Reads and writes count alike.
    assert victim([0], [Usage(0, 1, 0, 5)]) == 0


def test_of_nothing_nothing_goes() -> None:
    assert victim([], []) is None


def zipf(exponent: float, count: int, rng: random.Random) -> list[int]:
    """Blocks of the origin, of which some are asked for more than others."""
    sums = list(itertools.accumulate((at + 1) ** -exponent for at in range(BLOCKS)))
    blocks = list(range(BLOCKS))
    rng.shuffle(blocks)
    return [blocks[bisect.bisect(sums, rng.random() * sums[-1])] for _ in range(count)]


def hits_of_lru(trace: Sequence[int], skipped: int) -> float:
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for at, block in enumerate(trace):
        if block in cached:
            cached.move_to_end(block)
            hits += at >= skipped
        else:
            if len(cached) == CAPACITY:
                cached.popitem(last=False)
            cached[block] = None
    return hits / (len(trace) - skipped)


def hits(trace: Sequence[int], skipped: int, uncounted: Collection[int] = ()) -> float:
    """With sets as a cache has them, one way of each kept free."""
    sets: list[dict[int, Usage]] = [{} for _ in range(SETS)]
    found = asked = 0
    for at, block in enumerate(trace):
        cached = sets[_GROUND.set_of(block)]
        counts = at >= skipped and block not in uncounted
        asked += counts
        accesses = 1
        if block in cached:
            found += counts
            accesses += cached[block].reads
        elif len(cached) == WAYS - 1:
            blocks = list(cached)
            way = victim(range(len(blocks)), list(cached.values()))
            assert way is not None
            del cached[blocks[way]]
        cached[block] = used(at, accesses)
    return found / asked


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [1.1, 0.9, 0.6])
def test_as_many_hits_as_an_exact_lru_would_have(exponent: float) -> None:
    trace = zipf(exponent, 60_000, random.Random(1))
    exact, ours = hits_of_lru(trace, 20_000), hits(trace, 20_000)
    print(f"zipf {exponent}: exact LRU {exact:.3f}, ours {ours:.3f}")
    assert ours > exact - 0.015


@pytest.mark.slow
def test_a_workload_that_moves_away_is_followed() -> None:
    rng = random.Random(2)
    trace = zipf(0.9, 30_000, rng) + [block + BLOCKS for block in zipf(0.9, 60_000, rng)]
    assert hits(trace, 50_000) > hits_of_lru(trace, 50_000) - 0.015


@pytest.mark.slow
@pytest.mark.parametrize(("scans_of", "most_lost"), [(2, 0.04), (4, 0.03)])
def test_a_long_scan_leaves_the_hot_set_where_it_is(scans_of: int, most_lost: float) -> None:
    """Every second or fourth read is of a scan; half of the cache is hot."""
    rng = random.Random(3)
    hot = rng.sample(range(BLOCKS), CAPACITY // 2)
    scan = range(2 * BLOCKS, 2 * BLOCKS + 40_000)
    trace = [rng.choice(hot) for _ in range(10_000)]
    skipped, ahead = len(trace), iter(scan)
    trace += [rng.choice(hot) if at % scans_of else next(ahead) for at in range(40_000)]
    alone = hits([block for block in trace if block not in scan], skipped)
    ours = hits(trace, skipped, scan)
    print(f"hot set: {alone:.3f} alone, {ours:.3f} beside a scan, one read of {scans_of}")
    assert ours > alone - most_lost
