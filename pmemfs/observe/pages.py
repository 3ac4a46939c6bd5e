"""What the daemon of a mount reports of page structures: of all pages, of a file's, of one.

Invariants:
- a report takes a millisecond at a time, and all requests that have come are served in between. So
  a pool of terabytes is looked at without anybody waiting for it;
- an answer has a bounded length, whatever was touched and however a file lies;
- nothing here makes a page structure.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import trio

from pmemfs.errors import NoExtents, NoPageStructures
from pmemfs.fuse.session import Session
from pmemfs.media.page import LAYOUT, Page, PageFlags
from pmemfs.media.pagereport import PageOwner, PageReport
from pmemfs.memmap import effective_scheme
from pmemfs.observe.answers import (
    FilePages,
    HeldPin,
    OwnerShare,
    PageCell,
    PageMap,
    PagePins,
    PageRun,
    Pages,
    PageState,
    PinnedRange,
)
from pmemfs.observe.owners import Owners
from pmemfs.pfn import PAGE_SHIFT, PageGeometry
from pmemfs.pins.registry import Pins
from pmemfs.pool import Pool
from pmemfs.units import MIB
from pmemfs.unsaid import json_values
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.fs.extents import MappedExtent
from pmemfs.volume.fs.spans import frames_from
from pmemfs.volume.onefile import INODE

if TYPE_CHECKING:
    from pmemfs.memmap.pieces import Piece
    from pmemfs.memmap.scanning import AlikePages, Cells

MOST_CELLS = 1 << 14
RUNS_AT_ONCE = 1 << 12
"""An answer has so many runs, and at most as many again as a piece of a scan has pages."""
SHOWN_OWNERS = 52
MOST_PINS, MOST_FILES = 1024, 4
"""Of these an answer names the files."""
PATHS_BYTES = MIB
"""For all paths of an answer together; owners that come later are named by number."""
_MOST_HOTTEST = 1000
_STEP_SECONDS = 0.001
_ESCAPED_BYTES = 6
"""What a letter of a path may take in JSON."""
_NO_END = 1 << 62


class PageObserver:
    """Answers questions about page structures, from the daemon's own objects."""

    def __init__(self, pool: Pool, session: Session, pins: Pins) -> None:
        self._pool = pool
        self._pins = pins
        self._session = session
        self._memmap = session.memmap
        self._volume = session.served.volume
        self._fs = session.served.fs
        self._owners = Owners(self._volume)

    def methods(self) -> dict[str, Callable[..., Awaitable[dict[str, Any]]]]:
        """The questions by name."""
        return {
            "pages": self.pages,
            "page_map": self.page_map,
            "file_pages": self.file_pages,
            "page": self.page,
            "page_pins": self.page_pins,
        }

    async def pages(self, hottest: int) -> dict[str, Any]:
        """The states of all pages, and the hottest pages. Raises NoPageStructures."""
        geometry = self._geometry("counting pages")
        scanning = await _scanning()
        counting = scanning.Counting()
        hot = scanning.Hottest(min(max(0, hottest), _MOST_HOTTEST), geometry)

        def look(piece: Piece) -> None:
            counting.look(piece)
            hot.look(piece)

        async with self._session.grower.memmap_lock:
            await self._scan(look)
        report = Pages(
            scheme=effective_scheme(self._pool).word,
            page_size_bytes=self._pool.label.page_size_bytes,
            generation=self._pool.label.generation,
            counts=asdict(counting.counts(geometry.page_count)),
            hottest=tuple(await self._named(hot.reports())),
        )
        return json_values(report)

    async def page_map(self, cell_count: int, owners: bool | None = None) -> dict[str, Any]:
        """What is known of all pages, in so many cells at most. Raises NoPageStructures."""
        scanning = await _scanning()
        async with self._session.grower.memmap_lock:
            geometry = self._geometry("a map of the pages")
            most = min(max(1, cell_count), MOST_CELLS)
            cells = scanning.Cells(geometry.page_count, most)
            by_owner = scanning.OwnersOfCells(cells.shift) if owners else None

            def look(piece: Piece) -> None:
                cells.look(piece)
                if by_owner is not None:
                    by_owner.look(piece)

            await self._scan(look)
        shares: list[tuple[int, int]] = []
        owner_of: dict[int, int] = {}
        if by_owner is not None:
            by_owner.end()
            # One more, because pages that belong to no inode may be among the largest.
            largest = [share for share in by_owner.largest(SHOWN_OWNERS + 1) if share[0]]
            shares, owner_of = largest[:SHOWN_OWNERS], by_owner.owner_of
        names = await self._owners.of(owner for owner, _ in shares)
        report = PageMap(
            scheme=effective_scheme(self._pool).word,
            page_size_bytes=self._pool.label.page_size_bytes,
            generation=self._pool.label.generation,
            first_pfn=int(geometry.first_pfn),
            page_count=geometry.page_count,
            pages_per_cell=1 << cells.shift,
            cells=tuple(_cells(cells, owner_of)),
            owners=tuple(OwnerShare(names[owner], count) for owner, count in shares),
            other_pages=(by_owner.page_count if by_owner else 0) - sum(n for _, n in shares),
        )
        return json_values(report)

    async def file_pages(self, inode: int, start_bytes: int = 0) -> dict[str, Any]:
        """The pages of a file, from an offset on. Raises NoPageStructures, and NoExtents."""
        scanning = await _scanning()
        turns = _Turns()
        async with self._session.grower.memmap_lock:
            geometry = self._geometry("showing the pages of a file")
            size_bytes, extents = self._extents(inode, max(0, start_bytes) >> PAGE_SHIFT)
            runs: list[PageRun] = []
            next_bytes = None
            for extent in extents:
                alike = scanning.AlikeRuns()
                first = geometry.pfn_to_page(extent.pfn)
                last = geometry.pfn_to_page(extent.pfn + extent.frame_count - 1)
                for _ in self._memmap.scan(alike.look, first, last - first + 1):
                    if len(runs) + len(alike.runs) >= RUNS_AT_ONCE:
                        extent = _up_to(extent, alike.runs[-1], geometry)
                        break
                    await turns.give_way()
                runs += _runs_of(extent, alike.runs, geometry)
                await turns.give_way()
                if len(runs) >= RUNS_AT_ONCE:
                    next_bytes = runs[-1].offset_bytes + runs[-1].length_bytes
                    break
        report = FilePages(
            inode=inode,
            scheme=effective_scheme(self._pool).word,
            page_size_bytes=self._pool.label.page_size_bytes,
            size_bytes=size_bytes,
            runs=tuple(runs),
            next_bytes=next_bytes,
        )
        return json_values(report)

    async def page(self, pfn: int) -> dict[str, Any]:
        """All that is known of the page of a frame. Raises NoPageStructures, NotInPool."""
        await _scanning()
        found: list[Page] = []
        async with self._session.grower.memmap_lock:
            geometry = self._geometry("the state of a page")
            place = geometry.pfn_to_page(pfn)
            dirty: list[bool] = []

            def look(piece: Piece) -> None:
                found.append(LAYOUT.unpack(piece.records[:1].tobytes()))
                dirty.append(bool(piece.is_dirty[0]))

            await self._scan(look, place, 1)
        first_pfn = int(geometry.page_to_pfn(place))
        state = PageState(
            first_pfn=first_pfn,
            frame_count=1 << geometry.order,
            scheme=effective_scheme(self._pool).word,
            generation=self._pool.label.generation,
            page=place,
            pfn_t=int(self._memmap.pfn_t(first_pfn)),
            state=_state(dirty[0]) if found else "uninitialised",
            is_free=self._is_free(first_pfn, 1 << geometry.order),
        )
        for page in found:
            state = await self._with_counts(state, page, geometry)
        return json_values(state)

    async def page_pins(self) -> dict[str, Any]:
        """Who holds which pages, as far as an answer goes. Raises NoPageStructures."""
        self._geometry("a list of pins")
        pins = [(pin, False) for pin in self._pins.living]
        pins += [(pin, True) for pin in self._pins.resting]
        pins.sort(key=lambda found: (-found[0].page_count, found[0].number))
        shown, others = pins[:MOST_PINS], pins[MOST_PINS:]
        files = {pin.number: pin.files[:MOST_FILES] for pin, _ in shown}
        names = await self._owners.of(file.inode for some in files.values() for file in some)
        held, turns, room = [], _Turns(), _Room()
        for pin, is_resting in shown:
            ranges = [
                PinnedRange(room.fitting(names[file.inode]), file.offset_bytes, file.length_bytes)
                for file in files[pin.number]
            ]
            held.append(
                HeldPin(
                    pin=pin.number, pid=pin.client.pid, command=pin.client.command,
                    since_ns=pin.since_ns, writable=pin.is_writable, is_resting=is_resting,
                    is_stale=pin.is_stale, page_count=pin.page_count, files=tuple(ranges),
                    other_files=len(pin.files) - len(ranges),
                )
            )  # fmt: skip
            await turns.give_way()
        report = PagePins(
            scheme=effective_scheme(self._pool).word,
            page_size_bytes=self._pool.label.page_size_bytes,
            pins=tuple(held),
            other_pins=len(others),
            other_pages=sum(pin.page_count for pin, _ in others),
        )
        return json_values(report)

    async def _with_counts(self, state: PageState, page: Page, geometry: PageGeometry) -> PageState:
        """A state with what the page's structure says."""
        owner = None
        if page.mapping:
            names = await self._owners.of([page.mapping])
            owner = self._checked(names[page.mapping], page.index, state.first_pfn)
        return state._replace(
            referenced=bool(page.flags & PageFlags.REFERENCED),
            refcount=page.refcount,
            reads=page.reads,
            writes=page.writes,
            last_access_ns=page.last_access_ns,
            write_epoch=page.write_epoch,
            owner=owner,
            offset_bytes=page.index << (PAGE_SHIFT + geometry.order),
        )

    async def _named(self, reports: list[PageReport]) -> list[PageReport]:
        """Reports of pages, with the names of their owners."""
        names = await self._owners.of(report.mapping for report in reports)
        room, named = _Room(), []
        for report in reports:
            if report.mapping:
                owner = room.fitting(names[report.mapping])
                owner = self._checked(owner, report.index, report.pfn)
                report = report._replace(owner=owner)
            named.append(report)
        return named

    def _checked(self, owner: PageOwner, index: int, pfn: int) -> PageOwner:
        """An owner, and whether the page has left it. A larger page may belong to several."""
        geometry = self._memmap.geometry
        is_frame = geometry is not None and geometry.order == 0
        has_left = is_frame and self._owners.has_left(owner.inode, index, pfn)
        return owner._replace(has_left=has_left or owner.note == "gone")

    def _is_free(self, pfn: int, frame_count: int) -> bool | None:
        if self._fs is None:
            return None
        is_free = self._fs.allocator.is_free
        return all(is_free(frame) for frame in range(pfn, pfn + min(frame_count, 512)))

    def _geometry(self, what: str) -> PageGeometry:
        geometry = self._memmap.geometry
        if geometry is None:
            raise NoPageStructures(what=what)
        return geometry

    def _extents(self, inode: int, index: int) -> tuple[int, Iterator[MappedExtent]]:
        """The size of a file, and its extents from a frame on. Raises NoExtents."""
        if self._fs is None:
            volume = self._volume
            if inode != INODE or not isinstance(volume, BlockVolume):
                raise NoExtents(path=f"inode {inode}", why="it is not the device")
            frame_count = (volume.size_bytes >> PAGE_SHIFT) - index
            rest = MappedExtent(index, int(self._pool.first_data_pfn) + index, frame_count)
            return volume.size_bytes, iter([rest] if frame_count > 0 else [])
        try:
            size_bytes = self._fs.attributes(inode).size_bytes
            frames = frames_from(self._fs.frames.file(inode), index)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise NoExtents(path=f"inode {inode}", why=why) from None
        return size_bytes, frames

    async def _scan(
        self, look: Callable[[Piece], None], first_page: int = 0, page_count: int | None = None
    ) -> None:
        """Look at pages a millisecond at a time, with other tasks in between."""
        turns = _Turns()
        for _ in self._memmap.scan(look, first_page, page_count):
            await turns.give_way()


