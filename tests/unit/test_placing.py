"""How much a write into a hole takes, and where: strides, pieces in any order, sequences, gaps."""

from __future__ import annotations

import random

import pytest

from kit.fs_crash import FILE, FRAME, ROOT, PlainMedium, blank_image, on_medium, template
from pmemfs.media.filesystem import CHUNK_FRAMES
from pmemfs.memmap.none import NoMemmap
from pmemfs.volume.fs import placing
from pmemfs.volume.fs.filesystem import FileSystem

KIB = 1 << 10
MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def fs() -> FileSystem:
    """A file system of 96 MiB, empty."""
    image = blank_image(96 * MIB // FRAME)
    pool = on_medium(template(len(image)), PlainMedium(image))
    FileSystem.format(pool)
    return FileSystem(pool, NoMemmap())


def make(fs: FileSystem, name: bytes, size_bytes: int = 0) -> int:
    number = fs.make(ROOT, name, FILE)
    if size_bytes:
        fs.set_attributes(number, size_bytes=size_bytes)
    return number


def taken(fs: FileSystem, number: int) -> int:
    """The frames of the content of a file."""
    return fs.inode(number).extents.frame_count


def aligned(fs: FileSystem, number: int) -> int:
    """The frames that lie in the pool's chunks as they do in the file's."""
    first = fs.geometry.first_pfn
    return sum(
        extent.frame_count
        for extent in fs.extents(number)
        if (extent.pfn - first - extent.index) % CHUNK_FRAMES == 0
    )


@pytest.mark.parametrize("size_bytes", [SIZE, 0], ids=["in a hole", "growing"])
@pytest.mark.parametrize("stride", [5 * FRAME, 100 * KIB, MIB])
def test_a_page_at_each_stride_takes_a_page(fs: FileSystem, stride: int, size_bytes: int) -> None:
    number = make(fs, b"a", size_bytes)
    places = range(0, SIZE, stride)
    for at in places:
        fs.write(number, at, b"x" * FRAME)
    assert taken(fs, number) == len(places)
    # A log that is half dead at most, in frames of 63 records.
    assert len(fs.inode(number).log.frames) <= len(places) // 60 + 1
    before = fs.room().free_frames
    fs.unlink(ROOT, b"a")
    assert fs.room().free_frames >= before + len(places)


@pytest.mark.parametrize("size_bytes", [SIZE, 0], ids=["in a hole", "growing"])
@pytest.mark.parametrize("piece", [16 * KIB, 256 * KIB, MIB, 4 * MIB])
def test_pieces_in_any_order_end_as_chunks_that_are_aligned(
    fs: FileSystem, piece: int, size_bytes: int
) -> None:
    number = make(fs, b"a", size_bytes)
    places = list(range(0, SIZE, piece))
    random.Random(piece).shuffle(places)
    for count, at in enumerate(places):
        # The kernel's requests have 1 MiB at most.
        for part in range(at, at + piece, MIB):
            fs.write(number, part, b"x" * min(piece, MIB))
        # Others need frames meanwhile.
        fs.write(fs.make(ROOT, b"other %d" % count, FILE), 0, b"y" * 100)
        if size_bytes:
            assert taken(fs, number) * FRAME <= (count + 1) * piece * 9 // 8
    fs.trim_ahead(number)
    assert taken(fs, number) == aligned(fs, number) == SIZE // FRAME
    assert len(fs.extents(number)) <= SIZE // FRAME // CHUNK_FRAMES


def test_pages_in_any_order_end_as_few_extents_and_a_short_log(fs: FileSystem) -> None:
    number = make(fs, b"a", SIZE)
    places = list(range(0, SIZE, 2 * FRAME))
    random.Random(0).shuffle(places)
    for count, at in enumerate(places):
        fs.write(number, at, b"x" * 2 * FRAME)
        if count == len(places) // 2:
            assert taken(fs, number) <= len(places) * 17 // 16
            assert len(fs.extents(number)) < len(places) // 3
    assert taken(fs, number) == SIZE // FRAME
    assert len(fs.extents(number)) <= SIZE // FRAME // CHUNK_FRAMES
    assert len(fs.inode(number).log.frames) <= 3


def test_a_file_of_very_many_extents_gets_larger_pieces(
    fs: FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "_GRAINS", ((100, 1), (200, 4), (300, 16)))
    number = make(fs, b"a", SIZE)
    places = list(range(0, SIZE, FRAME))
    random.Random(0).shuffle(places)
    for at in places[: len(places) // 2]:
        fs.write(number, at, b"x" * FRAME)
        assert len(fs.extents(number)) <= 300 + SIZE // FRAME // CHUNK_FRAMES
    data = fs.read(number, 0, SIZE)
    written = set(places[: len(places) // 2])
    for at in places:
        assert data[at : at + FRAME] == (b"x" if at in written else b"\0") * FRAME


@pytest.mark.parametrize("piece", [FRAME, 5000, 128 * KIB, MIB])
def test_a_sequence_in_a_hole_is_mapped_ahead_by_an_eighth_at_most(
    fs: FileSystem, piece: int
) -> None:
    number = make(fs, b"a", SIZE)
    end = fills = 0
    while end + piece <= 12 * MIB:
        before = taken(fs, number)
        fs.write(number, end, b"x" * piece)
        end += piece
        fills += taken(fs, number) > before
        assert taken(fs, number) <= -(-end // FRAME) * 9 // 8
    # What the data plane can't do by itself grows by the logarithm of the whole.
    assert fills <= 75
    # Somewhere else, nothing is known of more to come.
    before = taken(fs, number)
    fs.write(number, SIZE - MIB, b"x" * FRAME)
    assert taken(fs, number) == before + 1


def test_what_was_mapped_ahead_fills_no_gap(fs: FileSystem) -> None:
    number = make(fs, b"a")
    for at in range(0, 3 * MIB, FRAME):
        fs.write(number, at, b"x" * FRAME)
    assert taken(fs, number) > 3 * MIB // FRAME
    fs.write(number, 3 * MIB + 10, b"x")
    fs.write(number, 4 * MIB + 10, b"x")
    fs.write(number, 13 * MIB, b"x" * FRAME)
    assert fs.read(number, 3 * MIB, MIB + 20) == bytes(10) + b"x" + bytes(MIB - 1) + b"x" + bytes(9)
    fs.trim_ahead(number)
    assert taken(fs, number) == 3 * MIB // FRAME + 3
    fs.write(number, 13 * MIB + FRAME, b"x" * FRAME)
    assert taken(fs, number) > 3 * MIB // FRAME + 4
    fs.set_attributes(number, size_bytes=20 * MIB)
    assert taken(fs, number) == 3 * MIB // FRAME + 4


def test_small_demands_take_frames_that_are_held_before_they_fail(fs: FileSystem) -> None:
    number = make(fs, b"a", 64 * MIB)
    for at in range(0, 64 * MIB, 2 * MIB):
        fs.write(number, at, b"x" * FRAME)
    other, at = make(fs, b"b"), 0
    while fs.room().free_frames >= fs.room().reserved_frames + 70:
        fs.write(other, at, b"x" * 60 * FRAME)
        at += 100 * FRAME
    assert taken(fs, number) == 32


def test_the_last_close_lets_others_have_what_was_held(fs: FileSystem) -> None:
    number = make(fs, b"a", SIZE)
    fs.write(number, 0, b"x" * FRAME)
    small = [make(fs, b"%d" % at) for at in range(2)]
    pfns = []
    for other in small:
        fs.write(other, 0, b"x" * 300 * FRAME)
        pfns.append(fs.extents(other)[0].pfn)
        fs.trim_ahead(number)
    held = fs.extents(number)[0].pfn
    assert not held <= pfns[0] < held + CHUNK_FRAMES
