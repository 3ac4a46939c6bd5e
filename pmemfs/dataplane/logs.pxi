"""Reads the logs of inodes, and keeps what is known up to date; logs.pxd says what others ask.

Invariants:
- whatever a pool holds, reading a log ends, and touches nothing outside the data zone. A log that
  is wrong in any way makes no known inode;
- what is read is copied first, so that it can't change while it is looked at. A fault comes only
  while it is copied, and then what is known is right up to `tail`, and reading goes on there;
- nothing of an inode is used before its head, both words of its log and the version of its log
  were compared with the pool.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.memory cimport peek, run_guarded
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.structures cimport *

cdef enum:
    FRAME_BYTES = 1 << FRAME_SHIFT
    FRAME_WORDS = 512
    # What a group keeps for itself: bitmaps, and in the first one more; see media.filesystem.
    KEPT_IN_GROUP = 2
    KEPT_IN_FIRST_GROUP = 4

# Bytes of the pool that are copied.
cdef struct copy_t:
    const uint8_t *source
    uint8_t *into
    size_t length

# The start of an inode's slot: its head, and the size word of its live line.
cdef struct look_t:
    inode_head_t head
    uint64_t size_word


# Touching the pool

cdef bint copy_pool(plane_t *plane, uint64_t offset, void *into, size_t length) noexcept nogil:
    """Copy bytes of the data zone; False: a touch faulted."""
    cdef copy_t copy
    copy.source, copy.into, copy.length = plane.pool + offset, <uint8_t *>into, length
    return run_guarded(copy_bytes, &copy)


cdef void copy_bytes(void *argument) noexcept nogil:
    cdef copy_t *copy = <copy_t *>argument
    memcpy(copy.into, copy.source, copy.length)


cdef uint32_t copy_entry(plane_t *plane, uint64_t offset, uint8_t *into) noexcept nogil:
    """Copy a record of up to MOST_ENTRY_SLOTS that lies in one frame; its slots, or 0."""
    cdef uint64_t left = FRAME_BYTES - offset % FRAME_BYTES
    cdef uint32_t length
    if not copy_pool(plane, offset, into, LOG_RECORD_BYTES):
        return 0
    length = into[1] * LOG_RECORD_BYTES
    if into[1] > MOST_ENTRY_SLOTS or length > left:
        return 0
    if length > LOG_RECORD_BYTES and not copy_pool(
            plane, offset + LOG_RECORD_BYTES, into + LOG_RECORD_BYTES, length - LOG_RECORD_BYTES):
        return 0
    return length // LOG_RECORD_BYTES


cdef bint is_usable(const names_head_t *head, uint64_t pfn, uint64_t frame_count) noexcept nogil:
    """Whether a run lies in the data zone and in one group, and not in what the group keeps."""
    cdef uint64_t start = pfn - head.first_pfn
    cdef uint64_t position = start % FS_GROUP_FRAMES
    cdef uint64_t kept = KEPT_IN_FIRST_GROUP if start < FS_GROUP_FRAMES else KEPT_IN_GROUP
    return (pfn >= head.first_pfn and start < head.frame_count and frame_count
            and frame_count <= head.frame_count - start
            and position >= kept and frame_count <= FS_GROUP_FRAMES - position)


cdef uint64_t slot_of_inode(const names_head_t *head, uint64_t number) noexcept nogil:
    """The offset of an inode's slot, in a frame that may hold inodes; 0: there can't be one."""
    cdef uint64_t root = head.first_pfn + FS_FIRST_INODES_FRAME
    if number == INODE_ROOT:
        return root << FRAME_SHIFT
    if (not is_usable(head, number // (FRAME_BYTES // INODE_SLOT_BYTES), 1)
            or number * INODE_SLOT_BYTES == root << FRAME_SHIFT):
        return 0
    return number * INODE_SLOT_BYTES


cdef bint has_inodes(plane_t *plane, uint64_t slot_offset) noexcept nogil:
    """Whether the inode bitmap says that the frame of a slot holds inodes."""
    cdef uint64_t first_pfn = plane.names.head.first_pfn
    cdef uint64_t frame = (slot_offset >> FRAME_SHIFT) - first_pfn
    cdef uint64_t position = frame % FS_GROUP_FRAMES
    cdef uint8_t bits = 0
    if frame == FS_FIRST_INODES_FRAME:
        return True
    return (copy_pool(plane, (first_pfn + frame - position + 1 << FRAME_SHIFT) + position // 8,
                      &bits, 1)
            and bits >> position % 8 & 1)


cdef replayed_t look_for_inodes(plane_t *plane, const known_t *known) noexcept nogil:
    """REPLAY_ODD if a file owns frames of inodes: a write to it would destroy them."""
    cdef uint64_t bits[FRAME_WORDS]
    cdef uint64_t first_pfn = plane.names.head.first_pfn
    cdef const known_extent_t *extent
    cdef uint64_t start, end, group, first, last, number
    cdef uint32_t position
    for position in range(known.extent_count):
        extent = &known.extents[position]
        start = extent.pfn - first_pfn
        if start <= FS_FIRST_INODES_FRAME < start + extent.frame_count:
            return REPLAY_ODD
        # Neighbours of two groups don't join, because each keeps its first frames.
        group = start - start % FS_GROUP_FRAMES
        start -= group
        end = start + extent.frame_count - 1
        first, last = start // 64, end // 64
        if not copy_pool(plane, (first_pfn + group + 1 << FRAME_SHIFT) + first * 8, bits,
                         (last - first + 1) * 8):
            return REPLAY_FAULT
        bits[0] &= ~<uint64_t>0 << start % 64
        bits[last - first] &= ~<uint64_t>0 >> (63 - end % 64)
        for number in range(last - first + 1):
            if bits[number]:
                return REPLAY_ODD
    return REPLAYED


# Checksums

cdef uint32_t crc_place(uint64_t number, uint64_t generation, uint64_t offset) noexcept nogil:
    """What a checksum covers first: whose it is, and where."""
    cdef uint64_t place[3]
    place[0], place[1], place[2] = number, generation, offset
    return crc32c(0, place, sizeof(place))


cdef uint32_t crc_record(uint64_t number, uint64_t generation, uint64_t offset,
                         const uint8_t *raw, size_t length) noexcept nogil:
    """The checksum of a record at an offset in the pool."""
    cdef uint64_t first = 0
    # Without the checksum itself.
    memcpy(&first, raw, 4)
    return crc32c(crc32c(crc_place(number, generation, offset), &first, 8), raw + 8, length - 8)


cdef void seal_record(uint64_t number, uint64_t generation, uint64_t offset, uint8_t *raw,
                      size_t length) noexcept nogil:
    """Store the checksum of a record in it."""
    cdef uint32_t checksum = crc_record(number, generation, offset, raw, length)
    memcpy(raw + 4, &checksum, 4)


cdef bint is_sealed(const known_t *known, uint64_t offset, const uint8_t *raw,
                    size_t length) noexcept nogil:
    """Whether bytes are a record of this inode that belongs at this offset."""
    cdef uint32_t checksum
    memcpy(&checksum, raw + 4, 4)
    return checksum == crc_record(known.number, known.generation, offset, raw, length)


cdef bint is_sound_head(const inode_head_t *head, uint64_t number) noexcept nogil:
    """Whether the magic, the checksum and the number of a slot's head are right."""
    cdef inode_head_t copy = head[0]
    copy.checksum = 0
    return (head.magic == INODE_MAGIC and head.number == number
            and head.checksum == crc32c(0, &copy, INODE_HEAD_WORD_AT))


