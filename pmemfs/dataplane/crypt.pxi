"""READ and WRITE of encrypted files: AES-256-XTS in place, block by block, while bytes are copied.

The unit of encryption is a block of 16 bytes, so a write that begins or ends inside of a block has
to read, change and store all of it: an edge. Invariants:
- **Locks.** Whoever stores into an encrypted page has the page's lock, from before it reads the old
  bytes of an edge until the last byte is stored. Otherwise two writers of one block would each
  store it with the old bytes of the other. The lock is a word in the shared memory, as those of
  a cache's sets are. Nobody waits for one for long: a request that finds it taken is forwarded.
  A touch that faults under a lock lets go of it.
- **Readers** take no lock. They read the sequence beside it, decrypt, and read it again. If it was
  odd or has changed, a block may have been half old and half new, and they try again. After some
  tries they take the lock.
- **Killed workers.** An edge is stored by one instruction. So a death leaves its block old or new,
  and not a mixture that would decrypt to garbage beside what was written.
- **Power failures** may tear a block. Where cache lines are what is durable, an edge first goes
  into the redo record of the file's live line, which is durable before the block is touched, and is
  gone before the page's lock is free. `media/live` says what is done with it. A file has one such
  record, which has a lock of its own.
- **Blocks without an edge** may be torn: all of their bytes belong to a write that was not answered.
- **Order** of locks: one page, and then one redo record.
- **All or nothing.** A request that is forwarded may have stored some of its pages. The control
  plane writes all of them again, which nobody can tell, because the write was not answered yet.
- **Keys** are read from secret memory, and their schedules are overwritten before a worker waits
  for requests (`forget_keys`). Measured: to set up a key for each of many requests would cost a
  fifth of what the encryption of 4 KiB costs. The key of a published table stays in its slot until
  the grace period after that.

Bytes below a file's size were always stored through its key, zeroes too. What is behind the size
decrypts to anything.
"""

from libc.errno cimport EIO
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.crypt cimport crypt_t
from pmemfs.dataplane.memory cimport load, load_fence, pause, peek, put, run_guarded, store
from pmemfs.dataplane.memory cimport store_block, store_fence
from pmemfs.dataplane.plane cimport piece_t, plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *
from pmemfs.medium.writeback cimport wait_for_write_back, write_back
from pmemfs.transform.secrets cimport *

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "crypt.h" nogil:
    bint thread_lives "pmemfs_thread_lives"(uint64_t thread_id)

cdef enum:
    # A page is being stored for less than a microsecond, unless its writer is not running.
    SEALED_LOOKS = 200
    PAGE_LOOKS = 1000
    INSIDE_UNIT = UNIT_BYTES - 1
    INSIDE_BLOCK = CIPHER_BYTES - 1
    # Of the control plane, before it looks whether who has the lock is alive.
    CONTROL_LOOKS = 10000

cdef uint64_t PAGE_LOCKS_MASK = (<uint64_t>1 << PAGE_LOCKS_SHIFT) - 1
cdef uint64_t REDO_LOCKS_MASK = (<uint64_t>1 << REDO_LOCKS_SHIFT) - 1

# The blocks of a page that a part of a request touches, by their offsets in the page.
cdef struct part_t:
    uint64_t unit
    # Where the page begins in the pool.
    uint64_t page_offset
    # The bytes of the request.
    size_t begin
    size_t length
    # The blocks around them.
    size_t first
    size_t end
    # Whether all of the pool's memory is there.
    bint is_whole


cdef inline part_t part_of(uint64_t pool_offset, uint64_t offset, uint64_t length,
                           bint whole) noexcept nogil:
    """The part of a piece from a byte on that lies in one page."""
    cdef part_t part
    part.unit = offset >> FRAME_SHIFT
    part.begin = <size_t>(offset & INSIDE_UNIT)
    part.length = <size_t>min(length, <uint64_t>(UNIT_BYTES - part.begin))
    part.page_offset = pool_offset - part.begin
    part.first = part.begin & ~<size_t>INSIDE_BLOCK
    part.end = (part.begin + part.length + INSIDE_BLOCK) & ~<size_t>INSIDE_BLOCK
    part.is_whole = whole
    return part


