"""Volume `linear` (mode `block`): one device as large as the data zone, byte n at byte n of it.

Invariant: every vec lies in the data zone, so the reserved zones can't be reached by any offset.
"""

from __future__ import annotations

from pmemfs.bio.bio_vec import BioVec
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT, pfn_to_pfn_t
from pmemfs.pool import Pool

INODE = 2
"""The inode number of the device, and the `mapping` of its pages."""


class LinearVolume:
    """The data zone as one device."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.name = pool.label.name
        self._first_pfn = int(pool.first_data_pfn)
        self.look_again()

    def look_again(self) -> None:
        """Be as large as the pool is now; a pool that grows keeps its data where it is."""
        self.size_bytes = self._pool.zones.data.size_bytes

    def bio(self, offset_bytes: int, length_bytes: int) -> list[BioVec]:
        """The frames behind a range, as far as it lies inside the device; [] behind its end."""
        length_bytes = min(length_bytes, self.size_bytes - offset_bytes)
        if length_bytes <= 0 or offset_bytes < 0:
            return []
        pfn = self._first_pfn + (offset_bytes >> PAGE_SHIFT)
        return [BioVec(pfn_to_pfn_t(pfn), length_bytes, offset_bytes & (FRAME_BYTES - 1))]