cdef bint is_frame_of(const known_t *known, const log_frame_t *frame,
                      uint64_t offset) noexcept nogil:
    """Whether this is the head of a frame of this inode's log that belongs at this offset."""
    cdef uint64_t magic = LOG_FRAME_MAGIC
    return (frame.magic == LOG_FRAME_MAGIC and frame.inode == known.number
            and frame.checksum == crc32c(crc_place(known.number, known.generation, offset),
                                         &magic, 8))


cdef uint16_t line_key(uint64_t number, uint64_t generation, uint16_t epoch) noexcept nogil:
    """The key of a live line, as `media.live.line_key`."""
    cdef uint64_t whose[2]
    cdef uint64_t mixed
    whose[0], whose[1] = number, generation
    mixed = crc32c(crc32c(0, whose, sizeof(whose)), &epoch, sizeof(epoch))
    mixed &= (1 << (LIVE_SIZE_SHIFT - 1)) - 1
    return <uint16_t>(mixed << 1 | memory.parity(mixed))


cdef bint line_says(const known_t *known, uint64_t size_word, uint64_t *size_bytes) noexcept nogil:
    """The size of a regular file, of which this is the live line's word; False: it is damaged."""
    cdef uint64_t size = size_word >> LIVE_SIZE_SHIFT
    cdef uint64_t key = (size_word ^ size_check(size)) & ((1 << LIVE_SIZE_SHIFT) - 1)
    size_bytes[0] = size if key == known.key else known.size_bytes
    return size >> SIZE_LIMIT_SHIFT == 0 and (key == known.key or key == known.key_before)