class _Room:
    """The room for paths in an answer."""

    def __init__(self) -> None:
        self._left = PATHS_BYTES

    def fitting(self, owner: PageOwner) -> PageOwner:
        """An owner, without its path where there is no room for that."""
        self._left -= _ESCAPED_BYTES * len(owner.path)
        return owner if self._left >= 0 else owner._replace(path="")


class _Turns:
    """Lets other tasks have their turn every millisecond."""

    def __init__(self) -> None:
        self._until = time.perf_counter() + _STEP_SECONDS

    async def give_way(self) -> None:
        """Wait until all tasks that can run have run, if it is time for that."""
        if time.perf_counter() >= self._until:
            await trio.lowlevel.checkpoint()
            self._until = time.perf_counter() + _STEP_SECONDS


async def _scanning() -> ModuleType:
    """What looks at page structures. A thread loads it, because that loads numpy."""
    return await trio.to_thread.run_sync(importlib.import_module, "pmemfs.memmap.scanning")


def _cells(cells: Cells, owner_of: dict[int, int]) -> Iterator[PageCell]:
    """The cells in which a page was touched."""
    for cell in cells.touched():
        yield PageCell(
            cell=cell,
            clean=int(cells.clean[cell]),
            dirty=int(cells.dirty[cell]),
            in_use=int(cells.in_use[cell]),
            reads=int(cells.reads[cell]),
            writes=int(cells.writes[cell]),
            owner=owner_of.get(cell, 0),
        )


