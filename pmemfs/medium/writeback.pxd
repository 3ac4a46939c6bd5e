# What native code needs of a medium; see writeback.pyx.

from libc.stddef cimport size_t

# Relative to whichever module includes it.
cdef extern from "../medium/writeback.h" nogil:
    void write_back "pmemfs_flush"(void *start, size_t length)
    void wait_for_write_back "pmemfs_fence"()
    int synchronise "pmemfs_msync"(void *start, size_t length)
