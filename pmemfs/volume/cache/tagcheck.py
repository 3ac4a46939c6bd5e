"""Checks the cache on a pool that isn't mounted, and repairs it if the user asks for it.

All that is stored is read once, in steps, and holes of sparse pools not at all. A repair changes
single words. It makes a set durable as it is before it changes a tag, because a killed process may
have left tags that are not.

What a repair loses is said before. It needs `force` where that may be what a user wrote: a damaged
tag in a group that may have dirty blocks, and a dirty block behind the end of the origin.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pmemfs.errors import DamagedCache, MemoryFault
from pmemfs.media.cache import (
    BLOCK,
    CHECK,
    GROUP_SHIFT,
    GROUP_WORD_BYTES,
    MIX,
    MIX_PLACE,
    REGION_SHIFT,
    SEQUENCE,
    SET_BYTES,
    STATE,
    TAG_BYTES,
    WAYS,
    Ground,
    TagState,
    is_newer,
)
from pmemfs.pool import Pool
from pmemfs.units import format_size
from pmemfs.volume.cache.heads import StoredHead, read_heads

if TYPE_CHECKING:
    import numpy.typing as npt

    Words = npt.NDArray[np.uint64]

MOST_PROBLEMS = 10_000
"""Problems beyond this number are only counted."""
_SETS_AT_ONCE = 1 << 16
_MOST_ROUNDS = 100

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True, slots=True)
class CacheRemedy:
    """What `--repair` would do."""

    sentence: str
    carry_out: Callable[[], object]
    needs_force: bool = False
    """Whether it may lose what a user wrote."""


@dataclass(frozen=True, slots=True)
class CacheProblem:
    """One thing that was found."""

    what: str
    is_error: bool
    sentence: str
    remedy: CacheRemedy | None = None


@dataclass(slots=True)
class CacheVerdict:
    """What a check has found."""

    problems: list[CacheProblem] = field(default_factory=list)
    uncounted: int = 0
    states: Counter[TagState] = field(default_factory=Counter)
    summary: str = ""

    @property
    def has_errors(self) -> bool:
        """Whether anything is wrong."""
        return any(problem.is_error for problem in self.problems)

    def add(self, problem: CacheProblem) -> None:
        """Add a problem. Once the list is full, the first error still replaces something else."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)
            return
        self.uncounted += 1
        if problem.is_error and not self.has_errors:
            self.problems[-1] = problem

    def doable(self, *, force: bool) -> list[tuple[CacheProblem, CacheRemedy]]:
        """What can be done about them."""
        found = [(problem, problem.remedy) for problem in self.problems if problem.remedy]
        return [(p, remedy) for p, remedy in found if force or not remedy.needs_force]


def check_cache(pool: Pool, progress: Progress = lambda *_: None) -> CacheVerdict:
    """All that is wrong with the cache on a pool."""
    verdict = CacheVerdict()
    readings = read_heads(pool)
    for reading in readings:
        if reading.problem:
            why = f"not valid: {reading.problem}"
            others = any(other.head for other in readings)
            remedy = CacheRemedy("both copies are written anew", lambda: _rewrite(pool))
            verdict.add(CacheProblem(reading.where, True, why, remedy if others else None))
    try:
        stored = StoredHead.open(pool)
    except DamagedCache as problem:
        verdict.add(CacheProblem("cache", True, f"{problem}; what was dirty in it is lost"))
        return verdict
    _Check(pool, stored, verdict, progress).run()
    return verdict


def repair_cache(
    pool: Pool, verdict: CacheVerdict, say: Callable[[CacheProblem, str], object],
    progress: Progress = lambda *_: None, *, force: bool = False,
) -> int:  # fmt: skip
    """Repair a cache on a writable pool, beginning with this verdict; how many things were done.

    `say` is called with each problem, and with why it is still there ("": it isn't).
    """
    done_count = 0
    failed: set[tuple[str, str]] = set()
    for _ in range(_MOST_ROUNDS):
        doable = [
            (problem, remedy)
            for problem, remedy in verdict.doable(force=force)
            if (problem.what, problem.sentence) not in failed
        ]
        if not doable:
            break
        for problem, remedy in doable:
            try:
                remedy.carry_out()
            except (OSError, DamagedCache) as error:
                failed.add((problem.what, problem.sentence))
                say(problem, f"could not be done: {error}")
            else:
                done_count += 1
                say(problem, "")
        pool.medium.fence()
        verdict = check_cache(pool, progress)
    say_left_of_cache(verdict, say, force=force)
    return done_count


def say_left_of_cache(
    verdict: CacheVerdict, say: Callable[[CacheProblem, str], object], *, force: bool
) -> None:
    """Report what is not repaired because the user did not ask for that."""
    for problem in () if force else verdict.problems:
        if problem.remedy and problem.remedy.needs_force:
            say(problem, f"only with --force: {problem.remedy.sentence}")


