"""Files that lie compressed: every operation does to them what it does to plain ones."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio
import trio.testing

from kit.compressible import FILE, FRAME, PIECE, Compressible, text, with_pages
from pmemfs.media.inode import ROOT
from pmemfs.media.transform import Transformation
from pmemfs.volume.base import NOT_PLAIN
from pmemfs.volume.fs.cold import pack_here
from pmemfs.volume.fs.readahead import ReadAhead

KINDS = (Transformation.ZSTD, Transformation.LZ4)


@pytest.fixture
def at() -> Compressible:
    return Compressible.in_memory()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [PIECE, 3 * PIECE, 2 * PIECE + 5 * FRAME + 17, 6 * FRAME])
def test_a_compressed_file_reads_as_before_and_takes_less_room(
    at: Compressible, kind: int, length: int
) -> None:
    free, data = at.free(), text(length)
    number = at.make("file", data, kind)
    blocks, taken = at.fs.attributes(number).block_count, free - at.free()
    at.rewrite(number)
    assert len(at.pieces(number)) == -(-length // PIECE)
    assert at.content(number) == data
    assert at.fs.attributes(number).block_count < blocks
    assert free - at.free() < taken
    at.check()
    assert at.content(number) == data
    assert at.fs.inode(number).transform is not None


def test_every_part_of_a_compressed_file_can_be_read(at: Compressible) -> None:
    data = text(2 * PIECE + 100)
    number = at.packed("file", data)
    chance = random.Random(1)
    for _ in range(300):
        start = chance.randrange(len(data))
        length = chance.randrange(1, len(data))
        assert bytes(at.fs.read(number, start, length)) == data[start : start + length]


def test_what_does_not_shrink_stays_plain(at: Compressible) -> None:
    data = os.urandom(PIECE) + text(PIECE)
    number = at.packed("file", data)
    assert at.pieces(number) == [32]
    assert at.content(number) == data


def test_holes_stay_holes(at: Compressible) -> None:
    number = at.make("file")
    at.fs.write(number, PIECE, text(PIECE))
    at.fs.write(number, 3 * PIECE + FRAME, text(2 * FRAME))
    at.rewrite(number)
    assert at.pieces(number) == [32], "the other range begins with a hole"
    assert at.fs.seek(number, 0, for_data=True) == PIECE
    assert at.fs.seek(number, PIECE + 5, for_data=True) == PIECE + 5
    assert at.fs.seek(number, PIECE + 5, for_data=False) == 2 * PIECE
    assert at.fs.seek(number, 2 * PIECE, for_data=True) == 3 * PIECE + FRAME
    assert not at.fs.has_hole(number, PIECE, PIECE)
    assert at.fs.has_hole(number, PIECE, PIECE + 1)


def test_where_it_lies_is_said_to_be_not_plain(at: Compressible) -> None:
    number = at.packed("file", text(2 * PIECE))
    assert [where for _, where, _ in at.fs.pieces(number, 0, 2 * PIECE, 10)] == [NOT_PLAIN]
    at.fs.make_plain(number, PIECE, 1)
    assert at.pieces(number) == [0]
    assert at.content(number) == text(2 * PIECE)


def punched(data: bytes, start: int, length: int) -> bytes:
    end = min(start + length, len(data))
    return data[:start] + bytes(max(0, end - start)) + data[end:]


Change = Callable[[Compressible, int], object]
DATA = text(4 * PIECE + 3 * FRAME + 100)
CHANGES: dict[str, tuple[Change, Callable[[bytes], bytes]]] = {
    "write": (
        lambda at, n: at.fs.write(n, PIECE + 7, b"x" * 9),
        lambda d: d[: PIECE + 7] + b"x" * 9 + d[PIECE + 16 :],
    ),
    "append": (lambda at, n: at.fs.write(n, len(DATA), b"y" * 99), lambda d: d + b"y" * 99),
    "write behind the end": (
        lambda at, n: at.fs.write(n, 6 * PIECE, b"z"),
        lambda d: d.ljust(6 * PIECE, b"\0") + b"z",
    ),
    "shorter": (
        lambda at, n: at.fs.set_attributes(n, size_bytes=PIECE + 99),
        lambda d: d[: PIECE + 99],
    ),
    "shorter at an edge": (
        lambda at, n: at.fs.set_attributes(n, size_bytes=PIECE),
        lambda d: d[:PIECE],
    ),
    "empty": (lambda at, n: at.fs.set_attributes(n, size_bytes=0), lambda d: b""),
    "longer": (
        lambda at, n: at.fs.set_attributes(n, size_bytes=5 * PIECE + 1),
        lambda d: d.ljust(5 * PIECE + 1, b"\0"),
    ),
    "punch within": (
        lambda at, n: at.fs.punch(n, 100, FRAME * 3),
        lambda d: punched(d, 100, FRAME * 3),
    ),
    "punch whole": (lambda at, n: at.fs.punch(n, PIECE, PIECE), lambda d: punched(d, PIECE, PIECE)),
    "punch over edges": (
        lambda at, n: at.fs.punch(n, PIECE - 9, 2 * PIECE),
        lambda d: punched(d, PIECE - 9, 2 * PIECE),
    ),
    "punch to the end": (
        lambda at, n: at.fs.punch(n, 3 * PIECE + 9, 9 * PIECE),
        lambda d: punched(d, 3 * PIECE + 9, 9 * PIECE),
    ),
    "zero": (
        lambda at, n: at.fs.zero(n, PIECE - 9, 99, keep_size=True),
        lambda d: punched(d, PIECE - 9, 99),
    ),
    "zero longer": (
        lambda at, n: at.fs.zero(n, 4 * PIECE, PIECE, keep_size=False),
        lambda d: punched(d, 4 * PIECE, PIECE).ljust(5 * PIECE, b"\0"),
    ),
    "allocate": (
        lambda at, n: at.fs.allocate(n, 0, 5 * PIECE, keep_size=False),
        lambda d: d.ljust(5 * PIECE, b"\0"),
    ),
    "allocate behind": (
        lambda at, n: at.fs.allocate(n, 5 * PIECE, PIECE, keep_size=True),
        lambda d: d,
    ),
    "collapse": (
        lambda at, n: at.fs.collapse(n, FRAME, 2 * FRAME),
        lambda d: d[:FRAME] + d[3 * FRAME :],
    ),
    "collapse whole": (
        lambda at, n: at.fs.collapse(n, PIECE, PIECE),
        lambda d: d[:PIECE] + d[2 * PIECE :],
    ),
    "collapse across": (
        lambda at, n: at.fs.collapse(n, FRAME, PIECE),
        lambda d: d[:FRAME] + d[FRAME + PIECE :],
    ),
    "insert": (
        lambda at, n: at.fs.insert(n, 3 * FRAME, FRAME),
        lambda d: d[: 3 * FRAME] + bytes(FRAME) + d[3 * FRAME :],
    ),
    "insert whole": (
        lambda at, n: at.fs.insert(n, PIECE, 2 * PIECE),
        lambda d: d[:PIECE] + bytes(2 * PIECE) + d[PIECE:],
    ),
    "copy within": (
        lambda at, n: at.fs.copy(n, 9, n, 2 * PIECE, PIECE),
        lambda d: d[: 2 * PIECE] + d[9 : 9 + PIECE] + d[3 * PIECE :],
    ),
    "make plain": (lambda at, n: at.fs.make_plain(n, 0, 9 * PIECE), lambda d: d),
    "rewrite": (lambda at, n: at.rewrite(n), lambda d: d),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("then", ["nothing", "grow", "rewrite", "append"])
def test_a_change_of_a_compressed_file_does_what_it_does_to_a_plain_one(
    at: Compressible, name: str, then: str
) -> None:
    change, model = CHANGES[name]
    number, expected = at.packed("file", DATA), model(DATA)
    change(at, number)
    assert at.content(number) == expected
    if then == "grow":
        expected = expected.ljust(7 * PIECE, b"\0")
        at.fs.set_attributes(number, size_bytes=7 * PIECE)
    elif then == "append":
        expected += b"tail"
        at.fs.write(number, len(expected) - 4, b"tail")
    elif then == "rewrite":
        at.rewrite(number)
    assert at.content(number) == expected
    at.check()
    assert at.content(number) == expected


def test_rewrite_makes_plain_what_has_no_compression_any_more(at: Compressible) -> None:
    number = at.packed("file", DATA)
    at.set(number, Transformation.NONE)
    at.rewrite(number)
    assert at.pieces(number) == []
    assert at.content(number) == DATA
    at.check()


def test_rewrite_goes_over_to_another_compression(at: Compressible) -> None:
    number = at.packed("file", DATA, Transformation.LZ4)
    before = at.fs.attributes(number).block_count
    at.set(number, Transformation.ZSTD, 19)
    at.rewrite(number)
    assert {piece.id for piece in at.fs.inode(number).pieces.values()} == {Transformation.ZSTD}
    assert at.fs.attributes(number).block_count < before
    assert at.content(number) == DATA
    at.check()


def damage(at: Compressible, number: int, index: int) -> None:
    piece = at.fs.inode(number).pieces[index]
    byte = (piece.pfn << 12) + piece.stored_bytes // 2
    at.medium.store(byte, bytes([at.medium.read(byte, 1)[0] ^ 1]))
    at.fs.frames.packed.forget_all()


def test_a_damaged_piece_is_an_error_for_its_range_which_the_log_names(
    at: Compressible, caplog: pytest.LogCaptureFixture
) -> None:
    number = at.packed("file", DATA)
    damage(at, number, 32)
    for _ in range(2):
        with pytest.raises(OSError, match="checksum") as caught:
            at.fs.read(number, PIECE + 1, 1)
        assert caught.value.errno == errno.EIO
    assert bytes(at.fs.read(number, 0, PIECE)) == DATA[:PIECE]
    assert bytes(at.fs.read(number, 2 * PIECE, PIECE)) == DATA[2 * PIECE : 3 * PIECE]
    (line,) = [record.message for record in caplog.records]
    assert f"inode {number}" in line
    assert f"{PIECE} bytes at {PIECE}" in line
    assert not at.fs.read_only


def test_a_damaged_piece_can_be_removed(at: Compressible) -> None:
    number = at.packed("file", DATA)
    damage(at, number, 32)
    at.fs.punch(number, PIECE, PIECE)
    assert at.content(number) == punched(DATA, PIECE, PIECE)
    damage(at, number, 0)
    at.fs.set_attributes(number, size_bytes=0)
    at.check()


def fill(at: Compressible) -> int:
    """Take all room that is not kept for deletions."""
    number = at.fs.make(ROOT, b"filler", FILE)
    position = 0
    for step in (PIECE, FRAME):
        while True:
            try:
                at.fs.write(number, position, os.urandom(step))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                break
            position += step
    return number


def test_a_full_pool_is_made_to_hold_more(at: Compressible) -> None:
    number = at.make("file", DATA)
    fill(at)
    with pytest.raises(OSError, match="space"):
        at.fs.write(at.make("other"), 0, text(10 * FRAME))
    at.rewrite(number)
    at.fs.tidy()
    at.fs.write(at.fs.lookup(ROOT, b"other"), 0, text(10 * FRAME))
    assert at.content(number) == DATA
    at.check()


@pytest.mark.parametrize(
    "name", ["shorter", "shorter at an edge", "empty", "longer", "punch within", "punch whole",
             "punch over edges", "punch to the end"],
)  # fmt: skip
def test_what_deletes_needs_no_room(at: Compressible, name: str) -> None:
    change, model = CHANGES[name]
    number = at.packed("file", DATA)
    fill(at)
    change(at, number)
    expected = model(DATA)
    assert at.content(number) == expected
    at.fs.set_attributes(number, size_bytes=6 * PIECE)
    assert at.content(number) == expected.ljust(6 * PIECE, b"\0")
    at.fs.unlink(ROOT, b"file")
    at.check()


def test_a_write_that_finds_no_room_to_make_a_piece_plain_changes_nothing(
    at: Compressible,
) -> None:
    number = at.packed("file", DATA)
    fill(at)
    with pytest.raises(OSError, match="space"):
        at.fs.write(number, PIECE, b"x")
    assert at.content(number) == DATA
    at.check()


@pytest.mark.parametrize("name", ["allocate", "zero", "collapse", "insert"])
def test_a_change_of_very_many_pieces_is_made_in_steps(name: str) -> None:
    at = Compressible.in_memory(8000)
    data = text(40 * PIECE)
    number = at.packed("file", data)

    async def change() -> None:
        fs, turns = at.fs, 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            changing = {
                "allocate": lambda: fs.allocate(number, 0, 40 * PIECE, keep_size=True),
                "zero": lambda: fs.zero(number, 0, 39 * PIECE + 5, keep_size=True),
                "collapse": lambda: fs.collapse(number, FRAME, FRAME),
                "insert": lambda: fs.insert(number, FRAME, FRAME),
            }[name]()
            assert changing is not None
            await changing
            nursery.cancel_scope.cancel()
        assert turns > 30

    trio.run(change)
    expected = {
        "allocate": data,
        "zero": punched(data, 0, 39 * PIECE + 5),
        "collapse": data[:FRAME] + data[2 * FRAME :],
        "insert": data[:FRAME] + bytes(FRAME) + data[FRAME:],
    }[name]
    assert at.content(number) == expected
    at.check()


def test_rewrite_finds_what_lies_behind_large_holes() -> None:
    at = Compressible.in_memory()
    number = at.make("file", text(PIECE))
    for place in (1 << 40, (1 << 41) + 5 * PIECE):
        at.fs.write(number, place, text(PIECE + 3 * FRAME))
    at.rewrite(number)
    wanted = [0, *(start + more for start in (1 << 28, (1 << 29) + 160) for more in (0, 32))]
    assert at.pieces(number) == wanted
    at.set(number, Transformation.NONE)
    at.rewrite(number)
    assert at.pieces(number) == []
    assert bytes(at.fs.read(number, 1 << 40, PIECE)) == text(PIECE)


def test_who_reads_on_gets_pieces_that_were_decompressed_meanwhile(at: Compressible) -> None:
    data = text(30 * PIECE)
    number = at.packed("file", data)
    with ThreadPoolExecutor(1) as executor:
        at.fs.frames.packed.ahead = ReadAhead(executor)
        for length in (PIECE, 8 * PIECE, 1000):
            at.fs.frames.packed.forget_all()
            found = [bytes(at.fs.read(number, at_, length)) for at_ in range(0, len(data), length)]
            assert b"".join(found) == data
        damage(at, number, 64)
        at.fs.read(number, 0, PIECE)
        at.fs.read(number, PIECE, PIECE)
        with pytest.raises(OSError, match="checksum"):
            at.fs.read(number, 2 * PIECE, PIECE)
        assert bytes(at.fs.read(number, 3 * PIECE, PIECE)) == data[3 * PIECE : 4 * PIECE]


def test_a_shorter_time_until_files_are_cold_counts_for_those_that_wait_already(
    tmp_path: Path,
) -> None:
    with with_pages(tmp_path) as at:
        at.fs.frames.packed.cold_seconds = 1000
        number = at.make("file", text(2 * PIECE))
        at.step()
        assert at.pieces(number) == []
        at.fs.frames.packed.cold_seconds = 0.001
        time.sleep(0.1)
        at.step()
        assert at.pieces(number) == [0, 32]


def test_the_background_lets_a_user_go_first_after_the_piece_that_it_has(tmp_path: Path) -> None:
    with with_pages(tmp_path) as at:
        cold, wanted = at.make("cold", text(9 * PIECE)), at.make("wanted", text(PIECE))
        cooler, order = at.fs.cooler, []

        async def pack(data: bytes, kind: int, level: int) -> bytes:
            order.append("background")
            await trio.testing.wait_all_tasks_blocked()
            return await pack_here(data, kind, level)

        async def pack_now(data: bytes, kind: int, level: int) -> bytes:
            order.append("user")
            return await pack_here(data, kind, level)

        async def both() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cooler.step)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(cooler.rewrite, wanted)

        cooler.pack, cooler.pack_now = pack, pack_now
        trio.run(both)
        assert "user" in order[:3]
        at.step()
        assert at.pieces(cold)
