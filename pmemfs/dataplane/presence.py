"""Which chunks of the pool have memory behind all of their bytes, as the file system below says.

In such a chunk the data plane may touch the mapping; elsewhere it asks for holes and goes through
system calls, since a touch would fill them. Called from one task or thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

from pmemfs.dataplane.layouts import CHUNK_SHIFT, Presence
from pmemfs.dataplane.sparse import data_ranges
from pmemfs.dataplane.tables import SharedMemory

CHUNK_BYTES = 1 << CHUNK_SHIFT


def survey(shared: SharedMemory, fd: int, start_bytes: int, end_bytes: int) -> None:
    """Find all whole chunks in a range of the pool. What is written meanwhile may be missed."""
    for data_start, data_end in data_ranges(fd, start_bytes, end_bytes):
        first = -(-data_start >> CHUNK_SHIFT)
        for chunk in range(first, data_end >> CHUNK_SHIFT):
            if shared.presence(chunk) is not Presence.WHOLE:
                shared.set_presence(chunk, Presence.WHOLE)


def look_again(shared: SharedMemory, fd: int) -> int:
    """Look at the chunks that were written to since they had holes; how many are whole now."""
    found = 0
    for chunk in list(_written_chunks(shared)):
        # Before the look: a write that comes while it lasts marks the chunk again.
        shared.set_presence(chunk, Presence.HOLEY)
        start = chunk << CHUNK_SHIFT
        ranges = list(data_ranges(fd, start, start + CHUNK_BYTES))
        if ranges == [(start, start + CHUNK_BYTES)]:
            shared.set_presence(chunk, Presence.WHOLE)
            found += 1
    return found


def expect_holes(shared: SharedMemory, start_bytes: int, end_bytes: int) -> None:
    """Say of all chunks that a range touches that they may have holes from now on."""
    for chunk in range(start_bytes >> CHUNK_SHIFT, (end_bytes - 1 >> CHUNK_SHIFT) + 1):
        shared.set_presence(chunk, Presence.HOLEY)


def _written_chunks(shared: SharedMemory) -> Iterator[int]:
    start, end = shared.areas.presence, shared.areas.sections
    # Only the parts of the shared memory that have ever been written are there to look at.
    for data_start, data_end in data_ranges(shared.fd, start, end):
        states = bytes(shared.memory[data_start:data_end])
        position = states.find(Presence.WRITTEN)
        while position >= 0:
            yield data_start + position - start
            position = states.find(Presence.WRITTEN, position + 1)
