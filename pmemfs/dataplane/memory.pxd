# Words shared between threads and processes, memory that may fault, time.

from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <string.h>
    #include <time.h>

    #if defined(__x86_64__)
    #include <immintrin.h>
    #define pmemfs_pause() _mm_pause()
    #else
    #define pmemfs_pause() __asm__ volatile("yield")
    #endif

    /* One of each, so that Cython sees functions and not types of arguments. */
    #define pmemfs_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define pmemfs_peek(p) __atomic_load_n((p), __ATOMIC_RELAXED)
    #define pmemfs_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    #define pmemfs_put(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    #define pmemfs_add(p, v) __atomic_fetch_add((p), (v), __ATOMIC_ACQ_REL)
    #define pmemfs_or(p, v) __atomic_fetch_or((p), (v), __ATOMIC_ACQ_REL)
    #define pmemfs_and(p, v) __atomic_fetch_and((p), (v), __ATOMIC_ACQ_REL)
    #define pmemfs_swap(p, expected, v) __atomic_compare_exchange_n( \\
        (p), (expected), (v), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
    #define pmemfs_full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #define pmemfs_prefetch(p) __builtin_prefetch((p), 1)
    #define pmemfs_parity(v) ((uint64_t)__builtin_parityll(v))

    /* A copy that leaves the caches alone: what is written is not read again soon. */
    static inline void pmemfs_stream(uint8_t *to, const uint8_t *from, size_t length) {
    #if defined(__x86_64__)
        size_t head = -(uintptr_t)to & 15;
        if (head > length) head = length;
        memcpy(to, from, head);
        to += head; from += head; length -= head;
        for (; length >= 64; length -= 64, to += 64, from += 64) {
            __m128i a = _mm_loadu_si128((const __m128i *)from);
            __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
            __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
            __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
            _mm_stream_si128((__m128i *)to, a);
            _mm_stream_si128((__m128i *)(to + 16), b);
            _mm_stream_si128((__m128i *)(to + 32), c);
            _mm_stream_si128((__m128i *)(to + 48), d);
        }
        _mm_sfence();
    #endif
        memcpy(to, from, length);
    }

    static inline uint64_t pmemfs_now_ns(clockid_t clock) {
        struct timespec t;
        clock_gettime(clock, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    """
    void pause "pmemfs_pause"()
    uint64_t load "pmemfs_load"(const uint64_t *word)
    uint64_t peek "pmemfs_peek"(const uint64_t *word)
    void store "pmemfs_store"(uint64_t *word, uint64_t value)
    void put "pmemfs_put"(uint64_t *word, uint64_t value)
    uint64_t add "pmemfs_add"(uint64_t *word, uint64_t value)
    bint swap "pmemfs_swap"(uint64_t *word, uint64_t *expected, uint64_t value)
    uint32_t peek_32 "pmemfs_peek"(const uint32_t *word)
    uint32_t add_32 "pmemfs_add"(uint32_t *word, uint32_t value)
    bint swap_32 "pmemfs_swap"(uint32_t *word, uint32_t *expected, uint32_t value)
    uint16_t peek_16 "pmemfs_peek"(const uint16_t *word)
    uint16_t or_16 "pmemfs_or"(uint16_t *word, uint16_t value)
    uint16_t and_16 "pmemfs_and"(uint16_t *word, uint16_t value)
    unsigned char load_8 "pmemfs_load"(const unsigned char *word)
    void store_8 "pmemfs_store"(unsigned char *word, unsigned char value)
    bint swap_8 "pmemfs_swap"(unsigned char *word, unsigned char *expected, unsigned char value)
    void full_fence "pmemfs_full_fence"()
    void prefetch "pmemfs_prefetch"(const void *line)
    uint64_t parity "pmemfs_parity"(uint64_t value)
    void stream "pmemfs_stream"(unsigned char *to, const unsigned char *source, size_t length)
    uint64_t now_ns "pmemfs_now_ns"(int clock)

ctypedef void (*guarded_t)(void *argument) noexcept nogil

cdef bint read_seqlocked(const uint64_t *sequence, uint64_t *words, size_t count) noexcept nogil
cdef bint run_guarded(guarded_t function, void *argument) noexcept nogil
cdef size_t fault_address() noexcept nogil
cdef int catch_faults() noexcept nogil
