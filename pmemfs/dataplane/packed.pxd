# What a worker decompresses pieces with.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.structures cimport hot_t

cdef extern from "packed.h" nogil:
    void load_packers "pmemfs_load_packers"()
    void *new_zstd "pmemfs_new_zstd"()
    void free_zstd "pmemfs_free_zstd"(void *context)
    bint unpack_zstd "pmemfs_unpack_zstd"(void *context, uint8_t *into, size_t length,
                                          const uint8_t *stored, size_t stored_bytes)
    bint unpack_lz4 "pmemfs_unpack_lz4"(uint8_t *into, size_t length, const uint8_t *stored,
                                        size_t stored_bytes)

cdef enum:
    # 2 MiB for a worker whose callers read less than a piece at a time.
    KEPT_PIECES = 8
    MOST_HOT = 64
    HEAT_SHIFT = 14

# A piece that was decompressed: where it lay, what it was, and its bytes before and after.
cdef struct kept_t:
    uint64_t pfn
    uint64_t flags
    uint64_t used
    uint8_t *stored
    uint8_t *plain

cdef struct unpacker_t:
    void *zstd
    # What is stored of the piece that is being read.
    uint8_t *stored
    kept_t kept[KEPT_PIECES]
    uint64_t uses
    # Pieces of which the control plane is to be told.
    hot_t hot[MOST_HOT]
    uint32_t hot_count

# In which seconds a piece was read: the last one, and how many before that.
cdef struct heat_t:
    uint64_t piece
    uint32_t second
    uint32_t seconds
