"""What tests ask of all page structures at once."""

from __future__ import annotations

from pmemfs.errors import NoPageStructures
from pmemfs.media.pagereport import PageReport
from pmemfs.memmap.base import Memmap
from pmemfs.memmap.scanning import Counting, Hottest, PageCounts


def counts_of(memmap: Memmap) -> PageCounts:
    """How many pages are in which state. Raises NoPageStructures."""
    counting = Counting()
    for _ in memmap.scan(counting.look):
        pass
    assert memmap.geometry is not None
    return counting.counts(memmap.geometry.page_count)


def hottest_of(memmap: Memmap, count: int) -> list[PageReport]:
    """The pages with the most transfers, hottest first. Raises NoPageStructures."""
    if memmap.geometry is None:
        raise NoPageStructures(what="finding the hottest pages")
    found = Hottest(count, memmap.geometry)
    for _ in memmap.scan(found.look):
        pass
    return found.reports()
