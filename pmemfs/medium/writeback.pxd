from libc.stddef cimport size_t

cdef void write_back(void *start, size_t length) noexcept nogil
cdef void wait_for_write_back() noexcept nogil
cdef int synchronise(void *start, size_t length) noexcept nogil
