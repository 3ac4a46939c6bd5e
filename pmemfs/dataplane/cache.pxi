"""READ, WRITE and LSEEK of mode `cache`: blocks that are found by their tags in the pool.

`media/cache` says what tags are, and `media.cache.Ground` where they lie. A block of the origin may
lie in one set only. Its bytes never change in place: a write puts them into another place of the
set, and then one store of a tag makes that place the block. The control plane follows the same
rules (`volume/cache`), which are these:

- **Places.** A place whose tag is 0 and whose pages have no references is free. Whoever wants to
  fill one takes references on all of its pages, under the lock of its set. A place with references
  is given to nobody, whatever its tag says.
- **Locks.** Tags change only under the lock of their set, which is a word in the shared memory.
  While it is free, all tags of the set are durable. It is held for a few microseconds and never
  across anything that waits. Nobody waits for a lock for long: a request that finds one taken is
  forwarded. A touch that faults under a lock lets go of it.
- **Readers** take no lock. They read a tag, take references on the pages, and read the tag again. If
  it is the same, the place holds that block for as long as they hold the references. Whoever frees a
  place clears its tag first, and then looks at the references. One of the two sees the other: each
  has a full fence between its store and its load.
- **Order.** A block's bytes are durable before its new tag is stored, that tag is durable before the
  old one is cleared, and a cleared tag is durable before its place is filled again. So after a power
  failure a block is old or new, and of two tags the one with the newer sequence counts.
- **All or nothing.** A read is forwarded whole before it is answered, and so is a write that meets an
  obstacle. Some of its blocks may be written then. The control plane writes all of them again, which
  nobody can tell, because the write was not answered yet.
- **Spare place.** A block that was not there takes a place only if another one stays free, so that
  each block of a full set can still be written.

A set with a damaged tag is left to the control plane: that tag may be the newer one of any block.
"""

from libc.errno cimport EINVAL, ENXIO, EROFS
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport SEEK_SET

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.cache cimport *
from pmemfs.dataplane.memory cimport load, pause, peek, prefetch, put, run_guarded, store
from pmemfs.dataplane.plane cimport piece_t, plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *
from pmemfs.medium.writeback cimport wait_for_write_back, write_back

cdef enum:
    # A lock is held for a copy of 64 KiB at most. If it is not free after so many looks, whoever
    # has it is likely not running.
    LOCK_LOOKS = 1000
    # A reader whose blocks move away under its eyes gives up after so many.
    READ_TRIES = 16
    STATE_MASK = (1 << TAG_SEQUENCE_SHIFT) - 1

# A request whose block is about to be served.
cdef struct expected_t:
    plane_t *plane
    uint64_t block
    uint64_t set_number
    bint is_write

cdef uint64_t REGION_MASK = ((<uint64_t>1) << CACHE_REGION_SHIFT) - 1
cdef uint64_t LOCKS_MASK = ((<uint64_t>1) << CACHE_LOCKS_SHIFT) - 1
cdef uint64_t LOW_MASK = ((<uint64_t>1) << TAG_CHECK_SHIFT) - 1
cdef uint64_t NEVER = ~<uint64_t>0


# Where blocks and tags lie


cdef inline uint64_t set_of(header_t *header, uint64_t block) noexcept nogil:
    """As `Ground.set_of` of media/cache."""
    cdef uint64_t mixed = ((block >> CACHE_REGION_SHIFT) ^ header.cache_seed) * TAG_MIX
    cdef uint64_t first = memory.multiply_high(mixed, header.cache_set_count)
    return (first + (block & REGION_MASK)) % header.cache_set_count


cdef inline uint64_t next_set(header_t *header, uint64_t block, uint64_t set_number) noexcept nogil:
    """The set of a block, if that of the block before it is known: mostly it is the next one."""
    if not block & REGION_MASK:
        return set_of(header, block)
    return set_number + 1 if set_number + 1 < header.cache_set_count else 0


cdef inline uint64_t *tags_of(plane_t *plane, uint64_t set_number) noexcept nogil:
    return <uint64_t *>(plane.pool + plane.header.cache_tags_offset + set_number * CACHE_SET_BYTES)


cdef inline bint are_tags_whole(plane_t *plane, uint64_t set_number,
                                uint64_t set_count) noexcept nogil:
    """Whether tags can be touched: a touch would fill a hole of a sparse pool."""
    return is_whole(plane, plane.header.cache_tags_offset + set_number * CACHE_SET_BYTES,
                    set_count * CACHE_SET_BYTES)


cdef inline uint64_t place_offset(header_t *header, uint64_t set_number, int way) noexcept nogil:
    """Where a place begins in the pool; as `Ground.place_offset`."""
    cdef uint64_t place = <uint64_t>way * header.cache_set_count + set_number
    return header.cache_blocks_offset + (place << header.cache_block_shift)


cdef inline uint64_t check_of(header_t *header, uint64_t low, uint64_t set_number,
                              int way) noexcept nogil:
    """The check bits of a tag; as `Ground._check`."""
    cdef uint64_t place = (set_number * CACHE_WAYS + <uint64_t>way) ^ header.cache_seed
    return ((low ^ (place * TAG_MIX_PLACE)) * TAG_MIX) >> TAG_CHECK_SHIFT


