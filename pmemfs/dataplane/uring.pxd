from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.entries cimport entry_t
from pmemfs.dataplane.plane cimport worker_t
from pmemfs.dataplane.structures cimport miss_t
from pmemfs.dataplane.transport cimport patience_t

cdef extern from "liburing.h" nogil:
    cdef struct io_uring:
        int ring_fd

cdef enum:
    # In the inbox, in place of a position: hand over again.
    AGAIN = 0xFFFFFFFF
    INBOX_ROOM = 64
    MISSES_ROOM = 64

# What came in lately, and where the worker runs for it; see `choose_place`.
cdef struct place_t:
    int cpu
    bint is_near
    uint32_t requests
    uint32_t batches
    uint64_t moved_bytes
    uint64_t others

cdef struct queue_t:
    worker_t worker
    int number
    io_uring ring
    entry_t *entries
    uint32_t entry_count
    uint32_t living
    # 1: the kernel has all entries, or they are being served.
    uint64_t has_begun
    # Positions of entries come here from the thread that has put their replies in place.
    int inbox_reader
    int inbox_writer
    int idle_ring
    uint32_t inbox[INBOX_ROOM]
    # The next reply on the worker's own socket; NULL if it has no socket.
    uint8_t *reply
    # How many replies are still to come there.
    uint32_t awaited
    # What is handed over together when all that came has been looked at.
    miss_t misses[MISSES_ROOM]
    uint32_t miss_count
    patience_t patience
    place_t place