# Keeping up to date

cdef known_t *know(worker_t *worker, uint64_t number) noexcept nogil:
    """An inode, up to date with the pool; NULL: hand over."""
    cdef plane_t *plane = worker.plane
    cdef names_t *names = plane.names
    cdef known_t *known
    cdef look_t look
    cdef uint64_t slot_offset, size_bytes
    if names == NULL or not have_buckets(names):
        return NULL
    known = find_known(names, number)
    slot_offset = known.slot_offset if known != NULL else 0
    if not slot_offset:
        slot_offset = slot_of_inode(names.head, number)
    if not slot_offset or not copy_pool(plane, slot_offset, &look, sizeof(look)):
        return NULL
    if known == NULL or not is_same_log(names, known, &look.head):
        known = begin_log(plane, known, number, slot_offset, &look.head)
        if known == NULL:
            return NULL
    use_known(names, known)
    if (not known.is_odd and (known.tail != look.head.tail or not known.is_whole)
            and not catch_up(worker, known, look.head.tail)):
        return NULL
    if known.is_odd or (known.mode >> 12 == FILE_TYPE
                        and not line_says(known, look.size_word, &size_bytes)):
        return NULL
    return known


cdef inline bint is_same_log(const names_t *names, const known_t *known,
                             const inode_head_t *head) noexcept nogil:
    """Whether what is known was read from the log that a slot's head names now."""
    return (head.head == known.head and head.generation == known.generation
            and head.tail and known.slot_offset
            and known.version == peek(version_of(names, known.number)))


cdef inline uint64_t *version_of(const names_t *names, uint64_t number) noexcept nogil:
    """What the control plane raises when a log is replaced or its inode freed."""
    return &names.versions[number & ((1 << NAMES_VERSIONS_SHIFT) - 1)]


cdef known_t *begin_log(plane_t *plane, known_t *known, uint64_t number, uint64_t slot_offset,
                        const inode_head_t *head) noexcept nogil:
    """Forget what is known of an inode, and begin to read its log; NULL: no inode is there."""
    cdef names_t *names = plane.names
    if known != NULL:
        clear_known(names, known)
    if not head.tail or not is_sound_head(head, number) or not has_inodes(plane, slot_offset):
        return NULL
    if known == NULL:
        known = new_known(names, number)
    if known == NULL:
        return NULL
    known.slot_offset, known.generation = slot_offset, head.generation
    known.birth_ns, known.head = head.birth_ns, head.head
    known.version = peek(version_of(names, number))
    known.live_slots = known.note_at = 1
    known.tail = known.area_end = 0
    if head.head == slot_offset + INODE_INLINE_OFFSET:
        known.tail, known.area_end = head.head, slot_offset + INODE_SLOT_BYTES
    return known


cdef bint catch_up(worker_t *worker, known_t *known, uint64_t tail) noexcept nogil:
    """Read a log on, up to its tail; whether all of it is known then, or known to be odd."""
    cdef bint was_whole = known.is_whole
    cdef replayed_t replayed = read_log(worker.plane, known, tail)
    if replayed == REPLAYED:
        replayed = look_for_inodes(worker.plane, known) if makes_an_inode(known) else REPLAY_ODD
        known.is_whole = replayed != REPLAY_FAULT
    if replayed == REPLAY_UNFINISHED:
        worker.reads_on = True
    elif replayed == REPLAY_ODD and was_whole:
        # The log may have been changed in a way that no version tells. Read it anew once.
        clear_known(worker.plane.names, known)
    elif replayed == REPLAY_ODD:
        known.is_odd = True
        free_index(worker.plane.names, known)
    return known.is_whole and known.tail == tail or known.is_odd


