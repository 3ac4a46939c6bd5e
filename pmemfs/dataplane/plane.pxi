"""The shared memory as the data plane reads it: extents, presence, counters.

The head of `tables.py`, which writes it, describes the protocol.
"""

from libc.errno cimport ESTALE, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.stat cimport fstat, struct_stat
from posix.unistd cimport usleep

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.memory cimport load, load_8, peek, put, read_seqlocked, store, store_8
from pmemfs.dataplane.plane cimport piece_t, plane_t
from pmemfs.dataplane.structures cimport *
from pmemfs.transform.secrets cimport SECRETS_BYTES, load_crypto, map_secrets, secret_t


cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command)
    enum:
        F_GETFL
        O_ACCMODE
        O_RDONLY

cdef enum:
    PAUSE_MICROSECONDS = 50
    # The words of an entry behind its sequence.
    ATTRIBUTES_WORDS = sizeof(attributes_t) // 8 - 1


cdef int attach(plane_t *plane, int shared_fd, int pool_fd, int map_flags) noexcept nogil:
    """Map the shared memory and the pool; 0 or errno: ESTALE for memory of another version."""
    cdef struct_stat status
    cdef void *mapped
    cdef int flags
    if fstat(shared_fd, &status):
        return errno
    plane.shared_bytes = <size_t>status.st_size
    mapped = mmap(NULL, plane.shared_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0)
    if mapped == MAP_FAILED:
        return errno
    plane.shared = <uint8_t *>mapped
    plane.header = <header_t *>mapped
    if plane.header.signature != SIGNATURE:
        # The program was replaced while the mount lasts. What lies where is not known here.
        return ESTALE
    plane.pool_fd = pool_fd
    # The mapping reaches beyond the pool's end. A touch there faults until the pool has grown.
    plane.mapped_bytes = plane.header.reach_bytes
    # Not as `read_only` says: a mount that is only read by now may be written to again.
    flags = fcntl(pool_fd, F_GETFL)
    mapped = mmap(NULL, plane.mapped_bytes,
                  PROT_READ if (flags & O_ACCMODE) == O_RDONLY else PROT_READ | PROT_WRITE,
                  map_flags, pool_fd, 0)
    if mapped == MAP_FAILED:
        return errno
    plane.pool = <uint8_t *>mapped
    find_areas(plane)
    return attach_names(plane)


cdef void find_areas(plane_t *plane) noexcept nogil:
    """Find what lies in the shared memory and the pool, which are mapped."""
    plane.header = <header_t *>plane.shared
    plane.inodes = <inode_t *>(plane.shared + plane.header.inodes_offset)
    plane.attributes = <attributes_t *>(plane.shared + plane.header.attributes_offset)
    plane.presence = plane.shared + plane.header.presence_offset
    plane.cache_locks = <uint64_t *>(plane.shared + plane.header.cache_locks_offset)
    plane.cache_groups = plane.shared + plane.header.cache_groups_offset
    plane.page_locks = <page_lock_t *>(plane.shared + plane.header.page_locks_offset)
    plane.redo_locks = <redo_lock_t *>(plane.page_locks + (1 << PAGE_LOCKS_SHIFT))
    plane.memmap.header = plane.header
    plane.memmap.sections = plane.shared + plane.header.sections_offset
    plane.memmap.pool_fd = plane.pool_fd
    plane.memmap.must_reserve = (plane.header.memmap_place == MEMMAP_POOL
                                 and not plane.header.reserved)
    plane.memmap.base = NULL
    if plane.header.memmap_place == MEMMAP_POOL:
        plane.memmap.base = plane.pool
    elif plane.header.memmap_place == MEMMAP_SHARED:
        plane.memmap.base = plane.shared


cdef void detach(plane_t *plane) noexcept nogil:
    """Unmap what `attach` has mapped."""
    detach_names(plane)
    if plane.shared != NULL:
        munmap(plane.shared, plane.shared_bytes)
    if plane.pool != NULL:
        munmap(plane.pool, plane.mapped_bytes)
    if plane.secrets != NULL:
        munmap(plane.secrets, SECRETS_BYTES)
    free(plane.heat)


