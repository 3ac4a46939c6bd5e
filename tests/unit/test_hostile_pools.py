"""Pools that nobody would make: refused, or served as far as they go, and repaired."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Iterator

import pytest

from kit import hostile_pools

TRIES = 1500
REGRESSIONS = (13, 192, 362, 967, 1933, 2269)
"""Seeds that have found something once; what it was has a test of its own elsewhere."""


@pytest.fixture(autouse=True)
def quick_and_quiet() -> Iterator[None]:
    """A try that takes seconds has failed."""
    before = signal.signal(signal.SIGPROF, hostile_pools.too_slow)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def attempt(seed: int) -> tuple[str, str]:
    signal.setitimer(signal.ITIMER_PROF, hostile_pools.TRY_SECONDS)
    return hostile_pools.attempt(seed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hostile_pools_are_refused_or_served_as_far_as_they_go_and_can_be_repaired() -> None:
    outcomes: Counter[str] = Counter()
    for seed in (*REGRESSIONS, *range(TRIES)):
        outcomes.update(attempt(seed))
    print(f"{TRIES + len(REGRESSIONS)} tries", outcomes)
    # Were all refused, or all valid, this would have tested little.
    for outcome in ("refused", "damaged, served read-only", "served", "errors"):
        assert outcomes[outcome] > TRIES // 100
    assert outcomes["check: repaired"] > TRIES // 8


@pytest.mark.parametrize("seed", [1, 2, 3, 13])
def test_a_seed_gives_the_same_try_each_time(seed: int) -> None:
    first, second = hostile_pools.mutated(seed), hostile_pools.mutated(seed)
    assert first[1:] == second[1:]
    hostile_pools.base.cache_clear()
    assert hostile_pools.mutated(seed)[1] == first[1]
    assert attempt(seed) == attempt(seed)


@pytest.mark.parametrize("seed", range(16))
def test_the_pools_it_starts_from_are_valid(seed: int) -> None:
    of = hostile_pools.base(seed)
    pool = hostile_pools.opened(of, of.image, read_only=True)
    verdict = hostile_pools.check_filesystem(pool)
    assert not verdict.has_errors, hostile_pools.sentences(verdict)
    assert hostile_pools.walk(hostile_pools.mounted(pool))[2] == []
    assert len(of.records) > 50


def test_what_is_outside_the_data_zone_is_out_of_bounds() -> None:
    of = hostile_pools.base(0)
    pool = hostile_pools.opened(of, of.image, read_only=False)
    for offset in (0, of.data_start - 1, of.data_start + of.data_bytes):
        with pytest.raises(hostile_pools.Trespass):
            pool.medium.read(offset, 1)
        with pytest.raises(hostile_pools.Trespass):
            pool.medium.store(offset, b"x")
    pool.medium.store(of.data_start, b"x")
