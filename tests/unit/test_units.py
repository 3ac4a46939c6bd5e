"""Sizes: every suffix means the power of two that fio and ndctl read in it."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmemfs.errors import BadSize
from pmemfs.units import GIB, KIB, MIB, TIB, align_up, format_size, is_power_of_two, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("4096", 4096),
        ("4K", 4 * KIB),
        ("4k", 4 * KIB),
        ("4KiB", 4 * KIB),
        ("4KB", 4 * KIB),
        ("1.5G", 3 * GIB // 2),
        (" 2 M ", 2 * MIB),
        ("16T", 16 * TIB),
        ("7P", 7 * 1024 * TIB),
        ("12B", 12),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_a_size_is_read_with_binary_suffixes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "0", "0K", "0.0001K", "-1", "4X", "K", "1e9", "4 4", "4KK", "٤", "8P P", "9" * 19 + "G",
     "9223372036854775808", "9" * 400 + ".0T", "9" * 5000, "0." + "0" * 5000 + "1"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(BadSize, match="is not a size: "):
        parse_size(text)


@given(st.text(alphabet="0123456789.KMGTPiB -e", max_size=12))
@example("1.")
def test_any_text_is_a_size_of_a_file_or_is_refused(text: str) -> None:
    try:
        size_bytes = parse_size(text)
    except BadSize:
        return
    assert 0 < size_bytes < 1 << 63


@given(st.integers(1, (1 << 63) - 1))
def test_whole_numbers_keep_their_low_bits(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.integers(0, 1 << 64))
def test_a_written_size_reads_back_within_half_a_percent(size_bytes: int) -> None:
    text = format_size(size_bytes)
    assert re.fullmatch(r"\d+(\.\d\d)?([KMGT]i)?B", text)
    if 0 < size_bytes < 1 << 62:
        # Two decimals are off by half a hundredth at most, and whole bytes by less than one more.
        assert abs(parse_size(text) - size_bytes) <= size_bytes * 0.005 + 1


def test_a_written_size_takes_the_largest_unit() -> None:
    assert format_size(1023) == "1023B"
    assert format_size(4 * GIB) == "4GiB"
    assert format_size(3 * GIB // 2) == "1.50GiB"


@given(st.integers(0, 1 << 64), st.integers(0, 40).map(lambda shift: 1 << shift))
def test_aligning_goes_to_the_nearest_multiple_above(value: int, alignment: int) -> None:
    aligned = align_up(value, alignment)
    assert aligned % alignment == 0
    assert 0 <= aligned - value < alignment


def test_powers_of_two_are_told_from_the_rest() -> None:
    powers = {1 << shift for shift in range(12)}
    assert {value for value in range(-4, 2049) if is_power_of_two(value)} == powers
