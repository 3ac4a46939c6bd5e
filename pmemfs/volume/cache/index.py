"""The index of a cache: which block of the origin lies where, and how that changes.

Sets, ways, tags and words of groups are declared in `media/cache.py`. Two programs change them by
the protocol that follows: this module, and the workers of a data plane (`dataplane/cache.pxi`).
The quick way of misses does some steps natively in this process (`dataplane/filling.pxi`).

**States.** A place (one way of one set) has a tag, and a reference count: that of its page
structures, all of which are taken and dropped together.

    tag 0, no reference     free: whoever has the set may reserve it
    tag 0, referenced       reserved by who fills it; or a late reader still copies from it, and
                            then nobody takes it
    CLEAN                   the block's bytes are here and in the origin
    DIRTY                   the block's bytes are here only
    ZERO                    the block is zeroes, which the origin lacks; the place holds nothing
    any other word          damage: never changed, never believed

**Reading** takes no lock. Read the tags; of two of one block the newer counts (`is_newer`; if
neither is newer, the set is damaged). Take the references (an atomic add, which is a full barrier),
then read the tag again. If it is the same word, copy, and drop the references. If not, drop them
and begin again.

**Changing a tag** is for whoever has locked the set. No step in a lock waits for anything but
cache lines, and while a lock is free, all tags of its sets are durable, but that a CLEAN one may
still be DIRTY. With every change:

1. *A group is seen first* (`groups.py`): what a killed process has left is durable before anything
   relies on it, and of two tags of one block the older is cleared. A worker only writes where the
   group is open, which says as much.
2. *A block becomes dirty* only in an open group, whose word is durable and not 0.
3. *Reserve*: find a way with tag 0 whose pages have no references. Take the references, and look
   whether they are the only ones: if not, drop them and try another way. Let the counters of the
   pages (last access, reads, writes) begin at 0, or, if the block has a place, with the reads and
   writes of that place's first page, because eviction goes by them. `mapping` is `INODE`, and
   `index` the number of the page in the file.
4. *Evict* (if no way is free): store 0 to the tag of a CLEAN victim without references; flush,
   fence; then reserve as in 3. The order matters twice. The reader adds its reference and then
   reads the tag; the evictor clears the tag and then adds its own reference. So at least one of
   them sees the other, because an atomic add is a full barrier, which a store fence is not. And
   the cleared tag must be durable before the place gets other bytes, or a power failure would leave
   the old block's tag over the new block's bytes.
5. *Publish*: store the bytes of the whole block; flush, fence. Read the set's tags: the block's tag
   must be what it was when the old bytes were read (or there must still be none). Store the new
   tag, with the next sequence; flush, fence. Store 0 to the old tag, flush, fence. Each fence keeps
   one thing from being there without what it relies on: the tag without its bytes; the old tag gone
   without the new one; another block in the old place while the old tag comes back.
6. *Clean*: see the group, then read the tag. Write the bytes to the origin and flush it; if the
   tag is still the same word, store it with the state CLEAN; flush. Nobody relies on it before a
   fence: what is evicted has a fence of its own, and so has a group that is closed. An origin that
   got the bytes of a tag which isn't durable would differ from the old tag's clean bytes.
7. *Clear*: if the tag is still the same word, store 0; flush, fence. *Zero*: the same with ZERO, in
   an open group, and with the same sequence: the place stays, although it holds nothing.

A block that is inserted leaves a free way in its set if any CLEAN victim can go. A block can then
be overwritten without an eviction.

**A power failure or a killed process** leaves, for each set, the tags before or after the store
that was under way, and so: a block is old or new, since its bytes were durable before its tag and
were not touched after it; it may have two tags whose sequences differ by one, of which the newer is
the acknowledged one or the one under way; a place that was reserved is free. A clean block that was
being cleaned may be dirty, and is written back again. Nothing dirty is in a group whose word is 0.
References, locks and what is known of groups are gone, and made anew.

**On media whose fence is msync** a data plane changes no tags. Here many changes share their
fences: the generators yield where the caller has to fence, in whatever thread, and hold their sets
locked until then, because a change must not rely on a tag that is not durable yet. Such a caller
needs `OwnLocks`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

from pmemfs.errors import DamagedCache, DamagedSet, SetBusy
from pmemfs.media.cache import (
    BLOCK,
    GROUP_SHIFT,
    SEQUENCES,
    SET_BYTES,
    STATE,
    TAG_BYTES,
    WAYS,
    Ground,
    Tag,
    TagState,
    is_newer,
)
from pmemfs.medium.base import Medium
from pmemfs.memmap.base import Access, Memmap
from pmemfs.pfn import PAGE_SHIFT
from pmemfs.volume.cache.groups import Found, Groups
from pmemfs.volume.cache.steps import Steps, carry_out
from pmemfs.volume.onefile import INODE

T = TypeVar("T")
Victim = Callable[[int, list[int]], int | None]
"""Chooses which of some ways of a set, whose blocks are CLEAN, is evicted; None: none of them. If
it is held, it stays, and the others are shown again."""

_WHOLE_SETS = 1024
_TAGS = struct.Struct(f"<{WAYS}Q")
_WORD = struct.Struct("<Q")
_BLOCK_SHIFT, _BLOCK_MASK, _STATE_MASK = BLOCK.shift, BLOCK.mask, STATE.mask


class Place(NamedTuple):
    """A place that is reserved: its pages are referenced for who fills it."""

    set_number: int
    way: int
    pool_offset: int


class Publication(NamedTuple):
    """That a place shall be the block from now on, if the block's tag is still what is expected."""

    place: Place
    block: int
    state: TagState
    expected: Found | None