def _up_to(extent: MappedExtent, run: AlikePages, geometry: PageGeometry) -> MappedExtent:
    """An extent up to the end of some pages."""
    end = geometry.first_pfn + ((run.first_page + run.page_count) << geometry.order)
    return extent._replace(frame_count=min(extent.frame_count, end - extent.pfn))


def _runs_of(
    extent: MappedExtent, alike: list[AlikePages], geometry: PageGeometry
) -> Iterator[PageRun]:
    """The pages of an extent in order, those between `alike` as uninitialised."""
    at, end = extent.pfn, extent.pfn + extent.frame_count

    def frames(first: int, behind: int) -> dict[str, int]:
        offset_bytes = (extent.index + first - extent.pfn) << PAGE_SHIFT
        length_bytes = (behind - first) << PAGE_SHIFT
        return {"offset_bytes": offset_bytes, "pfn": first, "length_bytes": length_bytes}

    for run in alike:
        # A larger page may reach out of the extent.
        start = geometry.first_pfn + (run.first_page << geometry.order)
        first, behind = max(at, start), min(end, start + (run.page_count << geometry.order))
        if first >= behind:
            continue
        if at < first:
            yield PageRun(**frames(at, first), state="uninitialised")
        yield PageRun(
            **frames(first, behind), state=_state(run.is_dirty), refcount=run.refcount,
            reads=run.reads, writes=run.writes, last_access_ns=run.last_access_ns,
        )  # fmt: skip
        at = behind
    if at < end:
        yield PageRun(**frames(at, end), state="uninitialised")


def _state(is_dirty: bool) -> Literal["clean", "dirty"]:
    return "dirty" if is_dirty else "clean"
