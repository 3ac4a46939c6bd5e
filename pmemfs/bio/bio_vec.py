"""`bio_vec`: a stretch of contiguous page frames, in which I/O is described everywhere.

Invariants: `length` is above zero; `offset` is inside the first frame; a vec may span many frames,
as the kernel's multi-page bvecs do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT, PageGeometry, PfnT, pfn_t_to_pfn, pfn_to_pfn_t

BIO_VEC_DTYPE = np.dtype([("pfn_t", "<u8"), ("length", "<u4"), ("offset", "<u4")])
"""A scatter/gather list as an array: 16 bytes a vec."""


class BioVec(NamedTuple):
    """Contiguous memory of the pool: `length` bytes from `offset` in the frame of `pfn_t`."""

    pfn_t: PfnT
    length: int
    offset: int

    def pool_offset_bytes(self, geometry: PageGeometry | None = None) -> int:
        """Where the memory starts, from the first byte of the pool."""
        return (pfn_t_to_pfn(self.pfn_t, geometry) << PAGE_SHIFT) + self.offset

    @property
    def frame_count(self) -> int:
        """The frames that the memory touches."""
        return (self.offset + self.length + FRAME_BYTES - 1) >> PAGE_SHIFT


def total_bytes(vecs: Iterable[BioVec]) -> int:
    """The length of a scatter/gather list in bytes."""
    return sum(vec.length for vec in vecs)


def merge(vecs: Iterable[BioVec], geometry: PageGeometry | None = None) -> list[BioVec]:
    """The same memory in the fewest vecs: neighbours that touch become one."""
    merged: list[BioVec] = []
    end_bytes = -1
    for vec in vecs:
        start_bytes = vec.pool_offset_bytes(geometry)
        if merged and start_bytes == end_bytes:
            last = merged[-1]
            merged[-1] = last._replace(length=last.length + vec.length)
        else:
            merged.append(vec)
        end_bytes = start_bytes + vec.length
    return merged


def skip_bytes(
    vecs: Sequence[BioVec], count: int, geometry: PageGeometry | None = None
) -> list[BioVec]:
    """What remains of a list after its first `count` bytes, such as a short transfer."""
    rest = list(vecs)
    while rest and count >= rest[0].length:
        count -= rest.pop(0).length
    if rest and count:
        vec = rest[0]
        frames, offset = divmod(vec.offset + count, FRAME_BYTES)
        # A frame in the middle of a huge page has no page structure of its own: only a word with
        # a page-frame number can name it.
        pfn = pfn_t_to_pfn(vec.pfn_t, geometry) + frames
        rest[0] = BioVec(pfn_to_pfn_t(pfn), vec.length - count, offset)
    return rest


def to_array(vecs: Sequence[BioVec]) -> npt.NDArray[np.void]:
    """A list as an array of BIO_VEC_DTYPE."""
    return np.array([tuple(vec) for vec in vecs], BIO_VEC_DTYPE)


def from_array(array: npt.NDArray[np.void]) -> list[BioVec]:
    """The list in an array of BIO_VEC_DTYPE."""
    return [BioVec(*vec) for vec in array.tolist()]