class SetLocks(Protocol):
    """Who may change the tags of a set."""

    def lock(self, set_number: int) -> bool:
        """Whether the lock was free, and is ours now."""

    def unlock(self, set_number: int) -> None:
        """Give it back."""


class OwnLocks:
    """Locks among the tasks of this process, one for each set."""

    def __init__(self) -> None:
        self._locked: set[int] = set()

    def lock(self, set_number: int) -> bool:
        """Whether no other task has it."""
        if set_number in self._locked:
            return False
        self._locked.add(set_number)
        return True

    def unlock(self, set_number: int) -> None:
        """Give it back."""
        self._locked.remove(set_number)


class Index:
    """Finds blocks, and changes where they are.

    All methods raise MemoryFault and OSError as the medium does. What changes tags raises SetBusy
    if somebody else has locked the set: try again a little later. What asks for a block raises
    DamagedSet if the block isn't found and a damaged tag of its set may have been its tag.
    """

    def __init__(
        self, medium: Medium, memmap: Memmap, ground: Ground, locks: SetLocks, groups: Groups
    ) -> None:
        self._medium = medium
        self._memmap = memmap
        self._ground = ground
        self._locks = locks
        self.groups = groups
        self._tags_offset = ground.tags_offset
        self._first_pfn = ground.place_pfn(0, 0)
        self._set_count = ground.set_count
        self._frames = 1 << ground.block_shift - PAGE_SHIFT
        self._held: dict[int, int] = {}
        """How many references this object has on the pages of a place, by its first pfn. After the
        data plane has died, they are taken anew."""
        self._whole: dict[int, tuple[int, ...]] = {}
        """Sets whose tags were all good, with these. A miss asks for its set three times, and this
        look is the longest part of each."""
        self.dirtied = 0
        """Blocks that became dirty by this process."""
        self.cleaned = 0
        """Dirty blocks that this process has cleaned, or whose tags it has cleared."""
        self.inserted = 0
        self.evicted = 0

    # Reading

    def find(self, block: int) -> Found | None:
        """The tag of a block."""
        set_number = self._ground.set_of(block)
        return self._find_in(self._words(set_number), set_number, block)

    def hold(self, block: int, access: Access = Access.READ) -> Found | None:
        """The tag of a block, with references on its pages; give them back by `release`."""
        while True:
            found = self.find(block)
            if found is None:
                return None
            self._get(found.set_number, found.way, block, access)
            if self.is_same(found):
                return found
            self.release(found)

    def release(self, held: Found | Place) -> None:
        """Drop the references that `hold` or `reserve` has taken. A place that was not published is
        free again."""
        self._put(self._pfn(held))

    def take_anew(self) -> None:
        """Take all references again, because the page structures are of a new generation. Raises
        OSError (ENOSPC)."""
        for pfn, count in self._held.items():
            for _ in range(count):
                self._memmap.get_pages(pfn, self._frames)

    def is_same(self, found: Found) -> bool:
        """Whether a tag is still what it was."""
        at = self._tag_at(found.set_number, found.way)
        return bool(_WORD.unpack(self._medium.read(at, TAG_BYTES))[0] == found.word)

    def place_of(self, found: Found) -> Place:
        """Where the bytes of a block lie."""
        number, way = found.set_number, found.way
        return Place(number, way, self._pfn_at(number, way) << PAGE_SHIFT)

    def dirty_in(self, group: int) -> Iterator[Found]:
        """As `Groups.dirty_in`, of a group that is seen now if it was not: that may fence."""
        self.run(self.groups.seeing([group]))
        return self.groups.dirty_in(group)

    # One change, durable when it returns (but for `clean`)

    def reserve(self, block: int, victim: Victim, access: Access = Access.PIN) -> Place | None:
        """A place for new bytes of a block, with references on its pages; None if all places of the
        set are dirty or held. `access` is accounted to the pages."""
        return self.run(self.reserving([block], victim, access))[0]

    def publish(
        self, place: Place, block: int, state: TagState, *, expected: Found | None
    ) -> Found | None:
        """Let a reserved place be the block, whose bytes were stored there and flushed.

        Nothing happens, and the answer is None, if the block's tag is not `expected` any more. The
        references on the place stay the caller's in any case.
        """
        return self.run(self.publishing([Publication(place, block, state, expected)]))[0]

    def clean(self, found: Found) -> bool:
        """The origin has the bytes of a dirty block; False if its tag has changed."""
        return self.run(self.cleaning([found]))[0]

    def clear(self, found: Found) -> bool:
        """Forget a block; False if its tag has changed."""
        return self.run(self.clearing([found]))[0]

    def zero(self, found: Found) -> bool:
        """Let a block that is there read as zeroes; False if its tag has changed."""
        return self.run(self.zeroing([found]))[0]

    def see(self, set_number: int) -> None:
        """Before a dirty block is found whose bytes are for the origin: see `Groups.seeing`."""
        self.run(self.groups.seeing([set_number >> GROUP_SHIFT]))

    def may_become_dirty(self, set_number: int) -> None:
        """Let the word of a set's group be durable and not 0, and workers make dirty tags in it."""
        self.run(self.groups.opening([set_number >> GROUP_SHIFT]))

    def run(self, steps: Steps[T]) -> T:
        """Carry out the steps of a change, with a fence after each one, in this thread."""
        return carry_out(steps, self._medium)

    # Many changes that share their fences

    def reserving(
        self, blocks: Sequence[int], victim: Victim, access: Access = Access.PIN
    ) -> Steps[list[Place | None]]:
        """As `reserve`, for blocks of different sets: of two in one set, one gets None."""
        sets = [self._ground.set_of(block) for block in blocks]
        yield from self.groups.seeing(number >> GROUP_SHIFT for number in sets)
        places: list[Place | None] = [None] * len(blocks)
        with self._locked(sets):
            try:
                evicted: dict[int, list[int]] = {}
                for number, at in {number: at for at, number in enumerate(sets)}.items():
                    places[at], ways = self._reserve_in(number, blocks[at], victim, access)
                    if ways:
                        evicted[at] = ways
                if evicted:
                    yield
                for at, ways in evicted.items():
                    own = self.find(blocks[at])
                    places[at] = places[at] or self._take(sets[at], ways, blocks[at], access, own)
            except BaseException:
                for place in filter(None, places):
                    self.release(place)
                raise
        return places

    def publishing(self, items: Sequence[Publication]) -> Steps[list[Found | None]]:
        """As `publish`, for many."""
        for item in items:
            # No store of a tag may fail for want of memory when others were stored already.
            self.prepare(item.place)
        yield from self.groups.seeing(i.place.set_number >> GROUP_SHIFT for i in items)
        with self._locked(i.place.set_number for i in items):
            # The bytes first: a tag that is durable without them would be another block's bytes.
            yield
            dirty = (i for i in items if i.state is not TagState.CLEAN)
            # With nothing that yields behind it, since groups may be closed again then.
            yield from self.groups.opening(i.place.set_number >> GROUP_SHIFT for i in dirty)
            results = [self._store_new(item) for item in items]
            if any(results):
                yield
            has_old = False
            for item, result in zip(items, results, strict=True):
                if result and item.expected:
                    self._store(item.expected, 0)
                    has_old = True
            if has_old:
                yield
        return results

    def cleaning(self, founds: Sequence[Found]) -> Steps[list[bool]]:
        """As `clean`, for many. Durable with the next fence, and nothing needs that."""
        return (yield from self._changing(founds, TagState.CLEAN))

    def clearing(self, founds: Sequence[Found]) -> Steps[list[bool]]:
        """As `clear`, for many."""
        return (yield from self._changing(founds, None))

    def zeroing(self, founds: Sequence[Found]) -> Steps[list[bool]]:
        """As `zero`, for many."""
        yield from self.groups.opening(f.set_number >> GROUP_SHIFT for f in founds)
        return (yield from self._changing(founds, TagState.ZERO))

    def _changing(self, founds: Sequence[Found], state: TagState | None) -> Steps[list[bool]]:
        """Store the tags anew with a state, or store 0, where they have not changed."""
        yield from self.groups.seeing(f.set_number >> GROUP_SHIFT for f in founds)
        with self._locked(f.set_number for f in founds):
            results = [self.is_same(found) for found in founds]
            for found in (f for f, is_same in zip(founds, results, strict=True) if is_same):
                tag = found.tag._replace(state=state) if state else None
                word = self._ground.tag_word(tag, found.set_number, found.way) if tag else 0
                self._store(found, word)
                self._count(found.tag, tag)
            if any(results) and state is not TagState.CLEAN:
                yield
        return results

    # Inside a lock

    def _reserve_in(
        self, set_number: int, block: int, victim: Victim, access: Access
    ) -> tuple[Place | None, list[int]]:
        """A place if one is free; and ways that were evicted, and are free after a fence."""
        words = self._words(set_number)
        own = self._find_in(words, set_number, block)
        free = [way for way, word in enumerate(words) if not word]
        place = self._take(set_number, free, block, access, own)
        # One for the block; and if it is new in the set, one more for the next change.
        wanted = (place is None) + (own is None and len(free) <= (place is not None))
        candidates = self._candidates(words, own) if wanted else []
        evicted: list[int] = []
        while candidates and len(evicted) < wanted:
            way = victim(set_number, candidates)
            if way is None:
                break
            candidates.remove(way)
            found = self._read(set_number, way, words[way])
            if found and not self._memmap.are_referenced(self._pfn(found), self._frames):
                self._store(found, 0)
                evicted.append(way)
        self.evicted += len(evicted)
        return place, evicted

    def _candidates(self, words: tuple[int, ...], own: Found | None) -> list[int]:
        """Ways whose blocks are clean, if their tags are not damaged; without that of `own`."""
        clean = [way for way, word in enumerate(words) if word & _STATE_MASK == TagState.CLEAN]
        if own and own.way in clean:
            clean.remove(own.way)
        return clean

    def _take(
        self, set_number: int, ways: Iterable[int], block: int, access: Access, own: Found | None
    ) -> Place | None:
        """The first of some ways with tag 0 that nobody holds, referenced by us."""
        memmap, frames = self._memmap, self._frames
        for way in ways:
            pfn = self._pfn_at(set_number, way)
            if memmap.are_referenced(pfn, frames):
                continue
            # As a pin, so that no access is accounted before the counts begin anew.
            self._get(set_number, way, block, Access.PIN)
            # Only now it is certain: a reader that came before has seen the old tag, and any other
            # one sees 0.
            pages = (memmap.usage(pfn + at) for at in range(frames))
            if all(page and page.refcount == 1 for page in pages):
                self._count_anew(pfn, own)
                if access is not Access.PIN:
                    self._get(set_number, way, block, access)
                    self._put(pfn)
                return Place(set_number, way, pfn << PAGE_SHIFT)
            self._put(pfn)
        return None

    def prepare(self, place: Place) -> None:
        """Let the tag of a place have memory. Raises OSError (ENOSPC)."""
        if not self._medium.reserved:
            self._medium.reserve(self._tag_at(place.set_number, place.way), TAG_BYTES)

    def _count_anew(self, pfn: int, own: Found | None) -> None:
        """Let the pages of a place count as those of the block did, if the block has a place."""
        reads = writes = 0
        if own:
            page = self._memmap.usage(self._pfn(own))
            reads, writes = (page.reads, page.writes) if page else (0, 0)
        self._memmap.count_anew(pfn, self._frames, reads, writes)

    def _store_new(self, item: Publication) -> Found | None:
        """Store the tag of a place, if the block's tag is as expected."""
        place, expected = item.place, item.expected
        current = self._find_in(self._words(place.set_number), place.set_number, item.block)
        if current != expected:
            return None
        sequence = (expected.tag.sequence + 1) % SEQUENCES if expected else 0
        tag = Tag(item.state, sequence, item.block)
        word = self._ground.tag_word(tag, place.set_number, place.way)
        found = Found(place.set_number, place.way, word, tag)
        self._store(found, word)
        self._count(expected.tag if expected else None, tag)
        self.inserted += expected is None
        return found

    def _count(self, before: Tag | None, after: Tag | None) -> None:
        was_dirty = before is not None and before.is_dirty
        is_dirty = after is not None and after.is_dirty
        self.dirtied += is_dirty and not was_dirty
        self.cleaned += was_dirty and not is_dirty

    def _store(self, found: Found, word: int) -> None:
        at = self._tag_at(found.set_number, found.way)
        self._medium.put(at, _WORD.pack(word))

    def _tag_at(self, set_number: int, way: int) -> int:
        """As `Ground.tag_offset`, which would compute all offsets anew."""
        return self._tags_offset + set_number * SET_BYTES + way * TAG_BYTES

    def _pfn_at(self, set_number: int, way: int) -> int:
        """As `Ground.place_pfn`."""
        return self._first_pfn + (way * self._set_count + set_number) * self._frames

    def _pfn(self, of: Found | Place) -> int:
        return self._pfn_at(of.set_number, of.way)

    def _get(self, set_number: int, way: int, block: int, access: Access) -> None:
        pfn = self._pfn_at(set_number, way)
        index = block << self._ground.block_shift - PAGE_SHIFT
        self._memmap.get_pages(pfn, self._frames, access, INODE, index)
        self._held[pfn] = self._held.get(pfn, 0) + 1

    def _put(self, pfn: int) -> None:
        # First, because bad memory keeps no reference either.
        left = self._held.pop(pfn) - 1
        if left:
            self._held[pfn] = left
        self._memmap.put_pages(pfn, self._frames)

    @contextmanager
    def _locked(self, sets: Iterable[int]) -> Iterator[None]:
        """Lock some sets. Raises SetBusy, and then none is locked."""
        taken: list[int] = []
        try:
            for number in sorted(set(sets)):
                if not self._locks.lock(number):
                    raise SetBusy(number=number)
                taken.append(number)
            yield
        finally:
            for number in taken:
                self._locks.unlock(number)

    # Tags

    def _words(self, set_number: int) -> tuple[int, ...]:
        return _TAGS.unpack(self._medium.read(self._tag_at(set_number, 0), SET_BYTES))

    def _find_in(self, words: tuple[int, ...], set_number: int, block: int) -> Found | None:
        best: Found | None = None
        for way, word in enumerate(words):
            if word >> _BLOCK_SHIFT & _BLOCK_MASK == block and word:
                found = self._read(set_number, way, word)
                if found is None or best is None:
                    best = found or best
                elif is_newer(found.tag.sequence, best.tag.sequence):
                    best = found
                elif not is_newer(best.tag.sequence, found.tag.sequence):
                    raise DamagedSet(number=set_number, way=way)
        if best is None and self._whole.get(set_number) != words:
            damaged = self._ground.first_damaged(words, set_number)
            if damaged is not None:
                raise DamagedSet(number=set_number, way=damaged)
            if len(self._whole) >= _WHOLE_SETS:
                self._whole.clear()
            self._whole[set_number] = words
        return best

    def _read(self, set_number: int, way: int, word: int) -> Found | None:
        """A tag; None if it is damaged."""
        try:
            tag = self._ground.read_tag(word, set_number, way)
        except DamagedCache:
            return None
        return Found(set_number, way, word, tag) if tag else None
