from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.structures cimport header_t, page_t

cdef struct memmap_t:
    header_t *header
    # `memmap_offset` of the header counts from here; NULL if there are no structures.
    uint8_t *base
    uint8_t *sections
    int pool_fd
    bint must_reserve

cdef struct pages_t:
    uint64_t first
    uint64_t count
    uint64_t epoch
