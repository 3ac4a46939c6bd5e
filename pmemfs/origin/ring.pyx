# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""An io_uring for transfers between views and a descriptor.

Invariants:
- the ring keeps a reference to the `Vectors` of every request until it has reaped it, so no memory
  is unmapped under a transfer;
- the kernel ends a ring later than its process: what a killed process had under way goes on into
  the pages. So the ring holds the descriptor of the pool as well (`hold`), and with it the pool's
  lock: until the last transfer is over, nobody else can mount the pool and give its pages away. A
  successor, which has that lock from the dead process, waits for another descriptor to be closed.
Source: io_uring(7), io_uring_register(2).
"""

cimport cython
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, EBUSY, EINTR, ENOMEM
from pmemfs.origin.vectors cimport Vectors, iovec

import os

cdef extern from "<liburing.h>" nogil:
    struct io_uring:
        int ring_fd
    struct io_uring_sqe:
        pass
    struct io_uring_cqe:
        int res
    enum:
        IORING_FSYNC_DATASYNC
        IORING_SETUP_CLAMP

    int io_uring_queue_init(unsigned entries, io_uring *ring, unsigned flags)
    void io_uring_queue_exit(io_uring *ring)
    int io_uring_register_files(io_uring *ring, const int *files, unsigned count)
    io_uring_sqe *io_uring_get_sqe(io_uring *ring)
    void io_uring_prep_readv(io_uring_sqe *sqe, int fd, const iovec *pieces, unsigned count,
                             unsigned long long offset)
    void io_uring_prep_writev(io_uring_sqe *sqe, int fd, const iovec *pieces, unsigned count,
                              unsigned long long offset)
    void io_uring_prep_fsync(io_uring_sqe *sqe, int fd, unsigned flags)
    void io_uring_sqe_set_data(io_uring_sqe *sqe, void *data)
    int io_uring_submit(io_uring *ring)
    unsigned io_uring_sq_ready(const io_uring *ring)
    int io_uring_peek_cqe(io_uring *ring, io_uring_cqe **cqe)
    void *io_uring_cqe_get_data(const io_uring_cqe *cqe)
    void io_uring_cqe_seen(io_uring *ring, io_uring_cqe *cqe)

cdef enum:
    MOST_HELD = 4


@cython.final
@cython.no_gc
cdef class Ring:
    """Raises OSError where the kernel has no rings or forbids them (ENOSYS, EPERM)."""

    cdef io_uring _ring
    cdef bint _is_open
    cdef readonly int under_way

    def __cinit__(self, unsigned entries) -> None:
        cdef int failed = -io_uring_queue_init(entries, &self._ring, IORING_SETUP_CLAMP)
        if failed:
            raise OSError(failed, os.strerror(failed))
        self._is_open = True

    def __dealloc__(self) -> None:
        if self._is_open:
            io_uring_queue_exit(&self._ring)

    def close(self) -> None:
        """End it; nothing may be under way."""
        if self._is_open:
            self._is_open = False
            io_uring_queue_exit(&self._ring)

    def fileno(self) -> int:
        """Readable while something can be reaped."""
        return self._ring.ring_fd

    def hold(self, fds) -> None:
        """Keep the files of descriptors open until all transfers are over. Raises OSError."""
        cdef int numbers[MOST_HELD]
        cdef int failed
        if len(fds) > MOST_HELD:
            raise ValueError("a ring holds no more descriptors")
        for at, fd in enumerate(fds):
            numbers[at] = fd
        failed = -io_uring_register_files(&self._ring, numbers, <unsigned>len(fds))
        if failed:
            raise OSError(failed, os.strerror(failed))

    def read(self, int fd, Vectors vectors not None, unsigned long long offset) -> None:
        """Prepare to read a range into the pieces."""
        cdef io_uring_sqe *sqe = self._entry()
        io_uring_prep_readv(sqe, fd, vectors.pieces, <unsigned>vectors.count, offset)
        self._begin(sqe, vectors)

    def write(self, int fd, Vectors vectors not None, unsigned long long offset) -> None:
        """Prepare to write the pieces to a range."""
        cdef io_uring_sqe *sqe = self._entry()
        io_uring_prep_writev(sqe, fd, vectors.pieces, <unsigned>vectors.count, offset)
        self._begin(sqe, vectors)

    def sync(self, int fd, Vectors vectors not None) -> None:
        """Prepare an fdatasync(2)."""
        cdef io_uring_sqe *sqe = self._entry()
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC)
        self._begin(sqe, vectors)

    def submit(self) -> bool:
        """Give the kernel what was prepared, in one call; False if it takes no more for now."""
        cdef int done
        with nogil:
            done = io_uring_submit(&self._ring)
        if done >= 0:
            # The kernel stops behind one that it can't begin.
            return io_uring_sq_ready(&self._ring) == 0
        if -done not in (EAGAIN, EBUSY, EINTR, ENOMEM):
            raise OSError(-done, os.strerror(-done))
        return False

    def reap(self) -> list:
        """The `Vectors` that are done; `result` is that of the system call, or -errno."""
        cdef io_uring_cqe *cqe
        cdef Vectors vectors
        done = []
        while io_uring_peek_cqe(&self._ring, &cqe) == 0:
            vectors = <Vectors><PyObject *>io_uring_cqe_get_data(cqe)
            vectors.result = cqe.res
            vectors.is_done = True
            io_uring_cqe_seen(&self._ring, cqe)
            done.append(vectors)
            Py_DECREF(vectors)
            self.under_way -= 1
        return done

    cdef io_uring_sqe *_entry(self) except NULL:
        cdef io_uring_sqe *sqe = io_uring_get_sqe(&self._ring)
        if sqe == NULL:
            self.submit()
            sqe = io_uring_get_sqe(&self._ring)
        if sqe == NULL:
            raise OSError(EAGAIN, os.strerror(EAGAIN))
        return sqe

    cdef void _begin(self, io_uring_sqe *sqe, Vectors vectors):
        vectors.is_done = False
        Py_INCREF(vectors)
        io_uring_sqe_set_data(sqe, <void *><PyObject *>vectors)
        self.under_way += 1
