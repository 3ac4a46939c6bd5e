"""Tables on terminals: whatever their width, no fact is left out and no line is longer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.cli import output
from pmemfs.cli.layout import columns_of, table_lines

ROWS = [["pmem0", "/dev/shm/a-long/name", "4"], ["日本", "/x", "12"]]
HEADINGS = ["NAME", "POOL", "SIZE"]


def test_columns_are_as_wide_as_what_is_in_them() -> None:
    assert list(table_lines(ROWS, headings=HEADINGS, right={2})) == [
        "NAME   POOL                  SIZE",
        "pmem0  /dev/shm/a-long/name     4",
        "日本   /x                      12",
    ]


def test_the_widest_text_is_broken_at_spaces_first() -> None:
    lines = table_lines([["kernel", "nothing is known to be wrong"]], width=26)
    assert list(lines) == ["kernel  nothing is known", "        to be wrong"]


def test_where_no_column_can_give_way_each_row_is_a_list_of_facts() -> None:
    assert list(table_lines(ROWS, headings=HEADINGS, right={2}, width=22)) == [
        "NAME  pmem0", "POOL  /dev/shm/a-long/name", "SIZE  4", "",
        "NAME  日本", "POOL  /x", "SIZE  12",
    ]  # fmt: skip


def test_facts_without_headings_are_listed_too() -> None:
    assert list(table_lines([["a-long-name-of-it", "1"]], width=5)) == ["a-long-name-of-it  1"]


def test_nothing_makes_no_line_and_headings_alone_make_one() -> None:
    assert list(table_lines([])) == []
    assert list(table_lines([], headings=HEADINGS)) == ["NAME  POOL  SIZE"]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (28, ["NAME   POOL             SIZE", "pmem0  /dev/shm/a-name     4"]),
        (27, ["POOL             SIZE", "/dev/shm/a-name     4"]),
        (20, ["POOL", "/dev/shm/a-name"]),
    ],
)
def test_columns_are_spared_before_a_text_is_broken(
    width: int,
    shown: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output, "_width", lambda: width)
    output.print_table(HEADINGS, [("pmem0", "/dev/shm/a-name", 4)], spare=["NAME", "SIZE"])
    assert capsys.readouterr().out.splitlines() == shown


@pytest.mark.parametrize("width", [None, 10, 30, 60, 200])
@given(rows=st.lists(st.lists(st.text("ab é日", max_size=40), min_size=3, max_size=3), max_size=4))
def test_every_letter_is_shown(rows: list[list[str]], width: int | None) -> None:
    lines = list(table_lines(rows, headings=HEADINGS, width=width))

    def letters(texts: list[str]) -> list[str]:
        return sorted("".join(texts).replace(" ", ""))

    shown = letters(lines)
    for letter in letters([cell for row in rows for cell in row]):
        shown.remove(letter)
    if width and any(line.startswith("NAME  POOL") for line in lines):
        assert max(map(columns_of, lines)) <= width
