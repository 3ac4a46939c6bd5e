"""Makes an inode of the records of its log, as `volume/fs/replay`.

Invariants:
- whatever `volume/fs/replay` refuses is refused here, and more: what is rare or odd is not worth
  the code, and the control plane knows it;
- a record is applied wholly or not at all. So reading may end at any record and go on there.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memmove

from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t
from pmemfs.dataplane.structures cimport *

cdef enum:
    FILE_TYPE = 8
    LINK_TYPE = 10
    # Of all types, as d_type: pipe, character device, directory, block device, file, link, socket.
    TYPES_MASK = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 12
    FIXED_FLAGS = INODE_FLAG_IMMUTABLE | INODE_FLAG_APPEND_ONLY
    FLAGS_LIMIT = INODE_FLAG_NO_ACCESS_TIME << 1
    MODE_MOST = 0xffff
    SIZE_LIMIT_SHIFT = 47
    TARGET_MOST_BYTES = 4095
    # A long target is stored in parts of so many bytes.
    PART_BYTES = 1700
    VALUE_HEAD_BYTES = 20


cdef replayed_t apply_record(plane_t *plane, known_t *known, const uint8_t *raw, uint32_t length,
                             uint64_t offset) noexcept nogil:
    """Apply a record of so many bytes, whose checksum is right, and which lies at this offset."""
    cdef uint8_t kind = raw[0]
    if kind == RECORD_ENTRY:
        return apply_entry(plane, known, raw, length, offset)
    if kind == RECORD_REMOVED:
        return apply_removed(plane, known, raw, length)
    if kind == RECORD_TARGET:
        return apply_target(known, raw, length)
    if length != LOG_RECORD_BYTES:
        return REPLAY_ODD
    if kind == RECORD_ATTRIBUTES:
        apply_attributes(known, <const attributes_record_t *>raw)
        return REPLAYED
    if kind == RECORD_EXTENT or kind == RECORD_HOLE:
        return apply_extent(plane.names.head, known, <const extent_record_t *>raw)
    if kind == RECORD_PARENT:
        return apply_parent(known, (<const parent_record_t *>raw).inode)
    return REPLAY_ODD


cdef void apply_attributes(known_t *known, const attributes_record_t *record) noexcept nogil:
    """Have these attributes from now on."""
    if not known.has_attributes or known.epoch != record.epoch:
        known.key = line_key(known.number, known.generation, record.epoch)
        known.key_before = line_key(known.number, known.generation, <uint16_t>(record.epoch - 1))
    known.has_attributes = True
    known.mode, known.link_count = record.mode, record.link_count
    known.uid, known.gid = record.uid, record.gid
    known.size_bytes = record.size_bytes
    known.accessed_ns, known.modified_ns = record.accessed_ns, record.modified_ns
    known.changed_ns = record.changed_ns
    known.device, known.epoch, known.flags = record.device, record.epoch, record.flags
    known.is_plain = can_change(known)


cdef bint can_change(const known_t *known) noexcept nogil:
    """Whether it is a file or directory that is not too unusual to be changed here."""
    cdef uint32_t type_ = known.mode >> 12
    if known.flags & FIXED_FLAGS:
        return False
    return type_ == FILE_TYPE or type_ == DIRECTORY_TYPE and known.link_count > 0


cdef replayed_t apply_entry(plane_t *plane, known_t *known, const uint8_t *raw, uint32_t length,
                            uint64_t offset) noexcept nogil:
    cdef uint32_t name_bytes = name_length(raw)
    cdef uint8_t type_ = raw[ENTRY_TYPE_AT]
    cdef replayed_t replayed
    if (length != entry_slots(name_bytes) * LOG_RECORD_BYTES
            or type_ > 12 or not TYPES_MASK >> type_ & 1
            or not is_name(raw + ENTRY_NAME_AT, name_bytes)):
        return REPLAY_ODD
    replayed = take_name(plane, known, raw + ENTRY_NAME_AT, name_bytes, offset, type_)
    if replayed == REPLAYED:
        note_time(known, raw)
    return replayed


cdef replayed_t apply_removed(plane_t *plane, known_t *known, const uint8_t *raw,
                              uint32_t length) noexcept nogil:
    cdef uint32_t name_bytes = name_length(raw)
    cdef found_t found
    cdef name_state_t state
    if (length != entry_slots(name_bytes) * LOG_RECORD_BYTES
            or not 0 < name_bytes <= LOG_NAME_MAX_BYTES):
        return REPLAY_ODD
    state = find_hashed(plane, known, hash_of_name(plane.names, raw + ENTRY_NAME_AT, name_bytes),
                        raw + ENTRY_NAME_AT, name_bytes, &found)
    if state != NAME_FOUND:
        return REPLAY_ODD if state == NAME_ABSENT else REPLAY_FAULT
    index_remove(known, &found)
    note_time(known, raw)
    return REPLAYED


cdef inline void note_time(known_t *known, const uint8_t *raw) noexcept nogil:
    """A name came or went: when that was, the directory changed."""
    memcpy(&known.modified_ns, raw + ENTRY_TIME_NS_AT, 8)
    known.changed_ns = known.modified_ns


cdef replayed_t apply_parent(known_t *known, uint64_t parent) noexcept nogil:
    if not parent:
        return REPLAY_ODD
    known.live_slots += known.parent == 0
    known.parent = parent
    return REPLAYED


cdef replayed_t apply_target(known_t *known, const uint8_t *raw, uint32_t length) noexcept nogil:
    """A part of a link's target. Nobody writes a second target, or empty parts."""
    cdef uint32_t total_bytes, start
    cdef uint16_t part_bytes, name_bytes
    memcpy(&total_bytes, raw + 8, 4)
    memcpy(&start, raw + 12, 4)
    memcpy(&part_bytes, raw + 16, 2)
    memcpy(&name_bytes, raw + 18, 2)
    if (name_bytes or not part_bytes or part_bytes > length - VALUE_HEAD_BYTES
            or total_bytes > TARGET_MOST_BYTES or start != known.target_read
            or (start and total_bytes != known.target_bytes)
            or start + part_bytes > total_bytes
            or memchr(raw + VALUE_HEAD_BYTES, 0, part_bytes) != NULL):
        return REPLAY_ODD
    known.target_bytes = total_bytes
    known.target_read = start + part_bytes
    if known.target_read == total_bytes:
        known.live_slots += target_slots(total_bytes)
    return REPLAYED


