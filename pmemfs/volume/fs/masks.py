"""Frames of chunks as bits of a number: a set bit is a frame, and the lowest bit is the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pmemfs.media.filesystem import CHUNK_FRAMES
from pmemfs.volume.fs.extents import Run

ALL = (1 << CHUNK_FRAMES) - 1


def chunk_parts(run: Run, first_pfn: int) -> Iterator[tuple[int, int, int]]:
    """The parts of a run, one for each chunk: chunk (counted from `first_pfn`), first bit,
    count."""
    start, left = run.pfn - first_pfn, run.frame_count
    while left:
        chunk, bit = divmod(start, CHUNK_FRAMES)
        count = min(left, CHUNK_FRAMES - bit)
        yield chunk, bit, count
        start += count
        left -= count


def bits(first: int, count: int) -> int:
    """The mask of a range of bits."""
    return ((1 << count) - 1) << first


def first_bit(mask: int) -> int:
    """The lowest set bit of a mask that is not 0."""
    return (mask & -mask).bit_length() - 1


def leading_bits(mask: int) -> int:
    """How many bits are set from the lowest position on."""
    return (~mask & (mask + 1)).bit_length() - 1


def run_starts(mask: int, length: int) -> int:
    """The bits of a mask at which a run of `length` set bits starts."""
    # Each step doubles the length that is known to be set, so a run of 512 takes nine shifts.
    done = 1
    while done < length and mask:
        step = min(done, length - done)
        mask &= mask >> step
        done += step
    return mask


def runs_of(mask: int) -> Iterator[tuple[int, int]]:
    """The runs of set bits in a mask: first bit and count."""
    at = 0
    while mask:
        skip = first_bit(mask)
        mask >>= skip
        at += skip
        count = leading_bits(mask)
        yield at, count
        mask >>= count
        at += count


class FrameSet:
    """A set of frames, as a mask for each chunk that has any."""

    def __init__(self, first_pfn: int) -> None:
        self._first_pfn = first_pfn
        self._masks: dict[int, int] = {}

    def add(self, runs: Iterable[Run]) -> list[Run]:
        """Add runs; the parts of them that were in the set before."""
        known = []
        for run in runs:
            for chunk, bit, count in chunk_parts(run, self._first_pfn):
                mask, before = bits(bit, count), self._masks.get(chunk, 0)
                known += self._runs(chunk, before & mask)
                after = before | mask
                # One object for all whole chunks: there may be very many of them.
                self._masks[chunk] = ALL if after == ALL else after
        return known

    def meeting(self, runs: Iterable[Run]) -> list[Run]:
        """The parts of runs that are in the set."""
        found = []
        for run in runs:
            for chunk, bit, count in chunk_parts(run, self._first_pfn):
                found += self._runs(chunk, self._masks.get(chunk, 0) & bits(bit, count))
        return found

    def mask(self, chunk: int) -> int:
        """The frames of a chunk that are in the set."""
        return self._masks.get(chunk, 0)

    def add_mask(self, chunk: int, mask: int) -> None:
        """Add frames of a chunk."""
        if mask:
            self._masks[chunk] = self._masks.get(chunk, 0) | mask

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The chunks that have frames in the set, in no order, with their masks."""
        yield from self._masks.items()

    def __bool__(self) -> bool:
        return bool(self._masks)

    def _runs(self, chunk: int, mask: int) -> list[Run]:
        start = self._first_pfn + chunk * CHUNK_FRAMES
        return [Run(start + bit, count) for bit, count in runs_of(mask)]