def _rewrite(pool: Pool, **changes: object) -> None:
    StoredHead.open(pool).rewrite(**changes)


class _Check:
    """The check of one cache whose head is valid."""

    def __init__(
        self, pool: Pool, stored: StoredHead, verdict: CacheVerdict, progress: Progress
    ) -> None:
        self.pool = pool
        self.medium = pool.medium
        self.head = stored.head
        self.ground = stored.ground
        self.verdict = verdict
        self.progress = progress
        self.block_count = -(-self.head.origin_bytes >> self.head.block_shift)

    def run(self) -> None:
        """Check words of groups, tags, and what the head says of them."""
        groups = self._read(self.ground.groups_offset, self.ground.group_count * GROUP_WORD_BYTES)
        if groups is None:
            return
        self._check_words(groups)
        set_count = self.ground.set_count
        for first in range(0, set_count, _SETS_AT_ONCE):
            count = min(_SETS_AT_ONCE, set_count - first)
            self.progress("tags", first, set_count)
            offset, size = self.ground.tag_offset(first, 0), count * SET_BYTES
            if not self.medium.is_hole(offset, size):
                words = self._read(offset, size)
                if words is not None:
                    _Step(self, first, words, groups).run()
        self.progress("tags", set_count, set_count)
        self._check_head(groups)

    def error(self, what: str, sentence: str, remedy: CacheRemedy | None = None) -> None:
        """Report that something is wrong."""
        self.verdict.add(CacheProblem(what, True, sentence, remedy))

    def store(self, offset: int, word: int) -> None:
        """Change a word, when all around it is durable as it is."""
        line = offset - offset % SET_BYTES
        self.medium.persist(line, SET_BYTES)
        self.medium.put(offset, word.to_bytes(TAG_BYTES, "little"))
        self.medium.fence()

    def _read(self, offset: int, size: int) -> Words | None:
        try:
            return np.frombuffer(bytes(self.medium.read(offset, size)), np.dtype("<u8"))
        except MemoryFault as fault:
            self.error("cache", f"{format_size(size)} of it can't be read: {fault}")
            return None

    def _check_words(self, groups: Words) -> None:
        now_ns = time.time_ns()
        for group in np.flatnonzero(groups > np.uint64(now_ns)).tolist():
            offset = self.ground.group_offset(group)
            self.verdict.add(
                CacheProblem(
                    f"group {group}",
                    False,
                    "it has dirty blocks since a time that is still to come",
                    CacheRemedy("they count as dirty since now", self._storing(offset, now_ns)),
                )
            )

    def _storing(self, offset: int, word: int) -> Callable[[], None]:
        return lambda: self.store(offset, word)

    def _check_head(self, groups: Words) -> None:
        states, head = self.verdict.states, self.head
        dirty = states[TagState.DIRTY] + states[TagState.ZERO]
        if head.is_settled and dirty != head.dirty_blocks:
            remedy = CacheRemedy(
                "the number is put right", lambda: _rewrite(self.pool, dirty_blocks=dirty)
            )
            why = f"it counts {blocks_of(head.dirty_blocks)} as dirty, and there are {dirty}"
            self.error("cache head", why, remedy)
        self.verdict.summary = (
            f"{sum(states.values())} of {self.ground.place_count} places hold a block; "
            f"dirty: {blocks_of(dirty)}; origin {head.origin} of {format_size(head.origin_bytes)}"
        )


