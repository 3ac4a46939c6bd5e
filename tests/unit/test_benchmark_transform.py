"""What the benchmark promises about transformed files: scripts/benchmark/corpora …"""

import sqlite3
from pathlib import Path

import pytest
import zstandard

from benchmark import corpora
from benchmark.cells import KIB, MIB
from benchmark.goals import GOALS, LimitGoal
from benchmark.transformcells import CIPHER_SHAPES, CORPORA, PLAIN_SHAPES, TRANSFORM_CELLS


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_has_about_the_size_that_was_asked_for_and_is_the_same_again(name: str) -> None:
    made = b"".join(corpora.content(name, 2 * MIB))
    assert 2 * MIB <= len(made) < 4 * MIB
    assert made == b"".join(corpora.content(name, 2 * MIB))


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_repeats_nothing_within_a_piece(name: str) -> None:
    made = b"".join(corpora.content(name, 2 * MIB))
    pieces = [made[at : at + corpora.PIECE_BYTES] for at in range(0, 2 * MIB, corpora.PIECE_BYTES)]
    assert len(set(pieces)) == len(pieces)
    packed = [len(zstandard.ZstdCompressor(level=1).compress(piece)) for piece in pieces]
    assert corpora.PIECE_BYTES / 12 < sum(packed) / len(packed) < corpora.PIECE_BYTES * 0.7


def test_a_database_is_one(tmp_path: Path) -> None:
    path = tmp_path / "database"
    path.write_bytes(b"".join(corpora.content("database", MIB)))
    with sqlite3.connect(path) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_pieces_are_compressed_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    made = b"".join(corpora.content("logs", 300 * KIB))
    path.write_bytes(made)
    packed = corpora.compressed(path)
    assert len(packed) == 3
    unpacker = zstandard.ZstdDecompressor()
    assert b"".join(map(unpacker.decompress, packed)) == made


def test_goals_name_cells_and_shapes_that_exist() -> None:
    cells = {cell.name for cell in TRANSFORM_CELLS}
    goals = [goal for goal in GOALS["transform"] if isinstance(goal, LimitGoal)]
    assert len(goals) == len(GOALS["transform"])
    assert {goal.cell for goal in goals} <= cells
    shapes = [goal.reading for goal in goals if goal.cell == "gocryptfs"]
    assert shapes == [f"gocryptfs-{cell.name}" for cell in CIPHER_SHAPES]
    assert {cell.block_bytes for cell in PLAIN_SHAPES} == {4 * KIB}
