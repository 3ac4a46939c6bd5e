from libc.stdint cimport uint32_t

from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport fuse_out_header

cdef int stop_blocking(int fuse_fd) noexcept nogil
cdef int serve_classic(worker_t *worker) noexcept nogil
cdef int reply_classic(int fuse_fd, fuse_out_header *head, const void *data,
                       uint32_t data_bytes) noexcept nogil