cdef uint64_t target_slots(uint32_t total_bytes) noexcept nogil:
    """The slots of all records of a target."""
    cdef uint32_t rest = total_bytes % PART_BYTES
    cdef uint32_t slots = total_bytes // PART_BYTES * slots_of_part(PART_BYTES)
    return slots + slots_of_part(rest) if rest else slots


cdef inline uint32_t slots_of_part(uint32_t part_bytes) noexcept nogil:
    return (VALUE_HEAD_BYTES + part_bytes + LOG_RECORD_BYTES - 1) // LOG_RECORD_BYTES


cdef replayed_t apply_extent(const names_head_t *head, known_t *known,
                             const extent_record_t *record) noexcept nogil:
    cdef uint64_t limit = <uint64_t>1 << (SIZE_LIMIT_SHIFT - FRAME_SHIFT)
    cdef known_extent_t extents[KNOWN_EXTENTS + 2]
    cdef known_extent_t extent
    cdef uint32_t count, number
    if (not 0 < record.frame_count <= limit or record.index > limit - record.frame_count
            or (record.head[0] == RECORD_EXTENT
                and not is_usable(head, record.pfn, record.frame_count))):
        return REPLAY_ODD
    count = without_range(known, record.index, record.frame_count, extents)
    if record.head[0] == RECORD_EXTENT:
        extent.index, extent.pfn = record.index, record.pfn
        extent.frame_count = record.frame_count
        count = with_extent(extents, count, extent)
    if count > KNOWN_EXTENTS:
        return REPLAY_ODD
    known.extent_count = count
    known.data_frames = 0
    for number in range(count):
        known.extents[number] = extents[number]
        known.data_frames += extents[number].frame_count
    return REPLAYED


cdef uint32_t without_range(const known_t *known, uint64_t index, uint64_t frame_count,
                            known_extent_t *left) noexcept nogil:
    """What is left of the extents once a range is a hole: one extent more at most."""
    cdef uint64_t end = index + frame_count
    cdef uint64_t start, stop
    cdef uint32_t number
    cdef uint32_t count = 0
    cdef known_extent_t extent
    for number in range(known.extent_count):
        extent = known.extents[number]
        start, stop = extent.index, extent.index + extent.frame_count
        if start < index:
            left[count] = extent
            left[count].frame_count = min(stop, index) - start
            count += 1
        if stop > end:
            left[count].index = max(start, end)
            left[count].pfn = extent.pfn + (left[count].index - start)
            left[count].frame_count = stop - left[count].index
            count += 1
    return count


cdef uint32_t with_extent(known_extent_t *extents, uint32_t count,
                          known_extent_t extent) noexcept nogil:
    """Add an extent where a hole is, joined with its neighbours; how many there are then."""
    cdef uint32_t at = 0
    while at < count and extents[at].index < extent.index:
        at += 1
    memmove(&extents[at + 1], &extents[at], (count - at) * sizeof(known_extent_t))
    extents[at] = extent
    count += 1
    if at + 1 < count and do_join(&extents[at], &extents[at + 1]):
        join(extents, at, count)
        count -= 1
    if at and do_join(&extents[at - 1], &extents[at]):
        join(extents, at - 1, count)
        count -= 1
    return count


cdef inline bint do_join(const known_extent_t *one, const known_extent_t *other) noexcept nogil:
    """Whether two extents are neighbours in the file and in the pool."""
    return (one.index + one.frame_count == other.index
            and one.pfn + one.frame_count == other.pfn)


cdef void join(known_extent_t *extents, uint32_t at, uint32_t count) noexcept nogil:
    """Make one of an extent and the next one."""
    extents[at].frame_count += extents[at + 1].frame_count
    memmove(&extents[at + 1], &extents[at + 2], (count - at - 2) * sizeof(known_extent_t))


cdef bint makes_an_inode(const known_t *known) noexcept nogil:
    """The log has ended: whether what it said makes an inode, as `Replay.finish`."""
    cdef uint32_t type_ = known.mode >> 12
    cdef bint is_directory = type_ == DIRECTORY_TYPE
    cdef bint is_file = type_ == FILE_TYPE
    return (known.has_attributes
            and known.mode <= MODE_MOST and TYPES_MASK >> type_ & 1
            and known.size_bytes >> SIZE_LIMIT_SHIFT == 0
            and (is_directory or not known.index.entry_count)
            and (is_file or not known.data_frames)
            and (known.parent or not is_directory)
            and (is_directory or known.number != INODE_ROOT)
            and (type_ == LINK_TYPE) == (known.target_bytes > 0)
            and known.target_read == known.target_bytes
            and known.flags < FLAGS_LIMIT
            and (is_file or is_directory or not known.flags & FIXED_FLAGS))
