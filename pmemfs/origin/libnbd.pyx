# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The part of libnbd that an origin needs.

The library is opened when it is first needed, so pmemfs can be built and run without it. Its Python
module can't read into memory that it hasn't made; the library takes addresses, so it reads into the
pages of a pool.

Invariant: a handle keeps the `Vectors` of each command until that is over or the handle is closed,
and the library touches no memory of a command after either.
Source: libnbd(3), nbd_aio_pread(3), nbd_aio_command_completed(3).
"""

cimport cython
from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint32_t, uint64_t
from pmemfs.origin.vectors cimport Vectors

import os

cdef extern from "<dlfcn.h>" nogil:
    enum:
        RTLD_NOW
    void *dlopen(const char *name, int flags)
    void *dlsym(void *library, const char *name)

cdef extern from "<poll.h>" nogil:
    enum:
        POLLIN
    struct pollfd:
        int fd
        short events
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef enum:
    DIRECTION_READ = 1
    DIRECTION_WRITE = 2
    FLAG_NO_HOLE = 2
    SIZE_MINIMUM = 0
    SIZE_MAXIMUM = 2
    MOST_TURNS = 256

ctypedef struct callback_t:
    void *callback
    void *user_data
    void *release

ctypedef void *(*create_f)() noexcept nogil
ctypedef void (*close_f)(void *) noexcept nogil
ctypedef const char *(*error_f)() noexcept nogil
ctypedef int (*number_f)() noexcept nogil
ctypedef int (*flag_f)(void *, bint) noexcept nogil
ctypedef int (*uri_f)(void *, const char *) noexcept nogil
ctypedef int (*ask_f)(void *) noexcept nogil
ctypedef int64_t (*ask_long_f)(void *) noexcept nogil
ctypedef int64_t (*block_size_f)(void *, int) noexcept nogil
ctypedef int64_t (*transfer_f)(void *, void *, size_t, uint64_t, callback_t, uint32_t) noexcept nogil
ctypedef int64_t (*flush_f)(void *, callback_t, uint32_t) noexcept nogil
ctypedef int64_t (*range_f)(void *, uint64_t, uint64_t, callback_t, uint32_t) noexcept nogil
ctypedef int (*completed_f)(void *, uint64_t) noexcept nogil

cdef struct library_t:
    create_f create
    close_f close
    error_f get_error
    number_f get_errno
    flag_f set_uri_allow_local_file
    flag_f set_pread_initialize
    uri_f connect_uri
    ask_f is_read_only
    ask_f can_flush
    ask_f can_trim
    ask_f can_zero
    ask_f can_multi_conn
    ask_long_f get_size
    block_size_f get_block_size
    transfer_f aio_pread
    transfer_f aio_pwrite
    flush_f aio_flush
    range_f aio_trim
    range_f aio_zero
    completed_f aio_disconnect
    ask_f aio_get_fd
    ask_f aio_get_direction
    ask_f aio_notify_read
    ask_f aio_notify_write
    ask_f aio_is_dead
    ask_f aio_is_closed
    completed_f aio_command_completed
    ask_long_f aio_peek_command_completed

# The functions of `library_t`, in its order.
_NAMES = (b"create", b"close", b"get_error", b"get_errno", b"set_uri_allow_local_file",
          b"set_pread_initialize", b"connect_uri", b"is_read_only", b"can_flush", b"can_trim",
          b"can_zero", b"can_multi_conn", b"get_size", b"get_block_size", b"aio_pread",
          b"aio_pwrite", b"aio_flush", b"aio_trim", b"aio_zero", b"aio_disconnect", b"aio_get_fd",
          b"aio_get_direction", b"aio_notify_read", b"aio_notify_write", b"aio_is_dead",
          b"aio_is_closed", b"aio_command_completed", b"aio_peek_command_completed")

cdef library_t nbd
cdef callback_t nobody


def load(name) -> bool:
    """Open the library; False if it isn't there."""
    cdef void **places = <void **>&nbd
    cdef void *library = dlopen(name.encode(), RTLD_NOW)
    if library == NULL:
        return False
    for number, function in enumerate(_NAMES):
        places[number] = dlsym(library, b"nbd_" + function)
        if places[number] == NULL:
            return False
    return True


