# The entries of a ring; entries.pxi says what they are.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.protocol cimport uring_header_t
from pmemfs.dataplane.structures cimport entry_state_t
from pmemfs.dataplane.transport cimport iovec

cdef struct entry_t:
    uring_header_t *header
    uint8_t *aside
    uint8_t *payload
    entry_state_t *state
    iovec memory[2]
    # When it came, if it is a read whose blocks are being brought.
    uint64_t since_ns
    # A worker that was killed has left a request in it, and nobody has looked at that yet.
    bint is_left

# What a data plane has to do with an entry that it finds.
cdef enum outlook_t:
    REGISTER_ENTRY
    COMMIT_AGAIN
    SERVE_LEFT
    HAND_LEFT
    FAIL_LEFT
