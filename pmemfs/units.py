"""Sizes in bytes: the constants, and the one way to read and to write them.

Suffixes are binary, as `fio` and `ndctl` read them: 4K, 4k, 4KiB and 4KB are all 4096 bytes.
"""

from __future__ import annotations

import re

from pmemfs.errors import BadSize

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
# No size needs 40 digits, and thousands of them are more than int() and float() take.
_SIZE = re.compile(
    r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*([KMGTP]?)(?:i?B)?\s*", re.IGNORECASE | re.ASCII
)


def parse_size(text: str, *, may_be_zero: bool = False) -> int:
    """The bytes that a text such as "4G", "1.5T" or "4096" stands for.

    Raises BadSize for anything else, for zero unless it `may_be_zero`, and for what no 64-bit file
    offset can hold.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadSize(
            text=text, why="it is not a number with an optional K, M, G, T or P, such as 4G"
        )
    number, suffix = match.groups()
    factor = 1 << (10 * _POWERS[suffix.upper()])
    # Whole numbers stay integers: a float would lose the low bits of a large size.
    size_bytes = int(number) * factor if "." not in number else int(float(number) * factor)
    if size_bytes == 0 and not may_be_zero:
        raise BadSize(text=text, why="it is zero")
    if size_bytes >= 1 << 63:
        raise BadSize(text=text, why="it is not less than 8192P")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for people, in the largest unit that it reaches; two decimals where it isn't whole."""
    for suffix, factor in (("T", TIB), ("G", GIB), ("M", MIB), ("K", KIB)):
        if size_bytes >= factor:
            whole, rest = divmod(size_bytes, factor)
            return f"{whole}{suffix}iB" if rest == 0 else f"{size_bytes / factor:.2f}{suffix}iB"
    return f"{size_bytes}B"


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` (a power of two) that is not below `value`."""
    return (value + alignment - 1) & -alignment


def is_power_of_two(value: int) -> bool:
    """Whether `value` is 1, 2, 4, …"""
    return value > 0 and value & (value - 1) == 0