cdef int have_secrets(plane_t *plane, int fd) noexcept nogil:
    """Map the memory of keys; 0 or errno. The descriptor is not needed any more."""
    cdef secret_t *secrets = NULL
    cdef int failed = load_crypto() or map_secrets(fd, &secrets)
    if not failed:
        # Workers look at it from now on, so it is stored last.
        store(<uint64_t *>&plane.secrets, <uint64_t>secrets)
    return failed


cdef slot_t *slot_of(plane_t *plane, int number) noexcept nogil:
    """The slot of worker `number`, which only that worker writes."""
    return <slot_t *>(plane.shared + plane.header.slots_offset + <size_t>number * SLOT_BYTES)


cdef inode_t *find_inode(plane_t *plane, uint64_t inode) noexcept nogil:
    """The entry of an inode, or NULL. It lies in one of two buckets: see `layouts.buckets_of`."""
    cdef uint64_t mixed = inode * INODE_HASH
    cdef inode_t *bucket
    cdef int choice, way
    if not inode:
        # Free entries have this number.
        return NULL
    for choice in range(2):
        bucket = &plane.inodes[(mixed >> (64 - INODE_BUCKETS_SHIFT)) * INODE_WAYS]
        for way in range(INODE_WAYS):
            # With acquire: the table word that is read next is this inode's, or 0, because an entry
            # goes to another inode only after a grace period.
            if load(&bucket[way].inode) == inode:
                return &bucket[way]
        mixed <<= INODE_BUCKETS_SHIFT
    return NULL


cdef bint read_attributes(plane_t *plane, uint64_t inode, void *answer) noexcept nogil:
    """Fill in the answer to GETATTR if it is published; see `layouts.attributes_place_of`."""
    cdef attributes_t *entry = &plane.attributes[inode * INODE_HASH >> (64 - ATTRIBUTES_SHIFT)]
    cdef attributes_t found
    # First a cheap look. A second one follows, because only inside the seqlock do the words
    # belong together.
    if (not inode or peek(&entry.inode) != inode
            or not read_seqlocked(&entry.sequence, &found.inode, ATTRIBUTES_WORDS)
            or found.inode != inode):
        return False
    memcpy(answer, &found.answer, sizeof(found.answer))
    return True


cdef table_t *table_of(plane_t *plane, inode_t *entry) noexcept nogil:
    """The published extents of an inode, or NULL. They stay until the worker's section ends."""
    cdef uint64_t offset = load(&entry.table)
    return <table_t *>(plane.shared + offset) if offset else NULL


cdef bint has_live_line(plane_t *plane, table_t *table) noexcept nogil:
    """Whether the live line that a table names can be touched at all."""
    return (table.live_offset % sizeof(live_t) == 0
            and table.live_offset <= peek(&plane.header.pool_bytes) - sizeof(live_t))


cdef piece_t piece_at(table_t *table, uint64_t offset, uint64_t length) noexcept nogil:
    """The longest piece from `offset` on that is one run of the pool, one hole, or forwarded."""
    cdef extent_t *extents = <extent_t *>(<uint8_t *>table + sizeof(table_t))
    cdef uint64_t frame = offset >> FRAME_SHIFT
    cdef uint64_t low = 0
    cdef uint64_t high = table.extent_count
    cdef uint64_t middle, start, end
    cdef piece_t piece
    while low < high:
        middle = (low + high) // 2
        if extents[middle].index + extents[middle].frame_count <= frame:
            low = middle + 1
        else:
            high = middle
    piece.is_hole = low == table.extent_count or extents[low].index > frame
    piece.is_forwarded = False
    piece.extent = NULL
    if not piece.is_hole:
        piece.extent = &extents[low]
        start = extents[low].index << FRAME_SHIFT
        end = start + (extents[low].frame_count << FRAME_SHIFT)
        piece.is_forwarded = extents[low].flags & EXTENT_FORWARDED
        piece.pool_offset = (extents[low].pfn << FRAME_SHIFT) + (offset - start)
    else:
        end = extents[low].index << FRAME_SHIFT if low < table.extent_count else offset + length
        piece.pool_offset = 0
    piece.length = min(length, end - offset)
    return piece


