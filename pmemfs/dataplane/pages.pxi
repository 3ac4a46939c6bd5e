"""Page structures, which threads of two processes change at once, without locks.

This is what each word of a structure goes through:
- `generation`: from an old one to this one with the top bit set, by the thread that wins the right
  to fill the structure, and to this one alone once all other words are filled. A thread that sees
  the top bit waits, but not for ever, because the filling thread may have been killed. To fill the
  structure again does no harm, since no page is held before its structure is filled;
- `refcount`: up and down by compare-and-swap, never past its maximum and never below zero;
- `reads`, `writes`: up by compare-and-swap, and they stay at their maximum; `flags`: by atomic or;
- `mapping`, `index`, `last_access_ns`, `write_epoch`: whole words, and the last writer counts.

A write stamps its pages with the epoch before its first byte moves and again after its last. So an
fsync in between, which may have missed some bytes, does not make the page clean.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EOVERFLOW, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.unistd cimport usleep

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.memory cimport load_8, pause, peek, prefetch, put, store, store_8
from pmemfs.dataplane.pages cimport memmap_t, pages_t
from pmemfs.dataplane.structures cimport *

cdef extern from "fcntl.h" nogil:
    int fallocate(int fd, int mode, long long offset, long long length)
    enum: FALLOC_FL_KEEP_SIZE
    enum: FALLOC_FL_PUNCH_HOLE

cdef enum:
    PREFETCH_DISTANCE = 8
    PATIENCE = 100000
    COUNTER_MAX = 0xFFFFFFFF

cdef uint64_t FILLING = <uint64_t>1 << 63


cdef int get_pages(memmap_t *memmap, pages_t *held, uint64_t pfn, uint64_t frame_count, int access,
                   uint64_t mapping, uint64_t index, uint64_t now_ns) noexcept nogil:
    """Take a reference on every page of a range and account the access: for all pages or none.

    Returns 0, EOVERFLOW, or the errno of getting memory for structures. `held` says at every
    instant what was taken, so that the caller can drop it after a fault.
    """
    cdef header_t *header = memmap.header
    cdef uint64_t first = (pfn - header.first_pfn) >> header.page_order
    cdef uint64_t last = (pfn + frame_count - 1 - header.first_pfn) >> header.page_order
    cdef uint64_t position
    cdef page_t *pages = pages_of(memmap)
    cdef int failed = enter_sections(memmap, first, last)
    held.first = first
    held.count = 0
    held.epoch = peek(&header.write_epoch)
    if failed:
        return failed
    for position in range(first, last + 1):
        prefetch(&pages[position + PREFETCH_DISTANCE])
        if get_page(&pages[position], header):
            put_pages(memmap, held, False)
            return EOVERFLOW
        held.count += 1
    for position in range(first, last + 1):
        account_page(&pages[position], access, mapping, index, now_ns, held.epoch)
        index += 1
    return 0


cdef void expect_page(memmap_t *memmap, uint64_t pfn) noexcept nogil:
    """Begin to fetch the structure of a page."""
    if memmap.base != NULL:
        prefetch(&pages_of(memmap)[(pfn - memmap.header.first_pfn) >> memmap.header.page_order])


cdef void put_pages(memmap_t *memmap, pages_t *held, bint is_write) noexcept nogil:
    """Drop the references that `get_pages` has taken."""
    cdef uint64_t epoch = peek(&memmap.header.write_epoch)
    cdef page_t *pages = pages_of(memmap)
    cdef page_t *page
    while held.count:
        held.count -= 1
        page = &pages[held.first + held.count]
        # First the epoch and the flag, then the reference: a search for idle sections that finds
        # the page without references must find it dirty.
        if is_write:
            if epoch != held.epoch:
                put(&page.write_epoch, epoch)
            if not memory.peek_16(&page.flags) & PAGE_DIRTY:
                # An fsync has cleaned it while the bytes moved.
                memory.or_16(&page.flags, PAGE_DIRTY)
        memory.add_32(&page.refcount, <uint32_t>-1)


cdef inline page_t *pages_of(memmap_t *memmap) noexcept nogil:
    """The structures, where they are now. They move when the pool grows, but not in a section."""
    return <page_t *>(memmap.base + peek(&memmap.header.memmap_offset))


cdef inline int get_page(page_t *page, header_t *header) noexcept nogil:
    cdef uint32_t count
    if memory.load(&page.generation) != header.generation:
        initialise(page, header)
    count = memory.peek_32(&page.refcount)
    while True:
        if count == COUNTER_MAX:
            return EOVERFLOW
        if memory.swap_32(&page.refcount, &count, count + 1):
            return 0


cdef inline void account_page(page_t *page, int access, uint64_t mapping, uint64_t index,
                              uint64_t now_ns, uint64_t epoch) noexcept nogil:
    cdef uint16_t flags
    if mapping:
        if page.mapping != mapping:
            put(&page.mapping, mapping)
        if page.index != index:
            put(&page.index, index)
    if access == ACCESS_PIN:
        return
    put(&page.last_access_ns, now_ns)
    flags = PAGE_REFERENCED
    if access == ACCESS_WRITE:
        flags |= PAGE_DIRTY
        put(&page.write_epoch, epoch)
        count_up(&page.writes)
    else:
        count_up(&page.reads)
    if (memory.peek_16(&page.flags) & flags) != flags:
        memory.or_16(&page.flags, flags)


cdef inline void count_up(uint32_t *counter) noexcept nogil:
    cdef uint32_t count = memory.peek_32(counter)
    while count != COUNTER_MAX and not memory.swap_32(counter, &count, count + 1):
        pass


cdef void initialise(page_t *page, header_t *header) noexcept nogil:
    """Fill a structure, or wait until another thread has filled it."""
    cdef uint64_t generation = header.generation
    cdef uint64_t found = memory.load(&page.generation)
    cdef int patience = PATIENCE
    while found != generation:
        if found == (generation | FILLING) and patience:
            patience -= 1
            pause()
            found = memory.load(&page.generation)
        elif memory.swap(&page.generation, &found, generation | FILLING):
            page.flags = 0
            page.order = <uint8_t>header.page_order
            page.reserved = 0
            page.refcount = 0
            page.mapping = page.index = page.private = page.last_access_ns = 0
            page.reads = page.writes = 0
            page.write_epoch = 0
            # Last, with release: a thread that sees this generation sees the words above, too.
            store(&page.generation, generation)
            return


cdef int enter_sections(memmap_t *memmap, uint64_t first, uint64_t last) noexcept nogil:
    """Make sure that the structures of a range can be touched; 0 or errno."""
    cdef uint64_t shift = memmap.header.section_shift
    cdef uint64_t section
    cdef int failed
    for section in range(first >> shift, (last >> shift) + 1):
        if load_8(&memmap.sections[section]) != SECTION_LIVE:
            failed = enter_section(memmap, section)
            if failed:
                return failed
    return 0


cdef int enter_section(memmap_t *memmap, uint64_t section) noexcept nogil:
    cdef uint8_t *state = &memmap.sections[section]
    cdef uint8_t found = load_8(state)
    cdef int failed
    while found != SECTION_LIVE:
            # Its memory is being punched out right now. What is stored before ABSENT would be lost.
        if found == SECTION_GOING:
            usleep(10)
            found = load_8(state)
            continue
        if found == SECTION_ABSENT and memmap.must_reserve:
            failed = reserve_section(memmap, section)
            if failed:
                return failed
        if memory.swap_8(state, &found, SECTION_LIVE):
            return 0
    return 0


cdef int reserve_section(memmap_t *memmap, uint64_t section) noexcept nogil:
    """Get memory for a stretch of structures in a sparse pool; 0 or errno."""
    cdef header_t *header = memmap.header
    cdef uint64_t first = section << header.section_shift
    cdef uint64_t count = min(<uint64_t>1 << header.section_shift, header.page_count - first)
    # KEEP_SIZE: a file that was cut off must not grow back, but fault.
    if fallocate(memmap.pool_fd, FALLOC_FL_KEEP_SIZE,
                 <long long>(header.memmap_offset + first * sizeof(page_t)),
                 <long long>(count * sizeof(page_t))):
        return errno
    return 0


cdef class PageAccountant:
    """The same operations for the control plane, on page structures that both planes share.

    It takes writable buffers: the shared memory, the memory with the page structures (the pool or
    the shared memory), and the states of their sections. `pool_fd` is the pool's descriptor if
    structures of a sparse pool still need memory, or -1.
    """

    cdef memmap_t _memmap
    cdef Py_buffer _shared
    cdef Py_buffer _memory
    cdef Py_buffer _sections

    def __cinit__(self, shared, memory, sections, int pool_fd) -> None:
        PyObject_GetBuffer(shared, &self._shared, PyBUF_WRITABLE)
        PyObject_GetBuffer(memory, &self._memory, PyBUF_WRITABLE)
        PyObject_GetBuffer(sections, &self._sections, PyBUF_WRITABLE)
        self._memmap.header = <header_t *>self._shared.buf
        self._memmap.base = <uint8_t *>self._memory.buf
        self._memmap.sections = <uint8_t *>self._sections.buf
        self._memmap.pool_fd = pool_fd
        self._memmap.must_reserve = pool_fd >= 0

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self._sections)
        PyBuffer_Release(&self._memory)
        PyBuffer_Release(&self._shared)

    def get(self, uint64_t pfn, uint64_t frame_count, int access, uint64_t mapping, uint64_t index,
            uint64_t now_ns) -> int:
        """Take references on existing pages, on all or none; 0 or an errno."""
        cdef pages_t held
        return get_pages(&self._memmap, &held, pfn, frame_count, access, mapping, index, now_ns)

    def put(self, uint64_t pfn, uint64_t frame_count, bint is_write=False) -> bool:
        """Drop references, on all pages or none; whether each page had one."""
        cdef header_t *header = self._memmap.header
        cdef uint64_t first = (pfn - header.first_pfn) >> header.page_order
        cdef uint64_t last = (pfn + frame_count - 1 - header.first_pfn) >> header.page_order
        cdef pages_t held
        cdef uint64_t position
        cdef page_t *page
        for position in range(first, last + 1):
            if load_8(&self._memmap.sections[position >> header.section_shift]) != SECTION_LIVE:
                return False
            page = &pages_of(&self._memmap)[position]
            if memory.load(&page.generation) != header.generation or not page.refcount:
                return False
        held.first, held.count = first, last - first + 1
        held.epoch = 0 if is_write else peek(&header.write_epoch)
        put_pages(&self._memmap, &held, is_write)
        return True

    def enter(self, uint64_t page, uint64_t page_count) -> int:
        """Make sure that structures can be touched; 0 or an errno."""
        return enter_sections(&self._memmap, page, page + page_count - 1)

    def clean(self, uint64_t pfn, uint64_t frame_count) -> None:
        """The content of a range is gone, so no page that lies whole in it is dirty any more."""
        cdef header_t *header = self._memmap.header
        cdef uint64_t first = pfn - header.first_pfn
        cdef uint64_t end = (first + frame_count) >> header.page_order
        cdef uint64_t position
        cdef page_t *page
        first = (first + (<uint64_t>1 << header.page_order) - 1) >> header.page_order
        for position in range(first, end):
            if load_8(&self._memmap.sections[position >> header.section_shift]) != SECTION_LIVE:
                continue
            page = &pages_of(&self._memmap)[position]
            if memory.load(&page.generation) == header.generation:
                memory.and_16(&page.flags, <uint16_t>~PAGE_DIRTY)

    def begin_persist(self) -> int:
        """Open a new write epoch; the epoch before it."""
        return memory.add(&self._memmap.header.write_epoch, 1)

    def end_persist(self, uint64_t epoch) -> None:
        """All that was written in `epoch` or before is durable."""
        raise_persisted(self._memmap.header, epoch)

    def begin_drop(self, uint64_t section) -> bool:
        """Announce that a section may go; False if it isn't live. A grace period must follow."""
        cdef uint8_t live = SECTION_LIVE
        return memory.swap_8(&self._memmap.sections[section], &live, SECTION_DROPPING)

    def end_drop(self, uint64_t section, bint is_idle, int shared_fd) -> bool:
        """Give an idle section's memory back; False if it isn't idle or was touched meanwhile."""
        cdef uint8_t *state = &self._memmap.sections[section]
        cdef uint8_t dropping = SECTION_DROPPING
        cdef header_t *header = self._memmap.header
        cdef uint64_t start = section << header.section_shift
        # A worker that has entered the section since has made it LIVE, and then this swap fails.
        cdef uint64_t count = min(<uint64_t>1 << header.section_shift, header.page_count - start)
        if not memory.swap_8(state, &dropping, SECTION_GOING if is_idle else SECTION_LIVE):
            return False
        if is_idle:
            # In whole frames; nothing else lies in the last one.
            fallocate(shared_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      <long long>(header.memmap_offset + start * sizeof(page_t)),
                      <long long>((count * sizeof(page_t) + 4095) & ~<uint64_t>4095))
            store_8(state, SECTION_ABSENT)
        return is_idle


    def drop_all(self, int shared_fd) -> None:
        """Give the memory of all sections back, while nobody touches one."""
        cdef header_t *header = self._memmap.header
        cdef Py_ssize_t section
        fallocate(shared_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  <long long>header.memmap_offset,
                  <long long>((header.page_count * sizeof(page_t) + 4095) & ~<uint64_t>4095))
        for section in range(self._sections.len):
            store_8(&self._memmap.sections[section], SECTION_ABSENT)


cdef void raise_persisted(header_t *header, uint64_t epoch) noexcept nogil:
    """Raise the persisted epoch. Write-backs may end in any order; a later epoch covers earlier."""
    cdef uint64_t known = memory.load(&header.persisted_epoch)
    while known < epoch and not memory.swap(&header.persisted_epoch, &known, epoch):
        pass
