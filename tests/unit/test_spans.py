"""What a range of a file is made of, where some of it lies compressed."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pmemfs.media.transform import PIECE_FRAMES, StoredPiece
from pmemfs.volume.base import HOLE, NOT_PLAIN
from pmemfs.volume.fs.inode import Inode
from pmemfs.volume.fs.spans import compressed_ranges, frame_at, frames_from, spans_of

FRAMES = 6 * PIECE_FRAMES


def piece(frame_count: int) -> StoredPiece:
    return StoredPiece(1000, frame_count, 1, 100, 0, 2)


def inode_with(pieces: dict[int, int], extents: list[tuple[int, int]]) -> Inode:
    """An inode with pieces (frame counts by index), and extents (index, frame count)."""
    made = Inode(1, 0, 0, 0, None)  # type: ignore[arg-type]
    for index, count in pieces.items():
        made.set_piece(index, piece(count))
    for index, count in extents:
        made.extents.map(index, 5000 + 2 * index, count)
    return made


def test_pieces_that_are_neighbours_are_one_part() -> None:
    inode = inode_with({0: 32, 32: 32, 96: 20}, [(64, 32), (150, 2)])
    assert [tuple(span) for span in spans_of(inode, 5, 155)] == [
        (5, NOT_PLAIN, 59), (64, 5128, 32), (96, NOT_PLAIN, 20), (116, HOLE, 34), (150, 5300, 2),
        (152, HOLE, 8),
    ]  # fmt: skip


def test_a_hole_of_terabytes_with_few_pieces_is_searched_by_its_pieces() -> None:
    inode = inode_with({1 << 40: 32, 0: 3}, [])
    assert list(compressed_ranges(inode, 0, 1 << 50)) == [(0, 3), (1 << 40, (1 << 40) + 32)]
    assert list(compressed_ranges(inode, 2, 1 << 40)) == [(2, 3)]
    assert list(compressed_ranges(inode, 3, 1 << 40)) == []


@given(
    st.dictionaries(st.sampled_from(range(0, FRAMES, PIECE_FRAMES)), st.integers(2, PIECE_FRAMES)),
    st.lists(st.tuples(st.integers(0, FRAMES - 1), st.integers(1, 9)), max_size=6),
    st.integers(0, FRAMES),
    st.integers(0, FRAMES),
)  # fmt: skip
def test_each_frame_is_in_the_span_that_it_belongs_to(
    pieces: dict[int, int], wanted: list[tuple[int, int]], start: int, length: int
) -> None:
    compressed = {at for index, count in pieces.items() for at in range(index, index + count)}
    extents = [(at, 1) for index, count in wanted for at in range(index, index + count)
               if at not in compressed]  # fmt: skip
    inode = inode_with(pieces, extents)
    found = list(spans_of(inode, start, length))
    position = start
    for span in found:
        assert span.index == position
        for frame in range(span.frame_count):
            at = span.index + frame
            expected = NOT_PLAIN if at in compressed else inode.extents.find(at)[0]
            assert expected == (span.pfn if span.pfn < 0 else span.pfn + frame)
        position += span.frame_count
    assert position == start + length
    assert all((one.pfn, other.pfn) != (NOT_PLAIN, NOT_PLAIN)
               for one, other in pairwise(found))  # fmt: skip


def test_a_piece_has_its_frames_where_the_first_that_it_stands_for_would_be() -> None:
    inode = inode_with({32: 32, 64: 20}, [(0, 32), (96, 2)])
    inode.set_piece(64, StoredPiece(2000, 20, 3, 9000, 0, 2))
    everything = [(0, 5000, 32), (32, 1000, 1), (64, 2000, 3), (96, 5192, 2)]
    assert [tuple(each) for each in frames_from(inode, 0)] == everything
    assert [tuple(each) for each in frames_from(inode, 33)] == everything[2:]
    assert [tuple(each) for each in frames_from(inode, 65)] == [(65, 2001, 2), everything[3]]
    assert list(frames_from(inode, 98)) == []
    for index, pfn, count in everything:
        for frame in range(count):
            assert frame_at(inode, index + frame) == pfn + frame
    assert [frame_at(inode, index) for index in (33, 63, 67, 90, 98)] == [-1] * 5
