# What the two transports have in common.

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t

from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport fuse_in_header
from pmemfs.dataplane.request cimport request_t, verdict_t

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void *iov_base
        size_t iov_len

cdef enum:
    # Buffers have this much for the longest request without its payload.
    HEADERS_BYTES = 4096
    # How long a worker waits awake for a request. An idle CPU takes 25 to 35 us in a virtual
    # machine to wake the caller, who then sends the next request; a shorter wait would always be in
    # vain.
    SPIN_NS = 50000
    MOST_FAILURES = 10

# How waiting awake went lately. An idle worker soon sleeps a thousand times for each wait.
cdef struct patience_t:
    uint32_t failures
    uint32_t sleeps_left
