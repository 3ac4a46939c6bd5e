"""How the pages of a file come to lie side by side in the addresses of a process.

A file has its pages in pieces of the pool. One array shows them all, so each piece is mapped behind
the one before it. Invariants:
- pieces lie without a gap and without an overlap, so each byte of an array is of its own file;
- the largest piece lies so that the kernel can map 2 MiB of it with one entry of a page table,
  where file and pool allow it. What doesn't reach 2 MiB gets no such care, because it costs two
  more system calls;
- a DAX device is mapped in units of its own (2 MiB, mostly) and at addresses that are multiples of
  a unit. Pieces that don't fit into such units can't be one array.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from pmemfs.errors import BadMapping
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB, format_size

HOLE = -1
_HUGE_BYTES = 2 * MIB


class Piece(NamedTuple):
    """A part of a range that is one part of the pool, or a hole."""

    at: int
    """Bytes from the beginning of the range; below zero where the range begins within a frame."""
    start: int
    """The offset in the pool in bytes, or HOLE."""
    length: int
    """In bytes, whole frames."""

    @property
    def end(self) -> int:
        """Where the next piece begins, as `at`."""
        return self.at + self.length

    def goes_on_in(self, other: Piece) -> bool:
        """Whether another piece, which is behind this one, is behind it in the pool as well."""
        if HOLE in (self.start, other.start):
            return self.start == other.start
        return self.start + self.length == other.start


class Layout(NamedTuple):
    """What to map where, as `medium/addresses` takes it."""

    pieces: list[tuple[int, int, int]]
    """(bytes from the first address, offset in the pool or HOLE, length)."""
    lead_bytes: int
    """How far behind the first address the range begins."""
    unit_bytes: int
    shift_bytes: int
    """The first address is so many bytes behind a multiple of `unit_bytes`."""


def lay_out(found: Iterable[Sequence[int]], unit_bytes: int, path: str) -> Layout:
    """How to map what the daemon says of a range: (offset in the range, in the pool, length) each.

    `path` is for the sentence of a BadMapping, which it raises if a DAX device can't be mapped so.
    """
    pieces = merged(Piece(*each) for each in found)
    if not pieces:
        return Layout([], 0, FRAME_BYTES, 0)
    if unit_bytes > FRAME_BYTES:
        pieces = _in_units(pieces, unit_bytes, path)
    first = pieces[0].at
    largest = max(pieces, key=lambda piece: piece.length if piece.start != HOLE else 0)
    if unit_bytes <= FRAME_BYTES:
        wants_huge = largest.start != HOLE and largest.length >= _HUGE_BYTES
        unit_bytes = _HUGE_BYTES if wants_huge else FRAME_BYTES
    shift_bytes = (
        (largest.start - (largest.at - first)) % unit_bytes if largest.start != HOLE else 0
    )
    return Layout(
        [(piece.at - first, piece.start, piece.length) for piece in pieces],
        -first,
        unit_bytes,
        shift_bytes,
    )


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with as few pieces as possible, since the kernel lets a process have only so many
    mappings."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].goes_on_in(piece):
            last = joined.pop()
            piece = Piece(last.at, last.start, last.length + piece.length)
        joined.append(piece)
    return joined


def _in_units(pieces: list[Piece], unit_bytes: int, path: str) -> list[Piece]:
    """The same in whole units; what lies around the range in its first and last unit comes with it.

    Raises BadMapping if two pieces would have to share a unit.
    """
    widened: list[Piece] = []
    for piece in pieces:
        if piece.start != HOLE:
            before = piece.start % unit_bytes
            length = -(-(before + piece.length) // unit_bytes) * unit_bytes
            piece = Piece(piece.at - before, piece.start - before, length)
        widened.append(piece)
    # The shift of one piece has to do for all.
    shifts = {(each.start - each.at) % unit_bytes for each in widened if each.start != HOLE}
    neighbours = pairwise(widened)
    if len(shifts) > 1 or any(one.end != other.at for one, other in neighbours):
        why = (
            f"its pieces do not begin and end at multiples of {format_size(unit_bytes)}, the unit "
            "in which this device can be mapped; map it with contiguous=True, which lays the file "
            "out anew"
        )
        raise BadMapping(path=path, why=why)
    return widened
