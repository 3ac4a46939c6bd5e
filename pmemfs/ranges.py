"""Ranges of numbers, such as pages or bytes, and what is left of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]
"""From the first number to the one behind the last."""


def without(ranges: Iterable[Range], taken: Sequence[Range]) -> Iterator[Range]:
    """What is left of ranges without other ranges; both are in ascending order and disjoint."""
    position = 0
    for start, end in ranges:
        while position < len(taken) and taken[position][1] <= start:
            position += 1
        at = position
        while at < len(taken) and taken[at][0] < end:
            if start < taken[at][0]:
                yield start, taken[at][0]
            start = max(start, taken[at][1])
            at += 1
        if start < end:
            yield start, end
