from libc.stddef cimport size_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef class Vectors:
    cdef iovec *pieces
    cdef Py_buffer *_held
    cdef Py_ssize_t _held_count
    cdef readonly Py_ssize_t count
    cdef readonly Py_ssize_t length_bytes
    cdef public object waiter
    cdef public bint is_done
    cdef public Py_ssize_t result
    cdef char *_copy
    cdef bint _is_filled

    cdef char *gathered(self) except NULL
    cdef char *in_one_piece(self) except NULL
    cdef void scatter(self)
