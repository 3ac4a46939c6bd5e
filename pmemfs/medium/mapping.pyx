# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A mapping of the pool that survives a touch of memory that is not there.

Touching poison, or a page of a file that was cut off, is a SIGBUS. The handler here maps a private
page of zeroes over the bad page, so the instruction that touched it, in numpy or memcpy, comes to
its end. No jump has to cross frames of C code that doesn't expect one. The caller learns of the
fault afterwards, from `load`, `store`, `flush_lines` or `take_fault`. The real page is back by
then, so the next touch tries again. Invariants:
- nothing uses what was read from a covered page, and what was stored into it is lost. So after each
  touch its thread asks, before it answers a request or calls anything durable;
- `load` and `store` also see pages that other threads' faults have covered: they hold the
  interpreter's lock, and pages are put back only under that lock;
- a SIGBUS of any other memory goes to the handler that was there before, and kills the process if
  there was none.
Source: sigaction(2), mmap(2) (MAP_FIXED).
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport ENOMEM, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.string cimport memcpy
from posix.mman cimport MAP_FAILED, PROT_WRITE, madvise, mmap, munmap
from posix.unistd cimport close, dup

from pmemfs.medium.writeback cimport write_back

import os

cdef extern from "mapping.h" nogil:
    cdef struct mapping_t "pmemfs_mapping":
        size_t start
        size_t end
        long owner
        int fd
        int protection
        int flags

    int guard "pmemfs_guard"(const mapping_t *wanted)
    void let_go "pmemfs_let_go"(int number)
    bint has_met "pmemfs_has_met"(int number, const void *at, size_t length)
    bint owner_has_met "pmemfs_owner_has_met"(long owner)
    long long take "pmemfs_take"(long owner)


def has_faulted(long owner) -> bool:
    """Whether this thread has touched a bad page of an owner since it last took a fault."""
    return owner_has_met(owner)


def take_fault(long owner) -> int:
    """Put the real pages of an owner back, and forget the faults that this thread has met.

    Returns the offset of the bad page that this thread met first, else of any covered page, else
    -1.
    """
    return take(owner)


cdef class GuardedMapping:
    """A file or device, mapped whole from its first byte; a buffer of all of it.

    `owner`, a number above zero, is the same for all mappings of one pool. A pool that grows has
    several, while views of the old mappings are held.
    """

    cdef uint8_t *_start
    cdef size_t _length
    cdef bint _is_writable
    cdef int _fd
    cdef int _number
    cdef Py_ssize_t _views

    def __cinit__(self, int fd, size_t length, *, int flags, int prot, long owner) -> None:
        cdef mapping_t wanted
        cdef void *mapped
        self._start = NULL
        self._number = -1
        # The caller may close its descriptor while a view is held that still needs the pages: the
        # handler needs the descriptor to put a page back.
        self._fd = dup(fd)
        if self._fd < 0:
            raise OSError(errno, os.strerror(errno))
        mapped = mmap(NULL, length, prot, flags, self._fd, 0)
        if mapped == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self._start, self._length = <uint8_t *>mapped, length
        self._is_writable = prot & PROT_WRITE
        wanted.start, wanted.end = <size_t>mapped, <size_t>mapped + length
        wanted.owner, wanted.fd, wanted.protection, wanted.flags = owner, self._fd, prot, flags
        self._number = guard(&wanted)
        if self._number < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self) -> None:
        self._unmap()

    def __getbuffer__(self, Py_buffer *view, int flags) -> None:
        if self._start == NULL:
            raise ValueError("the mapping is closed")
        PyBuffer_FillInfo(view, self, self._start, <Py_ssize_t>self._length,
                          not self._is_writable, flags)
        self._views += 1

    def __releasebuffer__(self, Py_buffer *view) -> None:
        self._views -= 1

    def close(self) -> None:
        """Unmap. If views are held, the last of them unmaps."""
        if not self._views:
            self._unmap()

    def load(self, size_t offset, size_t length) -> bytes | None:
        """A copy of a range, as far as it is mapped; None if one of its pages is bad."""
        if self._start == NULL:
            raise ValueError("the mapping is closed")
        offset = min(offset, self._length)
        length = min(length, self._length - offset)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
        memcpy(PyBytes_AS_STRING(data), self._start + offset, length)
        return None if has_met(self._number, self._start + offset, length) else data

    def store(self, size_t offset, data) -> bool:
        """Write a buffer of bytes; False if a page is bad, and then its part is lost."""
        cdef Py_buffer view
        cdef size_t length
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            length = <size_t>view.len
            if (self._start == NULL or not self._is_writable or offset > self._length
                    or length > self._length - offset):
                raise ValueError("a store outside of what is mapped for writing")
            memcpy(self._start + offset, view.buf, length)
        finally:
            PyBuffer_Release(&view)
        return not has_met(self._number, self._start + offset, length)

    def flush_lines(self, size_t offset, size_t length) -> bool:
        """Write back the cache lines of a range; False if a page is bad."""
        if (self._start == NULL or offset > self._length
                or length > self._length - offset):
            raise ValueError("a flush outside of what is mapped")
        if length:
            write_back(self._start + offset, length)
        return not has_met(self._number, self._start + offset, length)

    def madvise(self, int advice, size_t offset, size_t length) -> None:
        """Advise the kernel about a range. Raises OSError."""
        if (self._start == NULL or offset > self._length
                or length > self._length - offset):
            raise ValueError("advice outside of what is mapped")
        if madvise(self._start + offset, length, advice):
            raise OSError(errno, os.strerror(errno))

    cdef void _unmap(self) noexcept:
        if self._number >= 0:
            let_go(self._number)
        if self._start != NULL:
            munmap(self._start, self._length)
        if self._fd >= 0:
            close(self._fd)
        self._start, self._length, self._number, self._fd = NULL, 0, -1, -1