@cython.final
cdef class Handle:
    """A connection to an export, made by a call that waits for the server.

    Raises OSError; its text is the library's.
    """

    cdef void *_handle
    cdef dict _under_way

    def __cinit__(self, uri) -> None:
        cdef bytes text = uri.encode()
        cdef const char *raw = text
        cdef bint has_failed
        self._under_way = {}
        self._handle = nbd.create()
        if self._handle == NULL:
            raise MemoryError
        nbd.set_uri_allow_local_file(self._handle, True)
        nbd.set_pread_initialize(self._handle, False)
        with nogil:
            has_failed = nbd.connect_uri(self._handle, raw) != 0
        if has_failed:
            raise _failure()

    def __dealloc__(self) -> None:
        if self._handle != NULL:
            nbd.close(self._handle)

    @property
    def under_way(self) -> int:
        """How many commands have no answer yet."""
        return len(self._under_way)

    @property
    def fd(self) -> int:
        """The socket, to wait for."""
        return nbd.aio_get_fd(self._handle)

    @property
    def wants_to_read(self) -> bool:
        """Whether it has to go on when the socket is readable."""
        return self._handle != NULL and nbd.aio_get_direction(self._handle) & DIRECTION_READ != 0

    @property
    def wants_to_write(self) -> bool:
        """Whether it has to go on when the socket is writable."""
        return self._handle != NULL and nbd.aio_get_direction(self._handle) & DIRECTION_WRITE != 0

    @property
    def is_over(self) -> bool:
        """Whether the connection has ended."""
        return (self._handle == NULL or nbd.aio_is_dead(self._handle) != 0
                or nbd.aio_is_closed(self._handle) != 0)

    def facts(self) -> tuple:
        """What the server said when it was connected; see `nbd.Facts`."""
        return (
            nbd.get_size(self._handle), nbd.is_read_only(self._handle) > 0,
            nbd.can_flush(self._handle) > 0, nbd.can_trim(self._handle) > 0,
            nbd.can_zero(self._handle) > 0, nbd.can_multi_conn(self._handle) > 0,
            max(nbd.get_block_size(self._handle, SIZE_MINIMUM), 0),
            max(nbd.get_block_size(self._handle, SIZE_MAXIMUM), 0),
        )

    def read(self, Vectors vectors not None, uint64_t offset) -> None:
        """Begin to read a range. Raises OSError, as all of these."""
        cdef char *to = vectors.in_one_piece()
        self._begin(vectors, nbd.aio_pread(self._handle, to, vectors.length_bytes, offset, nobody, 0))

    def write(self, Vectors vectors not None, uint64_t offset) -> None:
        """Begin to write a range."""
        cdef char *start = vectors.gathered()
        self._begin(vectors,
                    nbd.aio_pwrite(self._handle, start, vectors.length_bytes, offset, nobody, 0))

    def flush(self, Vectors vectors not None) -> None:
        """Begin to flush; the `Vectors` of commands without memory are empty."""
        self._begin(vectors, nbd.aio_flush(self._handle, nobody, 0))

    def trim(self, Vectors vectors not None, uint64_t offset, uint64_t length) -> None:
        """Begin to discard a range."""
        self._begin(vectors, nbd.aio_trim(self._handle, length, offset, nobody, 0))

    def zero(self, Vectors vectors not None, uint64_t offset, uint64_t length,
             bint may_trim) -> None:
        """Begin to write zeroes to a range."""
        flags = 0 if may_trim else FLAG_NO_HOLE
        self._begin(vectors, nbd.aio_zero(self._handle, length, offset, nobody, flags))

    def read_more(self) -> list:
        """Go on, as the socket is readable; what is `done` then.

        The library takes one answer at a time, so it is told again while more has come.
        """
        cdef pollfd more
        cdef int turns
        more.fd, more.events = nbd.aio_get_fd(self._handle), POLLIN
        with nogil:
            for turns in range(MOST_TURNS):
                if (nbd.aio_notify_read(self._handle) < 0
                        or not nbd.aio_get_direction(self._handle) & DIRECTION_READ
                        or poll(&more, 1, 0) <= 0):
                    break
        return self.done()

    def write_more(self) -> list:
        """Go on, as the socket is writable; what is `done` then."""
        nbd.aio_notify_write(self._handle)
        return self.done()

    def done(self) -> list:
        """The `Vectors` of commands that are done; `result` is their length or -errno."""
        cdef int64_t cookie
        cdef Vectors vectors
        found = []
        while self._handle != NULL:
            cookie = nbd.aio_peek_command_completed(self._handle)
            if cookie <= 0:
                break
            vectors = self._under_way.pop(cookie)
            vectors.result = vectors.length_bytes
            if nbd.aio_command_completed(self._handle, cookie) < 0:
                vectors.result = -(nbd.get_errno() or EIO)
            else:
                vectors.scatter()
            vectors.is_done = True
            found.append(vectors)
        return found

    def close(self, bint is_goodbye) -> list:
        """Hang up, politely or at once; the `Vectors` of what has no answer."""
        left = list(self._under_way.values())
        self._under_way.clear()
        if self._handle != NULL:
            if is_goodbye:
                nbd.aio_disconnect(self._handle, 0)
            nbd.close(self._handle)
            self._handle = NULL
        return left

    cdef int _begin(self, Vectors vectors, int64_t cookie) except -1:
        if cookie < 0:
            raise _failure()
        vectors.is_done = False
        self._under_way[cookie] = vectors
        return 0


cdef _failure():
    """The last error of this thread."""
    number = nbd.get_errno() or EIO
    text = (nbd.get_error() or b"").decode(errors="replace")
    # The library says which of its functions failed first, which tells a user nothing.
    return OSError(number, text.partition(": ")[2] or text or os.strerror(number))
