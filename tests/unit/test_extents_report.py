"""The extents of a file, told in answers of bounded length."""

from __future__ import annotations

import json

import pytest

from kit.compressible import PIECE, Compressible, text
from kit.pools import MemoryMedium
from pmemfs.control import ANSWER_LIMIT_BYTES
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Mode, Scheme
from pmemfs.memmap.none import NoMemmap
from pmemfs.observe import extents
from pmemfs.observe.answers import ExtentReport, FileExtents
from pmemfs.pool import Pool, PoolSpec
from pmemfs.units import MIB
from pmemfs.unsaid import json_values
from pmemfs.volume.base import NewInode
from pmemfs.volume.fs.filesystem import FileSystem


def file_in_pieces() -> tuple[FileSystem, int]:
    """A file of which every second page is a hole."""
    spec = PoolSpec(name="e", alignment_bytes=4096, scheme=Scheme.NONE, mode=Mode.FS)
    pool = Pool.create(MemoryMedium(bytes(4 * MIB)), spec)
    FileSystem.format(pool)
    fs = FileSystem(pool, NoMemmap())
    number = fs.make(ROOT, b"file", NewInode(0o100644, 0, 0))
    fs.write(number, 0, b"x" * MIB)
    for offset_bytes in range(0, MIB, 8192):
        fs.punch(number, offset_bytes, 4096)
    return fs, number


def test_the_parts_of_a_report_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    fs, number = file_in_pieces()
    whole = extents.file_extents(fs, number)
    assert whole.is_complete
    assert len(whole.extents) == 128
    for at_once in (1, 7, 64, 127, 128, 129):
        monkeypatch.setattr(extents, "EXTENTS_AT_ONCE", at_once)
        rows: list[ExtentReport] = []
        while True:
            start = rows[-1].offset_bytes + 1 if rows else 0
            part = extents.file_extents(fs, number, start)
            assert len(part.extents) <= at_once
            rows += part.extents
            if part.is_complete:
                break
        assert tuple(rows) == whole.extents
    nothing = extents.file_extents(fs, number, MIB)
    assert (nothing.extents, nothing.is_complete) == ((), True)


def test_the_longest_part_fits_into_an_answer() -> None:
    row = ExtentReport((1 << 63) - 1, (1 << 52) - 1, (1 << 63) - 1, False)
    part = FileExtents((1 << 63) - 1, (1 << 63) - 1, (row,) * extents.EXTENTS_AT_ONCE, False)
    assert len(json.dumps({"result": json_values(part)})) <= ANSWER_LIMIT_BYTES


def test_pieces_that_lie_compressed_are_told_from_extents() -> None:
    at = Compressible.in_memory()
    number = at.packed("file", text(3 * PIECE))
    at.fs.make_plain(number, PIECE, 1)
    report = extents.file_extents(at.fs, number)
    assert [row.offset_bytes for row in report.extents] == [0, PIECE, 2 * PIECE]
    assert [row.length_bytes for row in report.extents] == [PIECE] * 3
    first, plain, last = (row.stored_bytes for row in report.extents)
    assert plain == 0
    assert 0 < first < PIECE
    assert 0 < last < PIECE