cdef replayed_t read_log(plane_t *plane, known_t *known, uint64_t tail) noexcept nogil:
    """Apply the records behind `known.tail`, of FRAMES_AT_ONCE frames at most."""
    # Words, for their alignment.
    cdef uint64_t area[FRAME_WORDS]
    cdef log_frame_t head
    cdef uint64_t start, end
    cdef replayed_t replayed
    cdef int frames = 0
    if not known.area_end:
        replayed = enter_frame(plane, known, known.head - LOG_FRAME_HEAD_BYTES)
        if replayed != REPLAYED:
            return replayed
    while True:
        start = known.area_end - (FRAME_BYTES if known.log_frame_count else INODE_SLOT_BYTES)
        # The end of a frame belongs to that frame. A link behind the tail may be garbage that an
        # append wrote before a crash took its commit away.
        end = tail if start < tail <= known.area_end else known.area_end
        if end < known.tail or (end != tail and not known.log_frame_count):
            return REPLAY_ODD
        if known.tail < end:
            if not copy_pool(plane, known.tail, <uint8_t *>area + (known.tail - start),
                             end - known.tail):
                return REPLAY_FAULT
            replayed = read_area(plane, known, <const uint8_t *>area, start, end)
            if replayed != REPLAYED:
                return replayed
        if end == tail:
            known.is_whole = True
            return REPLAYED
        frames += 1
        if frames == FRAMES_AT_ONCE:
            return REPLAY_UNFINISHED
        if not copy_pool(plane, start, &head, sizeof(head)):
            return REPLAY_FAULT
        replayed = enter_frame(plane, known, head.next)
        if replayed != REPLAYED:
            return replayed


cdef replayed_t enter_frame(plane_t *plane, known_t *known, uint64_t frame) noexcept nogil:
    """Go on with the records of another frame."""
    cdef log_frame_t head
    # All of this comes before the frame is touched: an offset from a bad pool may lie anywhere.
    if frame % FRAME_BYTES or not is_usable(plane.names.head, frame >> FRAME_SHIFT, 1):
        return REPLAY_ODD
    # A circle comes back to a frame that was noted, since they are noted at ever greater distances.
    if frame == known.noted_frame:
        return REPLAY_ODD
    if not copy_pool(plane, frame, &head, sizeof(head)):
        return REPLAY_FAULT
    if not is_frame_of(known, &head, frame):
        return REPLAY_ODD
    known.log_frame_count += 1
    if known.log_frame_count == known.note_at:
        known.noted_frame = frame
        known.note_at *= 2
    known.tail, known.area_end = frame + LOG_FRAME_HEAD_BYTES, frame + FRAME_BYTES
    return REPLAYED


cdef replayed_t read_area(plane_t *plane, known_t *known, const uint8_t *area, uint64_t start,
                          uint64_t end) noexcept nogil:
    """Apply the records from `known.tail` to `end` of a slot or frame that begins at `start`, of
    which `area` is a copy."""
    cdef const uint8_t *record
    cdef uint32_t length
    cdef replayed_t replayed
    while known.tail < end:
        record = area + (known.tail - start)
        length = record[1] * LOG_RECORD_BYTES
        if (not length or length > end - known.tail
                or not is_sealed(known, known.tail, record, length)):
            return REPLAY_ODD
        if record[0] == RECORD_PADDING and end != known.area_end:
            return REPLAY_ODD
        if record[0] != RECORD_PADDING:
            replayed = apply_record(plane, known, record, length, known.tail)
            if replayed != REPLAYED:
                return replayed
        known.slot_count += record[1]
        known.tail = end if record[0] == RECORD_PADDING else known.tail + length
    return REPLAYED


cdef void known_moved(known_t *known, uint64_t tail, uint64_t slots) noexcept nogil:
    """Records of so many slots, which were applied already, end at this tail."""
    known.tail = tail
    known.slot_count += slots
