# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Where the memory of views lies, for libraries and system calls that take addresses.

Invariants:
- the views' memory stays mapped as long as `Vectors` live, because they hold the buffers. Whoever
  has given an address away keeps the `Vectors` until the transfer is over;
- views that lie side by side are one piece.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINVAL
from libc.stddef cimport size_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

import os

cdef enum:
    ADDRESS_UNIT = 512
    MOST_VIEWS = 1024
    MOST_BYTES = 4 << 20


@cython.final
cdef class Vectors:
    """The memory of views, as an array of `struct iovec`, and how the transfer of it stands.

    `unit` divides the length of each view, if they are given. Raises OSError (EINVAL) for views
    that no origin takes. `waiter`, `is_done` and `result` are for whoever carries the transfer out.
    """

    def __cinit__(self, views, bint is_writable, size_t unit) -> None:
        cdef Py_ssize_t count = len(views)
        cdef Py_buffer *held
        cdef iovec *last
        self._is_filled = is_writable
        if count > MOST_VIEWS:
            raise OSError(EINVAL, os.strerror(EINVAL))
        self.pieces = <iovec *>malloc(max(count, 1) * (sizeof(iovec) + sizeof(Py_buffer)))
        if self.pieces == NULL:
            raise MemoryError
        self._held = <Py_buffer *>(self.pieces + max(count, 1))
        for view in views:
            held = self._held + self._held_count
            PyObject_GetBuffer(view, held, PyBUF_WRITABLE if is_writable else PyBUF_SIMPLE)
            self._held_count += 1
            last = self.pieces + self.count - 1
            if self.count and <char *>last.iov_base + last.iov_len == <char *>held.buf:
                last.iov_len += held.len
            else:
                self.pieces[self.count].iov_base = held.buf
                self.pieces[self.count].iov_len = held.len
                self.count += 1
            self.length_bytes += held.len
            if <size_t>held.buf % ADDRESS_UNIT or held.len % unit or not held.len:
                raise OSError(EINVAL, os.strerror(EINVAL))
        if self.length_bytes > MOST_BYTES:
            raise OSError(EINVAL, os.strerror(EINVAL))

    def __dealloc__(self) -> None:
        cdef Py_ssize_t number
        for number in range(self._held_count):
            PyBuffer_Release(self._held + number)
        free(self._copy)
        free(self.pieces)

    def advance(self, Py_ssize_t done_bytes) -> None:
        """Leave out what was transferred, at the beginning."""
        cdef Py_ssize_t gone = 0
        self.length_bytes -= done_bytes
        while gone < self.count and <size_t>done_bytes >= self.pieces[gone].iov_len:
            done_bytes -= self.pieces[gone].iov_len
            gone += 1
        self.count -= gone
        if gone:
            for number in range(self.count):
                self.pieces[number] = self.pieces[number + gone]
        if done_bytes and self.count:
            self.pieces.iov_base = <char *>self.pieces.iov_base + done_bytes
            self.pieces.iov_len -= done_bytes

    cdef char *in_one_piece(self) except NULL:
        """Memory in one piece for all of it: the views' own, or room for a copy."""
        if self.count <= 1:
            return <char *>self.pieces.iov_base
        if self._copy == NULL:
            self._copy = <char *>malloc(self.length_bytes)
            if self._copy == NULL:
                raise MemoryError
        return self._copy

    cdef char *gathered(self) except NULL:
        """As `in_one_piece`, and what the views show is there."""
        cdef char *to = self.in_one_piece()
        if self._copy != NULL:
            for number in range(self.count):
                memcpy(to, self.pieces[number].iov_base, self.pieces[number].iov_len)
                to += self.pieces[number].iov_len
        return self.in_one_piece()

    cdef void scatter(self):
        """Put what was read into a copy where it belongs. What was written stays as it is by now."""
        cdef char *start = self._copy
        if start != NULL and self._is_filled:
            for number in range(self.count):
                memcpy(self.pieces[number].iov_base, start, self.pieces[number].iov_len)
                start += self.pieces[number].iov_len
