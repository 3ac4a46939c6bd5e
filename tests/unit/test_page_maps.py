"""Maps of page structures: what is counted in cells and runs, and what a map shows of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.cli.output import Painted, print_painted, wants_colour
from pmemfs.cli.pagemap import (
    LEVELS,
    Shape,
    heat_base,
    heat_level,
    map_lines,
    owner_text,
    shape_of,
    state_letter,
)
from pmemfs.control import ANSWER_LIMIT_BYTES
from pmemfs.control.shape import decode
from pmemfs.media.page import LAYOUT, Page, PageFlags
from pmemfs.media.pagereport import PageOwner
from pmemfs.memmap.pieces import PIECE_PAGES, Piece, piece_of
from pmemfs.memmap.scanning import (
    AlikePages,
    AlikeRuns,
    Cells,
    Counting,
    OwnersOfCells,
)
from pmemfs.observe.answers import (
    FilePages,
    HeldPin,
    OwnerShare,
    PageCell,
    PageMap,
    PagePins,
    PageRun,
    PinnedRange,
)
from pmemfs.observe.pages import (
    MOST_CELLS,
    MOST_FILES,
    MOST_PINS,
    PATHS_BYTES,
    RUNS_AT_ONCE,
    SHOWN_OWNERS,
)
from pmemfs.unsaid import json_values

GENERATION, PERSISTED = 7, 3

pages = st.builds(
    Page,
    generation=st.sampled_from([0, GENERATION - 1, GENERATION, GENERATION, GENERATION]),
    order=st.just(0),
    reserved=st.just(0),
    private=st.just(0),
    flags=st.sampled_from([0, 2, 3]),
    refcount=st.sampled_from([0, 0, 1, 2]),
    mapping=st.integers(0, 3),
    index=st.integers(0, 9),
    last_access_ns=st.integers(0, 5),
    reads=st.sampled_from([0, 1, 2**32 - 1]),
    writes=st.sampled_from([0, 2**32 - 1]),
    write_epoch=st.integers(0, 5),
)
structures = st.lists(pages, min_size=1, max_size=60)


def pieces(given_pages: list[Page], cut: int) -> list[Piece]:
    """What a scan shows of structures that it meets in two stretches."""
    raw = memoryview(b"".join(map(LAYOUT.pack, given_pages)))
    at = min(cut, len(given_pages)) * LAYOUT.size_bytes
    parts = [(0, raw[:at]), (at // LAYOUT.size_bytes, raw[at:])]
    made = [piece_of(first, part, GENERATION, PERSISTED) for first, part in parts if len(part)]
    return [piece for piece in made if len(piece.pages)]


def current(given_pages: list[Page]) -> list[tuple[int, Page]]:
    return [(n, page) for n, page in enumerate(given_pages) if page.generation == GENERATION]


def is_dirty(page: Page) -> bool:
    return bool(page.flags & PageFlags.DIRTY) and page.write_epoch > PERSISTED


@given(structures, st.integers(0, 60), st.integers(1, 70))
def test_cells_add_up_what_their_pages_say(found: list[Page], cut: int, most: int) -> None:
    cells = Cells(len(found), most)
    assert len(cells.clean) <= most
    assert most == 1 or cells.shift == 0 or -(-len(found) >> (cells.shift - 1)) > most
    counting = Counting()
    for piece in pieces(found, cut):
        cells.look(piece)
        counting.look(piece)
    sums = {name: Counter[int]() for name in ("clean", "dirty", "in_use", "reads", "writes")}
    for number, page in current(found):
        cell = number >> cells.shift
        sums["dirty" if is_dirty(page) else "clean"][cell] += 1
        sums["in_use"][cell] += page.refcount > 0
        sums["reads"][cell] += page.reads
        sums["writes"][cell] += page.writes
    for name, counts in sums.items():
        assert getattr(cells, name).tolist() == [counts[n] for n in range(len(cells.clean))]
    assert cells.touched() == sorted({number >> cells.shift for number, _ in current(found)})
    counts = counting.counts(len(found))
    assert (counts.dirty, counts.clean) == (cells.dirty.sum(), cells.clean.sum())
    assert counts.uninitialised == len(found) - len(current(found))


@given(structures, st.integers(0, 60), st.integers(0, 6))
def test_a_cell_has_the_owner_of_most_of_its_pages(found: list[Page], cut: int, shift: int) -> None:
    owners = OwnersOfCells(shift)
    for piece in pieces(found, cut):
        owners.look(piece)
    owners.end()
    in_cells: dict[int, Counter[int]] = {}
    for number, page in current(found):
        in_cells.setdefault(number >> shift, Counter())[page.mapping] += 1
    assert owners.owner_of.keys() == in_cells.keys()
    for cell, owner in owners.owner_of.items():
        assert in_cells[cell][owner] == max(in_cells[cell].values())
    of_all = Counter(page.mapping for _, page in current(found))
    assert owners.largest(9) == sorted(of_all.items(), key=lambda item: (-item[1], item[0]))
    assert owners.page_count == len(current(found))


def test_of_very_many_owners_the_large_ones_are_counted_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OwnersOfCells, "KEPT", 8)
    owners = OwnersOfCells(0)
    number = 100
    for _ in range(50):
        small = [Page(generation=GENERATION, mapping=number + n) for n in range(20)]
        large = [Page(generation=GENERATION, mapping=n % 3 + 1) for n in range(60)]
        number += 20
        for piece in pieces([*small, *large], 0):
            owners.look(piece)
    assert owners.largest(3) == [(1, 1000), (2, 1000), (3, 1000)]
    assert owners.page_count == 4000


@given(structures, st.integers(0, 60))
def test_runs_are_pages_side_by_side_that_are_alike(found: list[Page], cut: int) -> None:
    alike = AlikeRuns()
    for piece in pieces(found, cut):
        alike.look(piece)

    def facts(page: Page) -> tuple[Any, ...]:
        return is_dirty(page), page.refcount, page.reads, page.writes

    covered = [n for run in alike.runs for n in range(run.first_page, run.first_page + run[1])]
    assert covered == [number for number, _ in current(found)]
    for run in alike.runs:
        members = found[run.first_page : run.first_page + run.page_count]
        assert {facts(page) for page in members} == {run[2:6]}
        assert run.last_access_ns == max(page.last_access_ns for page in members)
    for before, behind in zip(alike.runs, alike.runs[1:], strict=False):
        assert not before.goes_on_in(behind), "they are as long as they can be"


def test_one_piece_makes_no_more_runs_than_an_answer_has_room_for() -> None:
    longest = PageRun(2**63 - 1, 2**52, 2**63 - 1, "uninitialised", 2**32 - 1, 2**32 - 1,
                      2**32 - 1, 2**63)  # fmt: skip
    # Between two runs may be pages that nobody touched, which are a run, too.
    runs = (longest,) * (2 * RUNS_AT_ONCE + PIECE_PAGES)
    report = FilePages(2**63, "on-demand", 2**30, 2**63, runs, 2**63)
    assert len(str(json_values(report))) < ANSWER_LIMIT_BYTES
    assert not AlikePages(0, 1, False, 0, 0, 0, 0).goes_on_in(AlikePages(1, 1, True, 0, 0, 0, 0))


def test_the_largest_map_fits_into_an_answer() -> None:
    cell = PageCell(MOST_CELLS, 2**40, 2**40, 2**40, 2**63, 2**63, 2**40)
    share = OwnerShare(PageOwner(2**40, "\udcff" * 4096, ""), 2**40)
    report = PageMap("on-demand", 2**30, 2**62, 2**40, 2**40, 2**30, (cell,) * MOST_CELLS,
                     (share,) * SHOWN_OWNERS, 2**40)  # fmt: skip
    values = json_values(report)
    assert len(str(values["cells"])) + 6 * 4096 * SHOWN_OWNERS < ANSWER_LIMIT_BYTES
    few = report._replace(cells=report.cells[:9])
    assert decode(PageMap, json_values(few)) == few


def test_the_longest_list_of_pins_fits_into_an_answer() -> None:
    files = (PinnedRange(PageOwner(2**63, "", "not found"), 2**63, 2**63),) * MOST_FILES
    pin = HeldPin(2**63, 2**31, "\udcff" * 200, 2**63, True, True, True, 2**52, files, 2**31)
    report = PagePins("on-demand", 2**30, (pin,) * MOST_PINS, 2**31, 2**52)
    assert len(json.dumps(json_values(report))) + PATHS_BYTES < ANSWER_LIMIT_BYTES


@pytest.mark.parametrize(
    ("counts", "letter"),
    [((8, 0, 0), "C"), ((7, 0, 0), "c"), ((7, 1, 0), "d"), ((0, 8, 0), "D"), ((8, 0, 1), "u"),
     ((0, 8, 8), "U")],
)  # fmt: skip
def test_a_mixed_cell_shows_its_strongest_state(counts: tuple[int, int, int], letter: str) -> None:
    clean, dirty, in_use = counts
    assert state_letter(PageCell(0, clean, dirty, in_use, 0, 0), 8) == letter


@given(st.integers(0, 2**64))
def test_the_hottest_cell_has_a_digit_and_no_count_needs_more_than_nine(hottest: int) -> None:
    base = heat_base(map_of(PageCell(0, 1, 0, 0, hottest, 0)), "reads")
    assert base**LEVELS > hottest
    level = heat_level(hottest, base)
    assert 0 <= level <= LEVELS
    assert (level == 0) == (hottest == 0)
    if level:
        assert base ** (level - 1) <= hottest < base**level


def map_of(*cells: PageCell, owners: tuple[OwnerShare, ...] = (), other: int = 0) -> PageMap:
    """A map of 10 cells, the last of which has 2 pages and the others 4."""
    return PageMap("pmem", 4096, 1, 0x200, 38, 4, cells, owners, other)


def text(report: PageMap, by: Any, columns: int = 4) -> list[str]:
    """A map without colours."""
    return ["".join(part.text for part in line) for line in map_lines(report, by, columns)]


CELLS = (PageCell(0, 4, 0, 0, 100, 0, 12), PageCell(1, 3, 1, 0, 0, 5, 13),
         PageCell(9, 0, 2, 1, 1, 1, 0))  # fmt: skip


def test_a_map_of_states_in_plain_characters() -> None:
    assert text(map_of(*CELLS), "state") == [
        "pmem: 38 pages of 4KiB",
        "",
        "0x200  Cd..",
        "0x210  ....",
        "0x220  .u",
        "",
        "A cell is 4 pages, 16KiB; a row is 64KiB, and begins at this pfn.",
        ". untouched   c clean   d dirty   u in use",
        "A mixed cell shows what comes last in this list. C, D, U: all of its pages.",
    ]


def test_a_map_of_reads_in_plain_characters() -> None:
    lines = text(map_of(*CELLS), "reads")
    assert lines[2:5] == ["0x200  70..", "0x210  ....", "0x220  .1"]
    assert lines[-2] == (
        ". untouched   0 no reads   123456789 from 1 to 511 reads of all pages of a cell"
    )
    assert lines[-1] == "Each digit begins at 2 times as many as the one before: 1, 2, 4, …"


def test_a_map_of_owners_names_files_and_what_has_none() -> None:
    shares = (OwnerShare(PageOwner(12, "kv/a b.bin", ""), 4),
              OwnerShare(PageOwner(13, "", "unnamed"), 3))  # fmt: skip
    lines = text(map_of(*CELLS, PageCell(4, 1, 0, 0, 0, 0, 99), owners=shares, other=2), "owner")
    assert lines[2:5] == ["0x200  ab..", "0x210  +...", "0x220  .-"]
    assert lines[-4:] == [
        "     OWNER                     PAGES   SIZE",
        "a    kv/a b.bin                    4  16KiB",
        "b    inode 13 (unnamed)            3  12KiB",
        "+ -  other files, and no file      2   8KiB",
    ]


def test_what_is_known_of_an_owner_is_said() -> None:
    assert owner_text(None) == "-"
    assert owner_text(None, 12) == "inode 12"
    assert owner_text(PageOwner(12, "", "gone")) == "inode 12 (gone)"
    assert owner_text(PageOwner(12, "a/b", "", has_left=True)) == "a/b (has left it)"


@pytest.mark.parametrize("by", ["state", "reads", "writes", "owner"])
def test_no_map_without_a_touched_page_or_of_one_page_fails(by: Any) -> None:
    assert text(map_of(), by)[2] == "0x200  ...."
    one = PageMap("on-demand", 1 << 30, 1, 0x40000, 1, 1, (CELLS[0],))
    assert text(one, by)[2].startswith("0x40000  ")


@pytest.mark.parametrize("columns", [1, 20, 24, 79, 80, 81, 200, 1000])
@pytest.mark.parametrize("lines", [1, 10, 24, 100])
def test_a_map_fits_the_terminal(columns: int, lines: int) -> None:
    shape = shape_of((columns, lines), "state")
    assert shape.columns & (shape.columns - 1) == 0
    assert shape.columns <= max(8, columns - 16)
    assert 2 <= shape.lines <= max(2, lines - 8)


def test_a_pipe_gets_the_same_map_wherever_it_leads() -> None:
    assert shape_of(None, "owner") == shape_of(None, "state") == Shape(64, 16)


def test_only_our_own_colours_are_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [[Painted("a\x1b[2J", "31"), Painted(" b")]]
    print_painted(lines, in_colour=True)
    print_painted(lines, in_colour=False)
    print_painted(lines, in_colour=True, instead=True)
    painted = "\x1b[31ma\\x1b[2J\x1b[0m b"
    assert capsys.readouterr().out == (f"{painted}\na\\x1b[2J b\n\x1b[H{painted}\x1b[K\n\x1b[J")


def test_colours_are_for_terminals_unless_somebody_wishes_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert (wants_colour("always"), wants_colour("auto"), wants_colour("never")) == (
        True, False, False,
    )  # fmt: skip
    monkeypatch.setattr("pmemfs.cli.output.is_terminal", lambda: True)
    assert wants_colour("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour("auto")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour("auto")
