"""Places of a cache that the control plane fills from the origin, many with one call.

These are the steps "reserve" and "publish" of the protocol at the head of `volume/cache/index.py`,
for the common case: blocks that the cache does not have, in groups that were seen. Whatever else
is found is left to that module. A lock is held for one block at a time.

A touch of bad memory does not end these functions: the mapping of the control plane covers it with
zeroes (`medium/mapping`), and its owner asks the medium before it relies on anything.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strerror
from posix.time cimport CLOCK_REALTIME

from pmemfs.dataplane.cache cimport *
from pmemfs.dataplane.memory cimport load_8, now_ns
from pmemfs.dataplane.pages cimport pages_t
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.structures cimport *
from pmemfs.medium.writeback cimport wait_for_write_back, write_back

cdef enum:
    # As `SEEN` of volume/cache/groups.
    GROUP_SEEN = 2


cdef class CachePlaces:
    """Reserves and publishes places. Only one thread at a time may use it, the one that also takes
    the `CacheLocks` of this process.

    It takes writable buffers: the shared memory, the pool, and what `Groups` know of each group.
    """

    cdef plane_t _plane
    cdef worker_t _worker
    cdef Py_buffer _shared
    cdef Py_buffer _pool
    cdef Py_buffer _groups

    def __cinit__(self, shared, pool, groups, int pool_fd) -> None:
        cdef plane_t *plane = &self._plane
        memset(plane, 0, sizeof(plane_t))
        memset(&self._worker, 0, sizeof(worker_t))
        PyObject_GetBuffer(shared, &self._shared, PyBUF_WRITABLE)
        PyObject_GetBuffer(pool, &self._pool, PyBUF_WRITABLE)
        PyObject_GetBuffer(groups, &self._groups, PyBUF_WRITABLE)
        plane.shared, plane.shared_bytes = <uint8_t *>self._shared.buf, self._shared.len
        plane.pool, plane.mapped_bytes = <uint8_t *>self._pool.buf, self._pool.len
        plane.pool_fd = pool_fd
        find_areas(plane)
        self._worker.plane = plane
        # Its own counts: the slots in the shared memory belong to the workers.
        self._worker.slot = <slot_t *>calloc(1, SLOT_BYTES)
        if self._worker.slot == NULL:
            raise MemoryError

    def __dealloc__(self) -> None:
        free(self._worker.slot)
        PyBuffer_Release(&self._groups)
        PyBuffer_Release(&self._pool)
        PyBuffer_Release(&self._shared)

    @property
    def evicted(self) -> int:
        """How many blocks had to go."""
        return counts_of_cache(&self._worker).evicted

    def may_have(self, uint64_t block, uint64_t count=1) -> bool:
        """Whether the cache has any of some blocks, or can't tell here."""
        cdef uint64_t set_number
        cdef uint64_t words[CACHE_WAYS]
        cdef tag_t tag
        for block in range(block, block + count):
            set_number = set_of(self._plane.header, block)
            if (not are_tags_whole(&self._plane, set_number, 1)
                    or not read_set(&self._plane, set_number, block, words, &tag) or tag.word):
                return True
        return False

    def reserve(self, list blocks not None, uint64_t mapping) -> list:
        """Reserve a place for each of some blocks, and account a read of it; where each begins in
        the pool. 0: the block is there, or `Index` has to see to it."""
        cdef uint64_t offset
        self._worker.now_ns = now_ns(CLOCK_REALTIME)
        for block in blocks:
            prefetch(tags_of(&self._plane, set_of(self._plane.header, block)))
        offsets = []
        for block in blocks:
            offset = reserve_place(&self._worker, <uint8_t *>self._groups.buf, block, mapping)
            offsets.append(offset)
        return offsets

    def publish(self, list blocks not None, list offsets not None) -> list:
        """Let reserved places, which are filled, be clean blocks; which of them are now. A block
        that is something else by now stays what it is."""
        cdef plane_t *plane = &self._plane
        cdef uint64_t offset
        if plane.header.durability == DURABILITY_CACHE_LINES:
            for offset in offsets:
                write_back(plane.pool + offset, block_bytes(plane.header))
            # The bytes before the first tag that says that they are there.
            wait_for_write_back()
        return [publish_place(plane, block, offset)
                for block, offset in zip(blocks, offsets, strict=True)]

    def hold(self, list offsets not None) -> None:
        """Take the references that `reserve` has taken, in a new generation of page structures.
        Raises OSError (ENOSPC)."""
        cdef plane_t *plane = &self._plane
        cdef uint64_t frames = block_bytes(plane.header) >> FRAME_SHIFT
        cdef pages_t held
        cdef uint64_t offset
        cdef int failed
        for offset in offsets:
            failed = get_pages(&plane.memmap, &held, offset >> FRAME_SHIFT, frames, ACCESS_PIN, 0,
                               0, 0)
            if failed:
                raise OSError(failed, strerror(failed).decode())

    def release(self, list offsets not None) -> None:
        """Drop the references that `reserve` has taken."""
        cdef plane_t *plane = &self._plane
        cdef pages_t held
        cdef uint64_t offset
        for offset in offsets:
            held.first = (offset >> FRAME_SHIFT) - plane.header.first_pfn
            held.count = block_bytes(plane.header) >> FRAME_SHIFT
            put_pages(&plane.memmap, &held, False)


