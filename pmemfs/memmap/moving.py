"""Moves page structures within a pool, when its memmap zone moves.

Invariants: a structure that was initialised in the old zone is in the new zone, at the same index.
Everything else of the old zone that lies in the new zone is cleared, because it would turn up there
as the structure of another page. The zones may overlap. Nothing here can fail except by a fault of
the memory. No page is held meanwhile, so a structure that a fault loses or leaves behind is worth
no more than a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pmemfs.media.zones import Zone
from pmemfs.medium.base import Medium
from pmemfs.pfn import PAGE_STRUCTURE_BYTES
from pmemfs.ranges import Range, without
from pmemfs.units import MIB

_CLEARING_BYTES = MIB


def live_runs(states: bytes | bytearray | memoryview, live: int, shift: int) -> list[Range]:
    """The runs of pages in stretches, of 2^shift pages each, whose state is `live`."""
    found: list[Range] = []
    states = bytes(states)
    wanted, start = bytes([live]), 0
    while (start := states.find(wanted, start)) >= 0:
        rest = states[start:].lstrip(wanted)
        end = len(states) - len(rest)
        found.append((start << shift, end << shift))
        start = end
    return found


def clipped(runs: Iterable[Range], end: int) -> list[Range]:
    """The parts of runs before an end."""
    return [(first, min(last, end)) for first, last in runs if first < end]


def prepare_places(medium: Medium, runs: Iterable[Range], zone: Zone) -> None:
    """Get memory for runs of pages in a zone, and map it. Raises OSError (ENOSPC)."""
    for start, end in _bytes_of(runs, zone.offset_bytes):
        end = min(end, zone.end_bytes)
        if start < end:
            medium.reserve(start, end - start)
            medium.populate(start, end - start)


def move_zone(
    medium: Medium,
    runs: Sequence[Range],
    kept_pages: int,
    old: Zone,
    new: Zone,
    stale: Sequence[Range],
) -> None:
    """Move runs of pages, as far as they are kept, from the old memmap zone to the new one.

    Raises OSError (ENOSPC), and then has moved nothing. Raises MemoryFault after it has moved all
    that could be moved; structures in bad memory are lost.
    """
    prepare_places(medium, runs, new)
    move_structures(
        medium.view(0, medium.size_bytes),
        runs,
        kept_pages,
        old_offset=old.offset_bytes,
        new_offset=new.offset_bytes,
        new_end=new.end_bytes,
        stale=stale,
    )
    medium.check_touched()


def move_structures(
    memory: memoryview,
    runs: Sequence[Range],
    kept_pages: int,
    *,
    old_offset: int,
    new_offset: int,
    new_end: int,
    stale: Sequence[Range] = (),
) -> None:
    """Move runs of pages, in ascending order, from a zone at one offset to a zone at another.

    Pages from `kept_pages` on are not moved, but what they leave in the new zone is cleared.
    `stale` are ranges of bytes outside the old zone; their parts in the new zone are cleared, too.
    """
    kept = clipped(runs, kept_pages)
    old, new = _bytes_of(runs, old_offset), _bytes_of(kept, new_offset)
    moves = list(zip(_bytes_of(kept, old_offset), new, strict=True))
    # The zones may overlap. From the last run to the first, no move overwrites a run that is still
    # to be moved; in the other direction it is the other way round.
    if new_offset > old_offset:
        moves.reverse()
    for (source, source_end), (target, target_end) in moves:
        memory[target:target_end] = memory[source:source_end]
    for start, end in without(sorted([*old, *stale]), new):
        start, end = max(start, new_offset), min(end, new_end)
        while start < end:
            step = min(end - start, _CLEARING_BYTES)
            memory[start : start + step] = bytes(step)
            start += step


def _bytes_of(runs: Iterable[Range], offset: int) -> list[Range]:
    size = PAGE_STRUCTURE_BYTES
    return [(offset + first * size, offset + end * size) for first, end in runs]
