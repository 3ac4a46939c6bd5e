"""Write-back in the background: by age, by share, and when somebody needs room.

What may be dirty is known by groups of 512 sets, each with the time since when. A pass cleans the
oldest groups first, so the origin gets writes in the order of their age as far as groups tell it.
Invariants:
- a pass notes its time before it looks at a group. If the group has dirty blocks again in the end,
  that time is what its word says, so a word is never younger than what it stands for;
- one transfer at a time while nothing is due, so that hits keep their speed; more if a limit is
  passed or somebody waits;
- what the origin refuses is tried again, after pauses that become longer. Nothing is dropped.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import trio

from pmemfs.errors import PmemfsError, sentence_of, system_error
from pmemfs.media.cache import Ground
from pmemfs.volume.cache.cleaning import Cleaner
from pmemfs.volume.cache.errands import Errands
from pmemfs.volume.cache.fencing import Fencing
from pmemfs.volume.cache.groups import OPEN, Groups
from pmemfs.volume.cache.index import Index
from pmemfs.volume.cache.link import OriginLink
from pmemfs.volume.cache.search import DirtySearch
from pmemfs.volume.cache.zeroing import CachedBlocks

log = logging.getLogger(__name__)

_TICK_SECONDS = 0.25
_SHORT_TICK_SECONDS = 0.02
_SETTLE_SECONDS = 1.0
"""So long at most what was written through waits for a flush that nobody asked for."""
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
_GRACE_POLL_SECONDS = 0.001
_QUIET_RUNS, _BUSY_RUNS = 1, 32
_BLOCKS_AT_ONCE = 2048
_OF_A_SET = 2
"""So many blocks are cleaned where a set is full: one for the writer, one for the next."""
_LOW_SHARE = 0.9
"""Above the limit, a pass goes on down to this share of it."""


class WriteBack:
    """The dirty blocks of one cache. `count_dirty` is what both planes have made dirty."""

    def __init__(
        self, ground: Ground, index: Index, groups: Groups, search: DirtySearch, cleaner: Cleaner,
        link: OriginLink, fencing: Fencing, cached: CachedBlocks, count_dirty: Callable[[], int],
        errands: Errands,
    ) -> None:  # fmt: skip
        self._ground = ground
        self._index = index
        self._groups = groups
        self._search = search
        self._cleaner = cleaner
        self._link = link
        self._fencing = fencing
        self._cached = cached
        self._errands = errands
        self.count_dirty = count_dirty
        self.max_dirty_percent = 0
        self.max_dirty_age_seconds = 0
        self.full_set_waits = 0
        """Writes that waited because their set was full of dirty blocks."""
        self.limit_waits = 0
        """Writes that waited because too many blocks were dirty."""
        self.failures = 0
        self.allow_writes: Callable[[bool], None] = lambda is_allowed: None
        """Tells the workers of a data plane whether they may make blocks dirty."""
        self.is_paused = False
        """Whether nothing may be changed, because the mount has become read-only."""
        self._has_cleaned = trio.Event()
        self._wanted = trio.Event()
        self._passing = trio.Lock()
        self._searching = trio.Lock()
        self._counted = trio.Event()
        cleaner.has_settled = self._tell_writers
        self._pause = 0.0
        self._settled_at = 0.0

    # For writers

    @property
    def is_over_limit(self) -> bool:
        """Whether more blocks are dirty than the user allows."""
        return self.count_dirty() > self._limit

    @property
    def _limit(self) -> int:
        return self._ground.place_count * self.max_dirty_percent // 100

    async def wait_below_limit(self, count: int) -> None:
        """Wait until a writer may make so many blocks dirty. Raises OSError.

        As soon as so many were cleaned, it may. So a writer doesn't wait for what others have made
        dirty.
        """
        self.limit_waits += 1
        until = self._index.cleaned + count
        self._cleaner.waiters += 1
        try:
            with trio.move_on_after(self._link.timeout_seconds):
                while self.is_over_limit and self._index.cleaned < until:
                    self._wanted.set()
                    await self._has_cleaned.wait()
                return
        finally:
            self._cleaner.waiters -= 1
        raise self._link.timed_out()

    async def make_room(self, blocks: Sequence[int]) -> None:
        """Clean something in each of the sets that some blocks belong to. Raises OSError."""
        self.full_set_waits += 1
        sets = {self._ground.set_of(block) for block in blocks}
        deadline = trio.current_time() + self._link.timeout_seconds
        pause = 0.002
        while True:
            dirty = [block for number in sets for block in self._dirty_in_set(number)]
            if not dirty:
                # Only readers hold its places, and not for long.
                await trio.sleep(0.001)
                return
            try:
                clean = partial(self._cleaner.clean, dirty, most_runs=_BUSY_RUNS)
                await self._errands.run(clean)
            except OSError:
                if trio.current_time() >= deadline:
                    raise self._link.timed_out() from None
                await trio.sleep(pause)
                pause = min(2 * pause, 1.0)
            else:
                return

    def _dirty_in_set(self, set_number: int) -> list[int]:
        found = self._cached.in_sets(set_number, 1)
        return [f.tag.block for f in found if f.tag.is_dirty][:_OF_A_SET]

    # For users

    async def flush(self) -> None:
        """Give the origin all that is dirty now. Raises OSError."""
        while not self._search.has_counted:
            await self._search_on()
        async with self._passing:
            if self.is_paused:
                raise system_error(errno.EROFS)
            await self._clean_groups(list(self._groups.suspects()), _BUSY_RUNS)
            await self._cleaner.settle()
        # A mount that ends after this leaves the cache in order.
        while not self._search.is_done:
            await self._search_on()

    @property
    def oldest_ns(self) -> int:
        """Since when the oldest dirty block may be dirty, in ns since 1970; 0: there is none."""
        since = (self._groups.since_ns(group) for group in self._groups.suspects())
        return min(since, default=0)

    @property
    def is_busy(self) -> bool:
        """Whether something is being cleaned."""
        return self._passing.locked() or self._cleaner.has_written

    # In the background

    def search_anew(self) -> None:
        """Find again what is dirty, because somebody who made blocks dirty has died."""
        self._search.begin_anew()
        self._wanted.set()

    async def serve(self) -> None:
        """Clean what is due, for ever; and see what the last mount has left, if it did not end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._search_rest)
            await self._clean_what_is_due()

    async def _clean_what_is_due(self) -> None:
        allowed = True
        while True:
            # Workers don't look at the limit themselves, so look often when it is near.
            is_near = 2 * self.count_dirty() > self._limit
            tick_seconds = _SHORT_TICK_SECONDS if is_near else _TICK_SECONDS
            with trio.move_on_after(tick_seconds + self._pause):
                await self._wanted.wait()
            self._wanted = trio.Event()
            is_over = self.is_over_limit
            if allowed == is_over:
                allowed = not is_over
                self.allow_writes(allowed)
            try:
                while not self._search.has_counted:
                    await self._search_on()
                if not self._search.is_done:
                    self._counted.set()
                await self._pass()
                self._pause = 0.0
            except (OSError, PmemfsError) as error:
                self.failures += 1
                if not self._pause:
                    log.warning("dirty blocks could not be written to the origin: %s; trying again",
                                sentence_of(error))  # fmt: skip
                self._pause = min(max(2 * self._pause, _FIRST_PAUSE_SECONDS),
                                  _LONGEST_PAUSE_SECONDS)  # fmt: skip
            finally:
                self._tell_writers()

    async def _search_on(self) -> None:
        # One step after the other: the search counts as done when it finds no more to begin.
        async with self._searching:
            await self._fencing.run(self._search.step)
        await trio.lowlevel.checkpoint()

    async def _search_rest(self) -> None:
        """Search on where nothing can be dirty, which in a large cache takes a while."""
        while True:
            # Each time after a data plane has died, too.
            await self._counted.wait()
            self._counted = trio.Event()
            while self._search.has_counted and not self._search.is_done:
                try:
                    await self._search_on()
                except (OSError, PmemfsError) as error:
                    log.warning("tags could not be read after a crash: %s; the next mount searches "
                                "again", sentence_of(error))  # fmt: skip

    async def _pass(self) -> None:
        if self._link.origin is None or self._link.origin.read_only or self.is_paused:
            return
        if self._cleaner.has_written and trio.current_time() > self._settled_at + _SETTLE_SECONDS:
            self._settled_at = trio.current_time()
            await self._cleaner.settle()
        is_over = self.is_over_limit
        due = self._due(time.time_ns()) if self.count_dirty() else []
        if not due and not is_over:
            return
        async with self._passing:
            if self.is_paused:
                return
            if due:
                await self._clean_groups(due, _BUSY_RUNS if is_over else _QUIET_RUNS)
            if self.is_over_limit:
                target = self._limit * _LOW_SHARE
                for groups in _some(self._by_age()):
                    if self.count_dirty() <= target:
                        break
                    await self._clean_groups(groups, _BUSY_RUNS)

    def _due(self, now_ns: int) -> list[int]:
        """The groups whose oldest dirty block may be older than the user allows, oldest first."""
        if not self.max_dirty_age_seconds:
            return []
        # Half of the age: what a pass finds dirty may be as young as the pass before.
        before_ns = now_ns - self.max_dirty_age_seconds * 500_000_000
        return [group for group in self._by_age() if self._groups.since_ns(group) <= before_ns]

    def _by_age(self) -> list[int]:
        return sorted(self._groups.suspects(), key=self._groups.since_ns)

    async def _clean_groups(self, groups: Sequence[int], most_runs: int) -> None:
        """Clean all that is dirty in some groups now. Raises the first OSError."""
        failure: OSError | None = None
        for some in _some(groups):
            since_ns = time.time_ns()
            try:
                for blocks in self._dirty_blocks(some):
                    await self._cleaner.write_out(blocks, most_runs=most_runs)
                await self._cleaner.settle()
            except OSError as error:
                failure = failure or error
                if self._link.is_away:
                    break
            else:
                await self._close(some, since_ns)
        if failure:
            raise failure

    def _dirty_blocks(self, groups: Sequence[int]) -> Iterator[list[int]]:
        """The dirty blocks of some groups, many at a time."""
        blocks: list[int] = []
        for group in groups:
            for found in self._groups.dirty_in(group):
                blocks.append(found.tag.block)
                if len(blocks) == _BLOCKS_AT_ONCE:
                    yield blocks
                    blocks = []
        if blocks:
            yield blocks

    async def _close(self, groups: Sequence[int], since_ns: int) -> None:
        """Let the words of groups say what is dirty now."""
        # A group that nobody has written to in this mount was searched, and is opened for this.
        await self._fencing.run(
            lambda: self._groups.opening(g for g in groups if self._groups.state(g) != OPEN)
        )
        closing = self._groups.begin_closing(groups, since_ns)
        # Polled, because telling us would slow down the workers.
        while not self._groups.can_finish(closing):  # noqa: ASYNC110
            await trio.sleep(_GRACE_POLL_SECONDS)
        await self._fencing.run(lambda: self._groups.finish_closing(closing))

    def _tell_writers(self) -> None:
        self._has_cleaned.set()
        self._has_cleaned = trio.Event()


def _some(groups: Sequence[int]) -> Iterator[Sequence[int]]:
    """A few groups at a time, that share a flush of the origin."""
    for at in range(0, len(groups), 16):
        yield groups[at : at + 16]
