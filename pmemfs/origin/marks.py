"""Marks: a few bytes that say whether somebody has written to an origin since."""

from __future__ import annotations

import hashlib
import mmap

from pmemfs.origin.base import MARK_BYTES, Origin
from pmemfs.units import MIB, align_up


def mark_of(*facts: object) -> bytes:
    """A mark that is another one as soon as any of the facts is."""
    return hashlib.sha256(repr(facts).encode()).digest()[:MARK_BYTES]


async def ends_of(origin: Origin) -> bytes:
    """A checksum of the first and last MiB.

    File systems, partition tables and volume managers keep there what changes when they are used,
    so this sees most of what happens to a device, but not a write to its middle.
    """
    length_bytes = min(MIB, origin.size_bytes)
    # Freed with its last view, because after an error the traceback has one.
    memory = memoryview(mmap.mmap(-1, align_up(max(length_bytes, 1), mmap.PAGESIZE)))
    found = hashlib.sha256()
    for offset_bytes in sorted({0, origin.size_bytes - length_bytes}):
        if length_bytes:
            await origin.read(offset_bytes, [memory[:length_bytes]])
        found.update(memory[:length_bytes])
    return found.digest()