cdef crypt_t *begin_crypt(worker_t *worker, request_t *request) noexcept nogil:
    """Find the key of a request's file; NULL if it is not here."""
    cdef uint64_t slot = request.table.key_slot - 1
    cdef secret_t *secrets = <secret_t *>load(<uint64_t *>&worker.plane.secrets)
    if secrets == NULL or slot >= SECRETS_COUNT or not secrets[slot].kind:
        return NULL
    request.secret = &secrets[slot]
    if worker.crypt == NULL:
        worker.crypt = <crypt_t *>aligned_alloc(64, (sizeof(crypt_t) + 63) & ~<size_t>63)
        if worker.crypt != NULL:
            memset(worker.crypt, 0, sizeof(crypt_t))
    return worker.crypt


cdef inline bint have_sealing_key(crypt_t *crypt, const secret_t *secret) noexcept nogil:
    """Be ready to encrypt with a key; whether that works."""
    if crypt.sealing_key != secret or crypt.sealing_serial != secret.serial:
        crypt.sealing_key, crypt.sealing_serial = secret, secret.serial
        if not begin_xts(&crypt.sealing, secret, True):
            crypt.sealing_key = NULL
    return crypt.sealing_key != NULL


cdef inline bint have_opening_key(crypt_t *crypt, const secret_t *secret) noexcept nogil:
    """Be ready to decrypt with a key; whether that works."""
    if crypt.opening_key != secret or crypt.opening_serial != secret.serial:
        crypt.opening_key, crypt.opening_serial = secret, secret.serial
        if not begin_xts(&crypt.opening, secret, False):
            crypt.opening_key = NULL
    return crypt.opening_key != NULL


cdef inline void forget_keys(worker_t *worker) noexcept nogil:
    """Overwrite what this worker has of keys, since it has no request for now."""
    cdef crypt_t *crypt = worker.crypt
    if crypt == NULL:
        return
    if crypt.sealing_key != NULL:
        end_xts(&crypt.sealing)
    if crypt.opening_key != NULL:
        end_xts(&crypt.opening)
    crypt.sealing_key = crypt.opening_key = NULL


cdef void free_crypt(worker_t *worker) noexcept nogil:
    if worker.crypt != NULL:
        free_xts(&worker.crypt.sealing)
        free_xts(&worker.crypt.opening)
        free(worker.crypt)
        worker.crypt = NULL


# Locks


cdef inline page_lock_t *lock_of_page(plane_t *plane, uint64_t pool_offset) noexcept nogil:
    return &plane.page_locks[(pool_offset >> FRAME_SHIFT) & PAGE_LOCKS_MASK]


cdef inline redo_lock_t *lock_of_redo(redo_lock_t *locks, uint64_t live_offset) noexcept nogil:
    # Live lines lie in slots of several lines, so their numbers' low bits are alike.
    return &locks[live_offset * INODE_HASH >> (64 - REDO_LOCKS_SHIFT)]


cdef bint take_for_worker(worker_t *worker, uint64_t *lock) noexcept nogil:
    cdef size_t slots = <size_t>worker.plane.shared + worker.plane.header.slots_offset
    cdef uint64_t holder = 1 + (<size_t>worker.slot - slots) // SLOT_BYTES
    cdef uint64_t unlocked
    cdef int looks
    for looks in range(PAGE_LOOKS):
        unlocked = 0
        if not peek(lock) and memory.swap(lock, &unlocked, holder):
            return True
        pause()
    return False


cdef bint lock_page(request_t *request, uint64_t pool_offset) noexcept nogil:
    """Take the lock of a page. False: the request must be forwarded."""
    cdef page_lock_t *lock = lock_of_page(request.worker.plane, pool_offset)
    if not take_for_worker(request.worker, &lock.holder):
        request.must_forward = True
        return False
    request.worker.crypt.page_lock = lock
    memory.settle()
    return True


