"""Pinned pages in the addresses of this process: mapped, and made durable. Loads no numpy."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence

from pmemfs.client.connection import PoolMemory
from pmemfs.client.pieces import lay_out
from pmemfs.errors import BadMapping, TooManyMappings
from pmemfs.medium import writeback
from pmemfs.medium.addresses import Addresses, PinEnd, Shown, Tally
from pmemfs.medium.base import Durability
from pmemfs.pfn import FRAME_BYTES

_FEW_PIECES = 1000
"""A file of fewer pieces fails for want of addresses, not of mappings."""
_MAP_NORESERVE = 0x4000
"""Which only Python 3.13 has in `mmap`: a private mapping of terabytes is no promise of memory."""
_LIMIT = "/proc/sys/vm/max_map_count"


def map_pieces(
    pool: PoolMemory, pieces: Sequence[Sequence[int]], length_bytes: int, *, mode: str, path: str,
    held: PinEnd, tally: Tally, about: object = None,
) -> Addresses:  # fmt: skip
    """Map a range whose pieces the daemon has pinned, for the modes of `Mount.map`.

    Raises BadMapping and TooManyMappings, which name the file `path`, and OSError.
    """
    flags, protection = pool.map_flags, mmap.PROT_READ
    if mode != "r":
        protection |= mmap.PROT_WRITE
    if mode == "c":
        if pool.unit_bytes > FRAME_BYTES:
            why = "a DAX device has no private mappings; copy an array of mode 'r'"
            raise BadMapping(path=path, why=why)
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    layout = lay_out(pieces, pool.unit_bytes, path)
    try:
        return Addresses(
            pool.file.number,
            layout.pieces,
            lead=layout.lead_bytes,
            length=length_bytes,
            unit=layout.unit_bytes,
            shift=layout.shift_bytes,
            prot=protection,
            flags=flags,
            held=held,
            tally=tally,
            about=about,
        )
    except OSError as error:
        if error.errno == errno.ENOMEM and len(layout.pieces) >= _FEW_PIECES:
            raise TooManyMappings(
                path=path, count=len(layout.pieces), limit=_most_mappings()
            ) from None
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None


def make_durable(memory: Addresses, durability: Durability) -> None:
    """Make all stores durable that this thread has made or seen. Raises OSError (EIO)."""
    if durability is Durability.CACHE_LINES:
        writeback.flush_lines(Shown(memory))
        writeback.fence()
    elif durability is Durability.MSYNC:
        writeback.msync(Shown(memory))


def _most_mappings() -> int:
    with open(_LIMIT) as file:
        return int(file.read())
