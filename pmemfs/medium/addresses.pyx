# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Addresses that show pages of a pool, for as long as somebody looks at them.

Three objects hold each other in this order: arrays hold `Shown`, that holds `Addresses`, and that
holds the `PinEnd`. So the pages are let go when the last array is gone, and only then. Invariants:
- what an array shows is mapped at every instant: pieces of the pool, or zero pages. `force` puts
  zero pages in the place of the pieces in one system call for each range, so no touch is a SIGSEGV;
- the addresses are unmapped before the pin ends. Otherwise the daemon could give the pages to
  another file while a thread still stores into them;
- the end of any of these objects neither blocks nor calls Python: it may be a finalizer's, in any
  thread, while any lock is held;
- none of them takes part in garbage collection, and none refers to what could refer back. So the
  collector never takes the memory from under an array that is a part of a cycle.
Source: mmap(2) (MAP_FIXED), numpy's `PyArray_SetBaseObject` (what the `base` of a view is).
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, ENOMEM, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.fcntl cimport open as open_file
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close

import os

cdef extern from "addresses.h" nogil:
    enum:
        FRAME "PMEMFS_FRAME"

    ctypedef struct piece_t "pmemfs_piece":
        size_t at
        long long start "from"
        size_t length

    ctypedef struct end_t "pmemfs_end":
        int fd

    int ends_of "pmemfs_ends_of"(int *ends)
    int known "pmemfs_known"(int fd, unsigned long long *found)
    void begin "pmemfs_begin"(end_t *end, int fd, int speaks)
    void say "pmemfs_say"(const end_t *end, char word)
    void over "pmemfs_over"(end_t *end)
    void forked "pmemfs_forked"()
    void *reserve "pmemfs_reserve"(size_t length, size_t unit, size_t shift)
    int zeroes "pmemfs_zeroes"(void *start, size_t length, int protection)
    int lay "pmemfs_lay"(char *start, const piece_t *pieces, size_t count, int fd, int protection,
                         int flags)

cdef enum:
    FEW_PIECES = 256


# The daemon counts orderly ends, and each copy of an end has one of its own.
os.register_at_fork(after_in_child=lambda: forked())


def pin_ends() -> tuple[int, int]:
    """The two ends of a new pin: the daemon's and its client's. Raises OSError.

    To make a pair of sockets as objects takes as long as all else that the daemon does for a pin.
    """
    cdef int ends[2]
    if ends_of(ends):
        raise OSError(errno, os.strerror(errno))
    return ends[0], ends[1]


def known_of(int fd) -> tuple[int, int, int, int]:
    """What the kernel knows of an open file: device, inode, mode and user. Raises OSError.

    fstat(2) asks the daemon of a mount whenever the times of a file may be others by now, and that
    takes as long as a pin.
    Source: statx(2) (AT_STATX_DONT_SYNC).
    """
    cdef unsigned long long found[4]
    if known(fd, found):
        raise OSError(errno, os.strerror(errno))
    return found[0], found[1], found[2], found[3]


@cython.final
@cython.no_gc
cdef class Tally:
    """What is mapped for one mount: `pins` that have not ended here, `mappings`, and bytes."""

    cdef readonly Py_ssize_t pins
    cdef readonly Py_ssize_t mappings
    cdef readonly size_t mapped_bytes


@cython.final
@cython.no_gc
cdef class PinEnd:
    """This process's end of a pin, which is over with the last reference to this object.

    It takes the descriptor over. One that `speaks` says `d` before it closes it: nobody touches the
    pages any more. After a fork the child's copy says `f`. Of a pin that nobody writes to, the
    daemon needs to know nothing but the close, and each word would wake it once more.
    """

    cdef object __weakref__
    cdef end_t _end
    cdef Tally _tally

    def __cinit__(self, int fd, Tally tally not None, *, bint speaks) -> None:
        begin(&self._end, fd, speaks)
        self._tally = tally
        tally.pins += 1

    def __dealloc__(self) -> None:
        over(&self._end)
        if self._tally is not None:
            self._tally.pins -= 1

    def end(self) -> None:
        """End it now. Nothing may be mapped."""
        over(&self._end)

    def taint(self) -> None:
        """Tell the daemon that something may still write to the pages after the end."""
        say(&self._end, b"x")

    def fileno(self) -> int:
        """The descriptor."""
        return self._end.fd


@cython.final
@cython.no_gc
cdef class Descriptor:
    """An open file, closed with the last reference: a thread may need it while another closes."""

    cdef readonly int number

    def __cinit__(self, int number) -> None:
        self.number = number

    def __dealloc__(self) -> None:
        self._close()

    @staticmethod
    def opened(path: str, int flags, int permissions=0o666) -> Descriptor:
        """Open a file. Raises OSError, and ValueError.

        An interrupt that comes meanwhile finds the descriptor in its object, and leaves it closed.
        After os.open it would find it nowhere, because Python looks for signals before it assigns.
        """
        cdef bytes encoded = os.fsencode(path)
        cdef const char *name = encoded
        cdef Descriptor made = Descriptor(-1)
        cdef int failed
        if b"\0" in encoded:
            raise ValueError("embedded null byte")
        while True:
            with nogil:
                made.number = open_file(name, flags, permissions)
                failed = errno
            if made.number >= 0:
                return made
            if failed != EINTR:
                raise OSError(failed, os.strerror(failed), path)
            PyErr_CheckSignals()

    def close(self) -> None:
        """Close it now, whoever refers to it."""
        self._close()

    cdef void _close(self) noexcept nogil:
        if self.number >= 0:
            close(self.number)
            self.number = -1


