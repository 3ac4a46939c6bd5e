"""`kmap`: from page frames to memory, through a registry of who maps which frames.

After the `kmap_atomic_pfn_t` of the 2015 patch set, where each driver announced the range that it
serves. Invariant: ranges do not overlap, so a frame has one mapping at most.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from pmemfs.bio.bio_vec import BioVec
from pmemfs.errors import BadGeometry, NotInPool
from pmemfs.medium.base import ByteRange, Medium
from pmemfs.pfn import PAGE_SHIFT, PageGeometry, pfn_t_to_pfn


@dataclass(frozen=True, slots=True)
class Mapping:
    """Frames that a medium serves; frame `first_pfn` starts at `offset_bytes` of it."""

    first_pfn: int
    pfn_count: int
    medium: Medium
    offset_bytes: int

    @property
    def end_pfn(self) -> int:
        """The first frame behind the mapping."""
        return self.first_pfn + self.pfn_count


class KmapRegistry:
    """All mappings of a process."""

    def __init__(self) -> None:
        self._mappings: list[Mapping] = []

    def register(self, mapping: Mapping) -> None:
        """Announce a mapping. Raises BadGeometry where another one serves a frame of it."""
        position = bisect.bisect(self._mappings, mapping.first_pfn, key=lambda m: m.first_pfn)
        before = self._mappings[position - 1 : position] if position else []
        after = self._mappings[position : position + 1]
        if any(m.end_pfn > mapping.first_pfn for m in before) or any(
            m.first_pfn < mapping.end_pfn for m in after
        ):
            raise BadGeometry(why=f"page frame {mapping.first_pfn:#x} and up are mapped already")
        self._mappings.insert(position, mapping)

    def unregister(self, mapping: Mapping) -> None:
        """Withdraw a mapping."""
        self._mappings.remove(mapping)

    def find(self, pfn: int, pfn_count: int = 1) -> Mapping:
        """The mapping that serves all of a range of frames. Raises NotInPool."""
        position = bisect.bisect(self._mappings, pfn, key=lambda m: m.first_pfn) - 1
        if position >= 0 and pfn + pfn_count <= self._mappings[position].end_pfn:
            return self._mappings[position]
        raise NotInPool(pfn=pfn)

    def locate(self, vec: BioVec, geometry: PageGeometry | None = None) -> tuple[Medium, ByteRange]:
        """The medium of a vec, and the range of it. Raises NotInPool.

        A word with a page needs the geometry of the page structures that it points into.
        """
        pfn = pfn_t_to_pfn(vec.pfn_t, geometry)
        mapping = self.find(pfn, vec.frame_count)
        start = mapping.offset_bytes + ((pfn - mapping.first_pfn) << PAGE_SHIFT) + vec.offset
        return mapping.medium, ByteRange(start, vec.length)

    def kmap(self, vec: BioVec, geometry: PageGeometry | None = None) -> memoryview:
        """The memory of a vec, for as long as its frames stay where they are.

        Raises NotInPool, and OSError (ENOSPC) where a sparse medium finds no memory for them.
        """
        medium, part = self.locate(vec, geometry)
        medium.reserve(*part)
        return medium.view(*part)