cdef uint64_t reserve_place(worker_t *worker, const uint8_t *groups, uint64_t block,
                            uint64_t mapping) noexcept nogil:
    """Reserve a place for a block; 0 if it is there, or something is in the way."""
    cdef plane_t *plane = worker.plane
    cdef uint64_t set_number = set_of(plane.header, block)
    cdef uint64_t offset
    if (load_8(&groups[set_number >> CACHE_GROUP_SHIFT]) < GROUP_SEEN
            or not are_tags_whole(plane, set_number, 1)
            or not take_lock(lock_of(plane, set_number), CONTROL_HOLDER)):
        return 0
    offset = reserve_locked(worker, block, set_number, mapping)
    store(lock_of(plane, set_number), 0)
    return offset


cdef uint64_t reserve_locked(worker_t *worker, uint64_t block, uint64_t set_number,
                             uint64_t mapping) noexcept nogil:
    cdef plane_t *plane = worker.plane
    cdef uint64_t frames = block_bytes(plane.header) >> FRAME_SHIFT
    cdef uint64_t words[CACHE_WAYS]
    cdef uint64_t offset, position
    cdef pages_t held
    cdef tag_t tag
    cdef int way
    if not read_set(plane, set_number, block, words, &tag) or tag.word:
        return 0
    way = choose_way(worker, set_number, words, True, -1)
    if way < 0:
        return 0
    offset = place_offset(plane.header, set_number, way)
    # As a pin, so that no access is accounted before the counts begin anew.
    if get_pages(&plane.memmap, &held, offset >> FRAME_SHIFT, frames, ACCESS_PIN, mapping,
                 block * frames, worker.now_ns):
        return 0
    for position in range(held.first, held.first + held.count):
        memory.put_32(&pages_of(&plane.memmap)[position].reads, 0)
        memory.put_32(&pages_of(&plane.memmap)[position].writes, 0)
        account_page(&pages_of(&plane.memmap)[position], ACCESS_READ, 0, 0, worker.now_ns,
                     held.epoch)
    return offset


cdef bint publish_place(plane_t *plane, uint64_t block, uint64_t offset) noexcept nogil:
    """Store the tag of a place whose bytes are durable; False if the block has another tag, or its
    set can't be changed now."""
    cdef header_t *header = plane.header
    cdef uint64_t set_number = set_of(header, block)
    cdef uint64_t place = (offset - header.cache_blocks_offset) >> header.cache_block_shift
    cdef uint64_t words[CACHE_WAYS]
    cdef uint64_t low = block << TAG_BLOCK_SHIFT | TAG_CLEAN
    cdef tag_t tag
    cdef bint is_new
    cdef int way = <int>(place // header.cache_set_count)
    if not take_lock(lock_of(plane, set_number), CONTROL_HOLDER):
        return False
    is_new = read_set(plane, set_number, block, words, &tag) and not tag.word
    if is_new:
        store_tag(plane, set_number, way,
                  check_of(header, low, set_number, way) << TAG_CHECK_SHIFT | low)
        end_of_tags(plane)
    store(lock_of(plane, set_number), 0)
    return is_new
