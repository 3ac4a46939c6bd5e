/* Cache lines written back to memory, and the system calls of a medium. */
#ifndef PMEMFS_WRITEBACK_H
#define PMEMFS_WRITEBACK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <linux/falloc.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

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

/* Chosen once in each module that includes this. */
__attribute__((constructor))
static void pmemfs_choose(void) {
    unsigned a, b = 0, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    if (b & (1u << 24)) { pmemfs_lines = pmemfs_lines_clwb; pmemfs_instruction = "clwb"; }
    else if (b & (1u << 23)) {
        pmemfs_lines = pmemfs_lines_clflushopt; pmemfs_instruction = "clflushopt";
    }
}
static inline void pmemfs_fence(void) { _mm_sfence(); }

#elif defined(__aarch64__)
static const char *pmemfs_instruction = "dc cvac";
static void pmemfs_lines(uintptr_t line, uintptr_t end) {
    for (; line < end; line += PMEMFS_LINE)
        __asm__ volatile("dc cvac, %0" :: "r"(line) : "memory");
}
static inline void pmemfs_fence(void) { __asm__ volatile("dsb sy" ::: "memory"); }
#else
#error "pmemfs knows how to write back cache lines on x86-64 and arm64 only"
#endif

static inline void pmemfs_flush(void *start, size_t length) {
    uintptr_t line = (uintptr_t)start & ~(uintptr_t)(PMEMFS_LINE - 1);
    pmemfs_lines(line, (uintptr_t)start + length);
}
static inline int pmemfs_punch(int fd, long long offset, long long length) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
}
static inline int pmemfs_msync(void *start, size_t length) {
    uintptr_t page = (uintptr_t)start & ~(uintptr_t)4095;
    return msync((void *)page, (uintptr_t)start + length - page, MS_SYNC);
}

#endif