class _Step:
    """The check of some sets."""

    def __init__(self, check: _Check, first: int, words: Words, groups: Words) -> None:
        self.check = check
        self.first = first
        self.groups = groups
        self.at = np.flatnonzero(words)
        self.words = words[self.at]

    def run(self) -> None:
        """Look at all tags."""
        if not len(self.at):
            return
        low = self.words & np.uint64((1 << CHECK.shift) - 1)
        places = self.at.astype(np.uint64) + np.uint64(self.first * WAYS)
        sets = places // np.uint64(WAYS)
        blocks = low >> np.uint64(BLOCK.shift)
        states = low & np.uint64(STATE.mask)
        check = self.words >> np.uint64(CHECK.shift)
        is_tag = (check == check_bits(low, places, self.check.ground)) & (states - np.uint64(1) < 3)
        is_ours = is_tag & (sets_of(blocks, self.check.ground) == sets)
        is_inside = is_ours & (blocks < np.uint64(self.check.block_count))
        for at in np.flatnonzero(~is_tag).tolist():
            self._damaged(at, "it has the wrong check bits")
        for at in np.flatnonzero(is_tag & ~is_ours).tolist():
            self._damaged(at, f"block {int(blocks[at])} belongs to another set")
        for at in np.flatnonzero(is_ours & ~is_inside).tolist():
            self._outside(at, int(blocks[at]), int(states[at]) != TagState.CLEAN)
        older = self._check_twins(np.flatnonzero(is_inside), sets, blocks)
        is_inside[older] = False
        numbers, counts = np.unique(states[is_inside], return_counts=True)
        for state, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self.check.verdict.states[TagState(state)] += count
        self._check_groups(sets[is_inside & (states != np.uint64(TagState.CLEAN))])

    def _place(self, at: int) -> tuple[int, int]:
        set_number, way = divmod(int(self.at[at]), WAYS)
        return self.first + set_number, way

    def _name(self, at: int) -> str:
        return "tag of set {}, way {}".format(*self._place(at))

    def _clearing(self, at: int) -> Callable[[], None]:
        offset = self.check.ground.tag_offset(*self._place(at))
        return lambda: self.check.store(offset, 0)

    def _damaged(self, at: int, why: str) -> None:
        may_be_dirty = bool(self.groups[self._place(at)[0] >> GROUP_SHIFT])
        lost = (
            "what it stood for is lost if it was dirty: the origin's bytes are read instead"
            if may_be_dirty
            else "nothing is lost, because nothing near it is dirty"
        )
        remedy = CacheRemedy(
            f"its place is free, and {lost}", self._clearing(at), needs_force=may_be_dirty
        )
        self.check.error(self._name(at), f"it is damaged: {why}", remedy)

    def _outside(self, at: int, block: int, is_dirty: bool) -> None:
        lost = "what was written there is lost" if is_dirty else "nothing is lost"
        self.check.error(
            self._name(at),
            f"block {block} lies behind the end of the origin",
            CacheRemedy(f"its place is free; {lost}", self._clearing(at), needs_force=is_dirty),
        )

    def _check_twins(self, inside: npt.NDArray[np.intp], sets: Words, blocks: Words) -> list[int]:
        """Report tags of one block beside each other; those which don't count."""
        order = inside[np.argsort(blocks[inside], kind="stable")]
        same = np.flatnonzero(blocks[order[1:]] == blocks[order[:-1]])
        older = []
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            a, b = (SEQUENCE.of(int(self.words[at])) for at in (first, second))
            block = int(blocks[first])
            if not is_newer(a, b) and not is_newer(b, a):
                remedy = CacheRemedy(
                    "this one is cleared, and what was written last may be lost with it",
                    self._clearing(second),
                    needs_force=True,
                )
                sentence = f"block {block} has another tag, and neither is the newer one"
                self.check.error(self._name(second), sentence, remedy)
                older.append(second)
                continue
            old = second if is_newer(a, b) else first
            remedy = CacheRemedy("it is cleared; nothing is lost", self._clearing(old))
            # A power failure leaves such, and the next mount knows that after it.
            is_error = bool(self.check.head.is_settled)
            sentence = f"block {block} has a newer one, which counts"
            self.check.verdict.add(CacheProblem(self._name(old), is_error, sentence, remedy))
            older.append(old)
        return older

    def _check_groups(self, dirty_sets: Words) -> None:
        """Report dirty blocks that a search would miss."""
        groups, counts = np.unique(dirty_sets >> np.uint64(GROUP_SHIFT), return_counts=True)
        for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
            if not self.groups[group]:
                offset = self.check.ground.group_offset(group)
                remedy = CacheRemedy(
                    "they count as dirty since now",
                    lambda offset=offset: self.check.store(offset, time.time_ns()),  # type: ignore[misc]
                )
                sentence = f"it has {blocks_of(count)} that are dirty, and its word says none"
                self.check.error(f"group {group}", sentence, remedy)


def blocks_of(count: int) -> str:
    """A number of blocks, for a sentence."""
    return "1 block" if count == 1 else f"{count} blocks"


def check_bits(low: Words, places: Words, ground: Ground) -> Words:
    """The check bits of many tags; as `Ground.tag_word` computes them."""
    mixed = (places ^ np.uint64(ground.seed)) * np.uint64(MIX_PLACE)
    return ((low ^ mixed) * np.uint64(MIX)) >> np.uint64(CHECK.shift)


def sets_of(blocks: Words, ground: Ground) -> Words:
    """The sets of many blocks; as `Ground.set_of`."""
    count = np.uint64(ground.set_count)
    mixed = ((blocks >> np.uint64(REGION_SHIFT)) ^ np.uint64(ground.seed)) * np.uint64(MIX)
    # The upper half of a product of 64 bits each, in two steps, since there are fewer than 2^32
    # sets in 256 TiB.
    half = np.uint64(32)
    first = ((mixed >> half) * count + ((mixed & np.uint64(0xFFFF_FFFF)) * count >> half)) >> half
    inside = blocks & np.uint64((1 << REGION_SHIFT) - 1)
    result: Words = (first + inside) % count
    return result
