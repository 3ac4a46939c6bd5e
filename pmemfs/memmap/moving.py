"""Moving page structures inside a pool, when its memmap zone does.

Invariants: what was initialised in the old zone is in the new one, at the same index; whatever else
of the old zone lies in the new one too is cleared, so that no structure turns up at another index.
The zones may overlap. Nothing here can fail but by a fault of the memory: as nobody holds a page
meanwhile, structures that are lost or left behind by it are worth no more than fresh ones.
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
    """The runs of pages whose stretches, of 2^shift pages each, are in the state `live`."""
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
    """What is left of runs before an end."""
    return [(first, min(last, end)) for first, last in runs if first < end]


def prepare_places(medium: Medium, runs: Iterable[Range], zone: Zone) -> None:
    """Get memory for runs of pages in a zone, and have it mapped. Raises OSError (ENOSPC)."""
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

    Raises OSError (ENOSPC), and then has moved nothing; and MemoryFault, after which all that could
    be moved was, and what lay in bad memory is lost.
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
    """Move runs of pages, in ascending order, from a zone at one offset to one at another.

    Of pages from `kept_pages` on, only what they would leave in the new zone is cleared. `stale`
    are ranges of bytes outside the old zone that are cleared too, as far as they lie in the new
    one.
    """
    kept = clipped(runs, kept_pages)
    old, new = _bytes_of(runs, old_offset), _bytes_of(kept, new_offset)
    moves = list(zip(_bytes_of(kept, old_offset), new, strict=True))
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