cdef inline void begin_store(worker_t *worker) noexcept nogil:
    """Readers can't use the locked page from here on."""
    cdef page_lock_t *lock = worker.crypt.page_lock
    put(&lock.sequence, lock.sequence + 1)
    # No byte of the page may be seen before the sequence is odd.
    store_fence()


cdef inline void unlock_page(worker_t *worker) noexcept nogil:
    """The page is stored. The sequence is even again, if it was odd, before the lock is free."""
    cdef page_lock_t *lock = worker.crypt.page_lock
    store(&lock.sequence, lock.sequence + (lock.sequence & 1))
    worker.crypt.page_lock = NULL
    memory.settle()
    store(&lock.holder, 0)


cdef bint lock_redo(request_t *request) noexcept nogil:
    """Take the lock of the file's redo record. False: the request must be forwarded."""
    cdef uint64_t live_offset = request.table.live_offset
    cdef redo_lock_t *lock = lock_of_redo(request.worker.plane.redo_locks, live_offset)
    if not take_for_worker(request.worker, &lock.holder):
        request.must_forward = True
        return False
    # Whoever finds the lock of a dead holder finds the record that it has left.
    store(&lock.live_offset, live_offset)
    request.worker.crypt.redo_lock = lock
    memory.settle()
    return True


cdef void unlock_redo(worker_t *worker) noexcept nogil:
    cdef redo_lock_t *lock = worker.crypt.redo_lock
    worker.crypt.redo_lock = NULL
    memory.settle()
    store(&lock.holder, 0)


cdef void clear_redo_guarded(void *argument) noexcept nogil:
    """The block of the file's redo record could not be stored, so there is nothing to redo."""
    cdef live_t *live = (<request_t *>argument).live
    put(&live.redo_offset, 0)
    write_back(live, sizeof(live_t))
    wait_for_write_back()


cdef void let_go(request_t *request) noexcept nogil:
    """Let go of the locks that a fault has left."""
    cdef crypt_t *crypt = request.worker.crypt
    if crypt.redo_lock != NULL:
        run_guarded(clear_redo_guarded, request)
        unlock_redo(request.worker)
    if crypt.page_lock != NULL:
        unlock_page(request.worker)


# Reading


cdef verdict_t serve_sealed_read(worker_t *worker, request_t *request) noexcept nogil:
    """As `serve_read`, which has checked the request, with a key."""
    cdef crypt_t *crypt = begin_crypt(worker, request)
    if crypt == NULL or not have_opening_key(crypt, request.secret):
        request.answer_bytes = 0
        return FORWARD
    if not run_guarded(read_sealed_guarded, request):
        let_go(request)
        return fail_fault(worker, request)
    if request.must_forward:
        request.answer_bytes = 0
        return FORWARD
    if not request.error:
        request.moved_bytes = request.answer_bytes
    return ANSWER


