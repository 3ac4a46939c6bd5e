"""Compressed pieces that a worker of the data plane reads by itself."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from kit.compressible import FILE, PIECE, text
from kit.data_plane import READ, WRITE, SharedFiles, read_in, shared_files, write_in
from pmemfs.dataplane.layouts import (
    PIECE_BYTES_SHIFT,
    PIECE_CHECKSUM_SHIFT,
    PIECE_ID_SHIFT,
    Extent,
    ExtentFlags,
)
from pmemfs.dataplane.native import Responder, store_word
from pmemfs.errors import DamagedPiece
from pmemfs.fuse.published import Publisher
from pmemfs.media.inode import ROOT
from pmemfs.media.label import Scheme
from pmemfs.media.transform import StoredPiece, Transformation, piece_checksum
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.transform.zstd import compress
from pmemfs.units import MIB

KINDS = (Transformation.ZSTD, Transformation.LZ4)
FORWARDED = ("forward", 0, b"")
HOT_SECONDS = 20
"""Until then a piece that is read all the time is found hot."""


@dataclass
class Packed:
    """A file of a file system that shares its memory with a worker."""

    files: SharedFiles
    publisher: Publisher
    worker: Responder

    def make(self, data: bytes, kind: int = Transformation.ZSTD, name: bytes = b"file") -> int:
        """A file that somebody has open, with what can be compressed in pieces."""
        fs = self.files.fs
        ino = fs.make(ROOT, name, FILE)
        fs.hold(ino)
        fs.write(ino, 0, data)
        fs.trim_ahead(ino)
        fs.properties.set_transform(ino, kind, 0)
        trio.run(fs.cooler.rewrite, ino)
        self.publisher.opened(ino)
        return ino

    def publish(self, ino: int, position: int = 0) -> None:
        """Show it to the worker, as a read at a position does."""
        self.publisher.was_read(ino, position + 1)
        assert self.files.tables.is_published(ino)

    def read(self, ino: int, position: int, length: int) -> tuple[str, int, bytes]:
        return self.worker.answer(read_in(position, length), opcode=READ, inode=ino)

    def piece(self, ino: int, index: int) -> StoredPiece:
        return self.files.fs.inode(ino).pieces[index]

    def change_stored(self, piece: StoredPiece, at: int) -> None:
        """Change a stored byte."""
        medium, offset = self.files.pool.medium, (piece.pfn << PAGE_SHIFT) + at
        medium.store(offset, bytes([medium.read(offset, 1)[0] ^ 1]))


@pytest.fixture(params=[Scheme.NONE, Scheme.PMEM], ids=lambda s: s.name.lower())
def packed(request: pytest.FixtureRequest, shm: Path) -> Iterator[Packed]:
    with shared_files(shm, request.param) as files:
        yield Packed(files, Publisher(files.fs, files.tables), files.worker())


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_reads_any_part_of_a_file_with_pieces_holes_and_plain_ranges(
    packed: Packed, kind: int
) -> None:
    end = text(9 * PIECE + 5 * FRAME_BYTES + 77)
    data = text(2 * PIECE) + os.urandom(PIECE) + bytes(PIECE) + end
    ino = packed.make(data, kind)
    packed.files.fs.punch(ino, 3 * PIECE, PIECE)
    packed.publish(ino)
    assert packed.read(ino, 0, MIB) == ("answer", 0, data[:MIB])
    chance = random.Random(kind)
    for _ in range(400):
        start = chance.randrange(len(data))
        length = min(chance.choice((1, 4096, 70_000, PIECE, MIB)), len(data) - start)
        if chance.randrange(2):
            start -= start % FRAME_BYTES
        assert packed.read(ino, start, length) == ("answer", 0, data[start : start + length])
    assert packed.read(ino, len(data), 5) == ("answer", 0, b"")


def test_what_lies_behind_the_size_in_a_piece_is_not_read(packed: Packed) -> None:
    data = text(3 * PIECE)
    ino = packed.make(data)
    packed.files.fs.set_attributes(ino, size_bytes=PIECE + 5)
    packed.publish(ino)
    assert packed.read(ino, PIECE - 3, MIB) == ("answer", 0, data[PIECE - 3 : PIECE + 5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [100, PIECE])
def test_a_damaged_piece_is_left_to_the_control_plane(
    packed: Packed, kind: int, length: int
) -> None:
    data = text(3 * PIECE)
    ino = packed.make(data, kind)
    packed.publish(ino)
    # The worker has the plain bytes of the piece by now, and must not answer with them any more.
    assert packed.read(ino, PIECE, length)[0] == "answer"
    packed.change_stored(packed.piece(ino, 32), 500)
    assert packed.read(ino, PIECE, length) == FORWARDED
    assert packed.read(ino, PIECE - 1, 2) == FORWARDED
    assert packed.read(ino, 0, PIECE) == ("answer", 0, data[:PIECE])
    with pytest.raises(DamagedPiece):
        packed.files.fs.read(ino, PIECE, length)


@pytest.mark.parametrize("length", [100, PIECE])
@pytest.mark.parametrize(
    "change",
    [
        {"frame_count": 31}, {"frame_count": 33}, {"frame_count": 1 << 40},
        {"stored_bytes": 0}, {"stored_bytes": 1 << 22}, {"stored_bytes": 100},
        {"id": Transformation.XTS}, {"id": Transformation.LZ4}, {"id": 100}, {"checksum": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_table_that_is_wrong_of_a_piece_gives_no_bytes(
    packed: Packed, change: dict[str, int], length: int
) -> None:
    ino = packed.make(text(3 * PIECE))
    piece = packed.piece(ino, 32)._replace(**change)
    if "stored_bytes" in change and piece.stored_bytes < PIECE:
        # What is there of it is whole, and is not a whole frame.
        stored = packed.files.pool.medium.read(piece.pfn << PAGE_SHIFT, piece.stored_bytes)
        piece = piece._replace(checksum=piece_checksum(bytes(stored)))
    flags = (
        ExtentFlags.FORWARDED | piece.id << PIECE_ID_SHIFT
        | piece.stored_bytes << PIECE_BYTES_SHIFT | piece.checksum << PIECE_CHECKSUM_SHIFT
    )  # fmt: skip
    packed.files.shared.publish(
        ino, 3 * PIECE, [Extent(32, piece.pfn, piece.frame_count, flags)],
        live_offset=packed.files.fs.live_line(ino),
    )  # fmt: skip
    assert packed.read(ino, PIECE, length) == FORWARDED


def test_frames_that_get_another_piece_show_that_one(packed: Packed) -> None:
    one, other = text(PIECE, 1), text(PIECE, 2)
    ino = packed.make(one + one)
    packed.publish(ino)
    assert packed.read(ino, 5, 100) == ("answer", 0, one[5:105])
    piece, stored = packed.piece(ino, 0), compress(other, 0)
    packed.files.pool.medium.store(piece.pfn << PAGE_SHIFT, stored)
    packed.files.fs.inode(ino).set_piece(
        0, piece._replace(stored_bytes=len(stored), checksum=piece_checksum(stored))
    )
    packed.files.tables.withdraw(ino)
    packed.publish(ino)
    assert packed.read(ino, 5, 100) == ("answer", 0, other[5:105])


def test_a_write_into_a_piece_takes_the_table_away_first(packed: Packed) -> None:
    data = text(3 * PIECE)
    ino = packed.make(data)
    packed.publish(ino)
    write = packed.worker.answer(write_in(PIECE + 7, 3), opcode=WRITE, inode=ino, payload=b"new")
    assert write == FORWARDED
    packed.files.fs.write(ino, PIECE + 7, b"new")
    assert packed.read(ino, PIECE, 100) == FORWARDED
    packed.publish(ino)
    wanted = data[PIECE : PIECE + 7] + b"new" + data[PIECE + 10 : 2 * PIECE]
    assert packed.read(ino, PIECE, PIECE) == ("answer", 0, wanted)
    assert 32 not in packed.files.fs.inode(ino).pieces


def test_frames_of_a_piece_are_not_free_while_a_worker_may_read_them(packed: Packed) -> None:
    ino = packed.make(text(3 * PIECE))
    packed.publish(ino)
    fs, shared = packed.files.fs, packed.files.shared
    stored = packed.piece(ino, 32).stored_frames
    # A worker is in a request.
    store_word(shared.memory, shared.areas.slots, 1)
    fs.write(ino, PIECE, b"new")
    fs.tidy()
    assert fs.space().busy_frames >= stored
    store_word(shared.memory, shared.areas.slots, 2)
    fs.tidy()
    assert fs.space().busy_frames == 0


# Page structures would lie at the end of the pool, and be cut off first.
@pytest.mark.parametrize("packed", [Scheme.NONE], ids=["none"], indirect=True)
def test_a_cut_off_pool_is_an_error_of_the_reads_of_its_pieces(packed: Packed) -> None:
    data = text(3 * PIECE)
    ino = packed.make(data)
    packed.publish(ino)
    first, last = sorted((packed.piece(ino, index).pfn, index) for index in (0, 32, 64))[::2]
    os.truncate(packed.files.medium.fileno(), last[0] << PAGE_SHIFT)
    at = last[1] << PAGE_SHIFT
    assert packed.read(ino, at, PIECE) == ("answer", errno.EIO, b"")
    assert packed.files.shared.faults(0)[-1].inode == ino
    at = first[1] << PAGE_SHIFT
    assert packed.read(ino, at, PIECE) == ("answer", 0, data[at : at + PIECE])


@pytest.mark.slow
def test_a_piece_that_is_read_in_three_seconds_is_told_to_be_hot_once(packed: Packed) -> None:
    ino = packed.make(text(3 * PIECE))
    packed.publish(ino)
    packed.read(ino, 0, PIECE)
    end = time.monotonic() + HOT_SECONDS
    while not (hot := packed.worker.take_hot()) and time.monotonic() < end:
        packed.read(ino, PIECE + 5, 100)
        time.sleep(0.05)
    assert hot == [(ino, 32)]
    packed.read(ino, PIECE + 5, 100)
    assert packed.worker.take_hot() == []


def test_of_a_file_with_many_pieces_more_and_more_are_shown_as_it_is_read(packed: Packed) -> None:
    ino = packed.make(text(2 * PIECE))
    inode = packed.files.fs.inode(ino)
    piece = packed.piece(ino, 0)
    for index in range(0, 32 * 2000, 32):
        inode.set_piece(index, piece)
    packed.files.fs.store.set_live_size(inode, 2000 * PIECE)
    shown = []
    for at in range(0, 2000 * PIECE, PIECE):
        if packed.read(ino, at, 10) == FORWARDED:
            packed.publish(ino, at)
            (table,) = packed.files.shared.published()
            shown.append(table.head.extent_count)
    assert len(shown) < 8
    assert shown == sorted(shown)
    assert shown[-1] >= 1000