cdef bint is_whole(plane_t *plane, uint64_t pool_offset, uint64_t length) noexcept nogil:
    """Whether a range of the pool is known to have memory everywhere."""
    cdef uint64_t chunk
    cdef uint8_t presence
    for chunk in range(pool_offset >> CHUNK_SHIFT,
                       ((pool_offset + length - 1) >> CHUNK_SHIFT) + 1):
        presence = load_8(&plane.presence[chunk])
        if presence != PRESENCE_WHOLE and (presence != PRESENCE_DEFAULT
                                           or not plane.header.reserved):
            return False
    return True


cdef void note_written(plane_t *plane, uint64_t pool_offset, uint64_t length) noexcept nogil:
    """A range that may have had holes was written to: it may have become whole."""
    cdef uint64_t chunk
    cdef uint8_t *presence
    for chunk in range(pool_offset >> CHUNK_SHIFT,
                       ((pool_offset + length - 1) >> CHUNK_SHIFT) + 1):
        presence = &plane.presence[chunk]
        if load_8(presence) != PRESENCE_WRITTEN and load_8(presence) != PRESENCE_WHOLE:
            store_8(presence, PRESENCE_WRITTEN)


cdef void begin_section(slot_t *slot) noexcept nogil:
    """From here on, what this worker reads of the tables stays as it is."""
    put(&slot.section, slot.section + 1)
    # The fence orders this store before every load of a table. The control plane stores a table
    # word, fences, and reads the sections. So either it sees this section and waits for it, or this
    # worker sees the new word. Without the fence both could miss each other.
    memory.full_fence()
    while load(&slot.paused):
        # Tables and page structures are about to move. Wait outside of the section, because the
        # control plane waits for the section to end, and then begin anew.
        store(&slot.section, slot.section + 1)
        while load(&slot.paused):
            usleep(PAUSE_MICROSECONDS)
        put(&slot.section, slot.section + 1)
        memory.full_fence()


cdef void end_section(slot_t *slot) noexcept nogil:
    """This worker uses nothing of the tables any more."""
    # With release: all reads of tables and of their pages are done before the word is even.
    store(&slot.section, slot.section + 1)


cdef inline int bucket_of(uint64_t ns) noexcept nogil:
    """Four buckets for each power of two; see `LATENCY_BUCKETS`."""
    cdef int power
    if ns < 128:
        return 0
    power = 63 - __builtin_clzll(ns)
    return min(<int>((power - 7) * 4 + ((ns >> (power - 2)) & 3) + 1), LATENCY_BUCKETS - 1)


cdef extern from *:
    int __builtin_clzll(unsigned long long value) noexcept nogil


cdef void count_request(slot_t *slot, int operation, bint is_answered, bint has_failed,
                        uint64_t moved_bytes, uint64_t took_ns) noexcept nogil:
    """Account one request. A slot has only one writer, so plain stores are enough."""
    cdef uint8_t *at = <uint8_t *>slot + sizeof(slot_t) + operation * OPERATION_BYTES
    cdef counts_t *counts = <counts_t *>at
    cdef uint64_t *buckets = <uint64_t *>(at + sizeof(counts_t))
    if not is_answered:
        put(&counts.forwarded, counts.forwarded + 1)
        return
    put(&counts.answered, counts.answered + 1)
    if has_failed:
        put(&counts.failed, counts.failed + 1)
    if moved_bytes:
        put(&counts.moved_bytes, counts.moved_bytes + moved_bytes)
    put(&counts.total_ns, counts.total_ns + took_ns)
    buckets += bucket_of(took_ns)
    put(buckets, buckets[0] + 1)


cdef void record_fault(plane_t *plane, uint64_t pool_offset, uint64_t inode, int error,
                       uint64_t now) noexcept nogil:
    """Leave a record of memory that could not be touched; the control plane reports it."""
    cdef uint64_t number = memory.add(&plane.header.fault_count, 1)
    cdef fault_t *record = <fault_t *>(plane.shared + plane.header.faults_offset
                                       + (number % FAULT_RECORDS) * sizeof(fault_t))
    put(&record.pool_offset, pool_offset)
    put(&record.inode, inode)
    put(&record.error, <uint64_t>error)
    store(&record.time_ns, now)
