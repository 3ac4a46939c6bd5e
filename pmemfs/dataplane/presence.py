"""Which chunks of the pool have memory behind each byte, as the file system below says.

In such a chunk the data plane may touch the mapping. Elsewhere it asks for holes and uses system
calls, because a touch would fill the hole. Only one task or thread at a time calls this module.
"""

from __future__ import annotations

from collections.abc import Iterator

from pmemfs.dataplane.layouts import CHUNK_SHIFT, Presence
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.medium.sparse import data_ranges

CHUNK_BYTES = 1 << CHUNK_SHIFT


def survey(shared: SharedMemory, fd: int, start_bytes: int, end_bytes: int) -> None:
    """Find all whole chunks in a range of the pool. It may miss what is written meanwhile."""
    for data_start, data_end in data_ranges(fd, start_bytes, end_bytes):
        first = -(-data_start >> CHUNK_SHIFT)
        for chunk in range(first, data_end >> CHUNK_SHIFT):
            if shared.presence(chunk) is not Presence.WHOLE:
                shared.set_presence(chunk, Presence.WHOLE)


def look_again(shared: SharedMemory, fd: int) -> int:
    """Look again at chunks that had holes and were written to; how many are whole now."""
    found = 0
    for chunk in list(_written_chunks(shared)):
        # Before the look, so that a write which comes during it marks the chunk again.
        shared.set_presence(chunk, Presence.HOLEY)
        start = chunk << CHUNK_SHIFT
        ranges = list(data_ranges(fd, start, start + CHUNK_BYTES))
        if ranges == [(start, start + CHUNK_BYTES)]:
            shared.set_presence(chunk, Presence.WHOLE)
            found += 1
    return found


def expect_holes(shared: SharedMemory, start_bytes: int, end_bytes: int) -> None:
    """Mark all chunks that a range touches: they may have holes from now on."""
    for chunk in range(start_bytes >> CHUNK_SHIFT, (end_bytes - 1 >> CHUNK_SHIFT) + 1):
        shared.set_presence(chunk, Presence.HOLEY)


def _written_chunks(shared: SharedMemory) -> Iterator[int]:
    start, end = shared.areas.presence, shared.areas.sections
    # Parts of the shared memory that were never written to are holes, so they are skipped.
    for data_start, data_end in data_ranges(shared.fd, start, end):
        states = bytes(shared.memory[data_start:data_end])
        position = states.find(Presence.WRITTEN)
        while position >= 0:
            yield data_start + position - start
            position = states.find(Presence.WRITTEN, position + 1)