@cython.final
@cython.no_gc
cdef class Words:
    """The words that the daemon shares with its clients, for reading."""

    cdef uint8_t *_start
    cdef size_t _length

    def __cinit__(self, int fd) -> None:
        self._start = NULL
        self._length = os.fstat(fd).st_size
        mapped = mmap(NULL, self._length, PROT_READ, MAP_SHARED, fd, 0)
        if mapped == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self._start = <uint8_t *>mapped

    def __dealloc__(self) -> None:
        if self._start != NULL:
            munmap(self._start, self._length)

    def read(self, size_t place) -> int:
        """The word at a place, counted in words. Raises IndexError."""
        if place >= self._length // sizeof(uint64_t):
            raise IndexError(f"there is no word {place}")
        return (<uint64_t *>self._start)[place]


@cython.final
@cython.no_gc
cdef class Addresses:
    """A range of addresses with pieces of a file mapped side by side.

    `pieces` are (bytes from the first address, offset in the file or -1 for zero pages, length),
    together without a gap, all in units of a frame. The first address is `shift` bytes behind a
    multiple of `unit`. Arrays see `length` bytes from `lead` on. `held` is the end of the pin, and
    `about` is for the caller.
    """

    cdef char *_start
    cdef size_t _span
    cdef size_t _lead
    cdef readonly size_t length
    cdef bint _is_writable
    cdef Py_ssize_t _shown
    cdef PinEnd _held
    cdef Tally _tally
    cdef readonly object about

    def __cinit__(self, int fd, list pieces, *, size_t lead, size_t length, size_t unit,
                  size_t shift, int prot, int flags, PinEnd held, Tally tally not None, about) -> None:
        self._start = NULL
        self._held, self.about = held, about
        self._is_writable = prot & PROT_WRITE
        self._span = max(_span_of(pieces), FRAME)
        if lead > self._span or length > self._span - lead:
            raise ValueError("the pieces are shorter than what is to be seen")
        self._lead, self.length = lead, length
        # The kernel finds a place for what may lie anywhere and is one piece.
        cdef bint is_simple = len(pieces) == 1 and unit <= FRAME and pieces[0][1] != -1
        if is_simple:
            start = mmap(NULL, self._span, prot, flags, fd, pieces[0][1])
        else:
            start = reserve(self._span, unit, shift)
        if start == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self._start, self._tally = <char *>start, tally
        tally.mappings += 1
        tally.mapped_bytes += self._span
        if not is_simple:
            _lay_all(self._start, pieces, fd, prot, flags)
        if not pieces and zeroes(self._start, self._span, prot):
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self) -> None:
        if self._start != NULL:
            munmap(self._start, self._span)
        if self._tally is not None:
            self._tally.mappings -= 1
            self._tally.mapped_bytes -= self._span

    @property
    def is_shown(self) -> bool:
        """Whether an array, or a view of one, sees these addresses."""
        return self._shown > 0

    def force(self) -> None:
        """Show zeroes from now on, and let go of the pin, although arrays are alive.

        What they store is lost. Raises OSError, and then nothing has changed.
        """
        if zeroes(self._start, self._span,
                  PROT_READ | (PROT_WRITE if self._is_writable else 0)):
            raise OSError(errno, os.strerror(errno))
        if self._held is not None:
            # A transfer that the kernel or a device has begun goes on into the pages.
            self._held.taint()
            self._held = None


@cython.final
@cython.no_gc
cdef class Shown:
    """A buffer over `Addresses`: the `base` of arrays, which holds them for as long as it lives."""

    cdef object __weakref__
    cdef readonly Addresses memory

    def __cinit__(self, Addresses memory not None) -> None:
        self.memory = memory
        memory._shown += 1

    def __dealloc__(self) -> None:
        if self.memory is not None:
            self.memory._shown -= 1

    def __getbuffer__(self, Py_buffer *view, int flags) -> None:
        PyBuffer_FillInfo(view, self, self.memory._start + self.memory._lead,
                          <Py_ssize_t>self.memory.length, not self.memory._is_writable, flags)


cdef size_t _span_of(list pieces) except? 0:
    """How many bytes pieces span; they must lie side by side in whole frames."""
    cdef size_t end = 0, at, length
    for at, start, length in pieces:
        if at != end or not length or (at | length) % FRAME or (start != -1 and start % FRAME):
            raise ValueError("the pieces do not lie side by side in whole frames")
        end += length
    return end


cdef int _lay_all(char *start, list pieces, int fd, int protection, int flags) except -1:
    """Map the pieces. Many take long, and other threads run meanwhile."""
    cdef size_t count = len(pieces), number = 0
    cdef int failed = 0
    cdef piece_t *native = <piece_t *>malloc(max(count, 1) * sizeof(piece_t))
    if native == NULL:
        raise MemoryError
    try:
        for native[number].at, native[number].start, native[number].length in pieces:
            number += 1
        if count <= FEW_PIECES:
            failed = errno if lay(start, native, count, fd, protection, flags) else 0
        else:
            with nogil:
                failed = errno if lay(start, native, count, fd, protection, flags) else 0
    finally:
        free(native)
    if failed:
        raise OSError(failed, os.strerror(failed))
    return 0
