"""What every memmap scheme promises.

Invariants:
- a structure of another generation counts as uninitialised, and the first `get` fills it;
- a page with references is in use: its structure stays, and it goes to no other owner. Otherwise a
  transfer under way would touch another file's page;
- nothing here awaits, so what one call does is atomic to all tasks of the control plane.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pmemfs.media.page import Page
from pmemfs.media.zones import Zone
from pmemfs.pfn import PageGeometry, PfnT

# What only reports need is not loaded by a daemon that nobody asks.
if TYPE_CHECKING:
    from pmemfs.media.pagereport import StructureBytes
    from pmemfs.memmap.pieces import Piece


class Access(enum.IntEnum):
    """Why a reference is taken."""

    PIN = 0
    READ = 1
    WRITE = 2


class Usage(NamedTuple):
    """How a page is used and was used; see `Page`."""

    refcount: int
    last_access_ns: int
    reads: int
    writes: int


class Activity(NamedTuple):
    """How a range of pages is used and was used; zeroes where no structure is initialised."""

    is_referenced: bool
    last_access_ns: int
    """The newest of all pages."""
    writes: int
    """Of all pages together."""


class Memmap(ABC):
    """The page structures of a mounted pool."""

    has_pages: bool
    geometry: PageGeometry | None

    @abstractmethod
    def get_page(
        self, pfn: int, access: Access = Access.PIN, mapping: int = 0, index: int = 0
    ) -> None:
        """Take a reference on the page of `pfn`, and account the access.

        `mapping` and `index` say whose page it is, if the caller knows. Raises NotInPool,
        PageReferences if the count is at its maximum, and OSError (ENOSPC) if a sparse pool has no
        memory for the structure. Like all methods it raises MemoryFault if the memory of a
        structure is bad; then no reference was taken.
        """

    @abstractmethod
    def put_page(self, pfn: int) -> None:
        """Drop a reference. Raises PageReferences if there is none."""

    @abstractmethod
    def get_pages(
        self,
        pfn: int,
        pfn_count: int,
        access: Access = Access.PIN,
        mapping: int = 0,
        index: int = 0,
    ) -> None:
        """Do `get_page` once for every page that the range touches; `index` belongs to the first.

        It takes all references or none.
        """

    @abstractmethod
    def put_pages(self, pfn: int, pfn_count: int) -> None:
        """Do `put_page` once for every page that the range touches: for all of them or for none.

        Only if it raises MemoryFault, it has dropped those references whose structures are good.
        """

    @abstractmethod
    def are_referenced(self, pfn: int, pfn_count: int) -> bool:
        """Whether a page that the range touches has a reference. Makes no structure."""

    @abstractmethod
    def clean(self, pfn: int, pfn_count: int) -> None:
        """The content of a range is gone, so no page that lies whole in it is dirty any more."""

    @abstractmethod
    def count_anew(self, pfn: int, pfn_count: int, reads: int = 0, writes: int = 0) -> None:
        """A range is about to get other content, and nobody but the caller uses it: let its pages
        count transfers from these numbers on, and have no last access.

        An uninitialised page stays so, and will count from 0. So a caller with other numbers takes
        its references first.
        """

    @abstractmethod
    def page(self, pfn: int) -> Page | None:
        """A copy of the page's structure, or None if it is uninitialised."""

    @abstractmethod
    def usage(self, pfn: int) -> Usage | None:
        """Of `page` what says how it is used, in a tenth of the time."""

    @abstractmethod
    def activity(self, pfn: int, pfn_count: int) -> Activity:
        """How the pages that a range touches are used. Makes no structure."""

    @abstractmethod
    def pfn_t(self, pfn: int) -> PfnT:
        """The word for a page frame; it points to the page's structure if the scheme has one."""

    @abstractmethod
    def pfn_t_to_page(self, word: int) -> int:
        """The index of the page structure that a word points to. Raises NoPageStructures."""

    @abstractmethod
    def begin_persist(self) -> int:
        """Open a new write epoch; pages written before it are clean after `end_persist(epoch)`."""

    @abstractmethod
    def end_persist(self, epoch: int) -> None:
        """All that was written before the `begin_persist` that returned `epoch` is durable."""

    @abstractmethod
    def scan(
        self, look: Callable[[Piece], None], first_page: int = 0, page_count: int | None = None
    ) -> Iterator[None]:
        """Show `look` the initialised structures of a range of pages, a piece at a time.

        After each piece it yields, and the caller may let others run before it goes on: it makes no
        structure, and only pages that were touched cost time. A page that changes meanwhile is seen
        as it was or as it is. Nothing may `move` structures during a scan. Raises NoPageStructures.
        """

    @abstractmethod
    def memory(self) -> StructureBytes:
        """How much memory the structures take that exist now."""

    @abstractmethod
    def prepare_move(self, zone: Zone) -> None:
        """Do what can be done of `move` while pages are in use. It may run in any thread, or not
        be called at all.

        Raises OSError (ENOSPC).
        """

    @abstractmethod
    def move(self, geometry: PageGeometry, zone: Zone, stale: Sequence[tuple[int, int]]) -> None:
        """Serve these pages from now on, with their structures in that zone of the medium.

        Structures of pages that were there before keep what they say; words (`pfn_t`) that point to
        structures become void. The zone must hold nothing of this generation, except where the old
        zone overlaps it and in the ranges `stale`, in bytes. Raises OSError (ENOSPC) if a sparse
        pool has no memory for the structures; then all is as it was.
        """

    @abstractmethod
    def drop_idle(self, idle_seconds: float) -> int:
        """Give back structures that are not in use and were idle so long; how many."""
