# An inode as the log in its slot says it, and the pool that it lies in; stored.pxi reads it.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    # Each record adds one at most, and cuts one in two at most.
    MOST_RUNS = 12

# The data zone of a pool with a file system: its memory, and its frames. Where it may have holes it
# is read from a descriptor of the pool, else `fd` is -1.
cdef struct zone_t:
    const uint8_t *memory
    int fd
    uint64_t first_pfn
    uint64_t frame_count

# Frames of a file that are mapped to a run of the pool.
cdef struct run_t:
    uint64_t index
    uint64_t pfn
    uint64_t count

cdef struct stored_t:
    uint64_t number
    uint64_t generation
    # The last ATTRIBUTES; the entries behind it have set the times of a directory.
    uint32_t mode
    uint32_t link_count
    uint32_t uid
    uint32_t gid
    uint32_t device
    uint16_t epoch
    uint16_t flags
    uint64_t size_bytes
    int64_t accessed_ns
    int64_t modified_ns
    int64_t changed_ns
    bint has_attributes
    uint64_t parent
    uint64_t target_bytes
    uint64_t slot_count
    uint32_t run_count
    run_t runs[MOST_RUNS]
    # Of a directory: where its names stand in the slot, each behind its length of two bytes.
    uint32_t entry_count
    uint32_t entries[6]
    uint32_t subdirectory_count
