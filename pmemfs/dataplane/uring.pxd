from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport fuse_out_header, uring_header_t
from pmemfs.dataplane.structures cimport miss_t
from pmemfs.dataplane.transport cimport iovec, patience_t

cdef extern from "liburing.h" nogil:
    cdef struct io_uring:
        pass

cdef struct entry_t:
    uring_header_t *header
    uint8_t *payload
    iovec memory[2]
    # The request that another thread or process replies to; 0: none. Set before it is handed over.
    uint64_t pending

    # When it came, if it is a read whose blocks are being brought.
    uint64_t since_ns

cdef enum:
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
    # Positions of entries come here from the thread that has put their replies in place.
    int inbox_reader
    int inbox_writer
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
