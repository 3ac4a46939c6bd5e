# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The commands of librbd of which many are under way.

The Python binding wants `bytes` to write, makes `bytes` of what it reads, and calls back into
Python from threads of its own. The library takes addresses, so it reads into the pages of a pool.
It puts what is done on a list and raises an eventfd, so one task reaps many at once.

Invariant: `Commands` keep the `Vectors` of each command until it is over.
Source: rbd/librbd.h.
"""

cimport cython
from libc.stdint cimport int64_t, uint64_t
from pmemfs.origin.vectors cimport Vectors, iovec

import os

cdef extern from "<dlfcn.h>" nogil:
    enum:
        RTLD_NOW
    void *dlopen(const char *name, int flags)
    void *dlsym(void *library, const char *name)

cdef enum:
    EVENT_TYPE_EVENTFD = 2
    THICK_PROVISION = 1
    MOST_DONE = 128

ctypedef int (*create_f)(void *, void *, void **) noexcept nogil
ctypedef void (*release_f)(void *) noexcept nogil
ctypedef Py_ssize_t (*result_f)(void *) noexcept nogil
ctypedef int (*notify_f)(void *, int, int) noexcept nogil
ctypedef int (*poll_f)(void *, void **, int) noexcept nogil
ctypedef int (*transfer_f)(void *, const iovec *, int, uint64_t, void *) noexcept nogil
ctypedef int (*flush_f)(void *, void *) noexcept nogil
ctypedef int (*discard_f)(void *, uint64_t, uint64_t, void *) noexcept nogil
ctypedef int (*zero_f)(void *, uint64_t, size_t, void *, int, int) noexcept nogil

cdef struct library_t:
    create_f create_completion
    release_f release
    result_f get_return_value
    transfer_f readv
    transfer_f writev
    flush_f flush
    discard_f discard
    zero_f write_zeroes
    notify_f set_image_notification
    poll_f poll_io_events

# The functions of `library_t`, in its order.
_NAMES = (b"aio_create_completion", b"aio_release", b"aio_get_return_value", b"aio_readv",
          b"aio_writev", b"aio_flush", b"aio_discard", b"aio_write_zeroes",
          b"set_image_notification", b"poll_io_events")

cdef library_t rbd


def load(name) -> bool:
    """Open the library; False if it isn't there."""
    cdef void **places = <void **>&rbd
    cdef void *library = dlopen(name.encode(), RTLD_NOW)
    if library == NULL:
        return False
    for number, function in enumerate(_NAMES):
        places[number] = dlsym(library, b"rbd_" + function)
        if places[number] == NULL:
            return False
    return True


@cython.final
cdef class Commands:
    """Commands of an open image, which is given by its address."""

    cdef void *_image
    cdef dict _under_way

    def __cinit__(self, size_t image) -> None:
        self._image = <void *>image
        self._under_way = {}

    @property
    def under_way(self) -> int:
        """How many are not over yet."""
        return len(self._under_way)

    def notify(self, int eventfd) -> None:
        """Raise an eventfd whenever something is done."""
        _check(rbd.set_image_notification(self._image, eventfd, EVENT_TYPE_EVENTFD))

    def read(self, Vectors vectors not None, uint64_t offset) -> None:
        """Begin to read a range. Raises OSError, as all of these."""
        cdef void *end = self._begin(vectors)
        cdef int number
        with nogil:
            number = rbd.readv(self._image, vectors.pieces, <int>vectors.count, offset, end)
        self._begun(end, number)

    def write(self, Vectors vectors not None, uint64_t offset) -> None:
        """Begin to write a range."""
        cdef void *end = self._begin(vectors)
        cdef int number
        with nogil:
            number = rbd.writev(self._image, vectors.pieces, <int>vectors.count, offset, end)
        self._begun(end, number)

    def flush(self, Vectors vectors not None) -> None:
        """Begin to flush; the `Vectors` of commands without memory are empty."""
        cdef void *end = self._begin(vectors)
        self._begun(end, rbd.flush(self._image, end))

    def discard(self, Vectors vectors not None, uint64_t offset, uint64_t length) -> None:
        """Begin to discard a range."""
        cdef void *end = self._begin(vectors)
        self._begun(end, rbd.discard(self._image, offset, length, end))

    def zero(self, Vectors vectors not None, uint64_t offset, uint64_t length,
             bint may_trim) -> None:
        """Begin to write zeroes to a range."""
        cdef void *end = self._begin(vectors)
        flags = 0 if may_trim else THICK_PROVISION
        self._begun(end, rbd.write_zeroes(self._image, offset, length, end, flags, 0))

    def done(self) -> list:
        """The `Vectors` of commands that are done; `result` is theirs, -errno for a failure."""
        cdef void *ends[MOST_DONE]
        cdef Vectors vectors
        cdef int count = rbd.poll_io_events(self._image, ends, MOST_DONE)
        _check(min(count, 0))
        found = []
        for number in range(count):
            vectors = self._under_way.pop(<size_t>ends[number])
            vectors.result = rbd.get_return_value(ends[number])
            vectors.is_done = True
            rbd.release(ends[number])
            found.append(vectors)
        return found

    cdef void *_begin(self, Vectors vectors) except NULL:
        cdef void *end = NULL
        _check(rbd.create_completion(NULL, NULL, &end))
        vectors.is_done = False
        self._under_way[<size_t>end] = vectors
        return end

    cdef int _begun(self, void *end, int number) except -1:
        if number < 0:
            del self._under_way[<size_t>end]
            rbd.release(end)
            _check(number)
        return 0


cdef int _check(int number) except -1:
    if number < 0:
        raise OSError(-number, os.strerror(-number))
    return 0
