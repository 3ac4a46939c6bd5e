"""Scheme `none`: page-frame numbers only.

This is Dan Williams' answer. Whatever needs a page fails with EOPNOTSUPP, and that is intended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from pmemfs.errors import NoPageStructures
from pmemfs.media.page import Page
from pmemfs.media.zones import Zone
from pmemfs.memmap.base import Access, Activity, Memmap, Usage
from pmemfs.pfn import PageGeometry, PfnT, pfn_t_to_page, pfn_to_pfn_t

if TYPE_CHECKING:
    from pmemfs.media.pagereport import StructureBytes
    from pmemfs.memmap.pieces import Piece


class NoMemmap(Memmap):
    """A memmap without page structures."""

    has_pages = False
    geometry = None

    def get_page(
        self, pfn: int, access: Access = Access.PIN, mapping: int = 0, index: int = 0
    ) -> NoReturn:
        raise NoPageStructures(what="a reference to a page")

    def put_page(self, pfn: int) -> NoReturn:
        raise NoPageStructures(what="a reference to a page")

    def get_pages(
        self,
        pfn: int,
        pfn_count: int,
        access: Access = Access.PIN,
        mapping: int = 0,
        index: int = 0,
    ) -> NoReturn:
        raise NoPageStructures(what="a reference to a page")

    def put_pages(self, pfn: int, pfn_count: int) -> NoReturn:
        raise NoPageStructures(what="a reference to a page")

    def are_referenced(self, pfn: int, pfn_count: int) -> bool:
        return False

    def clean(self, pfn: int, pfn_count: int) -> None:
        """Nothing to do: no page is known to be dirty."""

    def count_anew(self, pfn: int, pfn_count: int, reads: int = 0, writes: int = 0) -> None:
        """Nothing to do: nothing is counted."""

    def page(self, pfn: int) -> Page | None:
        raise NoPageStructures(what="the state of a page")

    def usage(self, pfn: int) -> Usage | None:
        raise NoPageStructures(what="the state of a page")

    def activity(self, pfn: int, pfn_count: int) -> Activity:
        raise NoPageStructures(what="the state of pages")

    def pfn_t(self, pfn: int) -> PfnT:
        return pfn_to_pfn_t(pfn)

    def pfn_t_to_page(self, word: int) -> int:
        return pfn_t_to_page(word, None)

    def begin_persist(self) -> int:
        return 0

    def end_persist(self, epoch: int) -> None:
        """Nothing to do: no page is known to be dirty."""

    def scan(
        self, look: Callable[[Piece], None], first_page: int = 0, page_count: int | None = None
    ) -> Iterator[None]:
        raise NoPageStructures(what="the state of pages")

    def memory(self) -> StructureBytes:
        from pmemfs.media.pagereport import StructureBytes

        return StructureBytes(pool_bytes=0, dram_bytes=0)

    def prepare_move(self, zone: Zone) -> None:
        """Nothing to do."""

    def move(self, geometry: PageGeometry, zone: Zone, stale: Sequence[tuple[int, int]]) -> None:
        """Nothing to do: there are no structures."""

    def drop_idle(self, idle_seconds: float) -> int:
        return 0
