"""Holes of a file, as its file system tells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pmemfs.medium.fiemap import has_blocks_everywhere
from pmemfs.units import KIB, MIB


@pytest.fixture
def fd(tmp_path: Path) -> int:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, MIB)
        has_blocks_everywhere(descriptor, MIB)
    except OSError as error:
        pytest.skip(f"the file system of {tmp_path} does not tell: {error}")
    return descriptor


def test_reserved_blocks_count_though_nothing_was_written_to_them(fd: int) -> None:
    assert has_blocks_everywhere(fd, MIB)


@pytest.mark.parametrize("hole_at", [0, 512 * KIB, MIB - 4 * KIB])
def test_one_missing_block_is_a_hole(fd: int, hole_at: int) -> None:
    os.ftruncate(fd, 0)
    os.ftruncate(fd, MIB)
    for offset in range(0, MIB, 4 * KIB):
        if offset != hole_at:
            os.pwrite(fd, b"x" * 4 * KIB, offset)
    assert not has_blocks_everywhere(fd, MIB)
    os.pwrite(fd, b"x", hole_at)
    assert has_blocks_everywhere(fd, MIB)


def test_a_file_that_ends_early_is_not_everywhere(fd: int) -> None:
    assert not has_blocks_everywhere(fd, MIB + 4 * KIB)


def test_more_extents_than_one_call_returns_are_all_seen(fd: int) -> None:
    os.ftruncate(fd, 0)
    # Written and reserved blocks in turn are an extent each.
    os.posix_fallocate(fd, 0, 8 * MIB)
    for offset in range(0, 8 * MIB, 8 * KIB):
        os.pwrite(fd, b"x" * 4 * KIB, offset)
    assert has_blocks_everywhere(fd, 8 * MIB)
    assert not has_blocks_everywhere(fd, 8 * MIB + 4 * KIB)
