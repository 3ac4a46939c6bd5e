"""Pulls the power of a cache, and judges what is left.

A `World` is the index of a small cache on a recording medium, and an origin, which is a dictionary
and durable at once. Each operation is looked at while it runs, at every fence and before every
write of the origin, and when it has returned. What may be left then is opened, and compared with
what is legal:
- each block reads as before the operation or as after it, never as a mixture, and as after it when
  it has returned; where no tag says anything, the origin is read;
- a clean block has the bytes of the origin, or its eviction would change them;
- no dirty tag is in a group whose word is 0, and no tag is damaged;
- a head that says how many blocks are dirty is right;
- the search finds all dirty blocks, leaves one tag for each block, and every block as it was.

The set is the group here (`GROUP_SHIFT` is 0), so that two sets are two groups. Workers of a data
plane are played by other `actors`, since a fence is about the flushes of its own processor only.
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

from kit.fs_crash import CrashMedium, Moment, lines_of
from pmemfs.errors import DamagedCache
from pmemfs.media import cache as media
from pmemfs.media.cache import WAYS, CacheHead, Ground, TagState
from pmemfs.media.label import Mode, Scheme
from pmemfs.medium.base import Medium
from pmemfs.medium.recording import RecordingMedium
from pmemfs.memmap.on_demand import OnDemandMemmap
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import KIB, MIB
from pmemfs.volume.cache import groups, index, tagcheck
from pmemfs.volume.cache.eviction import Eviction
from pmemfs.volume.cache.groups import Found, Groups
from pmemfs.volume.cache.heads import StoredHead
from pmemfs.volume.cache.index import Index, OwnLocks, Place, Publication
from pmemfs.volume.cache.search import DirtySearch
from pmemfs.volume.cache.steps import Steps

BLOCK_BYTES = 4096
SETS = 2
BLOCKS = range(48)
POOL_BYTES = 2 * MIB + (SETS * WAYS + 2) * BLOCK_BYTES
ORIGIN_BYTES = len(BLOCKS) * BLOCK_BYTES
STALE = b"STALE!!\xa5"
ZEROES = bytes(BLOCK_BYTES)
MOST_KEPT = 4000
"""Of what was left; it takes some 10 KiB each."""


def small_groups(patch: Callable[[object, str, object], object]) -> None:
    """Let a group be one set. `patch` is `MonkeyPatch.setattr`."""
    for module in (media, groups, index, tagcheck):
        patch(module, "GROUP_SHIFT", 0)


def text(block: int, version: int) -> bytes:
    """The bytes of a version of a block: each line of them says which one it is."""
    lines = (b"block %d version %d line %d" % (block, version, at) for at in range(64))
    return b"".join(line.ljust(63) + b"\n" for line in lines)


class Died(BaseException):
    """The process is dead."""


class CacheMedium(RecordingMedium):
    """Knows who flushed what, and which call came from where."""

    def __init__(self, image: bytes, *, ignored_calls: Collection[int] = ()) -> None:
        super().__init__(image, ignored_calls=ignored_calls)
        self.sites: list[str] = []
        self.dies_at = -1
        self._flushed_by: dict[int, dict[int, int]] = {0: self._flushed}

    def act(self, actor: int) -> None:
        """Let another processor make the next calls."""
        self._flushed = self._flushed_by.setdefault(actor, {})

    def kill(self) -> None:
        """All processes are gone, with what they have flushed and not fenced. Memory stays."""
        self._flushed_by = {0: {}}
        self.act(0)

    def fence(self) -> None:
        own, persisted = self._flushed, dict(self._flushed)
        is_done = self.call_count not in self._ignored_calls
        super().fence()
        for actor, flushed in self._flushed_by.items():
            if flushed is own:
                self._flushed_by[actor] = self._flushed
            elif is_done:
                for line, count in persisted.items():
                    if line in flushed:
                        flushed[line] -= count
                        if flushed[line] <= 0:
                            del flushed[line]

    def _counts(self) -> bool:
        if self.call_count == self.dies_at:
            raise Died
        self.sites.append(site_of(sys._getframe(1)))
        return super()._counts()


def site_of(frame: FrameType | None) -> str:
    """Where a flush or fence is asked for: functions of the cache, from the inner to the outer."""
    assert frame
    kind, names = frame.f_code.co_name, []
    while frame is not None:
        name = frame.f_code.co_name
        if name == "carry_out":
            names += where_steps_wait(frame.f_locals["steps"]) if kind == "fence" else []
        elif "/pmemfs/volume/" in frame.f_code.co_filename and name not in ("_store", "run"):
            names.append(name)
        frame = frame.f_back
    return " < ".join([kind, *names])


def where_steps_wait(steps: Steps[object] | None) -> list[str]:
    """The functions of a change that waits for a fence, and the line in the innermost one."""
    names: list[str] = []
    while steps is not None:
        names.insert(0, steps.gi_code.co_name)
        line = steps.gi_frame.f_lineno
        steps = steps.gi_yieldfrom  # type: ignore[assignment]
    return [f"{names[0]}:{line}", *names[1:]]


@dataclass
class Seen:
    """What may be left at one instant, and what the origin is then."""

    moment: Moment
    origin: dict[int, bytes]


class Judge:
    """Looks at what is left."""

    def __init__(self, pool: Pool) -> None:
        self.medium = CrashMedium(pool.medium.size_bytes)
        self.pool = on_medium(pool, self.medium)
        self.states = 0
        self._left: dict[tuple[bytes, bytes], Left] = {}
        """By image and by a digest of the lines that are not as there: many moments leave the
        same, and most of what is wrong with it depends on nothing else."""

    def why_not(self, seen: Seen, legal: dict[int, Collection[bytes]], limit: int) -> Iterator[str]:
        """What is wrong with each of the states in which something is."""
        moment = seen.moment
        everything = [len(contents) - 1 for contents in moment.contents.values()]
        known: set[bytes] = set()
        reads: set[tuple[int, int]] = set()
        # What nobody reads of these two can't make a difference, at least not if nothing else does.
        for choice in ([0] * len(everything), everything):
            left = self._look(moment.image, moment.survivors(choice), known)
            if left:
                reads |= left.reads
                yield from left.why_not(seen.origin, legal)
        matters = lines_of(reads) & moment.contents.keys()
        for choice in moment.choices(matters, limit, random.Random(0)):
            if left := self._look(moment.image, moment.survivors(choice), known):
                yield from left.why_not(seen.origin, legal)

    def _look(self, image: bytes, lines: dict[int, bytes], known: set[bytes]) -> Left | None:
        """What is left in an image with some other lines; None if it is known already."""
        words = (line.to_bytes(4, "little") + content for line, content in sorted(lines.items()))
        digest = hashlib.blake2b(b"".join(words)).digest()
        if digest in known:
            return None
        known.add(digest)
        self.states += 1
        left = self._left.get((image, digest))
        if left is None:
            self.medium.reads = set()
            self.medium.apply(image, lines)
            try:
                left = self._left[image, digest] = what_is_left(self.pool, self.medium)
            finally:
                self.medium.undo()
            if len(self._left) == MOST_KEPT:
                del self._left[next(iter(self._left))]
        return left


@dataclass(frozen=True)
class Left:
    """What is left of a cache that was not unmounted, whatever its origin is."""

    why_wrong: str
    reads: set[tuple[int, int]]
    blocks: dict[int, tuple[Found | None, bytes | None]] = field(default_factory=dict)
    """Of each block the tag, and what it reads as if not as the origin."""

    def why_not(
        self, origin: dict[int, bytes], legal: dict[int, Collection[bytes]]
    ) -> Iterator[str]:
        """What is wrong, if anything is."""
        if self.why_wrong:
            yield self.why_wrong
            return
        for block, (found, content) in self.blocks.items():
            content = origin[block] if content is None else content
            if why := why_not_legal(block, found, content, origin, legal[block]):
                yield why
                return


def what_is_left(pool: Pool, medium: CrashMedium) -> Left:
    """What is left on a medium. Its reads are counted from before."""
    blocks: dict[int, tuple[Found | None, bytes | None]] = {}
    why_wrong = look_through(pool, medium, blocks)
    return Left(why_wrong, medium.reads, blocks)


def look_through(
    pool: Pool, medium: CrashMedium, blocks: dict[int, tuple[Found | None, bytes | None]]
) -> str:
    """What is wrong with a cache by itself; "": nothing. Its blocks are noted."""
    try:
        stored = StoredHead.open(pool)
        ground = stored.ground
        tags = list(all_tags(pool.medium, ground))
    except DamagedCache as problem:
        return f"it can't be opened: {problem}"
    found_groups = Groups(pool.medium, ground, is_settled=False)
    memmap = OnDemandMemmap(pool.page_geometry, pool.label.generation)
    opened = Index(pool.medium, memmap, ground, OwnLocks(), found_groups)
    for found in tags:
        if found.tag.is_dirty and not found_groups.since_ns(found.set_number >> media.GROUP_SHIFT):
            return f"{found} is dirty in a group whose word is 0"
    dirty = sum(found.tag.is_dirty for found in tags)
    if stored.head.is_settled and stored.head.dirty_blocks != dirty:
        return f"the head says that {stored.head.dirty_blocks} blocks are dirty, and {dirty} are"
    before = {block: opened.find(block) for block in BLOCKS}
    for block, found in before.items():
        blocks[block] = found, found and content_of(opened, block, found, {})
    search, store_count = DirtySearch(found_groups), medium.store_count
    while opened.run(search.step()):
        pass
    dirty = sum(found is not None and found.tag.is_dirty for found in before.values())
    if found_groups.found_dirty != dirty:
        return f"the search finds {found_groups.found_dirty} dirty blocks, and there are {dirty}"
    if medium.store_count > store_count:
        if before != {block: opened.find(block) for block in BLOCKS}:
            return "the search has changed a block"
        tags = list(all_tags(pool.medium, ground))
    if len({found.tag.block for found in tags}) < len(tags):
        return "after the search, a block has two tags"
    return ""


def why_not_legal(
    block: int, found: Found | None, content: bytes, origin: dict[int, bytes],
    legal: Collection[bytes],
) -> str:  # fmt: skip
    """What is wrong with one block; "": nothing."""
    if content not in legal:
        lines = sorted({content[at : at + 64].decode(errors="replace") for at in (0, 64, 4032)})
        return f"block {block}, {found and found.tag}, is none of its versions: {lines}"
    if found and found.tag.state is TagState.CLEAN and content != origin[block]:
        return f"block {block} is clean, and the origin has other bytes"
    return ""


def content_of(opened: Index, block: int, found: Found | None, origin: dict[int, bytes]) -> bytes:
    """What a read answers."""
    if found is None:
        return origin[block]
    if found.tag.state is TagState.ZERO:
        return ZEROES
    return bytes(opened._medium.read(opened.place_of(found).pool_offset, BLOCK_BYTES))


def all_tags(medium: Medium, ground: Ground) -> Iterator[Found]:
    """Every tag there is. Raises DamagedCache."""
    for number in range(ground.set_count):
        raw = medium.read(ground.tag_offset(number, 0), media.SET_BYTES)
        for way in range(WAYS):
            word = int.from_bytes(raw[way * 8 : way * 8 + 8], "little")
            if tag := ground.read_tag(word, number, way):
                yield Found(number, way, word, tag)


def on_medium(pool: Pool, medium: Medium) -> Pool:
    """The same pool on another medium."""
    other = copy.copy(pool)
    other.medium = medium
    return other


@dataclass
class Op:
    """An operation."""

    name: str
    run: Callable[[World], object]
    changes: int | None = None
    """The block whose bytes change."""


@dataclass
class World:
    """A mounted cache. `content` is what each block must read as."""

    image: bytes
    origin: dict[int, bytes]
    content: dict[int, bytes]
    limit: int = 40
    ignored: Collection[int] = ()
    judge: Judge | None = None
    is_settled: bool = True
    begins: bool = True
    """Whether who mounts it after a kill writes the head at once, as volumes do."""
    violations: list[str] = field(default_factory=list)
    version: int = 1000
    now_ns: int = 10**18
    under_way: dict[int, bytes] = field(default_factory=dict)
    uncertain: dict[int, set[bytes]] = field(default_factory=dict)
    """Blocks that a killed process was changing."""

    def __post_init__(self) -> None:
        self.medium = CacheMedium(self.image, ignored_calls=self.ignored)
        self.pool = on_medium(template(), self.medium)
        self.seen: list[Seen] | None = None
        self.medium.at_each_fence = self.look
        self.origin, self.content = dict(self.origin), dict(self.content)
        self.held: list[Found | Place] = []
        self.mount(self.is_settled)

    def mount(self, is_settled: bool) -> None:
        """Open the cache, as a new process does."""
        self.stored = StoredHead.open(self.pool)
        ground = self.stored.ground
        self.memmap = OnDemandMemmap(self.pool.page_geometry, self.pool.label.generation)
        self.groups = Groups(self.medium, ground, is_settled=is_settled, now_ns=self.clock)
        self.index = Index(self.medium, self.memmap, ground, OwnLocks(), self.groups)
        self.choose = Eviction(self.memmap, ground).choose
        self.search = DirtySearch(self.groups)

    def clock(self) -> int:
        self.now_ns += 1
        return self.now_ns

    def look(self) -> None:
        """Note what may be left now."""
        if self.seen is not None:
            self.seen.append(Seen(Moment.of(self.medium), dict(self.origin)))

    def write_origin(self, block: int, data: bytes) -> None:
        """The origin gets bytes, and is flushed."""
        self.look()
        self.origin[block] = data

    def new_text(self, block: int) -> bytes:
        self.version += 1
        return self.changing(block, text(block, self.version))

    def changing(self, block: int, data: bytes) -> bytes:
        """What an operation under way makes of a block."""
        self.under_way[block] = data
        return data

    def run(self, op: Op, *, explore: bool = True) -> None:
        """One operation, looked at during and after."""
        before = dict(self.content)
        self.under_way = {}
        self.seen = [] if explore and self.judge else None
        op.run(self)
        during, self.seen = self.seen, None
        legal: dict[int, Collection[bytes]] = {
            block: {before[block], content, *self.uncertain.get(block, ())}
            for block, content in self.content.items()
        }
        for block in self.under_way:
            self.uncertain.pop(block, None)
        if during is None or self.judge is None:
            return
        for seen in during:
            for why in self.judge.why_not(seen, legal, self.limit):
                self.violations.append(f"during {op.name}: {why}")
        legal = {
            block: {content, *self.uncertain.get(block, ())}
            for block, content in self.content.items()
        }
        after = Seen(Moment.of(self.medium), dict(self.origin))
        for why in self.judge.why_not(after, legal, self.limit):
            self.violations.append(f"after {op.name}: {why}")
        for block, content in self.content.items():
            if self.read(block) != content:
                self.violations.append(f"after {op.name} block {block} reads as something else")

    def run_until_killed(self, op: Op, call: int) -> bool:
        """Let the processes die before a flush or fence of an operation, and others mount the
        cache; whether the operation made so many."""
        before = dict(self.content)
        self.under_way = {}
        self.medium.dies_at = self.medium.call_count + call
        try:
            op.run(self)
            return False
        except Died:
            pass
        finally:
            self.medium.dies_at = -1
        self.kill()
        for block, data in self.under_way.items():
            # It was not acknowledged: either is right, until somebody writes again.
            self.uncertain[block] = {before[block], data}
            self.content[block] = self.read(block)
            if self.content[block] not in self.uncertain[block]:
                self.violations.append(f"{op.name} was killed, and block {block} is neither")
        return True

    def read(self, block: int) -> bytes:
        """What a read answers."""
        found = self.index.hold(block)
        try:
            return content_of(self.index, block, found, self.origin)
        finally:
            if found:
                self.index.release(found)

    def free_ways(self, set_number: int) -> int:
        """How many ways of a set have no tag."""
        raw = self.medium.read(self.stored.ground.tag_offset(set_number, 0), media.SET_BYTES)
        return WAYS - sum(any(raw[at : at + 8]) for at in range(0, len(raw), 8))

    # What volumes do

    def put(self, block: int, data: bytes, state: TagState, expected: Found | None) -> Found | None:
        """Reserve, fill and publish; None if there is no place."""
        place = self.index.reserve(block, self.choose)
        if place is None:
            return None
        try:
            self.medium.put(place.pool_offset, data)
            return self.index.publish(place, block, state, expected=expected)
        finally:
            self.index.release(place)

    def write(self, block: int, actor: int = 0) -> None:
        """As write-back does it; one block is cleaned first where all are dirty."""
        data = self.new_text(block)
        found = self.index.find(block)
        self.medium.act(actor)
        put = self.put(block, data, TagState.DIRTY, found)
        self.medium.act(0)
        if put is None:
            number = self.index._ground.set_of(block)
            victim = next(f for f in self.index.dirty_in(number) if f.tag.block != block).tag.block
            self.clean(victim)
            put = self.put(block, data, TagState.DIRTY, found)
        assert put
        self.content[block] = data

    def fetch(self, block: int) -> None:
        if self.index.find(block) is None:
            self.put(block, self.origin[block], TagState.CLEAN, None)

    def clean(self, block: int) -> bool:
        self.index.see(self.index._ground.set_of(block))
        found = self.index.find(block)
        if not found or not found.tag.is_dirty:
            return False
        self.write_origin(block, content_of(self.index, block, found, self.origin))
        if found.tag.state is TagState.ZERO:
            return self.index.clear(found)
        return self.index.clean(found)

    def write_through(self, block: int) -> None:
        self.write(block)
        self.clean(block)

    def write_around(self, block: int) -> None:
        # Cleared while it is dirty, the block would read as what the origin has of old.
        self.clean(block)
        if found := self.index.find(block):
            self.index.clear(found)
        data = self.new_text(block)
        self.write_origin(block, data)
        self.content[block] = data

    def drop(self, block: int) -> None:
        found = self.index.find(block)
        if found and not found.tag.is_dirty:
            self.index.clear(found)

    def trim(self, block: int) -> None:
        found = self.index.find(block)
        self.changing(block, ZEROES)
        if found:
            assert self.index.zero(found)
        self.write_origin(block, ZEROES)
        self.content[block] = ZEROES
        if found and (zero := self.index.find(block)):
            self.index.clear(zero)

    def make_zero(self, block: int) -> None:
        """As `trim`, whose origin has not answered yet."""
        if found := self.index.find(block):
            self.changing(block, ZEROES)
            self.index.zero(found)
            self.content[block] = ZEROES

    def write_back(self) -> None:
        """All dirty blocks, then close what may be closed."""
        since_ns = self.clock()
        suspects = list(self.groups.suspects())
        for group in suspects:
            for found in list(self.index.dirty_in(group)):
                self.clean(found.tag.block)
        self.close(suspects, since_ns)

    def close(self, numbers: Sequence[int], since_ns: int = 0) -> list[int]:
        closing = self.groups.begin_closing(numbers, since_ns)
        assert self.groups.can_finish(closing)
        return self.index.run(self.groups.finish_closing(closing))

    def kill(self) -> None:
        """The processes are killed, and others mount the cache."""
        self.medium.kill()
        self.mount(bool(StoredHead.open(self.pool).head.is_settled))
        if self.begins:
            self.stored.rewrite(is_settled=0)

    def remount(self) -> None:
        """Unmount, and mount again."""
        dirty = sum(1 for group in self.groups.suspects() for _ in self.index.dirty_in(group))
        is_settled = self.search.is_done
        if is_settled:
            self.stored.rewrite(is_settled=1, dirty_blocks=dirty)
        self.mount(is_settled)
        self.stored.rewrite(is_settled=0)

    def find_dirty(self) -> None:
        """The search, to its end."""
        while self.index.run(self.search.step()):
            pass

    def batch(self, blocks: Sequence[int]) -> None:
        """Writes that share their fences, as on media whose fence is msync."""
        founds = {block: self.index.find(block) for block in blocks}
        places = self.index.run(self.index.reserving(list(blocks), self.choose))
        pairs = [(b, p) for b, p in zip(blocks, places, strict=True) if p]
        data = {block: self.new_text(block) for block, _ in pairs}
        for block, place in pairs:
            self.medium.put(place.pool_offset, data[block])
        items = [Publication(p, b, TagState.DIRTY, founds[b]) for b, p in pairs]
        results = self.index.run(self.index.publishing(items))
        for (block, place), result in zip(pairs, results, strict=True):
            self.index.release(place)
            assert result
            self.content[block] = data[block]


_templates: dict[int, Pool] = {}


def template() -> Pool:
    """A pool of such a size, open."""
    if 0 not in _templates:
        medium = RecordingMedium(STALE * (POOL_BYTES // 8))
        spec = PoolSpec("small", alignment_bytes=4 * KIB, scheme=Scheme.ON_DEMAND, mode=Mode.CACHE)
        _templates[0] = Pool.create(medium, spec)
    return _templates[0]


def head() -> CacheHead:
    """What a user says of a new cache."""
    return CacheHead(origin_bytes=ORIGIN_BYTES, origin="/dev/null", origin_identity="file:1")


@dataclass(frozen=True)
class Start:
    """Something to begin with."""

    image: bytes
    origin: dict[int, bytes]
    content: dict[int, bytes]

    def world(self, **options: object) -> World:
        return World(self.image, self.origin, self.content, **options)  # type: ignore[arg-type]


def started(build: Callable[[World], object]) -> Start:
    """The image of a cache after something was done in it, and all is durable."""
    blank = template().medium
    medium = CacheMedium(bytes(blank.read(0, blank.size_bytes)))
    pool = on_medium(template(), medium)
    StoredHead.create(pool, head())
    # The choice of sets is random; a test is the same each time.
    stored = StoredHead.open(pool)
    stored.rewrite(seed=12345)
    origin = {block: text(block, 0) for block in BLOCKS}
    world = World(bytes(medium.read(0, medium.size_bytes)), origin, origin)
    build(world)
    world.stored.rewrite(is_settled=0)
    world.medium.flush(0, world.medium.size_bytes)
    world.medium.fence()
    return Start(bytes(world.medium.read(0, world.medium.size_bytes)), world.origin, world.content)
