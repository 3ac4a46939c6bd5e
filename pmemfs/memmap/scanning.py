"""Scans of page structures: what was touched, a piece at a time, so that nothing waits for all.

Whoever scans gives each piece to what counts in it (`Counting`, `Hottest`, …) and may do something
else before the next one. Loads numpy.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pmemfs.media.page import PageFlags
from pmemfs.media.pagereport import PageReport
from pmemfs.memmap.pieces import Piece
from pmemfs.pfn import PageGeometry

if TYPE_CHECKING:
    import numpy.typing as npt


_REFERENCED = np.uint16(PageFlags.REFERENCED)


@dataclass(frozen=True, slots=True)
class PageCounts:
    """How many pages are in which state. Each initialised page is either clean or dirty."""

    total: int
    uninitialised: int
    clean: int
    dirty: int
    referenced: int
    in_use: int


class Counting:
    """Counts pages by their states."""

    def __init__(self) -> None:
        self._initialised = self._dirty = self._referenced = self._in_use = 0

    def look(self, piece: Piece) -> None:
        """Count a piece."""
        self._initialised += len(piece.pages)
        self._dirty += int(np.count_nonzero(piece.is_dirty))
        self._referenced += int(np.count_nonzero(piece.records["flags"] & _REFERENCED))
        self._in_use += int(np.count_nonzero(piece.records["refcount"]))

    def counts(self, page_count: int) -> PageCounts:
        """What was counted, of so many pages."""
        return PageCounts(
            total=page_count,
            uninitialised=page_count - self._initialised,
            clean=self._initialised - self._dirty,
            dirty=self._dirty,
            referenced=self._referenced,
            in_use=self._in_use,
        )


class Hottest:
    """Finds the pages with the most transfers; of two alike, the first."""

    def __init__(self, count: int, geometry: PageGeometry) -> None:
        self._count = count
        self._geometry = geometry
        self._best: list[tuple[int, int, PageReport]] = []

    def look(self, piece: Piece) -> None:
        """Look for hot pages in a piece."""
        records = piece.records
        heat = records["reads"].astype(np.int64) + records["writes"]
        # What is not hotter than all that were found need not be sorted.
        least = self._best[-1][0] if len(self._best) >= self._count > 0 else 0
        hot = np.flatnonzero(heat > least)
        for position in hot[np.argsort(-heat[hot], kind="stable")[: self._count]]:
            page = int(piece.pages[position])
            report = _report(self._geometry, piece, int(position))
            self._best.append((int(heat[position]), -page, report))
        self._best = heapq.nlargest(self._count, self._best)

    def reports(self) -> list[PageReport]:
        """The pages that were found, hottest first."""
        return [report for _, _, report in self._best]


def _report(geometry: PageGeometry, piece: Piece, position: int) -> PageReport:
    record = piece.records[position : position + 1]
    return PageReport(
        pfn=int(geometry.page_to_pfn(int(piece.pages[position]))),
        mapping=int(record["mapping"][0]),
        index=int(record["index"][0]),
        refcount=int(record["refcount"][0]),
        dirty=bool(piece.is_dirty[position]),
        reads=int(record["reads"][0]),
        writes=int(record["writes"][0]),
        last_access_ns=int(record["last_access_ns"][0]),
    )


class Cells:
    """Counts pages by states and transfers in cells, each a range of pages of one size."""

    def __init__(self, page_count: int, most_cells: int) -> None:
        """As few pages a cell as `most_cells` allows, and a power of two."""
        shift = max(0, (-(-page_count // most_cells) - 1).bit_length())
        self.shift = shift
        count = -(-page_count >> shift)
        self.clean, self.dirty, self.in_use, self.reads, self.writes = (
            np.zeros(count, np.int64) for _ in range(5)
        )

    def look(self, piece: Piece) -> None:
        """Count a piece."""
        records, cells = piece.records, piece.pages >> self.shift
        starts = np.flatnonzero(np.diff(cells, prepend=-1))
        met = cells[starts]

        def add(sums: npt.NDArray[np.int64], values: npt.NDArray[np.generic]) -> None:
            sums[met] += np.add.reduceat(values, starts, dtype=np.int64)

        add(self.dirty, piece.is_dirty)
        add(self.clean, ~piece.is_dirty)
        add(self.in_use, records["refcount"] != 0)
        add(self.reads, records["reads"])
        add(self.writes, records["writes"])

    def touched(self) -> list[int]:
        """The cells in which a page was touched."""
        return np.flatnonzero(self.clean + self.dirty).tolist()


class OwnersOfCells:
    """Counts pages by their owners: the largest of each cell, and the largest of all."""

    KEPT = 4096
    """Of so many owners all pages are counted. With more of them, small owners may lose some."""

    def __init__(self, shift: int) -> None:
        self._shift = shift
        self.owner_of: dict[int, int] = {}
        """The owner of most pages of a cell."""
        self._cell = -1
        self._in_cell: dict[int, int] = {}
        self._all: dict[int, int] = {}
        self.page_count = 0

    def look(self, piece: Piece) -> None:
        """Count a piece."""
        owners, cells = piece.records["mapping"], piece.pages >> self._shift
        begins = np.ones(len(owners), np.bool_)
        begins[1:] = (owners[1:] != owners[:-1]) | (cells[1:] != cells[:-1])
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(owners))
        # Owners come in runs, because files do.
        for cell, owner, length in zip(
            cells[starts].tolist(), owners[starts].tolist(), lengths.tolist(), strict=True
        ):
            if cell != self._cell:
                self._end_cell()
                self._cell = cell
            self._in_cell[owner] = self._in_cell.get(owner, 0) + length
            self._all[owner] = self._all.get(owner, 0) + length
        self.page_count += len(owners)
        if len(self._all) > 2 * self.KEPT:
            self._all = dict(self.largest(self.KEPT))

    def end(self) -> None:
        """There are no more pieces."""
        self._end_cell()

    def largest(self, count: int) -> list[tuple[int, int]]:
        """The owners of most pages, and how many pages of each; the largest first."""
        return heapq.nlargest(count, self._all.items(), key=lambda item: (item[1], -item[0]))

    def _end_cell(self) -> None:
        if self._in_cell:
            # Of two that have as many, the one that comes first.
            self.owner_of[self._cell] = max(self._in_cell, key=self._in_cell.__getitem__)
        self._in_cell = {}


class AlikePages(NamedTuple):
    """Pages side by side whose structures say the same."""

    first_page: int
    page_count: int
    is_dirty: bool
    refcount: int
    reads: int
    writes: int
    last_access_ns: int
    """Of the page that was accessed last."""

    def goes_on_in(self, other: AlikePages) -> bool:
        """Whether another run begins where this one ends, and says the same."""
        return other.first_page == self.first_page + self.page_count and self[2:6] == other[2:6]


class AlikeRuns:
    """Joins pages that are alike and lie side by side; pages that nobody touched are in no run."""

    def __init__(self) -> None:
        self.runs: list[AlikePages] = []

    def look(self, piece: Piece) -> None:
        """Join the pages of a piece."""
        records, pages = piece.records, piece.pages
        names = ("refcount", "reads", "writes")
        begins = np.ones(len(pages), np.bool_)
        is_alike = (pages[1:] == pages[:-1] + 1) & (piece.is_dirty[1:] == piece.is_dirty[:-1])
        for name in names:
            is_alike &= records[name][1:] == records[name][:-1]
        begins[1:] = ~is_alike
        starts = np.flatnonzero(begins)
        ends = np.append(starts[1:], len(pages))
        newest = np.maximum.reduceat(records["last_access_ns"], starts)
        columns = (
            pages[starts], ends - starts, piece.is_dirty[starts],
            *(records[name][starts] for name in names), newest,
        )  # fmt: skip
        for row in zip(*(column.tolist() for column in columns), strict=True):
            run = AlikePages(*row)
            last = self.runs[-1] if self.runs else None
            if last is not None and last.goes_on_in(run):
                newest_ns = max(last.last_access_ns, run.last_access_ns)
                count = last.page_count + run.page_count
                self.runs[-1] = last._replace(page_count=count, last_access_ns=newest_ns)
            else:
                self.runs.append(run)
