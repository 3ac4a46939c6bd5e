"""`bio_vec`: a stretch of contiguous page frames, which is how all code here describes I/O.

Invariants: `length` is above zero, `offset` lies in the first frame, and a vec may span many
frames, as the kernel's multi-page bvecs do.
"""

from __future__ import annotations

from typing import NamedTuple

from pmemfs.pfn import PAGE_SHIFT, PageGeometry, PfnT, pfn_t_to_pfn


class BioVec(NamedTuple):
    """Contiguous memory of the pool: `length` bytes from `offset` in the frame of `pfn_t`."""

    pfn_t: PfnT
    length: int
    offset: int

    def pool_offset_bytes(self, geometry: PageGeometry | None = None) -> int:
        """Where the memory starts, counted from the first byte of the pool.

        A word that points to a page structure needs the geometry of those structures.
        """
        return (pfn_t_to_pfn(self.pfn_t, geometry) << PAGE_SHIFT) + self.offset
