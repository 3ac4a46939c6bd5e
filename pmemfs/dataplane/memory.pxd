# Words shared between threads and processes, memory that may fault, time.

from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

ctypedef void (*guarded_t)(void *argument) noexcept nogil

cdef extern from "memory.h" nogil:
    void pause "pmemfs_pause"()
    uint64_t load "pmemfs_load"(const uint64_t *word)
    uint64_t peek "pmemfs_peek"(const uint64_t *word)
    void store "pmemfs_store"(uint64_t *word, uint64_t value)
    void put "pmemfs_put"(uint64_t *word, uint64_t value)
    uint64_t add "pmemfs_add"(uint64_t *word, uint64_t value)
    bint swap "pmemfs_swap"(uint64_t *word, uint64_t *expected, uint64_t value)
    uint32_t peek_32 "pmemfs_peek"(const uint32_t *word)
    void put_32 "pmemfs_put"(uint32_t *word, uint32_t value)
    uint32_t add_32 "pmemfs_add"(uint32_t *word, uint32_t value)
    bint swap_32 "pmemfs_swap"(uint32_t *word, uint32_t *expected, uint32_t value)
    uint16_t peek_16 "pmemfs_peek"(const uint16_t *word)
    uint16_t or_16 "pmemfs_or"(uint16_t *word, uint16_t value)
    uint16_t and_16 "pmemfs_and"(uint16_t *word, uint16_t value)
    unsigned char load_8 "pmemfs_load"(const unsigned char *word)
    void store_8 "pmemfs_store"(unsigned char *word, unsigned char value)
    bint swap_8 "pmemfs_swap"(unsigned char *word, unsigned char *expected, unsigned char value)
    void full_fence "pmemfs_full_fence"()
    void store_fence "pmemfs_store_fence"()
    void load_fence "pmemfs_load_fence"()
    void fence_after_swap "pmemfs_fence_after_swap"()
    void settle "pmemfs_settle"()
    uint64_t multiply_high "pmemfs_multiply_high"(uint64_t a, uint64_t b)
    void prefetch "pmemfs_prefetch"(const void *line)
    uint64_t parity "pmemfs_parity"(uint64_t value)
    void stream "pmemfs_stream"(unsigned char *to, const unsigned char *source, size_t length)
    void stream_on "pmemfs_stream_on"(unsigned char *to, const unsigned char *source, size_t length)
    void end_stream "pmemfs_end_stream"()
    void store_block "pmemfs_store_block"(unsigned char *to, const unsigned char *source)
    uint64_t now_ns "pmemfs_now_ns"(int clock)
    bint read_seqlocked "pmemfs_read_seqlocked"(const uint64_t *sequence, uint64_t *words,
                                                size_t count)
    bint run_guarded "pmemfs_run_guarded"(guarded_t function, void *argument)
    size_t fault_address "pmemfs_fault_address"()
    int catch_faults "pmemfs_catch_faults"()
