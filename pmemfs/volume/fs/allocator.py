"""Which frames are free: the persistent bitmap, and which of them to give out.

Two kinds of demand, as in WineFS (SOSP '21): whole chunks of 2 MiB for what is large, so that it is
aligned however old the pool, and pieces of chunks that are broken already for what is small.
A third one comes in pieces and in any order, as downloads and images of disks do: a chunk is *held*
for the file. What is not used of it counts as free, but small demands of others look elsewhere as
long as there is anything; so the pieces of the file fall into place. Invariants:
- a bit is set and flushed before its run is given out; whoever maps the run fences before that is
  committed. A bit is cleared after what freed it was committed. So a crash can leave a bit set that
  nobody owns, and never one clear that somebody does;
- the last frames are for urgent demands, whose operations take no more room in the end:
  `RESERVE_FRAMES` (of a small pool less) for what their records need meanwhile, `log_frames` so
  that the longest log can be written anew. Without these a full pool could not be emptied.

A group is read when it is needed first, so nothing here costs by the size of the pool at mount.
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
"""What comes in pieces of this size gets chunks of its own."""
_TRIES = 16


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
        """Chunks that are held for a file: no `partial` ones, once they are broken."""

    def set_mask(self, chunk: int, mask: int) -> None:
        """Replace the mask of a chunk, and what follows from it."""
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
        self.known_free = self.log_frames = 0
        self._holds: dict[int, list[tuple[int, int]]] = {}
        """By who holds them, group and chunk in it."""
        self.given_out: list[Run] | None = None
        """What was given out since somebody began to collect it here."""
        self.set_geometry(geometry)

    def set_geometry(self, geometry: Geometry) -> None:
        """The zone, as it is now: groups may have become longer, and more."""
        self.geometry = geometry
        least = min(_LEAST_RESERVE_FRAMES, geometry.frame_count // 8)
        self._for_records = min(RESERVE_FRAMES, max(geometry.frame_count // 64, least))
        self.set_log_frames(self.log_frames)
        # Forgotten and read anew when needed: the last group may have got more frames.
        self._groups.clear()
        self.known_free = 0

    def set_log_frames(self, frame_count: int) -> None:
        """Say what the longest log takes that is to be written anew."""
        self.log_frames = frame_count
        self.reserve = self._for_records + min(frame_count, self.geometry.frame_count // 2)
        """How many frames only urgent demands get."""
        self._least_frames = self.reserve - self._for_records // 2

    def is_tight(self, wanted: int) -> bool:
        """Whether urgent demands have taken half of what is for their records, but not `wanted`."""
        least = self._least_frames
        return self.known_free < least and wanted <= self.free_up_to(least) < least

    def allocate(
        self, frame_count: int, *, goal: int = 0, whole: bool = False, urgent: bool = False
    ) -> list[Run]:
        """Runs of free frames, used from now on. Raises OSError (ENOSPC), and then takes nothing.

        `goal` is the pfn where they would best begin. `whole` asks for the start of whole chunks,
        although less is wanted, since more will follow.
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

    def hold(self, owner: int, wish: int, *, frame_count: int) -> int | None:
        """Hold a whole chunk for an inode that needs a part of it; its first pfn, or None.

        The one at the pfn `wish`, if that is a whole one. For a small part there is one only while
        half of a group is whole, so that what comes in whole chunks finds some, too.
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
        """Let others have what an inode holds."""
        for number, chunk in self._holds.pop(owner, ()):
            if number in self._groups:
                self._groups[number].unhold(chunk)

    def free(self, runs: Iterable[Run]) -> None:
        """Give runs back. Their bits are cleared, and durable with a later fence."""
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
        """All free frames: reads every group's bitmap that was not read before."""
        self._learn_all()
        return self.known_free

    def free_up_to(self, enough: int) -> int:
        """How many frames are free, or at least `enough`: reads no more bitmaps than tell that."""
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
        """A group, read when it is needed first."""
        group = self._groups.get(number)
        if group is None:
            offset = self.geometry.group_pfn(number) << PAGE_SHIFT
            group = Group(bytes(self._medium.read(offset, FRAME_BYTES)), self.managed(number))
            self._groups[number] = group
            self.known_free += group.free_count
        return group

    def forget(self, number: int) -> None:
        """Let go of a group, which is read anew when it is needed."""
        group = self._groups.pop(number, None)
        if group is not None:
            self.known_free -= group.free_count

    def managed(self, number: int) -> list[int]:
        """For each chunk of a group, a mask of the frames that can be given out."""
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
        """A run of at most `wanted` frames; there are free ones."""
        if wanted >= CHUNK_FRAMES or whole:
            run = self._take_chunks(wanted)
            if run:
                return run
        small = min(wanted, CHUNK_FRAMES - 1)
        run = self._take_small(small) or self._take_chunks(wanted)
        if run is None and self._holds:
            for owner in list(self._holds):
                self.unhold(owner)
            run = self._take_small(small)
        return run or self._take_longest(wanted)

    def _take_chunks(self, wanted: int) -> Run | None:
        """A run from the start of a whole chunk on."""
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
                    # What is less than a chunk is placed by itself, where chunks are broken.
                    length &= -CHUNK_FRAMES
                return self._mark(Run(pfn, length))
        return None

    def _take_small(self, wanted: int) -> Run | None:
        """A run of all `wanted` frames, in a chunk that is broken already."""
        count = self.geometry.group_count
        for step in range(count):
            number = (self._small_group + step) % count
            group = self.group(number)
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
        """The longest run in the first chunk that has any: where a pool is nearly full."""
        for number in range(self.geometry.group_count):
            group = self.group(number)
            for chunk in sorted(group.whole | group.partial | group.held):
                length = 1
                starts = group.masks[chunk]
                while length < wanted and (more := starts & group.masks[chunk] >> length):
                    starts, length = more, length + 1
                bit = first_bit(starts)
                pfn = self.geometry.group_pfn(number) + chunk * CHUNK_FRAMES + bit
                return self._mark(Run(pfn, length))
        raise system_error(errno.ENOSPC)

    def _chunk_at(self, pfn: int) -> tuple[int, int] | None:
        """The group and the chunk in it that begins here, if it is a whole one."""
        start = pfn - self.geometry.first_pfn
        if start % CHUNK_FRAMES or not 0 <= start < self.geometry.frame_count:
            return None
        number, position = divmod(start, GROUP_FRAMES)
        chunk = position // CHUNK_FRAMES
        group = self.group(number)
        return (number, chunk) if chunk in group.whole and chunk not in group.held else None

    def _find_whole(self, least: int) -> tuple[int, int] | None:
        """A whole chunk that nobody holds, in a group that has more than `least` of 64."""
        count = self.geometry.group_count
        for step in range(min(count, _TRIES)):
            number = (self._large_group + step) % count
            group = self.group(number)
            if len(group.whole) > self._share(number, least) and group.whole - group.held:
                return number, min(group.whole - group.held)
        return None

    def _share(self, number: int, chunks: int) -> int:
        """As many of a group's chunks as `chunks` are of a long one's."""
        return chunks * self.geometry.frames_of(number) // GROUP_FRAMES

    def _take_at(self, pfn: int, wanted: int) -> list[Run]:
        """As many free frames as there are from `pfn` on, in its group."""
        start = pfn - self.geometry.first_pfn
        if not 0 <= start < self.geometry.frame_count:
            return []
        number, position = divmod(start, GROUP_FRAMES)
        group = self.group(number)
        found = 0
        while found < wanted and position < GROUP_FRAMES:
            chunk, bit = divmod(position, CHUNK_FRAMES)
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
            # A sparse pool found no memory for the bitmap itself.
            self.free([Run(run.pfn, sum(marked))] if marked else [])
            raise
        if self.given_out is not None:
            self.given_out.append(run)
        return run

    def _parts(self, run: Run) -> Iterable[tuple[int, int, int, int]]:
        """A run by chunks: group, chunk in it, first bit and count."""
        for chunk, bit, count in chunk_parts(run, self.geometry.first_pfn):
            yield *divmod(chunk, GROUP_CHUNKS), bit, count

    def _store(self, number: int, chunk: int, bit: int, count: int, mask: int) -> None:
        """Store the words of a chunk's line that a range of bits lies in."""
        group = self.group(number)
        used = ~mask & self._managed_mask(number, chunk)
        first, last = bit >> 6, (bit + count - 1) >> 6
        words = used.to_bytes(CHUNK_LINE_BYTES, "little")[first * 8 : last * 8 + 8]
        line = (self.geometry.group_pfn(number) << PAGE_SHIFT) + chunk * CHUNK_LINE_BYTES
        self._medium.store(line + first * 8, words)
        self._medium.flush(line + first * 8, len(words))
        before = group.free_count
        group.set_mask(chunk, mask)
        self.known_free += group.free_count - before

    def _managed_mask(self, number: int, chunk: int) -> int:
        if chunk and self.geometry.frames_of(number) == GROUP_FRAMES:
            return ALL
        return self.managed(number)[chunk]


def _first_of_run(chunks: set[int], wanted: int) -> int:
    """Where the first run of `wanted` chunks begins, or else the longest."""
    mask = sum(1 << chunk for chunk in chunks)
    while not (starts := run_starts(mask, wanted)):
        wanted -= 1
    return first_bit(starts)
