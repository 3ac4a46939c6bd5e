# What the two transports have in common.

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport fuse_in_header, fuse_out_header
from pmemfs.dataplane.serve cimport request_t, verdict_t

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef enum:
    # Of buffers: the longest request beside its payload.
    HEADERS_BYTES = 4096
    # How long a worker waits awake for a request.
    SPIN_NS = 20000
    MOST_FAILURES = 10

# How waiting awake went lately. An idle worker soon sleeps a thousand times for each time awake.
cdef struct patience_t:
    uint32_t failures
    uint32_t sleeps_left

cdef inline bint may_wait_awake(patience_t *patience) noexcept nogil:
    if not patience.sleeps_left:
        return True
    patience.sleeps_left -= 1
    return False

cdef inline void give_up(patience_t *patience) noexcept nogil:
    # No request came: the next attempt follows after twice as many sleeps.
    patience.failures = min(patience.failures + 1, <uint32_t>MOST_FAILURES)
    patience.sleeps_left = (<uint32_t>1 << patience.failures) - 1

cdef int hand_over(worker_t *worker, request_t *request, verdict_t verdict) noexcept nogil
cdef bint wants_reply(const fuse_in_header *head) noexcept nogil
cdef void end_all(plane_t *plane) noexcept nogil
cdef void rewrite_reply(fuse_out_header *head, void *data, uint32_t data_bytes) noexcept nogil
