from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.structures cimport header_t, page_t

cdef struct memmap_t:
    header_t *header
    # What `memmap_offset` of the header counts from; NULL where there are no structures.
    uint8_t *base
    uint8_t *sections
    int pool_fd
    bint must_reserve

cdef struct pages_t:
    uint64_t first
    uint64_t count
    uint64_t epoch

cdef int get_pages(memmap_t *memmap, pages_t *held, uint64_t pfn, uint64_t frame_count, int access,
                   uint64_t mapping, uint64_t index, uint64_t now_ns) noexcept nogil
cdef void expect_page(memmap_t *memmap, uint64_t pfn) noexcept nogil
cdef void put_pages(memmap_t *memmap, pages_t *held, bint is_write) noexcept nogil
cdef void raise_persisted(header_t *header, uint64_t epoch) noexcept nogil