cdef void read_sealed_guarded(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef uint64_t done = 0
    cdef piece_t piece
    while done < request.answer_bytes:
        piece = piece_at(request.table, wanted.offset + done, request.answer_bytes - done)
        if piece.is_hole:
            memset(request.answer + done, 0, piece.length)
        elif piece.is_forwarded:
            request.must_forward = True
            return
        elif not read_sealed_piece(request, piece, wanted.offset + done, request.answer + done):
            return
        done += piece.length


cdef bint read_sealed_piece(request_t *request, piece_t piece, uint64_t offset,
                     uint8_t *into) noexcept nogil:
    cdef plane_t *plane = request.worker.plane
    cdef bint whole = is_whole(plane, piece.pool_offset, piece.length)
    cdef uint64_t done = 0
    cdef part_t part
    if not whole and is_unused(plane, piece.pool_offset, piece.length):
        # Nothing was ever stored here, so no key has made it.
        memset(into, 0, piece.length)
        return True
    if not hold_pages(request, piece, offset, ACCESS_READ):
        return False
    while done < piece.length:
        part = part_of(piece.pool_offset + done, offset + done, piece.length - done, whole)
        if not decrypt_part(request, &part, into + done):
            break
        done += part.length
    drop_pages(request.worker, request)
    return done == piece.length


cdef bint decrypt_part(request_t *request, const part_t *part, uint8_t *into) noexcept nogil:
    """Decrypt bytes of a page as they were at one instant."""
    cdef page_lock_t *lock = lock_of_page(request.worker.plane, part.page_offset)
    cdef uint64_t sequence
    cdef bint works
    cdef int looks
    for looks in range(SEALED_LOOKS):
        sequence = load(&lock.sequence)
        if sequence & 1:
            pause()
            continue
        if not decrypt_blocks(request, part, into):
            return False
        load_fence()
        if peek(&lock.sequence) == sequence:
            return True
    if not lock_page(request, part.page_offset):
        return False
    works = decrypt_blocks(request, part, into)
    unlock_page(request.worker)
    return works


cdef bint decrypt_blocks(request_t *request, const part_t *part, uint8_t *into) noexcept nogil:
    cdef plane_t *plane = request.worker.plane
    cdef crypt_t *crypt = request.worker.crypt
    cdef uint64_t at = part.page_offset + part.first
    cdef const uint8_t *source = plane.pool + at
    cdef bint is_straight = not part.begin and part.length == part.end
    # What stands before the first block decrypts to something, too, and is not looked at.
    cdef uint8_t *target = into if is_straight else crypt.plain
    if not part.is_whole:
        # The mapping would fill holes when it is touched.
        request.error = read_pool(plane, target + part.first, part.end - part.first, at)
        note_refusal(request, at)
        source = target
        if request.error:
            return False
    elif not is_straight:
        memcpy(target + part.first, source, part.end - part.first)
        source = target
    if not xts_unit(&crypt.opening, part.unit, target, source, part.end):
        request.error = EIO
        return False
    if not is_straight:
        memcpy(into, target + part.begin, part.length)
    return True


# Writing


cdef verdict_t serve_sealed_write(worker_t *worker, request_t *request) noexcept nogil:
    """As `serve_write`, which has checked the request, with a key."""
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef crypt_t *crypt = begin_crypt(worker, request)
    cdef bint has_edge = (wanted.offset | (wanted.offset + wanted.size)) & INSIDE_BLOCK
    if (crypt == NULL or not have_sealing_key(crypt, request.secret)
            or (has_edge and not have_opening_key(crypt, request.secret))):
        return FORWARD
    if not run_guarded(write_sealed_guarded, request):
        let_go(request)
        return fail_fault(worker, request)
    if request.must_forward:
        request.error = 0
        return FORWARD
    if request.error:
        return ANSWER
    (<fuse_write_out *>request.answer).size = wanted.size
    request.answer_bytes = 8
    request.moved_bytes = wanted.size
    return ANSWER


cdef void write_sealed_guarded(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef uint64_t done = 0
    cdef piece_t piece
    while done < wanted.size:
        piece = piece_at(request.table, wanted.offset + done, wanted.size - done)
        if not write_sealed_piece(request, piece, wanted.offset + done, request.payload + done):
            return
        done += piece.length
    # Only now, after the bytes of all pieces.
    if request.live != NULL:
        note_write(request)


cdef bint write_sealed_piece(request_t *request, piece_t piece, uint64_t offset,
                     const uint8_t *data) noexcept nogil:
    cdef plane_t *plane = request.worker.plane
    cdef bint is_flushed = plane.header.durability == DURABILITY_CACHE_LINES
    cdef bint whole = is_whole(plane, piece.pool_offset, piece.length)
    cdef uint64_t done = 0
    cdef part_t part
    if not hold_pages(request, piece, offset, ACCESS_WRITE):
        return False
    while done < piece.length:
        # Where cache lines are durable, always through the mapping: see `write_piece`.
        part = part_of(piece.pool_offset + done, offset + done, piece.length - done,
                       whole or is_flushed)
        if not encrypt_part(request, &part, data + done):
            break
        done += part.length
    if is_flushed:
        wait_for_write_back()
    # After the write, as in `write_piece`.
    if not whole and done:
        note_written(plane, piece.pool_offset, done)
    drop_pages(request.worker, request)
    return done == piece.length


cdef bint encrypt_part(request_t *request, const part_t *part, const uint8_t *data) noexcept nogil:
    cdef crypt_t *crypt = request.worker.crypt
    cdef bint has_head = part.begin != part.first
    cdef bint has_tail = part.begin + part.length != part.end
    cdef bint works
    if has_head or has_tail:
        if not lock_page(request, part.page_offset):
            return False
        works = (encrypt_edges(request, part, data, has_head, has_tail)
                 and store_sealed(request, part, has_head, has_tail))
        unlock_page(request.worker)
        return works
    if not part.first and part.is_whole:
        return encrypt_in_place(request, part, data)
    # The blocks before it are made up: each stands for itself.
    memcpy(crypt.plain + part.first, data, part.length)
    if not xts_unit(&crypt.sealing, part.unit, crypt.sealed, crypt.plain, part.end):
        request.error = EIO
        return False
    if not lock_page(request, part.page_offset):
        return False
    begin_store(request.worker)
    works = store_blocks(request, part, part.first, part.end)
    unlock_page(request.worker)
    return works


cdef bint encrypt_in_place(request_t *request, const part_t *part,
                           const uint8_t *data) noexcept nogil:
    """Encrypt whole blocks from the start of a page on straight into the pool, which saves a copy.
    What libcrypto stores there is ciphertext only."""
    cdef plane_t *plane = request.worker.plane
    cdef uint8_t *into = plane.pool + part.page_offset
    cdef bint works
    if not lock_page(request, part.page_offset):
        return False
    begin_store(request.worker)
    works = xts_unit(&request.worker.crypt.sealing, part.unit, into, data, part.end)
    unlock_page(request.worker)
    if not works:
        request.error = EIO
    elif plane.header.durability == DURABILITY_CACHE_LINES:
        # `write_sealed_piece` waits for all of them.
        write_back(into, part.end)
    return works


cdef bint encrypt_edges(request_t *request, const part_t *part, const uint8_t *data, bint has_head,
                     bint has_tail) noexcept nogil:
    """Encrypt bytes of a locked page, with the bytes beside them in their first and last block."""
    cdef crypt_t *crypt = request.worker.crypt
    if ((has_head and not load_edge(request, part, part.first))
            or (has_tail and not load_edge(request, part, part.end - CIPHER_BYTES))):
        return False
    if not xts_unit(&crypt.opening, part.unit, crypt.plain, crypt.sealed, part.end):
        request.error = EIO
        return False
    memcpy(crypt.plain + part.begin, data, part.length)
    if not xts_unit(&crypt.sealing, part.unit, crypt.sealed, crypt.plain, part.end):
        request.error = EIO
        return False
    return True


cdef bint load_edge(request_t *request, const part_t *part, size_t at) noexcept nogil:
    cdef plane_t *plane = request.worker.plane
    cdef uint8_t *into = request.worker.crypt.sealed + at
    if part.is_whole:
        memcpy(into, plane.pool + part.page_offset + at, CIPHER_BYTES)
        return True
    request.error = read_pool(plane, into, CIPHER_BYTES, part.page_offset + at)
    note_refusal(request, part.page_offset + at)
    return not request.error


cdef bint store_sealed(request_t *request, const part_t *part, bint has_head,
                     bint has_tail) noexcept nogil:
    """Store the blocks of a locked page, edges first."""
    cdef worker_t *worker = request.worker
    cdef bint is_noted = (worker.plane.header.durability == DURABILITY_CACHE_LINES
                          and request.live != NULL)
    cdef size_t first = part.first
    cdef size_t end = part.end
    cdef bint works = True
    if is_noted and not lock_redo(request):
        return False
    begin_store(worker)
    if has_head:
        works = store_edge(request, part, first, is_noted)
        first += CIPHER_BYTES
    if has_tail and first < end:
        end -= CIPHER_BYTES
        works = works and store_edge(request, part, end, is_noted)
    if is_noted:
        unlock_redo(worker)
    return works and (first >= end or store_blocks(request, part, first, end))


cdef bint store_edge(request_t *request, const part_t *part, size_t at,
                     bint is_noted) noexcept nogil:
    """Store one block, which a power failure must not tear, either."""
    cdef plane_t *plane = request.worker.plane
    cdef live_t *live = request.live
    cdef const uint8_t *block = request.worker.crypt.sealed + at
    cdef uint64_t offset = part.page_offset + at
    cdef const uint64_t *words = <const uint64_t *>block
    if not part.is_whole:
        request.error = write_pool(plane, block, CIPHER_BYTES, offset)
        note_refusal(request, offset)
        return not request.error
    if is_noted:
        put(<uint64_t *>&live.redo_block[0], words[0])
        put(<uint64_t *>&live.redo_block[8], words[1])
        put(&live.redo_check, redo_check(offset, words[0], words[1]))
        # Last: a line keeps the order of the stores into it, so the offset never stands before an
        # older block.
        store(&live.redo_offset, offset)
        write_back(live, sizeof(live_t))
        wait_for_write_back()
    store_block(plane.pool + offset, block)
    if plane.header.durability == DURABILITY_CACHE_LINES:
        write_back(plane.pool + offset, CIPHER_BYTES)
        wait_for_write_back()
    if is_noted:
        store(&live.redo_offset, 0)
        write_back(live, sizeof(live_t))
        wait_for_write_back()
    return True


cdef inline uint64_t redo_check(uint64_t offset, uint64_t low, uint64_t high) noexcept nogil:
    """As `media.live.redo_check`."""
    return mix(mix(mix(offset) ^ low) ^ high)


cdef inline uint64_t mix(uint64_t word) noexcept nogil:
    return (word ^ word >> 32) * LIVE_SIZE_FACTOR


cdef bint store_blocks(request_t *request, const part_t *part, size_t first,
                       size_t end) noexcept nogil:
    """Store whole blocks of a locked page."""
    cdef plane_t *plane = request.worker.plane
    cdef const uint8_t *source = request.worker.crypt.sealed + first
    cdef uint64_t offset = part.page_offset + first
    if not part.is_whole:
        request.error = write_pool(plane, source, end - first, offset)
        note_refusal(request, offset)
        return not request.error
    memcpy(plane.pool + offset, source, end - first)
    if plane.header.durability == DURABILITY_CACHE_LINES:
        # `write_sealed_piece` waits for all of them.
        write_back(plane.pool + offset, end - first)
    return True


# The control plane


cdef class PageLocks:
    """The locks of encrypted pages and of redo records, for the control plane.

    It takes writable buffers: the shared memory, and the pool. A lock is held for a few stores and
    never across an `await`, since workers that find it taken hand their requests over. A lock whose
    holder was killed is taken over.
    """

    cdef Py_buffer _shared
    cdef Py_buffer _pool
    cdef header_t *_header
    cdef page_lock_t *_pages
    cdef redo_lock_t *_redos

    def __cinit__(self, shared, pool) -> None:
        PyObject_GetBuffer(shared, &self._shared, PyBUF_WRITABLE)
        PyObject_GetBuffer(pool, &self._pool, PyBUF_WRITABLE)
        self._header = <header_t *>self._shared.buf
        if not self._header.has_files:
            raise ValueError("there are no locks of pages here")
        self._pages = <page_lock_t *>(<uint8_t *>self._shared.buf + self._header.page_locks_offset)
        self._redos = <redo_lock_t *>(self._pages + (1 << PAGE_LOCKS_SHIFT))

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self._pool)
        PyBuffer_Release(&self._shared)

    def lock(self, uint64_t pfn) -> None:
        """Lock the page of a frame. No reader uses it until it is unlocked."""
        cdef page_lock_t *lock = &self._pages[pfn & PAGE_LOCKS_MASK]
        with nogil:
            self._take(&lock.holder)
            # A dead holder may have left it odd.
            put(&lock.sequence, lock.sequence | 1)
            store_fence()

    def unlock(self, uint64_t pfn) -> None:
        """Unlock a page after all its bytes are stored."""
        cdef page_lock_t *lock = &self._pages[pfn & PAGE_LOCKS_MASK]
        store(&lock.sequence, lock.sequence + 1)
        store(&lock.holder, 0)

    def lock_redo(self, uint64_t live_offset) -> None:
        """Lock the redo record of a live line, after the page of the block. The record is empty
        then: what a dead holder has left is durable."""
        cdef redo_lock_t *lock = lock_of_redo(self._redos, live_offset)
        with nogil:
            self._take(&lock.holder)
            self._finish(lock.live_offset)
            store(&lock.live_offset, live_offset)

    def unlock_redo(self, uint64_t live_offset) -> None:
        """Unlock a redo record, which is empty."""
        store(&lock_of_redo(self._redos, live_offset).holder, 0)

    def holders(self) -> list[int]:
        """Who has a lock."""
        words = [self._pages[at].holder for at in range(PAGE_LOCKS_MASK + 1)]
        words += [self._redos[at].holder for at in range(REDO_LOCKS_MASK + 1)]
        return [word for word in words if word]

    def free_all(self) -> None:
        """Free all locks, while no worker is in a section. What held one of them is dead."""
        cdef uint64_t at
        cdef page_lock_t *page
        cdef redo_lock_t *redo
        for at in range(REDO_LOCKS_MASK + 1):
            redo = &self._redos[at]
            if redo.holder:
                self._finish(redo.live_offset)
                store(&redo.holder, 0)
        for at in range(PAGE_LOCKS_MASK + 1):
            page = &self._pages[at]
            if page.holder:
                store(&page.sequence, page.sequence + (page.sequence & 1))
                store(&page.holder, 0)

    cdef void _take(self, uint64_t *lock) noexcept nogil:
        cdef uint64_t found = 0
        cdef int looks
        while True:
            for looks in range(CONTROL_LOOKS):
                found = 0
                if not peek(lock) and memory.swap(lock, &found, CONTROL_HOLDER):
                    return
                pause()
            sched_yield()
            found = peek(lock)
            if found >= CONTROL_HOLDER or (found and not self._lives(found)):
                # Of the control plane, this is the only one that lives.
                if memory.swap(lock, &found, CONTROL_HOLDER):
                    return

    cdef bint _lives(self, uint64_t holder) noexcept nogil:
        cdef uint8_t *slots = <uint8_t *>self._shared.buf + self._header.slots_offset
        if holder > self._header.worker_count:
            return False
        return thread_lives(peek(&(<slot_t *>(slots + (holder - 1) * SLOT_BYTES)).thread_id))

    cdef void _finish(self, uint64_t live_offset) noexcept nogil:
        """The redo record of a live line may be left by a dead process. Its block is old or new,
        as no power failure has torn it. When that is durable, the record is of no use any more, and
        would do harm later: it would undo what is stored there from now on."""
        cdef uint8_t *pool = <uint8_t *>self._pool.buf
        cdef live_t *live = <live_t *>(pool + live_offset)
        cdef uint64_t room = <uint64_t>self._pool.len
        cdef uint64_t offset
        if not live_offset or live_offset % sizeof(live_t) or live_offset > room - sizeof(live_t):
            return
        offset = peek(&live.redo_offset)
        if not offset:
            return
        if offset <= room - CIPHER_BYTES:
            write_back(pool + offset, CIPHER_BYTES)
            wait_for_write_back()
        store(&live.redo_offset, 0)
        write_back(live, sizeof(live_t))
        wait_for_write_back()
