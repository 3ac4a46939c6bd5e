"""What every memmap scheme promises.

Invariants:
- a structure of another generation reads as uninitialised and is filled by the first `get`;
- a page with references is in use: nobody may give it to another owner or drop its structure;
- nothing here awaits, so what one call does is atomic to all tasks of the control plane.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from pmemfs.media.page import Page
from pmemfs.media.pagereport import PageReport
from pmemfs.media.zones import Zone
from pmemfs.pfn import PageGeometry, PfnT


class Access(enum.IntEnum):
    """Why a reference is taken."""

    PIN = 0
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class PageCounts:
    """How many pages are in which state. Of the initialised, each is clean or dirty."""

    total: int
    uninitialised: int
    clean: int
    dirty: int
    referenced: int
    in_use: int


class Memmap(ABC):
    """The page structures of a mounted pool."""

    has_pages: bool
    geometry: PageGeometry | None

    @abstractmethod
    def get_page(
        self, pfn: int, access: Access = Access.PIN, mapping: int = 0, index: int = 0
    ) -> None:
        """Take a reference on the page of `pfn`, and account the access.

        `mapping` and `index` say whose page it is, where the caller knows. Raises NotInPool,
        PageReferences where the count is at its maximum, and OSError (ENOSPC) where a sparse pool
        finds no memory for the structure. Raises MemoryFault, as all methods do, where the memory
        of a structure is bad; then no reference was taken.
        """

    @abstractmethod
    def put_page(self, pfn: int) -> None:
        """Drop a reference. Raises PageReferences where nobody holds one."""

    @abstractmethod
    def get_pages(
        self,
        pfn: int,
        pfn_count: int,
        access: Access = Access.PIN,
        mapping: int = 0,
        index: int = 0,
    ) -> None:
        """`get_page` once for every page that the range touches; `index` is of the first one.

        All of them or none.
        """

    @abstractmethod
    def put_pages(self, pfn: int, pfn_count: int) -> None:
        """`put_page` once for every page that the range touches; all of them or none.

        But where it raises MemoryFault, all whose structures can still be touched.
        """

    @abstractmethod
    def are_referenced(self, pfn: int, pfn_count: int) -> bool:
        """Whether anybody holds a page that the range touches. Makes no structure."""

    @abstractmethod
    def clean(self, pfn: int, pfn_count: int) -> None:
        """The content of a range is gone: no page that it covers whole is dirty any more."""

    @abstractmethod
    def page(self, pfn: int) -> Page | None:
        """A copy of the page's structure, or None where it is uninitialised."""

    @abstractmethod
    def pfn_t(self, pfn: int) -> PfnT:
        """The word for a page frame: with its page, where the scheme has one."""

    @abstractmethod
    def pfn_t_to_page(self, word: int) -> int:
        """The index of the page structure of a word. Raises NoPageStructures."""

    @abstractmethod
    def begin_persist(self) -> int:
        """Open a new write epoch; the pages written before are clean once `end_persist(epoch)`."""

    @abstractmethod
    def end_persist(self, epoch: int) -> None:
        """All that was written before the `begin_persist` that answered `epoch` is durable."""

    @abstractmethod
    def counts(self) -> PageCounts:
        """How many pages are in which state. Raises NoPageStructures."""

    @abstractmethod
    def hottest(self, count: int) -> list[PageReport]:
        """The pages with the most transfers, hottest first. Raises NoPageStructures."""

    @abstractmethod
    def prepare_move(self, zone: Zone) -> None:
        """Do what can be done of `move` while pages are in use; in any thread, or never.

        Raises OSError (ENOSPC).
        """

    @abstractmethod
    def move(self, geometry: PageGeometry, zone: Zone, stale: Sequence[tuple[int, int]]) -> None:
        """Have these pages from now on, with their structures in that zone of the medium.

        What is known of pages that were there before stays known; words (`pfn_t`) with a page do
        not. The zone holds nothing of this generation but what lies in the old one, and in the
        ranges `stale`, in bytes. Raises OSError (ENOSPC) where a sparse pool finds no memory for
        the structures, and then all is as it was.
        """

    @abstractmethod
    def drop_idle(self, idle_seconds: float) -> int:
        """Give back structures that nobody needs and that were idle so long; how many."""
