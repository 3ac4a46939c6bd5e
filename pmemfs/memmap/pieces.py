"""What a scan of page structures shows at once. Loads numpy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmemfs.media.page import LAYOUT, PageFlags

Records = np.ndarray[tuple[int], np.dtype[np.void]]
"""Consecutive page structures, as an array of media.page.LAYOUT.dtype."""

PIECE_PAGES = 4096
"""So many structures are looked at in well under a millisecond."""

_DIRTY = np.uint16(PageFlags.DIRTY)
_LONGS = LAYOUT.size_bytes // 8


class Piece(NamedTuple):
    """The structures of some pages that were initialised in this mount, in ascending order."""

    pages: npt.NDArray[np.int64]
    """Their places among all structures."""
    records: Records
    is_dirty: npt.NDArray[np.bool_]


def piece_of(first_page: int, memory: memoryview, generation: int, persisted_epoch: int) -> Piece:
    """What is initialised among consecutive structures, as a copy: others may change them."""
    records = np.frombuffer(memory, LAYOUT.dtype)
    places = np.flatnonzero(records["generation"] == generation)
    # As words, because numpy copies structured records field by field.
    words = np.frombuffer(memory, np.uint64).reshape(-1, _LONGS)
    current = words[places].view(LAYOUT.dtype).reshape(-1)
    is_flagged = (current["flags"] & _DIRTY) != 0
    is_dirty = np.asarray(is_flagged & (current["write_epoch"] > persisted_epoch))
    return Piece(places + first_page, current, is_dirty)
