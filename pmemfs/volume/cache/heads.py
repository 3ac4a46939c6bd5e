"""The two copies of a cache's head: how a cache is made, opened, and its head written anew.

Invariants, as of the pool's label (see `pool/labels.py`):
- the head is written to the copy that is not in force, made durable, and then written to the other
  copy. So at every instant one copy is valid;
- what a killed process has written last may not be durable yet, although it can be read. So before
  the first write of a mount, the copy in force is made durable as it is;
- a head makes a cache of a pool. `create` writes it last, when all tags and words of groups are
  durably 0: what a device held before would be damage otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pmemfs.errors import BadGeometry, DamagedCache, MemoryFault
from pmemfs.media.cache import (
    BLOCK,
    HEAD,
    HEAD_COPIES,
    CacheHead,
    Ground,
    ground_of,
    pack_head,
    set_count_of,
    validate_head,
)
from pmemfs.media.layout import replace
from pmemfs.medium.base import Medium
from pmemfs.pool import Pool
from pmemfs.pool.pool import random_word
from pmemfs.units import format_size
from pmemfs.volume.cache.steps import Steps, carry_out


class HeadReading(NamedTuple):
    """What was found at the place of a copy."""

    where: str
    offset_bytes: int
    head: CacheHead | None
    problem: DamagedCache | None


def read_heads(pool: Pool) -> list[HeadReading]:
    """Both copies, each with its head if it is valid."""
    start = pool.zones.data.offset_bytes
    names = ("cache head", "cache head copy")
    return [
        _read_head(pool, names[copy], start + copy * HEAD.size_bytes) for copy in range(HEAD_COPIES)
    ]


def newer_head(readings: list[HeadReading]) -> HeadReading:
    """The copy in force: the valid copy with the higher sequence number. Raises DamagedCache."""
    valid = [reading for reading in readings if reading.head]
    if not valid:
        why = "; ".join(f"{reading.where}: {_why(reading)}" for reading in readings)
        raise DamagedCache(why=f"neither copy of its head is valid ({why})")
    return max(valid, key=lambda reading: reading.head.sequence if reading.head else -1)


class StoredHead:
    """The head of an open cache."""

    def __init__(self, medium: Medium, pool: Pool, in_force: HeadReading) -> None:
        assert in_force.head is not None
        self._medium = medium
        self._pool = pool
        self._in_force = in_force.offset_bytes
        self._is_durable = False
        self.head: CacheHead = in_force.head

    @classmethod
    def create(cls, pool: Pool, head: CacheHead) -> StoredHead:
        """Make a cache of a new pool. Of `head` count the size of blocks, the policy, the limits,
        and all about the origin.

        Raises BadGeometry, DamagedCache for a head that could not be read back, and OSError.
        """
        data = pool.zones.data
        set_count = set_count_of(data.size_bytes, head.block_shift)
        if not set_count:
            raise BadGeometry(why="the pool is too small to hold a cache")
        if head.origin_bytes > BLOCK.mask + 1 << head.block_shift:
            raise BadGeometry(
                why=f"with blocks of {format_size(1 << head.block_shift)} an origin of "
                f"{format_size(head.origin_bytes)} is too large: take larger blocks"
            )
        head = replace(
            head,
            sequence=1,
            uuid=pool.label.uuid,
            seed=random_word(),
            set_count=set_count,
            is_settled=1,
            dirty_blocks=0,
        )
        raw = pack_head(head)
        head = validate_head(raw, pool.label.uuid, data.size_bytes)
        ground = ground_of(head, data.offset_bytes)
        pool.medium.clear(data.offset_bytes, ground.blocks_offset - data.offset_bytes)
        for reading in read_heads(pool):
            pool.medium.store(reading.offset_bytes, raw)
            pool.medium.persist(reading.offset_bytes, len(raw))
        return cls.open(pool)

    @classmethod
    def open(cls, pool: Pool) -> StoredHead:
        """The head of the cache on a pool. Raises DamagedCache."""
        return cls(pool.medium, pool, newer_head(read_heads(pool)))

    @property
    def ground(self) -> Ground:
        """Where the parts of the cache lie."""
        return ground_of(self.head, self._pool.zones.data.offset_bytes)

    def rewrite(self, **changes: Any) -> None:
        """Write both copies with other values in some fields, durably; see `CacheHead`."""
        carry_out(self.rewriting(**changes), self._medium)

    def rewriting(self, **changes: Any) -> Steps[None]:
        """As `rewrite`. Only one task at a time may do it.

        Raises DamagedCache if it could not be read back.
        """
        head = replace(self.head, **changes, sequence=self.head.sequence + 1)
        raw = pack_head(head)
        data = self._pool.zones.data
        head = validate_head(raw, self._pool.label.uuid, data.size_bytes)
        if not self._is_durable:
            self._medium.flush(self._in_force, HEAD.size_bytes)
            self._is_durable = True
        # What the head says of the tags, how many are dirty, must be durable before it as well.
        yield
        places = [data.offset_bytes + copy * HEAD.size_bytes for copy in range(HEAD_COPIES)]
        for offset_bytes in sorted(places, key=lambda place: place == self._in_force):
            self._medium.put(offset_bytes, raw)
            yield
        self.head = head


def _read_head(pool: Pool, where: str, offset_bytes: int) -> HeadReading:
    data = pool.zones.data
    if not data.contains(offset_bytes, HEAD.size_bytes):
        problem = DamagedCache(why="the pool is too small to hold it")
        return HeadReading(where, offset_bytes, None, problem)
    try:
        raw = pool.medium.read(offset_bytes, HEAD.size_bytes)
        head = validate_head(raw, pool.label.uuid, data.size_bytes)
    except DamagedCache as problem:
        return HeadReading(where, offset_bytes, None, problem)
    except MemoryFault as fault:
        return HeadReading(where, offset_bytes, None, DamagedCache(why=str(fault)))
    return HeadReading(where, offset_bytes, head, None)


def _why(reading: HeadReading) -> str:
    return str(reading.problem.facts["why"]) if reading.problem else "valid"
