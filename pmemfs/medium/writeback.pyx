# cython: language_level=3
"""The instructions and system calls of a medium that Python lacks.

`flush_lines` writes the cache lines of a range back to memory, `fence` waits until they are there;
`msync` is mmap.flush() without holding the interpreter's lock; `punch_hole` gives memory back. On x86-64, clwb where the processor
has it, else clflushopt, else clflush; on arm64, dc cvac (dc cvap needs a privilege check that user
space can't make portably). Source: Intel SDM vol. 2, "CLWB"; Arm ARM, "DC CVAC".
"""

from libc.errno cimport errno
from libc.stddef cimport size_t

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <sys/mman.h>
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/falloc.h>

    int fallocate(int, int, off_t, off_t);

    #define PMEMFS_LINE 64

    #if defined(__x86_64__)
    #include <cpuid.h>
    #include <immintrin.h>

    static const char *pmemfs_instruction = "clflush";

    __attribute__((target("clwb")))
    static void pmemfs_lines_clwb(uintptr_t line, uintptr_t end) {
        for (; line < end; line += PMEMFS_LINE) _mm_clwb((void *)line);
    }
    __attribute__((target("clflushopt")))
    static void pmemfs_lines_clflushopt(uintptr_t line, uintptr_t end) {
        for (; line < end; line += PMEMFS_LINE) _mm_clflushopt((void *)line);
    }
    static void pmemfs_lines_clflush(uintptr_t line, uintptr_t end) {
        for (; line < end; line += PMEMFS_LINE) _mm_clflush((void *)line);
    }
    static void (*pmemfs_lines)(uintptr_t, uintptr_t) = pmemfs_lines_clflush;

    static void pmemfs_choose(void) {
        unsigned a, b = 0, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        if (b & (1u << 24)) { pmemfs_lines = pmemfs_lines_clwb; pmemfs_instruction = "clwb"; }
        else if (b & (1u << 23)) {
            pmemfs_lines = pmemfs_lines_clflushopt; pmemfs_instruction = "clflushopt";
        }
    }
    static void pmemfs_fence(void) { _mm_sfence(); }

    #elif defined(__aarch64__)
    static const char *pmemfs_instruction = "dc cvac";
    static void pmemfs_lines(uintptr_t line, uintptr_t end) {
        for (; line < end; line += PMEMFS_LINE)
            __asm__ volatile("dc cvac, %0" :: "r"(line) : "memory");
    }
    static void pmemfs_choose(void) {}
    static void pmemfs_fence(void) { __asm__ volatile("dsb sy" ::: "memory"); }
    #else
    #error "pmemfs knows how to write back cache lines on x86-64 and arm64 only"
    #endif

    static void pmemfs_flush(void *start, size_t length) {
        uintptr_t line = (uintptr_t)start & ~(uintptr_t)(PMEMFS_LINE - 1);
        pmemfs_lines(line, (uintptr_t)start + length);
    }
    static int pmemfs_punch(int fd, long long offset, long long length) {
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    }
    static int pmemfs_msync(void *start, size_t length) {
        uintptr_t page = (uintptr_t)start & ~(uintptr_t)4095;
        return msync((void *)page, (uintptr_t)start + length - page, MS_SYNC);
    }
    """
    const char *pmemfs_instruction
    void pmemfs_choose() nogil
    void pmemfs_flush(void *start, size_t length) nogil
    void pmemfs_fence() nogil
    int pmemfs_msync(void *start, size_t length) nogil
    int pmemfs_punch(int fd, long long offset, long long length) nogil


cdef void write_back(void *start, size_t length) noexcept nogil:
    """`flush_lines` for native code."""
    pmemfs_flush(start, length)


cdef void wait_for_write_back() noexcept nogil:
    """`fence` for native code."""
    pmemfs_fence()


cdef int synchronise(void *start, size_t length) noexcept nogil:
    """`msync` for native code: 0, or -1 with errno."""
    return pmemfs_msync(start, length)


pmemfs_choose()
INSTRUCTION = pmemfs_instruction.decode()


def flush_lines(const unsigned char[::1] memory) -> None:
    """Write back every cache line that `memory` touches; durable after the next `fence`."""
    cdef size_t length = <size_t>memory.shape[0]
    if length:
        with nogil:
            pmemfs_flush(<void *>&memory[0], length)


def fence() -> None:
    """Wait until all cache lines that this thread wrote back are in memory."""
    pmemfs_fence()


def msync(const unsigned char[::1] memory) -> None:
    """Write the pages that `memory` touches to their device. Raises OSError."""
    cdef size_t length = <size_t>memory.shape[0]
    cdef int failed
    if length:
        with nogil:
            failed = pmemfs_msync(<void *>&memory[0], length)
        if failed:
            raise OSError(errno, "msync failed")


def punch_hole(int fd, long long offset_bytes, long long length_bytes) -> None:
    """Give the memory behind a range of a file back; it reads as zeroes then. Raises OSError."""
    cdef int failed
    with nogil:
        failed = pmemfs_punch(fd, offset_bytes, length_bytes)
    if failed:
        raise OSError(errno, "punching a hole failed")
