/* Words shared between threads and processes, memory that may fault, time.

   Seqlocks: the only writer makes a sequence odd, writes the words behind it, and makes it even. A
   reader that found the sequence even, and the same before and after its reads, has words that
   belong together.

   Guards: run a function, and survive the SIGBUS of a touch in it.

   Touching poison, a truncated file, or a hole of a full file system is a SIGBUS. Invariants: a
   guarded function owns nothing that its caller can't put right when it touches such memory,
   because it is left in the middle; of guarded functions that call each other, a fault ends the
   innermost; a SIGBUS outside of a guard kills, as it should. Only a touch ends a guarded function:
   the kernel also tells of damage that was not touched yet (BUS_MCEERR_AO), and the thread that
   runs just then has nothing to do with it.
   Source: sigaction(2), sigsetjmp(3); the mask is not saved, so the handler leaves it alone. */
#ifndef PMEMFS_MEMORY_H
#define PMEMFS_MEMORY_H

#include "../medium/sigbus.h"

#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
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
#define pmemfs_swap(p, expected, v) __atomic_compare_exchange_n( \
    (p), (expected), (v), 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
#define pmemfs_full_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
/* After stores, before other stores. */
#define pmemfs_store_fence() __atomic_thread_fence(__ATOMIC_RELEASE)
/* After loads, before other loads. */
#define pmemfs_load_fence() __atomic_thread_fence(__ATOMIC_ACQUIRE)
/* After a swap or an add, before a load: on x86 these are full fences themselves. */
#if defined(__x86_64__)
#define pmemfs_fence_after_swap() __asm__ volatile("" ::: "memory")
#else
#define pmemfs_fence_after_swap() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#endif
/* What was assigned before is in memory, where a way out of a guarded function finds it. */
#define pmemfs_settle() __asm__ volatile("" ::: "memory")
#define pmemfs_multiply_high(a, b) ((uint64_t)((unsigned __int128)(a) * (b) >> 64))
#define pmemfs_prefetch(p) __builtin_prefetch((p), 1)
#define pmemfs_parity(v) ((uint64_t)__builtin_parityll(v))

/* A copy that leaves the caches alone: what is written is not read again soon. Before anything is
   stored that says so, `pmemfs_end_stream` must follow. */
static inline void pmemfs_stream_on(uint8_t *to, const uint8_t *from, size_t length) {
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
#endif
    memcpy(to, from, length);
}

static inline void pmemfs_end_stream(void) {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

static inline void pmemfs_stream(uint8_t *to, const uint8_t *from, size_t length) {
    pmemfs_stream_on(to, from, length);
    pmemfs_end_stream();
}

/* 16 bytes at a multiple of 16, by one instruction: neither a killed thread nor another processor
   leaves or sees a half of them. On arm64 that holds for processors that have LSE2. */
static inline void pmemfs_store_block(uint8_t *to, const uint8_t *from) {
#if defined(__x86_64__)
    __m128i block = _mm_loadu_si128((const __m128i *)from);
    __asm__ volatile("movdqa %1, %0" : "=m"(*(__m128i *)to) : "x"(block) : "memory");
#else
    uint64_t words[2];
    memcpy(words, from, sizeof words);
    __asm__ volatile("stp %1, %2, [%0]" :: "r"(to), "r"(words[0]), "r"(words[1]) : "memory");
#endif
}

static inline uint64_t pmemfs_now_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* What is behind a sequence; 0 where it is being written, and `words` are of no use. */
static inline int pmemfs_read_seqlocked(const uint64_t *sequence, uint64_t *words, size_t count) {
    uint64_t before = pmemfs_load(sequence);
    if (before & 1) return 0;
    for (size_t position = 0; position < count; position++)
        words[position] = pmemfs_peek(&sequence[1 + position]);
    pmemfs_full_fence();
    return pmemfs_peek(sequence) == before;
}

static __thread sigjmp_buf pmemfs_way_out;
static __thread volatile sig_atomic_t pmemfs_guarded;
static __thread void *volatile pmemfs_fault;
static int pmemfs_catches;

static void pmemfs_on_fault(int number, siginfo_t *info, void *context) {
    if (pmemfs_is_news(info)) return;
    if (!pmemfs_guarded || !pmemfs_is_touch(info)) {
        pmemfs_pass_on(number, info, context);
        return;
    }
    pmemfs_guarded = 0;
    pmemfs_fault = info->si_addr;
    siglongjmp(pmemfs_way_out, 1);
}

/* Make guards work in this process; 0, or -1 with errno. */
static inline int pmemfs_catch_faults(void) {
    if (pmemfs_catches) return 0;
    pmemfs_catches = 1;
    return pmemfs_handle_sigbus(pmemfs_on_fault);
}

/* Whether `function(argument)` came to its end; if not, see pmemfs_fault_address. */
/* In a frame of its own, and as it stands: a fault may come between any two of its stores. */
__attribute__((noinline, noclone, unused))
static int pmemfs_run_guarded_once(void (*function)(void *), void *argument) {
    if (sigsetjmp(pmemfs_way_out, 0)) return 0;
    pmemfs_guarded = 1;
    function(argument);
    pmemfs_guarded = 0;
    return 1;
}

/* The same, also where a guarded function calls it. */
static inline int pmemfs_run_guarded(void (*function)(void *), void *argument) {
    sigjmp_buf outer;
    int ended;
    if (!pmemfs_guarded) return pmemfs_run_guarded_once(function, argument);
    memcpy(&outer, &pmemfs_way_out, sizeof outer);
    ended = pmemfs_run_guarded_once(function, argument);
    memcpy(&pmemfs_way_out, &outer, sizeof outer);
    pmemfs_guarded = 1;
    return ended;
}

/* The address whose touch ended this thread's latest guarded function. */
static inline size_t pmemfs_fault_address(void) { return (size_t)pmemfs_fault; }

#endif