cdef inline uint64_t sequence_of(uint64_t word) noexcept nogil:
    return (word >> TAG_SEQUENCE_SHIFT) % CACHE_SEQUENCES


cdef inline bint is_newer(uint64_t word, uint64_t other) noexcept nogil:
    """Which of two tags of one block counts; as `media.cache.is_newer`."""
    cdef uint64_t ahead = (sequence_of(word) - sequence_of(other)) % CACHE_SEQUENCES
    return 0 < ahead < CACHE_SEQUENCES // 2


cdef inline uint64_t state_of(uint64_t word) noexcept nogil:
    return word & STATE_MASK


cdef bint read_set(plane_t *plane, uint64_t set_number, uint64_t block, uint64_t *words,
                   tag_t *tag) noexcept nogil:
    """Read all tags of a set, and find that of a block. False: one of them is damaged."""
    cdef header_t *header = plane.header
    cdef uint64_t *tags = tags_of(plane, set_number)
    cdef uint64_t word, low
    cdef int way
    tag.word, tag.way, tag.older = 0, -1, -1
    for way in range(CACHE_WAYS):
        word = words[way] = load(&tags[way])
        if not word:
            continue
        low = word & LOW_MASK
        if (word >> TAG_CHECK_SHIFT != check_of(header, low, set_number, way)
                or state_of(word) - 1 >= TAG_ZERO):
            return False
        if low >> TAG_BLOCK_SHIFT != block:
            continue
        if tag.word and is_newer(tag.word, word):
            tag.older = way
        elif tag.word and not is_newer(word, tag.word):
            # No crash leaves two tags of which neither is the newer one.
            return False
        else:
            tag.older = tag.way
            tag.word, tag.way = word, way
    return True


# Reading


cdef verdict_t serve_cached(worker_t *worker, request_t *request) noexcept nogil:
    """Answer a request for the file of a cache, whose table says the size."""
    cdef uint32_t opcode = request.head.opcode
    if opcode == FUSE_READ:
        return serve_cached_read(worker, request)
    if opcode == FUSE_WRITE:
        return serve_cached_write(worker, request)
    if opcode == FUSE_LSEEK:
        return serve_cached_seek(request)
    if request.table == NULL or not load(&worker.plane.header.cache_fsyncs):
        return FORWARD
    return serve_sync(worker, request)


cdef verdict_t serve_cached_read(worker_t *worker, request_t *request) noexcept nogil:
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    if request.operation_bytes < sizeof(fuse_read_in) or wanted.size > request.answer_room:
        return refuse(request, EINVAL)
    if request.table == NULL or worker.plane.memmap.base == NULL:
        return FORWARD
    if wanted.offset >= request.size_bytes or not wanted.size:
        return ANSWER
    request.answer_bytes = <uint32_t>min(<uint64_t>wanted.size, request.size_bytes - wanted.offset)
    if not run_guarded(read_cached_guarded, request):
        return fail_fault(worker, request)
    if request.must_forward:
        request.answer_bytes = 0
        return FORWARD
    if not request.error:
        request.moved_bytes = request.answer_bytes
        if not request.is_again:
            count_blocks(&counts_of_cache(worker).read_hits,
                         blocks_of(worker.plane.header, wanted.offset, request.answer_bytes))
    return ANSWER


cdef inline cache_counts_t *counts_of_cache(worker_t *worker) noexcept nogil:
    return <cache_counts_t *>(<uint8_t *>worker.slot + CACHE_COUNTS_AT)


cdef inline void count_blocks(uint64_t *counter, uint64_t count) noexcept nogil:
    """A slot has only one writer, so a plain store is enough."""
    put(counter, counter[0] + count)


cdef inline uint64_t blocks_of(header_t *header, uint64_t offset, uint64_t length) noexcept nogil:
    """How many blocks a range touches."""
    return (((offset + length - 1) >> header.cache_block_shift)
            - (offset >> header.cache_block_shift) + 1)


