"""A cache in a pool, its workers, and what a test wants to find or plant there; no origin."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kit.data_plane import ALL, FSYNC, LSEEK, MAX_WRITE, READ, WRITE, lseek_in, read_in, write_in
from kit.pools import mapped_pool
from pmemfs.dataplane.counters import CacheCounters, read_cache_counters
from pmemfs.dataplane.native import CacheLocks, Responder
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.caching import PublishedCache
from pmemfs.engine.native import SharedEngine
from pmemfs.engine.sharing import share_memmap, share_pool
from pmemfs.media.cache import WAYS, Ground, Tag, TagState, set_count_of
from pmemfs.media.label import Scheme
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Access, Memmap
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.pool import Pool
from pmemfs.units import KIB, MIB
from pmemfs.volume.onefile import INODE

SEED = 0x1234_5678_9ABC_DEF1


@dataclass
class Cached:
    """A cache, and workers of a data plane that answer requests for it."""

    pool: Pool
    medium: MappedMedium
    shared: SharedMemory
    memmap: Memmap
    published: PublishedCache
    ground: Ground
    size_bytes: int
    points: bool = False
    workers: list[Responder] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.show()
        self.workers = [self.worker(number) for number in range(self.shared.worker_count)]

    def show(self) -> None:
        """Let workers do all that they can."""
        self.published.show_cache(self.ground, self.size_bytes)
        self.published.allow_writes(True)
        self.published.allow_fsyncs(True)
        for group in range(self.ground.group_count):
            self.published.allow_group(group, True)

    def worker(self, number: int) -> Responder:
        """One more worker in this process."""
        return Responder(
            self.shared.fd, self.medium.fileno(), self.medium.map_flags, MAX_WRITE,
            number=number, points=self.points,
        )  # fmt: skip

    @property
    def block_bytes(self) -> int:
        """How large a block is."""
        return 1 << self.ground.block_shift

    @property
    def locks(self) -> CacheLocks:
        """The locks of its sets."""
        return CacheLocks(self.shared.cache_locks)

    @property
    def counters(self) -> CacheCounters:
        """What the workers have counted."""
        return read_cache_counters(self.shared)

    # Requests: None says that one was forwarded

    def read(self, offset: int, size: int, *, worker: int = 0) -> bytes | None:
        """READ."""
        verdict, error, data = self.workers[worker].answer(
            read_in(offset, size), opcode=READ, inode=INODE
        )
        if error:
            raise OSError(error, os.strerror(error))
        return data if verdict == "answer" else None

    def write(self, offset: int, data: bytes, *, worker: int = 0) -> int | None:
        """WRITE."""
        verdict, error, reply = self.workers[worker].answer(
            write_in(offset, len(data)), opcode=WRITE, inode=INODE, payload=data
        )
        if error:
            raise OSError(error, os.strerror(error))
        return int(struct.unpack_from("<I", reply)[0]) if verdict == "answer" else None

    def read_all(self, offsets: list[int], size: int, *, worker: int) -> list[bytes | None]:
        """READs one after another, without an interpreter in between; None for one that fails."""
        _, answers = self.workers[worker].answer_series(
            [read_in(offset, size) for offset in offsets], opcode=READ, inode=INODE, room=size
        )
        return [data if (verdict, error) == ("answer", 0) else None
                for verdict, error, data in answers]  # fmt: skip

    def write_all(
        self, writes: list[tuple[int, bytes]], *, worker: int, turns: int = 1
    ) -> list[bool]:
        """WRITEs in the same way, all of them some times; whether each was answered at last."""
        _, answers = self.workers[worker].answer_series(
            [write_in(offset, len(data)) for offset, data in writes],
            opcode=WRITE, inode=INODE, payloads=[data for _, data in writes], turns=turns,
        )  # fmt: skip
        return [(verdict, error) == ("answer", 0) for verdict, error, _ in answers]

    def seek(self, offset: int, whence: int) -> int | None:
        """LSEEK."""
        verdict, error, reply = self.workers[0].answer(
            lseek_in(offset, whence), opcode=LSEEK, inode=INODE
        )
        if error:
            raise OSError(error, os.strerror(error))
        return int(struct.unpack("<Q", reply)[0]) if verdict == "answer" else None

    def fsync(self) -> str:
        """FSYNC; the verdict."""
        return self.workers[0].answer(bytes(16), opcode=FSYNC, inode=INODE)[0]

    # The pool, as the control plane writes it

    def plant(
        self, block: int, data: bytes, *, way: int = 0, state: TagState = TagState.CLEAN,
        sequence: int = 0,
    ) -> int:  # fmt: skip
        """Put a block into a place; the number of its set."""
        number = self.ground.set_of(block)
        self.medium.store(self.ground.place_offset(number, way), data)
        self.set_word(number, way, self.ground.tag_word(Tag(state, sequence, block), number, way))
        return number

    def set_word(self, set_number: int, way: int, word: int) -> None:
        """Store a tag, right or wrong."""
        self.medium.store(self.ground.tag_offset(set_number, way), word.to_bytes(8, "little"))

    def words(self, set_number: int) -> list[int]:
        """The tags of a set."""
        raw = self.medium.read(self.ground.tag_offset(set_number, 0), 8 * WAYS)
        return list(struct.unpack(f"<{WAYS}Q", raw))

    def tags(self, set_number: int) -> dict[int, Tag]:
        """What the tags of a set say, by way."""
        words = enumerate(self.words(set_number))
        found = {way: self.ground.read_tag(word, set_number, way) for way, word in words}
        return {way: tag for way, tag in found.items() if tag}

    def all_tags(self) -> dict[int, list[Tag]]:
        """All tags of the cache, by block."""
        found: dict[int, list[Tag]] = {}
        for number in range(self.ground.set_count):
            for tag in self.tags(number).values():
                found.setdefault(tag.block, []).append(tag)
        return found

    def blocks_of_set(self, set_number: int, count: int) -> list[int]:
        """Blocks that lie in one set."""
        found = []
        block = 0
        while len(found) < count:
            if self.ground.set_of(block) == set_number:
                found.append(block)
            block += 1
        return found

    def hold(self, set_number: int, way: int) -> None:
        """Take references on a place, as a transfer or a fetch does."""
        self.memmap.get_pages(self.ground.place_pfn(set_number, way), self._frames, Access.PIN)

    def drop(self, set_number: int, way: int) -> None:
        """Drop them again."""
        self.memmap.put_pages(self.ground.place_pfn(set_number, way), self._frames)

    def is_held(self, set_number: int, way: int) -> bool:
        """Whether anybody holds a page of a place."""
        pfn = self.ground.place_pfn(set_number, way)
        return self.memmap.are_referenced(pfn, self._frames)

    @property
    def _frames(self) -> int:
        return self.block_bytes >> PAGE_SHIFT

    def assert_nothing_is_left(self) -> None:
        """No lock is taken and no page is held once all requests are answered."""
        for number in range(self.ground.set_count):
            assert self.locks.holder(number) == 0
            for way in range(WAYS):
                assert not self.is_held(number, way)


@contextmanager
def cached(
    directory: Path, *, scheme: Scheme = Scheme.PMEM, block_shift: int = 12,
    pool_bytes: int = 32 * MIB, set_count: int | None = None, size_bytes: int = 1 << 40,
    worker_count: int = 2, points: bool = False, is_reserved: bool = True,
) -> Iterator[Cached]:  # fmt: skip
    """An empty cache that no origin stands behind. With `set_count` it has so many sets, rather
    than all that the pool has room for."""
    with mapped_pool(directory, scheme, 4 * KIB, pool_bytes) as pool:
        medium = pool.medium
        assert isinstance(medium, MappedMedium)
        zone = pool.zones.data
        if is_reserved:
            medium.reserve(0, medium.size_bytes)
            medium.reserved = True
        count = set_count or set_count_of(zone.size_bytes, block_shift)
        ground = Ground(zone.offset_bytes, count, block_shift, SEED)
        shared = share_pool(pool, worker_count=worker_count, cache_set_count=count)
        shared.set_header_word("answered", ALL)
        memmap = share_memmap(pool, medium, shared)
        engine = SharedEngine(pool, medium, memmap, shared)
        published = PublishedCache(engine)
        yield Cached(pool, medium, shared, memmap, published, ground, size_bytes, points)
