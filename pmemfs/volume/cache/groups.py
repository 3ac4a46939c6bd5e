"""Groups of sets: which may have dirty blocks, and since when.

A group is 512 sets, with 64 KiB of tags. What is stored of it is one word: the time since when it
may have dirty blocks, or 0. What is known of it during a mount is one byte:

    UNSEEN -> SEEING -> SEEN -> OPEN <-> CLOSING -> SEEN

Invariants:
- the word of a group is durable and not 0 before a tag in it becomes dirty. A search after a crash
  reads only such groups, and would forget the block otherwise;
- after a mount that did not end, no tag may be what is durable: the process died between a store
  and its fence, and a later power failure would bring the old tag back, over whatever its place
  holds by then. So the first that changes a tag of an `UNSEEN` group makes all its tags durable as
  they are now, and clears the older of two tags of one block (`seeing`);
- workers of a data plane make dirty tags in `OPEN` groups only, whose word is known to be durable;
- a word becomes 0 only if no worker can make a dirty tag in the group, since it was closed and a
  grace period is over, and if a look at all its tags has found no dirty one, and a fence after that
  look has made durable what it saw. A tag that was cleaned just now may be dirty again otherwise.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from pmemfs.errors import DamagedCache, SetBusy
from pmemfs.media.cache import (
    BLOCK,
    GROUP_SHIFT,
    GROUP_WORD_BYTES,
    SET_BYTES,
    TAG_BYTES,
    WAYS,
    Ground,
    Tag,
    is_newer,
)
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.cache.steps import Steps

UNSEEN, SEEING, SEEN, OPEN, CLOSING = range(5)

_WORD = struct.Struct("<Q")
_DIRTY_BIT = 2
"""Set in the words of dirty tags (`DIRTY` and `ZERO`), and in no others."""


class Found(NamedTuple):
    """A tag as it was read."""

    set_number: int
    way: int
    word: int
    tag: Tag


class Gate(Protocol):
    """Who makes blocks dirty beside this process: the workers of a data plane."""

    def allow_group(self, group: int, is_allowed: bool) -> None:
        """Let workers make blocks of a group dirty, or not any more."""

    def forbid_groups(self) -> None:
        """Let workers make no block dirty in any group."""

    def begin_grace(self) -> object:
        """A token for `is_over`."""

    def is_over(self, token: object) -> bool:
        """Whether every worker has ended what it was about to do when the token was given."""


class NoWorkers:
    """There are none: the python engine."""

    def allow_group(self, group: int, is_allowed: bool) -> None:
        """Nobody asks."""

    def forbid_groups(self) -> None:
        """Nobody asks."""

    def begin_grace(self) -> object:
        """Nobody has to end anything."""
        return None

    def is_over(self, token: object) -> bool:
        """Nobody is doing anything."""
        return True


class Closing(NamedTuple):
    """Groups that are about to be closed."""

    groups: tuple[int, ...]
    token: object
    since_ns: int


class Groups:
    """The words of all groups, and what is known of each during a mount."""

    def __init__(
        self, medium: Medium, ground: Ground, gate: Gate | None = None, *, is_settled: bool,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:  # fmt: skip
        """`is_settled`: the last mount has ended, so what is stored is durable and in order."""
        self._medium = medium
        self._ground = ground
        self._gate = gate or NoWorkers()
        self._now_ns = now_ns
        self.is_settled = is_settled
        self._states = bytearray([SEEN if is_settled else UNSEEN]) * ground.group_count
        self.found_dirty = 0
        """Dirty blocks that were met in `UNSEEN` groups: the last mount's."""

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self._states)

    @property
    def states(self) -> bytearray:
        """What is known of each group: those from `SEEN` on were seen."""
        return self._states

    def state(self, group: int) -> int:
        """What is known of a group."""
        return self._states[group]

    def since_ns(self, group: int) -> int:
        """Since when a group may have dirty blocks; 0: it has none."""
        (since_ns,) = _WORD.unpack(self._medium.read(self._ground.group_offset(group), 8))
        return int(since_ns)

    def sets(self, group: int) -> range:
        """The sets of a group."""
        first = group << GROUP_SHIFT
        return range(first, min(first + (1 << GROUP_SHIFT), self._ground.set_count))

    def oldest_ns(self) -> int:
        """Since when the oldest dirty block may be dirty; 0: there is none."""
        return min(map(self.since_ns, self.suspects()), default=0)

    def suspects(self, first: int = 0) -> Iterator[int]:
        """Groups from a number on whose word is not 0, in order. Reads as it goes."""
        step = FRAME_BYTES // GROUP_WORD_BYTES
        while first < self.count:
            offset, count = self._ground.group_offset(first), min(step, self.count - first)
            raw = bytes(self._medium.read(offset, count * GROUP_WORD_BYTES))
            if any(raw):
                words = struct.unpack(f"<{count}Q", raw)
                yield from (first + at for at, word in enumerate(words) if word)
            first += count

    def seeing(self, groups: Iterable[int]) -> Steps[None]:
        """Before tags of these groups are changed: let all that they hold be durable.

        Raises SetBusy if another task is doing this.
        """
        unseen = {group for group in groups if self._states[group] < SEEN}
        if not unseen:
            return
        for group in unseen:
            if self._states[group] == SEEING:
                raise SetBusy(number=self.sets(group).start)
        self._set_states(unseen, SEEING)
        try:
            for group in unseen:
                self._flush_all(group)
            yield
            older = [found for group in unseen for found in self._older(group)]
            for found in older:
                self._store(self._ground.tag_offset(found.set_number, found.way), 0)
            if older:
                yield
            found_dirty = sum(map(self._count_dirty, unseen))
        except BaseException:
            self._set_states(unseen, UNSEEN)
            raise
        self._set_states(unseen, SEEN)
        self.found_dirty += found_dirty

    def forget(self) -> None:
        """Know nothing any more, because workers have died, and what they stored last may not be
        durable, nor counted. No worker may be running. Only for media whose fence is not msync:
        there no change is under way while another task runs."""
        self._gate.forbid_groups()
        self._set_states(range(self.count), UNSEEN)
        self.found_dirty = 0

    def _count_dirty(self, group: int) -> int:
        """How many dirty blocks a group has that becomes `SEEN`."""
        if not self.since_ns(group):
            return 0
        count = sum(1 for _ in self.dirty_in(group))
        if not count:
            # Nobody has made a tag dirty since, for workers do so in `OPEN` groups only.
            self._store(self._ground.group_offset(group), 0)
        return count

    def opening(self, groups: Iterable[int]) -> Steps[None]:
        """Before tags of these groups become dirty: let their words be durable and not 0.

        They may be closed again as soon as another task runs.
        """
        wanted = set(groups)
        while closed := {group for group in wanted if self._states[group] != OPEN}:
            yield from self.seeing(closed)
            words = {}
            for group in closed:
                if self._states[group] == CLOSING:
                    self._open(group)
                else:
                    words[group] = self._word_of(group)
            if words:
                # What another task has stored may not be durable yet. This fence is for all.
                yield
            for group, word in words.items():
                # Meanwhile it may have been closed, and be about to get another word.
                if self._states[group] == SEEN and self.since_ns(group) == word:
                    self._open(group)

    def _word_of(self, group: int) -> int:
        """The word of a group, stored now if it was 0."""
        word = self.since_ns(group)
        if not word:
            word = self._now_ns()
            self._store(self._ground.group_offset(group), word)
        return word

    def _open(self, group: int) -> None:
        self._states[group] = OPEN
        self._gate.allow_group(group, True)

    def begin_closing(self, groups: Iterable[int], since_ns: int = 0) -> Closing:
        """Begin to close groups, which may have no dirty blocks any more.

        `since_ns` is a time, or 0: all that was dirty then has been cleaned. The word of a group
        that has dirty blocks nevertheless will say it.
        """
        chosen = tuple(
            group
            for group in groups
            if self._states[group] in (SEEN, OPEN) and self.since_ns(group)
        )
        for group in chosen:
            self._gate.allow_group(group, False)
        self._set_states(chosen, CLOSING)
        return Closing(chosen, self._gate.begin_grace(), since_ns)

    def can_finish(self, closing: Closing) -> bool:
        """Whether no worker is in one of the groups any more."""
        return self._gate.is_over(closing.token)

    def finish_closing(self, closing: Closing) -> Steps[list[int]]:
        """Close the groups that have no dirty blocks, once `can_finish` says so; which ones.

        That their words are 0 is durable some time later.
        """
        clean = []
        # A group that is open again had a block that this process has made dirty meanwhile.
        for group in (group for group in closing.groups if self._states[group] == CLOSING):
            if next(self.dirty_in(group), None) is None:
                clean.append(group)
                continue
            if closing.since_ns:
                self._store(self._ground.group_offset(group), closing.since_ns)
            self._open(group)
        if clean:
            yield
        closed = [group for group in clean if self._states[group] == CLOSING]
        for group in closed:
            self._store(self._ground.group_offset(group), 0)
        self._set_states(closed, SEEN)
        return closed

    def dirty_in(self, group: int) -> Iterator[Found]:
        """The dirty blocks of a group, by ascending set. Each set is read when it is reached.

        Damaged tags are left out. Of two tags of one block the newer counts.
        """
        sets = self.sets(group)
        for first in range(sets.start, sets.stop, _SETS_AT_ONCE):
            count = min(_SETS_AT_ONCE, sets.stop - first)
            words = self._words(first, count)
            at = [position for position, word in enumerate(words) if word & _DIRTY_BIT]
            for position in at:
                found = self._found(first, position, words[position])
                if found and not self._is_outdated(found, words, position):
                    yield found

    def _older(self, group: int) -> Iterator[Found]:
        """The older of two tags of one block, where a group has such."""
        if not self.since_ns(group):
            # Only a block that becomes dirty has two tags for a moment.
            return
        sets = self.sets(group)
        words = self._words(sets.start, len(sets))
        # The newer one is dirty: it can't be cleaned before the older one is cleared, durably.
        dirty = {position // WAYS for position, word in enumerate(words) if word & _DIRTY_BIT}
        for number in sorted(dirty):
            for position in range(number * WAYS, number * WAYS + WAYS):
                found = self._found(sets.start, position, words[position])
                if found and self._is_outdated(found, words, position):
                    yield found

    def _is_outdated(self, found: Found, words: tuple[int, ...], position: int) -> bool:
        """Whether the set has a newer tag of the same block."""
        start = position // WAYS * WAYS
        block = found.tag.block
        for other, word in enumerate(words[start : start + WAYS]):
            if other != found.way and BLOCK.of(word) == block:
                rival = self._found(found.set_number, other, word)
                if rival and is_newer(rival.tag.sequence, found.tag.sequence):
                    return True
        return False

    def _found(self, first_set: int, position: int, word: int) -> Found | None:
        """A tag among the words of some sets; None if it is free or damaged."""
        set_number, way = first_set + position // WAYS, position % WAYS
        try:
            tag = self._ground.read_tag(word, set_number, way)
        except DamagedCache:
            return None
        return Found(set_number, way, word, tag) if tag else None

    def _words(self, first_set: int, set_count: int) -> tuple[int, ...]:
        raw = self._medium.read(self._ground.tag_offset(first_set, 0), set_count * SET_BYTES)
        return struct.unpack(f"<{set_count * WAYS}Q", raw)

    def _set_states(self, groups: Iterable[int], state: int) -> None:
        for group in groups:
            self._states[group] = state

    def _flush_all(self, group: int) -> None:
        """Begin to make all tags and the word of a group durable, as they are."""
        medium, sets = self._medium, self.sets(group)
        medium.flush(self._ground.group_offset(group), GROUP_WORD_BYTES)
        start, end = self._ground.tag_offset(sets.start, 0), self._ground.tag_offset(sets.stop, 0)
        if medium.reserved:
            medium.flush(start, end - start)
            return
        # A hole of a sparse pool must not get memory by this.
        for offset_bytes, length_bytes in medium.with_memory(start, end - start):
            medium.flush(offset_bytes, length_bytes)

    def _store(self, offset_bytes: int, word: int) -> None:
        self._medium.put(offset_bytes, _WORD.pack(word))


_SETS_AT_ONCE = FRAME_BYTES // SET_BYTES
assert WAYS * TAG_BYTES == SET_BYTES