cdef void read_cached_guarded(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    cdef uint64_t done = 0
    cdef uint64_t moved
    cdef int tries = READ_TRIES
    while done < request.answer_bytes:
        moved = read_portion(request, done)
        if request.must_forward or request.error or request.pointed != NULL:
            return
        if not moved:
            tries -= 1
        if not tries:
            request.must_forward = True
            return
        done += moved


cdef uint64_t read_portion(request_t *request, uint64_t done) noexcept nogil:
    """Read some bytes more of a request, and return how many: fewer if a block moves away."""
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef header_t *header = request.worker.plane.header
    cdef uint64_t start = wanted.offset + done
    cdef uint64_t end = wanted.offset + request.answer_bytes
    cdef uint64_t block = start >> header.cache_block_shift
    cdef uint64_t position = start
    cdef uint64_t run_end
    cdef cached_t blocks[PORTION_BLOCKS]
    cdef int count = <int>min(blocks_of(header, start, end - start), <uint64_t>PORTION_BLOCKS)
    cdef int number = 0
    cdef int run
    # All of them before the first byte moves: what is not all there is forwarded.
    if not find_blocks(request.worker.plane, block, count, blocks):
        request.must_forward = request.is_missed = True
        return 0
    while number < count:
        run = length_of_run(&blocks[number], count - number)
        run_end = min(end, (block + <uint64_t>(number + run)) << header.cache_block_shift)
        if not read_run(request, &blocks[number], run, position, run_end - position):
            break
        position = run_end
        number += run
    return position - start


cdef bint find_blocks(plane_t *plane, uint64_t block, int count, cached_t *blocks) noexcept nogil:
    """Find blocks that follow each other. False: one is not there, or can't be read here."""
    cdef header_t *header = plane.header
    cdef uint64_t set_number = set_of(header, block)
    cdef uint64_t words[CACHE_WAYS]
    cdef uint64_t pool_offset
    cdef tag_t tag
    cdef int number
    for number in range(count):
        if number:
            set_number = next_set(header, block + <uint64_t>number, set_number)
        if (not are_tags_whole(plane, set_number, 1)
                or not read_set(plane, set_number, block + <uint64_t>number, words, &tag)
                or not tag.word):
            return False
        blocks[number].set_number = set_number
        blocks[number].word, blocks[number].way = tag.word, tag.way
        if state_of(tag.word) != TAG_ZERO:
            pool_offset = place_offset(header, set_number, tag.way)
            expect_page(&plane.memmap, pool_offset >> FRAME_SHIFT)
            prefetch(plane.pool + pool_offset)
    return True


cdef int length_of_run(const cached_t *blocks, int count) noexcept nogil:
    """How many blocks lie side by side, or are zeroes, from the first on."""
    cdef bint is_zero = state_of(blocks[0].word) == TAG_ZERO
    cdef int length = 1
    while (length < count and (state_of(blocks[length].word) == TAG_ZERO) == is_zero
            and (is_zero or (blocks[length].way == blocks[0].way
                             and blocks[length].set_number
                             == blocks[0].set_number + <uint64_t>length))):
        length += 1
    return length


cdef bint read_run(request_t *request, const cached_t *blocks, int count, uint64_t offset,
                   uint64_t length) noexcept nogil:
    """Read a run of blocks; False if one of them lies elsewhere by now, or there is an error."""
    cdef plane_t *plane = request.worker.plane
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef uint8_t *into = request.answer + (offset - wanted.offset)
    cdef uint64_t in_block = offset & (((<uint64_t>1) << plane.header.cache_block_shift) - 1)
    cdef piece_t piece
    if state_of(blocks[0].word) == TAG_ZERO:
        memset(into, 0, length)
        return True
    piece.pool_offset = place_offset(plane.header, blocks[0].set_number, blocks[0].way) + in_block
    piece.length, piece.is_hole = length, False
    if not is_whole(plane, piece.pool_offset, piece.length):
        request.must_forward = True
        return False
    if not hold_pages(request, piece, offset, ACCESS_PIN if request.is_again else ACCESS_READ):
        return False
    if not are_unchanged(plane, blocks, count):
        drop_pages(request.worker, request)
        return False
    if in_block >> FRAME_SHIFT and not request.is_again:
        note_use(request, &blocks[0])
    if request.may_point and length == request.answer_bytes:
        # The reply points into the pool. Pages stay held and the section open until `release`.
        request.pointed = plane.pool + piece.pool_offset
        return True
    memcpy(into, plane.pool + piece.pool_offset, length)
    drop_pages(request.worker, request)
    return True


cdef inline void note_use(request_t *request, const cached_t *block) noexcept nogil:
    """The end of a block is read. For evictions its first page speaks, so that notes it, too."""
    cdef plane_t *plane = request.worker.plane
    cdef uint64_t position = page_of_place(plane, block.set_number, block.way)
    if is_initialised(&plane.memmap, position):
        account_page(&pages_of(&plane.memmap)[position], ACCESS_READ, 0, 0,
                     request.worker.now_ns, request.held.epoch)


cdef inline bint are_unchanged(plane_t *plane, const cached_t *blocks, int count) noexcept nogil:
    """Whether places whose pages are held now still belong to their blocks."""
    cdef int number
    # The reference before the look at the tag. Whoever clears a tag looks at references after that.
    memory.fence_after_swap()
    for number in range(count):
        if (load(&tags_of(plane, blocks[number].set_number)[blocks[number].way])
                != blocks[number].word):
            return False
    return True


cdef verdict_t serve_cached_seek(request_t *request) noexcept nogil:
    """Only the origin knows where it has holes, so all of it counts as data."""
    cdef const fuse_lseek_in *wanted = <const fuse_lseek_in *>request.operation
    if request.operation_bytes < sizeof(fuse_lseek_in):
        return refuse(request, EINVAL)
    if request.table == NULL or (wanted.whence != SEEK_DATA and wanted.whence != SEEK_HOLE):
        return FORWARD
    if wanted.offset >= request.size_bytes:
        return refuse(request, ENXIO)
    (<fuse_lseek_out *>request.answer).offset = (
        wanted.offset if wanted.whence == SEEK_DATA else request.size_bytes)
    request.answer_bytes = sizeof(fuse_lseek_out)
    return ANSWER


# Writing


cdef verdict_t serve_cached_write(worker_t *worker, request_t *request) noexcept nogil:
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef header_t *header = worker.plane.header
    if request.operation_bytes < sizeof(fuse_write_in) or wanted.size > request.payload_bytes:
        return refuse(request, EINVAL)
    if header.read_only:
        return refuse(request, EROFS)
    # What reaches beyond the end is cut off or refused by the control plane. Only the control plane
    # calls msync, without which a tag on such memory could become durable before its block.
    if (request.table == NULL or worker.plane.memmap.base == NULL
            or not load(&header.cache_writes) or header.durability == DURABILITY_MSYNC
            or wanted.size == 0 or wanted.offset > request.size_bytes
            or wanted.size > request.size_bytes - wanted.offset):
        return FORWARD
    request.is_write = True
    request.batch.locked = request.batch.change_count = 0
    if not run_guarded(write_cached_guarded, request):
        close_batch(request)
        return fail_fault(worker, request)
    if request.must_forward:
        return FORWARD
    if request.error:
        return ANSWER
    stamp(&request.entry.last_write_ns)
    (<fuse_write_out *>request.answer).size = wanted.size
    request.answer_bytes = 8
    request.moved_bytes = wanted.size
    return ANSWER


cdef void write_cached_guarded(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef header_t *header = request.worker.plane.header
    cdef batch_t *batch = &request.batch
    cdef uint64_t end = wanted.offset + wanted.size
    cdef uint64_t block = wanted.offset >> header.cache_block_shift
    cdef uint64_t last = (end - 1) >> header.cache_block_shift
    cdef bint is_first = True
    cdef int number
    while block <= last:
        begin_batch(header, batch, block, last)
        if is_first and block + <uint64_t>batch.set_count <= last:
            # There are more batches. It would be a waste to store some blocks and then forward all.
            is_first = False
            if not may_write_all(request, block, last):
                request.must_forward = True
                return
        if prepare_batch(request, batch):
            store_batch(request, batch)
            publish_batch(request.worker, batch)
        elif not request.error:
            request.must_forward = True
        close_batch_guarded(request)
        if request.must_forward or request.error:
            return
        block += <uint64_t>batch.set_count


cdef void begin_batch(header_t *header, batch_t *batch, uint64_t block,
                      uint64_t last) noexcept nogil:
    """Choose the blocks of a batch: their sets follow each other, so that each has its own lock."""
    cdef uint64_t most = max(<uint64_t>1, <uint64_t>BATCH_BYTES >> header.cache_block_shift)
    cdef uint64_t count = min(min(most, last - block + 1), REGION_MASK + 1 - (block & REGION_MASK))
    cdef uint64_t number
    batch.first_set = set_of(header, block)
    count = min(count, header.cache_set_count - batch.first_set)
    batch.set_count = <int>count
    for number in range(count):
        batch.changes[number].block = block + number
        batch.changes[number].set_number = batch.first_set + number


cdef bint may_write_all(request_t *request, uint64_t block, uint64_t last) noexcept nogil:
    """Whether all blocks of a write can be written, as far as a quick look at their sets tells."""
    cdef plane_t *plane = request.worker.plane
    cdef uint64_t set_number = set_of(plane.header, block)
    cdef uint64_t words[CACHE_WAYS]
    cdef tag_t tag
    while may_change(plane, set_number, 1) and may_have_room(tags_of(plane, set_number)):
        if not covers(request, block) and (
                not read_set(plane, set_number, block, words, &tag) or not tag.word):
            return False
        if block == last:
            return True
        block += 1
        set_number = next_set(plane.header, block, set_number)
    return False


cdef inline bint may_have_room(const uint64_t *tags) noexcept nogil:
    cdef uint64_t word
    cdef int way
    for way in range(CACHE_WAYS):
        word = peek(&tags[way])
        if not word or state_of(word) == TAG_CLEAN:
            return True
    return False


cdef bint may_change(plane_t *plane, uint64_t set_number, uint64_t set_count) noexcept nogil:
    """Whether sets may get dirty blocks, and their tags can be touched."""
    cdef uint64_t group
    for group in range(set_number >> CACHE_GROUP_SHIFT,
                       ((set_number + set_count - 1) >> CACHE_GROUP_SHIFT) + 1):
        if not load_8(&plane.cache_groups[group]):
            return False
    return are_tags_whole(plane, set_number, set_count)


cdef inline bint covers(request_t *request, uint64_t block) noexcept nogil:
    """Whether a write has all bytes of a block, or all up to the end of the origin."""
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef uint64_t shift = request.worker.plane.header.cache_block_shift
    cdef uint64_t end = min((block + 1) << shift, request.size_bytes)
    return wanted.offset <= block << shift and wanted.offset + wanted.size >= end


cdef inline bint has_all_of(request_t *request, uint64_t block) noexcept nogil:
    """Whether a write has all bytes of a block. The last one may reach beyond the origin."""
    cdef uint64_t shift = request.worker.plane.header.cache_block_shift
    return covers(request, block) and (block + 1) << shift <= request.size_bytes


cdef bint prepare_batch(request_t *request, batch_t *batch) noexcept nogil:
    """Lock the sets of a batch, and hold a place for each block. False: something is in the way."""
    cdef worker_t *worker = request.worker
    cdef int number
    cdef int hint = -1
    if not may_change(worker.plane, batch.first_set, <uint64_t>batch.set_count):
        return False
    for number in range(batch.set_count):
        if not lock_set(worker, batch.first_set + <uint64_t>number):
            return False
        batch.locked = number + 1
        # Stored before the next touch, which may fault: `close_batch` must know.
        memory.settle()
    for number in range(batch.set_count):
        if not read_change(worker.plane, &batch.changes[number]):
            return False
    for number in range(batch.set_count):
        if not prepare_change(request, batch, &batch.changes[number], hint):
            return False
        hint = batch.changes[number].way
    return True


cdef bint read_change(plane_t *plane, change_t *change) noexcept nogil:
    """Find a block that is to be written, and begin to fetch what a look for a place touches."""
    cdef int way
    if not read_set(plane, change.set_number, change.block, change.words, &change.old):
        return False
    while change.old.older >= 0:
        # Left by a crash. It must go now: after some more writes it would look newer.
        clear_tag(plane, change.set_number, change.old.older)
        read_set(plane, change.set_number, change.block, change.words, &change.old)
    if change.old.word:
        expect_place(plane, change.set_number, change.old.way)
    for way in range(CACHE_WAYS):
        if not change.words[way]:
            expect_place(plane, change.set_number, way)
            break
    return True


cdef inline void expect_place(plane_t *plane, uint64_t set_number, int way) noexcept nogil:
    """Begin to fetch the structure of a place's first page."""
    expect_page(&plane.memmap, place_offset(plane.header, set_number, way) >> FRAME_SHIFT)


cdef bint prepare_change(request_t *request, batch_t *batch, change_t *change,
                         int hint) noexcept nogil:
    """Find and hold a place for a block. False: it has to wait, or is missed."""
    cdef worker_t *worker = request.worker
    cdef plane_t *plane = worker.plane
    if not change.old.word:
        if not covers(request, change.block):
            return False
    else:
        if (state_of(change.old.word) != TAG_ZERO and not has_all_of(request, change.block)
                and not is_place_whole(plane, change.set_number, change.old.way)):
            return False
        # The block stays where it is until its new place is full, so it is no victim.
        change.words[change.old.way] = TAG_DIRTY
    change.way = choose_way(worker, change.set_number, change.words, not change.old.word, hint)
    return change.way >= 0 and hold_place(request, batch, change)


cdef inline uint64_t block_bytes(header_t *header) noexcept nogil:
    return (<uint64_t>1) << header.cache_block_shift


cdef bint hold_place(request_t *request, batch_t *batch, change_t *change) noexcept nogil:
    """Take references on all pages of a change's new place, and note whose they are now."""
    cdef plane_t *plane = request.worker.plane
    cdef uint64_t frames = block_bytes(plane.header) >> FRAME_SHIFT
    cdef uint64_t offset = place_offset(plane.header, change.set_number, change.way)
    change.held.count = 0
    batch.change_count += 1
    memory.settle()
    # As a pin, so that no access is accounted before the counts begin anew.
    request.error = get_pages(&plane.memmap, &change.held, offset >> FRAME_SHIFT, frames,
                              ACCESS_PIN, request.head.nodeid, change.block * frames,
                              request.worker.now_ns)
    if request.error:
        return False
    count_anew(request, change)
    return True


cdef void count_anew(request_t *request, change_t *change) noexcept nogil:
    """Let the pages of a new place count as those of the block did before, and one write more."""
    cdef plane_t *plane = request.worker.plane
    cdef page_t *pages = pages_of(&plane.memmap)
    cdef page_t *page
    cdef uint32_t reads = 0
    cdef uint32_t writes = 0
    cdef uint64_t position
    if change.old.word:
        position = page_of_place(plane, change.set_number, change.old.way)
        page = &pages[position]
        if is_initialised(&plane.memmap, position):
            reads, writes = memory.peek_32(&page.reads), memory.peek_32(&page.writes)
    for position in range(change.held.first, change.held.first + change.held.count):
        page = &pages[position]
        memory.put_32(&page.reads, reads)
        memory.put_32(&page.writes, writes)
        account_page(page, ACCESS_WRITE, 0, 0, request.worker.now_ns, change.held.epoch)


cdef void store_batch(request_t *request, batch_t *batch) noexcept nogil:
    """Fill the new places of a batch, durably. Those that lie side by side are filled at once."""
    cdef header_t *header = request.worker.plane.header
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef change_t *first
    cdef change_t *change
    cdef int number = 0
    cdef int count
    while number < batch.set_count:
        first = &batch.changes[number]
        count = 0
        while number + count < batch.set_count:
            change = &batch.changes[number + count]
            if change.way != first.way or not has_all_of(request, change.block):
                break
            count += 1
        if count:
            fill(request, place_offset(header, first.set_number, first.way),
                 request.payload + ((first.block << header.cache_block_shift) - wanted.offset),
                 <uint64_t>count << header.cache_block_shift)
            number += count
        else:
            store_part(request, first)
            number += 1
    # Before the first tag says that they are there.
    if header.durability == DURABILITY_CACHE_LINES:
        wait_for_write_back()
    elif wanted.size >= STREAM_BYTES:
        memory.end_stream()


cdef void store_part(request_t *request, change_t *change) noexcept nogil:
    """Fill the new place of a block with what is written, and around that with what it held."""
    cdef plane_t *plane = request.worker.plane
    cdef header_t *header = plane.header
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef uint64_t start = change.block << header.cache_block_shift
    cdef uint64_t end = start + block_bytes(header)
    cdef uint64_t written = max(start, <uint64_t>wanted.offset)
    cdef uint64_t written_end = min(end, wanted.offset + wanted.size)
    cdef uint64_t place = place_offset(header, change.set_number, change.way)
    cdef const uint8_t *old = NULL
    if change.old.word and state_of(change.old.word) != TAG_ZERO:
        old = plane.pool + place_offset(header, change.set_number, change.old.way)
    keep(request, place, old, written - start)
    fill(request, place + (written - start), request.payload + (written - wanted.offset),
         written_end - written)
    keep(request, place + (written_end - start),
         NULL if old == NULL else old + (written_end - start), end - written_end)


cdef inline void keep(request_t *request, uint64_t pool_offset, const uint8_t *old,
                      uint64_t length) noexcept nogil:
    """Fill a part of a new place with what the old one holds there; without one, with zeroes."""
    cdef plane_t *plane = request.worker.plane
    if not length:
        return
    if old != NULL:
        fill(request, pool_offset, old, length)
        return
    memset(plane.pool + pool_offset, 0, length)
    if plane.header.durability == DURABILITY_CACHE_LINES:
        write_back(plane.pool + pool_offset, length)


cdef inline void fill(request_t *request, uint64_t pool_offset, const uint8_t *data,
                      uint64_t length) noexcept nogil:
    """Store bytes into a place, and begin to make them durable."""
    cdef plane_t *plane = request.worker.plane
    cdef uint8_t *into = plane.pool + pool_offset
    if plane.header.durability == DURABILITY_CACHE_LINES:
        memcpy(into, data, length)
        write_back(into, length)
    elif (<const fuse_write_in *>request.operation).size >= STREAM_BYTES:
        memory.stream_on(into, data, length)
    else:
        memcpy(into, data, length)


cdef void publish_batch(worker_t *worker, batch_t *batch) noexcept nogil:
    """Make the new places of a batch the blocks, and free the old ones."""
    cdef plane_t *plane = worker.plane
    cdef cache_counts_t *counts = counts_of_cache(worker)
    cdef change_t *change
    cdef int number
    for number in range(batch.set_count):
        change = &batch.changes[number]
        store_tag(plane, change.set_number, change.way, next_word(plane.header, change))
    end_of_tags(plane)
    for number in range(batch.set_count):
        change = &batch.changes[number]
        if change.old.word:
            store_tag(plane, change.set_number, change.old.way, 0)
        count_blocks(&counts.write_hits if change.old.word else &counts.inserted, 1)
        if not change.old.word or state_of(change.old.word) == TAG_CLEAN:
            count_blocks(&counts.dirtied, 1)
    end_of_tags(plane)


cdef inline uint64_t next_word(header_t *header, const change_t *change) noexcept nogil:
    """The tag of a block in its new place."""
    cdef uint64_t sequence = 0
    cdef uint64_t low
    if change.old.word:
        sequence = (sequence_of(change.old.word) + 1) % CACHE_SEQUENCES
    low = change.block << TAG_BLOCK_SHIFT | sequence << TAG_SEQUENCE_SHIFT | TAG_DIRTY
    return check_of(header, low, change.set_number, change.way) << TAG_CHECK_SHIFT | low


cdef inline void store_tag(plane_t *plane, uint64_t set_number, int way,
                           uint64_t word) noexcept nogil:
    """Store a tag, whose set is locked, and begin to make it durable."""
    cdef uint64_t *tag = &tags_of(plane, set_number)[way]
    store(tag, word)
    if plane.header.durability == DURABILITY_CACHE_LINES:
        write_back(tag, sizeof(uint64_t))


cdef inline void end_of_tags(plane_t *plane) noexcept nogil:
    """Wait until all tags that were stored are durable."""
    if plane.header.durability == DURABILITY_CACHE_LINES:
        wait_for_write_back()


cdef void clear_tag(plane_t *plane, uint64_t set_number, int way) noexcept nogil:
    """Free a place, durably. After that, whoever has no reference on its pages gets none."""
    store_tag(plane, set_number, way, 0)
    end_of_tags(plane)
    # The tag before the look at references that follows; a reader does it the other way round.
    memory.full_fence()


cdef void close_batch(request_t *request) noexcept nogil:
    """Let go of what a batch still has, after a fault: first of the locks, which lie in memory that
    can't fault, and then of the pages whose structures can be touched."""
    cdef batch_t *batch = &request.batch
    cdef pages_t *held
    cdef uint64_t before
    unlock_batch(request.worker, batch)
    while batch.change_count:
        held = &batch.changes[batch.change_count - 1].held
        before = held.count
        if not run_guarded(close_batch_guarded, request) and held.count and held.count == before:
            held.count -= 1


cdef void close_batch_guarded(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    cdef batch_t *batch = &request.batch
    cdef change_t *change
    unlock_batch(request.worker, batch)
    while batch.change_count:
        change = &batch.changes[batch.change_count - 1]
        if change.held.count:
            put_pages(&request.worker.plane.memmap, &change.held, True)
        batch.change_count -= 1
        memory.settle()


cdef void unlock_batch(worker_t *worker, batch_t *batch) noexcept nogil:
    while batch.locked:
        batch.locked -= 1
        # With release: the tags were stored before.
        store(lock_of(worker.plane, batch.first_set + <uint64_t>batch.locked), 0)


# Locks


cdef inline uint64_t *lock_of(plane_t *plane, uint64_t set_number) noexcept nogil:
    return &plane.cache_locks[set_number & LOCKS_MASK]


cdef inline bint lock_set(worker_t *worker, uint64_t set_number) noexcept nogil:
    """Lock a set for this worker; False if it is not free soon."""
    cdef plane_t *plane = worker.plane
    cdef size_t slots = <size_t>plane.shared + plane.header.slots_offset
    return take_lock(lock_of(plane, set_number), 1 + (<size_t>worker.slot - slots) // SLOT_BYTES)


cdef bint take_lock(uint64_t *lock, uint64_t holder) noexcept nogil:
    cdef int looks
    cdef uint64_t unlocked
    for looks in range(LOCK_LOOKS):
        unlocked = 0
        if not peek(lock) and memory.swap(lock, &unlocked, holder):
            return True
        pause()
    return False


# Places


cdef int choose_way(worker_t *worker, uint64_t set_number, uint64_t *words, bint is_new,
                    int hint) noexcept nogil:
    """A way of a locked set whose place a block may get; -1: there is none. `hint` is tried first.

    A block that is not there yet must leave another way free, so it may drive out a clean one.
    """
    cdef int found = free_place(worker.plane, set_number, words, hint)
    cdef int victim
    if found >= 0 and (not is_new or free_ways(words) > 1):
        return found
    victim = evict(worker, set_number, words)
    if found >= 0:
        return found if victim >= 0 else -1
    if is_new and victim >= 0 and free_ways(words) < 2 and evict(worker, set_number, words) < 0:
        return -1
    return victim


cdef inline int free_ways(const uint64_t *words) noexcept nogil:
    """How many ways have no block, whether their places are held or not."""
    cdef int count = 0
    cdef int way
    for way in range(CACHE_WAYS):
        count += not words[way]
    return count


cdef int free_place(plane_t *plane, uint64_t set_number, const uint64_t *words,
                    int hint) noexcept nogil:
    """A way whose place is free and can be touched; -1 if there is none."""
    cdef int way
    if hint >= 0 and is_free(plane, set_number, words, hint):
        return hint
    for way in range(CACHE_WAYS):
        if way != hint and is_free(plane, set_number, words, way):
            return way
    return -1


cdef inline bint is_free(plane_t *plane, uint64_t set_number, const uint64_t *words,
                         int way) noexcept nogil:
    return (not words[way] and is_place_whole(plane, set_number, way)
            and not is_held(plane, set_number, way))


cdef inline bint is_place_whole(plane_t *plane, uint64_t set_number, int way) noexcept nogil:
    return is_whole(plane, place_offset(plane.header, set_number, way), block_bytes(plane.header))


cdef int evict(worker_t *worker, uint64_t set_number, uint64_t *words) noexcept nogil:
    """Free the place of a clean block of a locked set; its way, or -1 if there is none."""
    cdef plane_t *plane = worker.plane
    cdef uint32_t ways = 0
    cdef int way
    for way in range(CACHE_WAYS):
        if state_of(words[way]) == TAG_CLEAN and is_place_whole(plane, set_number, way):
            ways |= <uint32_t>1 << way
    while ways:
        way = choose_victim(plane, set_number, ways)
        ways &= ~(<uint32_t>1 << way)
        if is_held(plane, set_number, way):
            continue
        clear_tag(plane, set_number, way)
        words[way] = 0
        count_blocks(&counts_of_cache(worker).evicted, 1)
        # A reader may have come before the tag was cleared. Then the place is free once that reader
        # is done.
        if not is_held(plane, set_number, way):
            return way
    return -1


cdef int choose_victim(plane_t *plane, uint64_t set_number, uint32_t ways) noexcept nogil:
    """Which of some ways goes first; as `volume/cache/eviction` chooses."""
    cdef page_t *page
    cdef uint64_t position, accessed
    cdef uint64_t oldest = NEVER
    cdef uint64_t oldest_once = NEVER
    cdef int found = -1
    cdef int found_once = -1
    cdef int once = 0
    cdef int way
    for way in range(CACHE_WAYS):
        if not ways >> way & 1:
            continue
        position = page_of_place(plane, set_number, way)
        if not is_initialised(&plane.memmap, position):
            return way
        page = &pages_of(&plane.memmap)[position]
        accessed = peek(&page.last_access_ns)
        if accessed < oldest:
            oldest, found = accessed, way
        if (<uint64_t>memory.peek_32(&page.reads) + memory.peek_32(&page.writes)
                < CACHE_FEW_ACCESSES):
            once += 1
            if accessed < oldest_once:
                oldest_once, found_once = accessed, way
    return found_once if once >= CACHE_ONCE else found


cdef bint is_held(plane_t *plane, uint64_t set_number, int way) noexcept nogil:
    """Whether a page of a place has references."""
    cdef uint64_t first = page_of_place(plane, set_number, way)
    cdef uint64_t position
    for position in range(first, first + (block_bytes(plane.header) >> FRAME_SHIFT)):
        if (is_initialised(&plane.memmap, position)
                and memory.peek_32(&pages_of(&plane.memmap)[position].refcount)):
            return True
    return False


cdef inline uint64_t page_of_place(plane_t *plane, uint64_t set_number, int way) noexcept nogil:
    """The number of the structure of a place's first page."""
    return (place_offset(plane.header, set_number, way) >> FRAME_SHIFT) - plane.header.first_pfn


cdef inline bint is_initialised(memmap_t *memmap, uint64_t page) noexcept nogil:
    """Whether a page's structure says anything. If there is none, a touch would make memory for
    it."""
    cdef uint8_t state = load_8(&memmap.sections[page >> memmap.header.section_shift])
    return (state != SECTION_ABSENT and state != SECTION_GOING
            and load(&pages_of(memmap)[page].generation) == memmap.header.generation)


# What a request will touch


cdef inline uint64_t expected_block(header_t *header, const uint8_t *operation) noexcept nogil:
    # Reads and writes have their offset in the same place.
    return (<const fuse_read_in *>operation).offset >> header.cache_block_shift


cdef void expect_tags(worker_t *worker, const uint8_t *operation) noexcept nogil:
    """Begin to fetch the tags of the first block of a request."""
    cdef plane_t *plane = worker.plane
    cdef header_t *header = plane.header
    cdef uint64_t *tags
    if peek(&header.cache_tags_offset):
        tags = tags_of(plane, set_of(header, expected_block(header, operation)))
        prefetch(tags)
        prefetch(&tags[CACHE_WAYS // 2])


cdef void expect_block(worker_t *worker, const uint8_t *operation,
                       bint is_write) noexcept nogil:
    """Begin to fetch the first block of a request, or the place where it will be written, and the
    structures of their pages. The worker is in a section."""
    cdef expected_t expected
    cdef header_t *header = worker.plane.header
    expected.plane = worker.plane
    expected.is_write = is_write
    expected.block = expected_block(header, operation)
    expected.set_number = set_of(header, expected.block)
    # A fault here is met again by the request itself.
    if are_tags_whole(worker.plane, expected.set_number, 1):
        run_guarded(expect_guarded, &expected)


cdef void expect_guarded(void *argument) noexcept nogil:
    cdef expected_t *expected = <expected_t *>argument
    cdef plane_t *plane = expected.plane
    cdef uint64_t *tags = tags_of(plane, expected.set_number)
    cdef uint64_t word, offset
    cdef bint has_place = not expected.is_write
    cdef int way
    for way in range(CACHE_WAYS):
        word = peek(&tags[way]) & LOW_MASK
        if word and word >> TAG_BLOCK_SHIFT == expected.block:
            expect_place(plane, expected.set_number, way)
        elif word or has_place:
            continue
        if not word or not expected.is_write:
            has_place = True
            offset = place_offset(plane.header, expected.set_number, way)
            prefetch(plane.pool + offset)
            prefetch(plane.pool + offset + 64)
            expect_place(plane, expected.set_number, way)


cdef class CacheLocks:
    """The locks of the sets of a cache, for the control plane, in a buffer of the shared memory.

    A lock is held for a few stores and never across an `await`: workers wait for it awake.
    """

    cdef Py_buffer _locks

    def __cinit__(self, locks) -> None:
        PyObject_GetBuffer(locks, &self._locks, PyBUF_WRITABLE)
        if self._locks.len != (LOCKS_MASK + 1) * sizeof(uint64_t):
            raise ValueError("these are not the locks of a cache")

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self._locks)

    def lock(self, uint64_t set_number) -> bool:
        """Lock a set; False if it is not free soon. Then let others run, and try again."""
        cdef uint64_t *lock = &(<uint64_t *>self._locks.buf)[set_number & LOCKS_MASK]
        cdef bint is_taken
        with nogil:
            is_taken = take_lock(lock, CONTROL_HOLDER)
        return is_taken

    def unlock(self, uint64_t set_number) -> None:
        """Unlock a set that this process has locked, after all its tags are durable."""
        store(&(<uint64_t *>self._locks.buf)[set_number & LOCKS_MASK], 0)

    def holder(self, uint64_t set_number) -> int:
        """Who has locked a set; 0: nobody."""
        return load(&(<uint64_t *>self._locks.buf)[set_number & LOCKS_MASK])

    def free_all(self) -> None:
        """Free all locks. What held one of them must be dead."""
        cdef uint64_t number
        for number in range(LOCKS_MASK + 1):
            store(&(<uint64_t *>self._locks.buf)[number], 0)
