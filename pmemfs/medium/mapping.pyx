# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""A mapping of the pool that survives a touch of memory that is not there.

Poison and a file that somebody cut off are a SIGBUS. Here the handler puts a page of zeroes, which
is nobody's, where the bad page is, so that the instruction that touched it, be it numpy's or
memcpy's, comes to its end without a jump over anybody's frames. Whoever touched learns of it
afterwards, from `load`, `store`, `flush_lines` or `take_fault`, and the real page is back then: the
next touch tries again. Invariants:
- what a touch of a covered page has read is used by nobody, and what it has stored is lost: so each
  touch is followed by a question, in its own thread, before anything is answered or durable;
- `load` and `store` see what other threads' faults have covered too, since they hold the
  interpreter's lock, without which nobody puts a page back;
- a SIGBUS of any other memory goes to the handler that was there before, and kills if none was.
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

from pmemfs.medium cimport sigbus
from pmemfs.medium.writeback cimport write_back

import os

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <sched.h>
    #include <stdint.h>
    #include <sys/mman.h>

    #define PMEMFS_MAPPINGS 256

    struct pmemfs_mapping {
        uintptr_t start, end;      /* All zeroes: free. */
        uintptr_t low, high;       /* What may be covered now. */
        long owner;
        int fd, protection, flags;
    };
    static struct pmemfs_mapping pmemfs_mappings[PMEMFS_MAPPINGS];

    /* Held for some system calls at most, by nobody who touches a pool meanwhile. */
    static char pmemfs_is_locked;
    static void pmemfs_lock(void) {
        while (__atomic_test_and_set(&pmemfs_is_locked, __ATOMIC_ACQUIRE)) sched_yield();
    }
    static void pmemfs_unlock(void) { __atomic_clear(&pmemfs_is_locked, __ATOMIC_RELEASE); }

    /* The first bad page that this thread has met since it asked; owner 0: none. The model of
       initial-exec, since the handler must not be the one to get memory for it. */
    static __thread __attribute__((tls_model("initial-exec"))) volatile long pmemfs_met_owner;
    static __thread __attribute__((tls_model("initial-exec"))) volatile size_t pmemfs_met_offset;

    /* Put zeroes there; as small a piece as the mapping can be split at. Whether that was done. */
    static int pmemfs_put_zeroes(struct pmemfs_mapping *mapping, uintptr_t address) {
        for (int shift = 12; shift <= 30; shift += 9) {
            uintptr_t unit = (uintptr_t)1 << shift;
            uintptr_t low = address & -unit, high = low + unit;
            if (low < mapping->start) low = mapping->start;
            if (high > mapping->end) high = mapping->end;
            if (mmap((void *)low, high - low, mapping->protection,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0)
                != MAP_FAILED) {
                if (mapping->low >= mapping->high) {
                    mapping->low = low;
                    mapping->high = high;
                }
                if (low < mapping->low) mapping->low = low;
                if (high > mapping->high) mapping->high = high;
                return 1;
            }
        }
        return 0;
    }
    static int pmemfs_cover(uintptr_t address) {
        int is_covered = 0;
        pmemfs_lock();
        for (int number = 0; number < PMEMFS_MAPPINGS; number++) {
            struct pmemfs_mapping *mapping = &pmemfs_mappings[number];
            if (address < mapping->start || address >= mapping->end) continue;
            is_covered = pmemfs_put_zeroes(mapping, address);
            if (is_covered && !pmemfs_met_owner) {
                pmemfs_met_owner = mapping->owner;
                pmemfs_met_offset = address - mapping->start;
            }
            break;
        }
        pmemfs_unlock();
        return is_covered;
    }
    static void pmemfs_on_fault(int number, siginfo_t *info, void *context) {
        int error = errno;
        if (pmemfs_is_news(info)) return;
        if (!pmemfs_is_touch(info) || info->si_code == BUS_ADRALN
            || !pmemfs_cover((uintptr_t)info->si_addr))
            pmemfs_pass_on(number, info, context);
        errno = error;
    }

    /* The number of a mapping from now on, or -1 with errno. */
    static int pmemfs_guard(const struct pmemfs_mapping *wanted) {
        static int catches;
        if (!catches && pmemfs_handle_sigbus(pmemfs_on_fault)) return -1;
        catches = 1;
        pmemfs_lock();
        for (int number = 0; number < PMEMFS_MAPPINGS; number++)
            if (!pmemfs_mappings[number].start) {
                pmemfs_mappings[number] = *wanted;
                /* Whoever wants it has not filled these in, and they may be anything then. */
                pmemfs_mappings[number].low = pmemfs_mappings[number].high = 0;
                pmemfs_unlock();
                return number;
            }
        pmemfs_unlock();
        errno = ENOMEM;
        return -1;
    }
    static void pmemfs_let_go(int number) {
        pmemfs_lock();
        memset(&pmemfs_mappings[number], 0, sizeof pmemfs_mappings[number]);
        pmemfs_unlock();
    }

    /* Whether what this thread did last with a range may have met zeroes instead of the pool. */
    static inline int pmemfs_has_met(int number, const void *at, size_t length) {
        const struct pmemfs_mapping *mapping = &pmemfs_mappings[number];
        uintptr_t start = (uintptr_t)at;
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        return pmemfs_met_owner == mapping->owner
            || (__atomic_load_n(&mapping->low, __ATOMIC_RELAXED) < start + length
                && start < __atomic_load_n(&mapping->high, __ATOMIC_RELAXED));
    }
    static inline int pmemfs_owner_has_met(long owner) {
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        return pmemfs_met_owner == owner;
    }
    /* Put the pages of a pool back; the offset of the one that this thread met first, or -1. */
    static long long pmemfs_take(long owner) {
        long long met = -1;
        if (pmemfs_met_owner == owner) {
            met = (long long)pmemfs_met_offset;
            pmemfs_met_owner = 0;
        }
        pmemfs_lock();
        for (int number = 0; number < PMEMFS_MAPPINGS; number++) {
            struct pmemfs_mapping *mapping = &pmemfs_mappings[number];
            uintptr_t low = mapping->low, length = mapping->high - mapping->low;
            if (mapping->owner != owner || low >= mapping->high) continue;
            if (met < 0) met = (long long)(low - mapping->start);
            /* What can't be put back stays covered, and whoever touches it learns of it. */
            if (mmap((void *)low, length, mapping->protection, mapping->flags | MAP_FIXED,
                     mapping->fd, (off_t)(low - mapping->start)) != MAP_FAILED)
                mapping->low = mapping->high = 0;
        }
        pmemfs_unlock();
        return met;
    }
    """
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
    """Whether this thread has touched a bad page of an owner's mappings since it last took one."""
    return owner_has_met(owner)


def take_fault(long owner) -> int:
    """Put the pages of an owner back, and forget what this thread has met of them.

    The offset of the bad page that this thread met first, or else of one that is covered; or -1.
    """
    return take(owner)


cdef class GuardedMapping:
    """A file or device, mapped whole from its first byte; a buffer of all of it.

    `owner`, above zero, is what all mappings of one pool have in common: a pool that grows has
    several, as long as views of the old ones are held.
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
        # The caller may close its own, and whoever holds a view still needs the pages.
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
        """Unmap, unless somebody has a view; then with the last one."""
        if not self._views:
            self._unmap()

    def load(self, size_t offset, size_t length) -> bytes | None:
        """A copy of a range, as far as it is mapped; None where a page of it is bad."""
        if self._start == NULL:
            raise ValueError("the mapping is closed")
        offset = min(offset, self._length)
        length = min(length, self._length - offset)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
        memcpy(PyBytes_AS_STRING(data), self._start + offset, length)
        return None if has_met(self._number, self._start + offset, length) else data

    def store(self, size_t offset, data) -> bool:
        """Write a buffer of bytes; False where a page is bad: it is not there then."""
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
        """Write back the cache lines of a range; False where a page is bad."""
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
