"""Knows which frames are free, from the persistent bitmap, and chooses which of them to give out.

There are two kinds of demand, as in WineFS (SOSP '21). A large demand gets whole chunks of 2 MiB,
so that its data is aligned however old the pool is. A small demand gets pieces of chunks that are
broken already. A third kind comes in pieces and in any order, as downloads and images of disks do:
for it a chunk is *held* for the file. The unused part of a held chunk counts as free, but small
demands of others look elsewhere as long as they find anything, so the pieces of the file fall into
place. Invariants:
- a bit is set and flushed before its run is given out, and the caller who maps the run fences
  before it commits. A bit is cleared only after the commit of what freed it. So a crash can leave a
  bit set whose frame has no owner, but never a clear bit whose frame has one: that frame would be
  given to a second file;
- the last frames are for urgent demands, whose operations take no more room in the end:
  `RESERVE_FRAMES` (fewer in a small pool) for the records that they need meanwhile, and
  `log_frames` so that the longest log can be written anew. Without them a full pool could not be
  emptied.

A group is read when it is first needed, so a mount costs the same for any size of pool.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from pmemfs.errors import system_error
from pmemfs.media.filesystem import (
    CHUNK_FRAMES,
    CHUNK_LINE_BYTES,
    GROUP_CHUNKS,
    GROUP_FRAMES,
    Geometry,
)
from pmemfs.medium.base import Medium
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.volume.fs.extents import Run
from pmemfs.volume.fs.masks import (
    ALL,
    bits,
    chunk_parts,
    first_bit,
    leading_bits,
    run_starts,
)

RESERVE_FRAMES = 1024
_LEAST_RESERVE_FRAMES = 8
LARGE_FRAMES = 64
"""A demand of at least this size gets chunks of its own, even if it comes in pieces."""
_TRIES = 16
_GROUPS_AT_ONCE = 32
"""To read the bitmaps of so many takes some ms."""


class Group:
    """The free frames of one group: a mask for each chunk, in which a set bit is a free frame."""

    __slots__ = ("free_count", "held", "masks", "partial", "whole")

    def __init__(self, bitmap: bytes, managed: list[int]) -> None:
        self.masks: list[int] = []
        for chunk, may_be_free in enumerate(managed):
            line = bitmap[chunk * CHUNK_LINE_BYTES : (chunk + 1) * CHUNK_LINE_BYTES]
            free = ~int.from_bytes(line, "little") & may_be_free
            # One object for all whole chunks: a free terabyte has half a million of them.
            self.masks.append(ALL if free == ALL else free)
        self.free_count = sum(mask.bit_count() for mask in self.masks)
        self.whole = {chunk for chunk, mask in enumerate(self.masks) if mask == ALL}
        self.partial = {chunk for chunk, mask in enumerate(self.masks) if mask and mask != ALL}
        self.held: set[int] = set()
        """Chunks that are held for a file. They are not in `partial` once they are broken, so that
        small demands do not find them."""

    def set_mask(self, chunk: int, mask: int) -> None:
        """Replace the mask of a chunk, and bring all that follows from it up to date."""
        self.free_count += mask.bit_count() - self.masks[chunk].bit_count()
        self.masks[chunk] = mask
        if mask == ALL:
            self.masks[chunk] = ALL
            self.whole.add(chunk)
            self.partial.discard(chunk)
        else:
            self.whole.discard(chunk)
            is_small = mask and chunk not in self.held
            (self.partial.add if is_small else self.partial.discard)(chunk)
        if mask in (0, ALL):
            # Nothing is left of it to hold, or it is whole again and anybody may have it.
            self.held.discard(chunk)

    def unhold(self, chunk: int) -> None:
        """Let small demands have a chunk again."""
        if chunk in self.held:
            self.held.discard(chunk)
            self.set_mask(chunk, self.masks[chunk])


class Allocator:
    """The free frames of a data zone."""

    def __init__(self, medium: Medium, geometry: Geometry) -> None:
        self._medium = medium
        self._groups: dict[int, Group] = {}
        self._small_group = self._large_group = 0
        self.known_free = self.log_frames = self._next_unread = 0
        self._holds: dict[int, list[tuple[int, int]]] = {}
        """The chunks that each inode holds, as the group and the chunk in it."""
        self.given_out: list[Run] | None = None
        """All that was given out since a caller began to collect it here."""
        self.set_geometry(geometry)

    def set_geometry(self, geometry: Geometry) -> None:
        """Take the zone as it is now: groups may have become longer, and there may be more."""
        self.geometry = geometry
        least = min(_LEAST_RESERVE_FRAMES, geometry.frame_count // 8)
        self._for_records = min(RESERVE_FRAMES, max(geometry.frame_count // 64, least))
        self.set_log_frames(self.log_frames)
        # All groups are read anew when needed, because the last one may have got more frames.
        self._groups.clear()
        self.known_free = 0

    def set_log_frames(self, frame_count: int) -> None:
        """Say how many frames the longest log takes when it is written anew."""
        self.log_frames = frame_count
        self.reserve = self._for_records + min(frame_count, self.geometry.frame_count // 2)
        """How many frames are left to urgent demands alone."""
        self._least_frames = self.reserve - self._for_records // 2

    def is_tight(self, wanted: int) -> bool:
        """Whether urgent demands have used half of their frames for records, but still leave enough
        that `wanted` frames can be had."""
        least = self._least_frames
        return self.known_free < least and wanted <= self.free_up_to(least) < least

    def allocate(
        self, frame_count: int, *, goal: int = 0, whole: bool = False, urgent: bool = False
    ) -> list[Run]:
        """Runs of free frames, marked as used. Raises OSError (ENOSPC), and then takes nothing.

        `goal` is the pfn where the runs would best begin. `whole` asks for the start of a whole
        chunk although the caller wants less, because more will follow.
        """
        self._make_sure(frame_count, urgent=urgent)
        runs: list[Run] = []
        try:
            if goal and (not whole or self._chunk_at(goal)):
                runs += self._take_at(goal, frame_count)
            rest = frame_count - sum(run.frame_count for run in runs)
            while rest:
                runs.append(self._take(rest, whole=whole))
                rest -= runs[-1].frame_count
        except OSError:
            self.free(runs)
            raise
        return runs

    def allocate_run(self, frame_count: int, *, urgent: bool = False) -> Run:
        """One run of free frames, marked as used, of less than a group. Raises OSError (ENOSPC).

        A run of at least a chunk begins with a chunk.
        """
        self._make_sure(frame_count, urgent=urgent)
        if frame_count < CHUNK_FRAMES and (small := self._take_small(frame_count)):
            return small
        wanted = -(-frame_count // CHUNK_FRAMES)
        for number in range(self.geometry.group_count):
            group = self.group(number)
            starts = run_starts(sum(1 << chunk for chunk in group.whole - group.held), wanted)
            if starts:
                pfn = self.geometry.group_pfn(number) + first_bit(starts) * CHUNK_FRAMES
                return self._mark(Run(pfn, frame_count))
        raise system_error(errno.ENOSPC)

    def hold(self, owner: int, wish: int, *, frame_count: int) -> int | None:
        """Hold a whole chunk for an inode that needs a part of it; its first pfn, or None.

        It is the chunk at the pfn `wish`, if that chunk is whole. For a small part there is a chunk
        only while half of its group is whole, so that demands for whole chunks find some, too.
        """
        least = 0 if frame_count >= LARGE_FRAMES else GROUP_CHUNKS // 2
        place = self._chunk_at(wish)
        if place is None or len(self.group(place[0]).whole) <= self._share(place[0], least):
            place = self._find_whole(least)
        if place is None:
            return None
        number, chunk = place
        self.group(number).held.add(chunk)
        self._holds.setdefault(owner, []).append(place)
        return self.geometry.group_pfn(number) + chunk * CHUNK_FRAMES

    def unhold(self, owner: int) -> None:
        """Let other inodes have the chunks that this inode holds."""
        for number, chunk in self._holds.pop(owner, ()):
            if number in self._groups:
                self._groups[number].unhold(chunk)

    def free(self, runs: Iterable[Run]) -> None:
        """Give runs back. Their bits are clear now, and durably so after a later fence."""
        for run in runs:
            for group, chunk, bit, count in self._parts(run):
                mask = self.group(group).masks[chunk] | bits(bit, count)
                self._store(group, chunk, bit, count, mask)

    def is_free(self, pfn: int) -> bool:
        """Whether a frame is free."""
        group, position = divmod(pfn - self.geometry.first_pfn, GROUP_FRAMES)
        chunk, bit = divmod(position, CHUNK_FRAMES)
        return bool(self.group(group).masks[chunk] >> bit & 1)

    def free_count(self) -> int:
        """All free frames. Reads every bitmap that was not read before."""
        self._learn_all()
        return self.known_free

    def look_on(self) -> bool:
        """Read some bitmaps that were not read before; whether there are more."""
        count = self.geometry.group_count
        if len(self._groups) == count:
            return False
        end = min(self._next_unread + _GROUPS_AT_ONCE, count)
        for number in range(self._next_unread, end):
            self.group(number)
        self._next_unread = end % count
        return True

    def free_up_to(self, enough: int) -> int:
        """How many frames are free, or at least `enough`. Reads no more bitmaps than it needs."""
        if self.known_free < enough:
            self._learn_all(enough)
        return self.known_free

    def largest_run(self) -> int:
        """The longest run of free frames, in frames. Runs over all chunks."""
        longest = 0
        for number in range(self.geometry.group_count):
            current = 0
            for mask in self.group(number).masks:
                if mask == ALL:
                    current += CHUNK_FRAMES
                else:
                    parts = f"{mask:0{CHUNK_FRAMES}b}"[::-1].split("0")
                    longest = max(longest, current + len(parts[0]), *map(len, parts))
                    current = len(parts[-1])
                longest = max(longest, current)
        return longest

    def group(self, number: int) -> Group:
        """A group, which is read when it is first needed."""
        group = self._groups.get(number)
        if group is None:
            offset = self.geometry.group_pfn(number) << PAGE_SHIFT
            group = Group(bytes(self._medium.read(offset, FRAME_BYTES)), self.managed(number))
            self._groups[number] = group
            self.known_free += group.free_count
        return group

    def forget(self, number: int) -> None:
        """Let go of a group, which is read anew when it is next needed."""
        group = self._groups.pop(number, None)
        if group is not None:
            self.known_free -= group.free_count

    def managed(self, number: int) -> list[int]:
        """For each chunk of a group, a mask of the frames that can be given out."""
        # The first frames of a group hold its bitmap and the like; behind the last frame of a
        # short group there is no pool.
        frames, kept = self.geometry.frames_of(number), self.geometry.kept_of(number)
        if frames == GROUP_FRAMES:
            return [ALL & -(1 << kept), *[ALL] * (GROUP_CHUNKS - 1)]
        everything = ((1 << frames) - 1) & -(1 << kept)
        return [everything >> chunk * CHUNK_FRAMES & ALL for chunk in range(GROUP_CHUNKS)]

    def _make_sure(self, frame_count: int, *, urgent: bool) -> None:
        wanted = frame_count + (0 if urgent else self.reserve)
        if self.free_up_to(wanted) < wanted:
            raise system_error(errno.ENOSPC)

    def _learn_all(self, enough: int | None = None) -> None:
        if len(self._groups) == self.geometry.group_count:
            return
        for number in range(self.geometry.group_count):
            if number not in self._groups:
                self.group(number)
                if enough is not None and self.known_free >= enough:
                    return

    def _take(self, wanted: int, *, whole: bool) -> Run:
        """A run of at most `wanted` frames. The caller has made sure that there are free frames."""
        if wanted >= CHUNK_FRAMES or whole:
            run = self._take_chunks(wanted)
            if run:
                return run
        small = min(wanted, CHUNK_FRAMES - 1)
        run = self._take_small(small) or self._take_chunks(wanted)
        if run is None and self._holds:
            # Rather break a promise of a good place than fail: what is held is free.
            for owner in list(self._holds):
                self.unhold(owner)
            run = self._take_small(small)
        return run or self._take_longest(wanted)

    def _take_chunks(self, wanted: int) -> Run | None:
        """A run that begins with a whole chunk, or None if there is no whole chunk."""
        count = self.geometry.group_count
        for step in range(count):
            number = (self._large_group + step) % count
            group = self.group(number)
            if group.whole:
                self._large_group = number
                first = min(group.whole)
                wanted_chunks = -(-wanted // CHUNK_FRAMES)
                if wanted_chunks > 1:
                    first = _first_of_run(group.whole, wanted_chunks)
                last = first
                while last - first < wanted_chunks and last in group.whole:
                    last += 1
                pfn = self.geometry.group_pfn(number) + first * CHUNK_FRAMES
                length = min(wanted, (last - first) * CHUNK_FRAMES)
                if length > CHUNK_FRAMES:
                    # The rest, less than a chunk, goes where chunks are broken already.
                    length &= -CHUNK_FRAMES
                return self._mark(Run(pfn, length))
        return None

    def _take_small(self, wanted: int) -> Run | None:
        """One run of all `wanted` frames, in a chunk that is broken already, or None."""
        count = self.geometry.group_count
        for step in range(count):
            number = (self._small_group + step) % count
            group = self.group(number)
            # The tries are bounded because a fragmented group can have 64 chunks without room, and
            # a large pool thousands of such groups: then breaking a whole chunk is cheaper.
            for tries, chunk in enumerate(group.partial):
                if tries == _TRIES:
                    break
                starts = run_starts(group.masks[chunk], wanted)
                if starts:
                    self._small_group = number
                    bit = first_bit(starts)
                    pfn = self.geometry.group_pfn(number) + chunk * CHUNK_FRAMES + bit
                    return self._mark(Run(pfn, wanted))
            if group.partial and step >= _TRIES:
                break
        return None

    def _take_longest(self, wanted: int) -> Run:
        """The longest run in the first chunk that has any free frame, for a pool that is nearly
        full."""
        for number in range(self.geometry.group_count):
            group = self.group(number)
            for chunk in sorted(group.whole | group.partial | group.held):
                length = 1
                starts = group.masks[chunk]
                # A set bit in `starts`: a run of at least `length` free frames begins there.
                while length < wanted and (more := starts & group.masks[chunk] >> length):
                    starts, length = more, length + 1
                bit = first_bit(starts)
                pfn = self.geometry.group_pfn(number) + chunk * CHUNK_FRAMES + bit
                return self._mark(Run(pfn, length))
        raise system_error(errno.ENOSPC)

    def _chunk_at(self, pfn: int) -> tuple[int, int] | None:
        """The group and the chunk that begins at this pfn, if the chunk is whole and not held."""
        start = pfn - self.geometry.first_pfn
        if start % CHUNK_FRAMES or not 0 <= start < self.geometry.frame_count:
            return None
        number, position = divmod(start, GROUP_FRAMES)
        chunk = position // CHUNK_FRAMES
        group = self.group(number)
        return (number, chunk) if chunk in group.whole and chunk not in group.held else None

    def _find_whole(self, least: int) -> tuple[int, int] | None:
        """A whole chunk that no file holds, in a group with more than `least` of 64 whole ones."""
        count = self.geometry.group_count
        for step in range(min(count, _TRIES)):
            number = (self._large_group + step) % count
            group = self.group(number)
            if len(group.whole) > self._share(number, least) and group.whole - group.held:
                return number, min(group.whole - group.held)
        return None

    def _share(self, number: int, chunks: int) -> int:
        """A number of chunks out of 64, for a group that may be shorter than that."""
        return chunks * self.geometry.frames_of(number) // GROUP_FRAMES

    def _take_at(self, pfn: int, wanted: int) -> list[Run]:
        """As many free frames as there are from `pfn` on, without a gap, in its group."""
        start = pfn - self.geometry.first_pfn
        if not 0 <= start < self.geometry.frame_count:
            return []
        number, position = divmod(start, GROUP_FRAMES)
        group = self.group(number)
        found = 0
        while found < wanted and position < GROUP_FRAMES:
            chunk, bit = divmod(position, CHUNK_FRAMES)
            # The chunk where it begins may be held for this very file; the next is another's.
            if found and chunk in group.held:
                break
            mask = group.masks[chunk] >> bit
            length = min(leading_bits(mask), wanted - found)
            found += length
            position += length
            if not length or (bit + length) != CHUNK_FRAMES:
                break
        return [self._mark(Run(pfn, found))] if found else []

    def _mark(self, run: Run) -> Run:
        marked = []
        try:
            for group, chunk, bit, count in self._parts(run):
                mask = self.group(group).masks[chunk] & ~bits(bit, count)
                self._store(group, chunk, bit, count, mask)
                marked.append(count)
        except OSError:
            # The medium has no memory left for the bitmap itself: a sparse pool on a full tmpfs.
            self.free([Run(run.pfn, sum(marked))] if marked else [])
            raise
        if self.given_out is not None:
            self.given_out.append(run)
        return run

    def _parts(self, run: Run) -> Iterable[tuple[int, int, int, int]]:
        """The parts of a run, one for each chunk: group, chunk in it, first bit and count."""
        for chunk, bit, count in chunk_parts(run, self.geometry.first_pfn):
            yield *divmod(chunk, GROUP_CHUNKS), bit, count

    def _store(self, number: int, chunk: int, bit: int, count: int, mask: int) -> None:
        """Store the words of a chunk's line in which a range of bits lies, and flush them."""
        group = self.group(number)
        used = ~mask & self._managed_mask(number, chunk)
        # Bits of frames that are never given out (see `managed`) are stored as 0.
        first, last = bit >> 6, (bit + count - 1) >> 6
        words = used.to_bytes(CHUNK_LINE_BYTES, "little")[first * 8 : last * 8 + 8]
        line = (self.geometry.group_pfn(number) << PAGE_SHIFT) + chunk * CHUNK_LINE_BYTES
        self._medium.store(line + first * 8, words)
        self._medium.flush(line + first * 8, len(words))
        # Memory follows the medium, because a store may raise and then nothing has changed.
        before = group.free_count
        group.set_mask(chunk, mask)
        self.known_free += group.free_count - before

    def _managed_mask(self, number: int, chunk: int) -> int:
        if chunk and self.geometry.frames_of(number) == GROUP_FRAMES:
            return ALL
        return self.managed(number)[chunk]


def _first_of_run(chunks: set[int], wanted: int) -> int:
    """Where the first run of `wanted` chunks begins, or the first of the longest runs if none is so
    long."""
    mask = sum(1 << chunk for chunk in chunks)
    while not (starts := run_starts(mask, wanted)):
        wanted -= 1
    return first_bit(starts)
