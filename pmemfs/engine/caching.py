"""A cache in the shared memory: what the workers of the data plane may do with it.

At first they may do nothing: they forward all. Invariants:
- a worker makes blocks dirty only while `allow_writes` and the block's group say so. After either
  is taken back, and a grace period, none does;
- whoever here holds the lock of a set has made all tags of the set durable before it unlocks.
"""

from __future__ import annotations

from pmemfs.dataplane.counters import read_cache_counters
from pmemfs.dataplane.layouts import CACHE_LOCKS_SHIFT, CHUNK_SHIFT, Presence
from pmemfs.dataplane.native import CacheLocks, CachePlaces
from pmemfs.dataplane.tables import Grace
from pmemfs.engine.native import SharedAttributes, SharedEngine
from pmemfs.media.cache import Ground
from pmemfs.medium.mapped import MappedMedium
from pmemfs.volume.cache.onlookers import CacheOnlookers, WorkerCounts
from pmemfs.volume.onefile import INODE

LOCK_WORDS = 1 << CACHE_LOCKS_SHIFT


class SharedLocks:
    """The locks of sets, which workers take, too. Several sets have one lock, so whoever changes
    many sets at once may take a lock again that it has; this process has one thread that does."""

    def __init__(self, locks: CacheLocks) -> None:
        self._locks = locks
        self._counts: dict[int, int] = {}

    def lock(self, set_number: int) -> bool:
        """Lock a set; False if a worker has it."""
        word = set_number % LOCK_WORDS
        count = self._counts.get(word, 0)
        if not count and not self._locks.lock(word):
            return False
        self._counts[word] = count + 1
        return True

    def unlock(self, set_number: int) -> None:
        """Unlock a set, after all its tags are durable."""
        word = set_number % LOCK_WORDS
        self._counts[word] -= 1
        if not self._counts[word]:
            del self._counts[word]
            self._locks.unlock(word)


class PublishedCache(SharedAttributes, CacheOnlookers):
    """The cache of a mount, as workers see it; their memory was made for its number of sets."""

    def __init__(self, engine: SharedEngine) -> None:
        super().__init__(engine.shared)
        self._engine = engine
        self._groups = engine.shared.cache_groups

    def show_cache(self, ground: Ground, size_bytes: int) -> None:
        """Let workers answer what the tags of a cache prove. The file has `size_bytes`.

        Call it again when the size has changed.
        """
        # The table last: a worker that finds it finds these words, too.
        words = {
            "cache_tags_offset": ground.tags_offset,
            "cache_blocks_offset": ground.blocks_offset,
            "cache_seed": ground.seed,
            "cache_block_shift": ground.block_shift,
        }
        if ground.set_count != self._shared.header_word("cache_set_count"):
            raise ValueError(f"this memory was not made for {ground.set_count} sets")
        for name, value in words.items():
            self._shared.set_header_word(name, value)
        self._shared.publish(INODE, size_bytes, [])

    def hide(self) -> None:
        """Let workers forward all of it. After a grace period none touches the cache."""
        if self._shared.is_published(INODE):
            self._shared.withdraw(INODE)

    def allow_writes(self, is_allowed: bool) -> None:
        """Whether workers may answer writes, in groups that are allowed. On a medium that needs
        msync they never do."""
        self._shared.set_header_word("cache_writes", is_allowed)

    def allow_fsyncs(self, is_allowed: bool) -> None:
        """Whether an fsync has nothing to do but to fence: the origin need not be flushed."""
        self._shared.set_header_word("cache_fsyncs", is_allowed)

    def allow_misses(self) -> None:
        """Let workers hand over reads of blocks that are not there by messages of `Miss`."""
        self._shared.set_header_word("cache_misses", 1)

    def allow_group(self, group: int, is_allowed: bool) -> None:
        """Whether workers may make blocks dirty in a group of sets."""
        self._groups[group] = is_allowed

    def forbid_groups(self) -> None:
        """Let workers make no block dirty in any group."""
        self._shared.forbid_groups()

    def is_allowed(self, group: int) -> bool:
        """Whether workers may make blocks dirty in a group of sets."""
        return bool(self._groups[group])

    def note_reserved(self, offset_bytes: int, length_bytes: int) -> None:
        """A range of a sparse pool has memory now, which it keeps as long as the mount lasts: let
        workers touch those chunks of 2 MiB that lie whole in it."""
        first = -(-offset_bytes >> CHUNK_SHIFT)
        for chunk in range(first, offset_bytes + length_bytes >> CHUNK_SHIFT):
            self._shared.set_presence(chunk, Presence.WHOLE)

    def counters(self) -> WorkerCounts:
        """What all workers have done to the cache."""
        return WorkerCounts(*read_cache_counters(self._shared))

    def locks(self) -> SharedLocks:
        """The locks of sets, which workers take, too."""
        return SharedLocks(CacheLocks(self._shared.cache_locks))

    def places(self, medium: MappedMedium, groups: bytearray) -> CachePlaces:
        """Fills places of the pool, many at once; `groups` is what is known of each group."""
        return CachePlaces(
            self._shared.memory, medium.view(0, medium.size_bytes), groups, medium.fileno()
        )

    def begin_grace(self) -> Grace:
        """Note which requests are under way now."""
        return self._shared.begin_grace()

    def is_over(self, token: object) -> bool:
        """Whether all requests have ended that were under way then."""
        assert isinstance(token, Grace)
        return self._shared.is_over(token)

    async def grace(self) -> None:
        """Wait until every worker has ended what it does now."""
        await self._engine.grace()
