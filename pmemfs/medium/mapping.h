/* Mappings whose bad pages are covered with zeroes when they are touched; see mapping.pyx. */
#ifndef PMEMFS_MAPPING_H
#define PMEMFS_MAPPING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "sigbus.h"

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <sys/mman.h>

#define PMEMFS_MAPPINGS 256

struct pmemfs_mapping {
    uintptr_t start, end;      /* All zero: the place is free. */
    uintptr_t low, high;       /* What zeroes may cover now. */
    long owner;
    int fd, protection, flags;
};
static struct pmemfs_mapping pmemfs_mappings[PMEMFS_MAPPINGS];

/* Held for a few system calls, and only by code that touches no pool meanwhile: a fault under the
   lock would wait for it for ever. */
static char pmemfs_is_locked;
static void pmemfs_lock(void) {
    while (__atomic_test_and_set(&pmemfs_is_locked, __ATOMIC_ACQUIRE)) sched_yield();
}
static void pmemfs_unlock(void) { __atomic_clear(&pmemfs_is_locked, __ATOMIC_RELEASE); }

/* The first bad page that this thread has met since it last asked; owner 0: it has met none.
   With initial-exec the memory is there from the start: a signal handler must not allocate it. */
static __thread __attribute__((tls_model("initial-exec"))) volatile long pmemfs_met_owner;
static __thread __attribute__((tls_model("initial-exec"))) volatile size_t pmemfs_met_offset;

/* Map zeroes over an address, in the smallest piece that the mapping can be split into (4 KiB,
   2 MiB or 1 GiB, depending on its pages); whether that worked. */
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

/* Guard a mapping from now on; its number, or -1 with errno. */
static int pmemfs_guard(const struct pmemfs_mapping *wanted) {
    static int catches;
    if (!catches && pmemfs_handle_sigbus(pmemfs_on_fault)) return -1;
    catches = 1;
    pmemfs_lock();
    for (int number = 0; number < PMEMFS_MAPPINGS; number++)
        if (!pmemfs_mappings[number].start) {
            pmemfs_mappings[number] = *wanted;
            /* The caller has not filled these in, so they may hold anything. */
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

/* Whether the last touch of a range by this thread may have met zeroes instead of the pool. */
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
/* Put the pages of a pool back; the offset of the bad page that this thread met first, or else of
   one that is covered, or -1. */
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
        /* A page that can't be put back stays covered, and each touch of it is reported. */
        if (mmap((void *)low, length, mapping->protection, mapping->flags | MAP_FIXED,
                 mapping->fd, (off_t)(low - mapping->start)) != MAP_FAILED)
            mapping->low = mapping->high = 0;
    }
    pmemfs_unlock();
    return met;
}

#endif
