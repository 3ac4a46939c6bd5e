"""Inodes, as they are stored: what stat(2) tells of one, read from its slot in the pool.

This is for the inodes that most are: their logs lie in their slots and say simple things. Of any
other, `read_stored` says only that it can't tell, and whoever asks takes the long way
(`volume/fs/reading`, `replay`, `livelines`), which knows all and finds the words for damage.
Invariants:
- what is read here, the long way would read too, and come to the same. So each of its checks stands
  here as well, and a doubt is a No;
- nothing that is stored is believed: no offset and no length is used before it was compared with
  what may be, so only the data zone is read;
- nothing is stored here. A live line that a crash has left behind its log is to be set right first,
  so that is the long way's;
- an encrypted, compressed or unknown inode is the long way's.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport pread

from pmemfs.dataplane.memory cimport parity, peek, prefetch
from pmemfs.dataplane.stored cimport run_t, stored_t, zone_t
from pmemfs.dataplane.structures cimport *

cdef extern from "crc32c.h" nogil:
    uint32_t crc32c "pmemfs_crc32c"(uint32_t crc, const uint8_t *data, size_t length)

cdef extern from "sys/stat.h" nogil:
    enum:
        S_IFMT
        S_IFREG
        S_IFDIR
        S_IFLNK
        S_IFIFO
        S_IFSOCK
        S_IFCHR
        S_IFBLK

cdef enum:
    FRAME_BYTES = 1 << FRAME_SHIFT
    SLOT_WORDS = INODE_SLOT_BYTES >> 3
    BITMAP_WORDS = FRAME_BYTES >> 3
    TYPE_SHIFT = 12
    ALL_FLAGS = 2 * INODE_FLAG_NO_ACCESS_TIME - 1
    # What a checksum of a record covers first: number, generation, offset, 4 bytes, and a zero.
    PLACE_BYTES = 32
    CHECKSUM_AT = 4
    # The fields of a head that never change.
    HEAD_CONSTANT_BYTES = 32


cdef bint read_stored(const zone_t *zone, uint64_t number, stored_t *stored) noexcept nogil:
    """What stat(2) tells of an inode; whether this could tell."""
    cdef uint64_t words[SLOT_WORDS]
    cdef uint8_t *slot = <uint8_t *>words
    cdef uint64_t offset = number * INODE_SLOT_BYTES
    cdef uint64_t end
    if number >> 55 or not is_usable(zone, offset >> FRAME_SHIFT, 1):
        return False
    if not holds_inodes(zone, offset >> FRAME_SHIFT):
        return False
    # The root has a number that doesn't say where it lies, and what has this one is not the root.
    if offset == (zone.first_pfn + FS_FIRST_INODES_FRAME) << FRAME_SHIFT or number == INODE_ROOT:
        return False
    if not fetch(zone, offset, slot, INODE_SLOT_BYTES):
        return False
    memset(stored, 0, sizeof(stored_t))
    stored.number = number
    end = log_end(<const inode_head_t *>slot, number, offset)
    if not end or not replay_slot(zone, slot, offset, end, stored):
        return False
    return is_possible(zone, stored) and look_at_line(<const live_t *>(slot + INODE_LIVE_OFFSET),
                                                      stored)


cdef inline void expect(const zone_t *zone, uint64_t number) noexcept nogil:
    """Begin to fetch an inode that is about to be read: its head, live line and first records."""
    cdef uint64_t offset = number * INODE_SLOT_BYTES
    cdef const uint8_t *slot
    cdef int line
    if zone.fd < 0 and not number >> 55 and is_usable(zone, offset >> FRAME_SHIFT, 1):
        slot = zone.memory + (offset - (zone.first_pfn << FRAME_SHIFT))
        for line in range(4):
            prefetch(slot + line * LOG_RECORD_BYTES)


cdef inline bint is_usable(const zone_t *zone, uint64_t pfn, uint64_t count) noexcept nogil:
    """As `media.filesystem.Geometry.is_usable`."""
    cdef uint64_t start = pfn - zone.first_pfn
    cdef uint64_t place = start % FS_GROUP_FRAMES
    if pfn < zone.first_pfn or start >= zone.frame_count or not count:
        return False
    if count > zone.frame_count - start or count > FS_GROUP_FRAMES - place:
        return False
    return place >= <uint64_t>(FS_KEPT_IN_FIRST_GROUP if start < FS_GROUP_FRAMES else FS_KEPT_IN_GROUP)


cdef inline bint fetch(const zone_t *zone, uint64_t offset, uint8_t *into,
                       size_t length) noexcept nogil:
    """Copy what lies at an offset in the pool, in a usable frame or a bitmap; whether that worked.
    Words that a worker may be changing are whole in the copy."""
    cdef uint64_t *words = <uint64_t *>into
    cdef const uint64_t *memory
    cdef size_t number
    if zone.fd >= 0:
        return pread(zone.fd, into, length, <off_t>offset) == <ssize_t>length
    memory = <const uint64_t *>(zone.memory + (offset - (zone.first_pfn << FRAME_SHIFT)))
    for number in range(length // 8):
        words[number] = peek(&memory[number])
    return True


cdef inline uint64_t bitmap_offset(const zone_t *zone, uint64_t pfn) noexcept nogil:
    """Of the inode bitmap of the group that a usable frame is in."""
    return (pfn - (pfn - zone.first_pfn) % FS_GROUP_FRAMES + 1) << FRAME_SHIFT


cdef bint has_inodes(const zone_t *zone, uint64_t pfn, uint64_t count) noexcept nogil:
    """Whether some of these usable frames of one group hold inodes, or nobody can tell. As
    `InodeTable.has_inodes`."""
    cdef uint64_t bits[BITMAP_WORDS]
    cdef uint64_t bit = (pfn - zone.first_pfn) % FS_GROUP_FRAMES
    cdef uint64_t first = bit >> 6
    cdef uint64_t last = (bit + count - 1) >> 6
    cdef uint64_t number
    if pfn <= zone.first_pfn + FS_FIRST_INODES_FRAME < pfn + count:
        return True
    if not fetch(zone, bitmap_offset(zone, pfn) + first * 8, <uint8_t *>bits,
                 (last - first + 1) * 8):
        return True
    bits[0] &= ~<uint64_t>0 << (bit & 63)
    bits[last - first] &= ~<uint64_t>0 >> (63 - ((bit + count - 1) & 63))
    for number in range(last - first + 1):
        if bits[number]:
            return True
    return False


cdef inline bint holds_inodes(const zone_t *zone, uint64_t pfn) noexcept nogil:
    """As `InodeTable._has_inodes`, of a usable frame."""
    cdef uint64_t bit = (pfn - zone.first_pfn) % FS_GROUP_FRAMES
    cdef uint64_t word
    if pfn == zone.first_pfn + FS_FIRST_INODES_FRAME:
        return True
    if not fetch(zone, bitmap_offset(zone, pfn) + (bit >> 6) * 8, <uint8_t *>&word, 8):
        return False
    return word >> (bit & 63) & 1


cdef inline uint64_t log_end(const inode_head_t *head, uint64_t number,
                             uint64_t offset) noexcept nogil:
    """Where the log ends in the slot; 0 if the head is wrong or free, or the log not in the slot."""
    cdef uint8_t raw[HEAD_CONSTANT_BYTES]
    cdef uint64_t end = head.tail - offset
    memcpy(raw, head, HEAD_CONSTANT_BYTES)
    memset(raw + CHECKSUM_AT, 0, 4)
    if head.magic != INODE_MAGIC or head.checksum != crc32c(0, raw, HEAD_CONSTANT_BYTES):
        return 0
    if head.number != number or head.head != offset + INODE_INLINE_OFFSET:
        return 0
    if end < INODE_INLINE_OFFSET or end > INODE_SLOT_BYTES or end % LOG_RECORD_BYTES:
        return 0
    return end


cdef bint replay_slot(const zone_t *zone, const uint8_t *slot, uint64_t offset, uint64_t end,
                      stored_t *stored) noexcept nogil:
    """Apply the records up to `end`; whether all were sound and simple. As `LogReader`, `Replay`."""
    cdef uint8_t place[PLACE_BYTES]
    cdef uint64_t at = INODE_INLINE_OFFSET
    cdef uint64_t length
    cdef uint64_t where
    cdef uint32_t crc
    stored.generation = (<const inode_head_t *>slot).generation
    memset(place, 0, PLACE_BYTES)
    memcpy(place, &stored.number, 8)
    memcpy(place + 8, &stored.generation, 8)
    while at < end:
        length = (<const record_head_t *>(slot + at)).slots * LOG_RECORD_BYTES
        if not length or length > end - at:
            return False
        where = offset + at
        memcpy(place + 16, &where, 8)
        memcpy(place + 24, slot + at, CHECKSUM_AT)
        crc = crc32c(0, place, PLACE_BYTES)
        crc = crc32c(crc, slot + at + CHECKSUM_AT + 4, length - CHECKSUM_AT - 4)
        if crc != (<const record_head_t *>(slot + at)).checksum:
            return False
        if not apply_record(zone, slot, at, length, stored):
            return False
        stored.slot_count += length // LOG_RECORD_BYTES
        at += length
    return True


cdef bint apply_record(const zone_t *zone, const uint8_t *slot, uint64_t at, uint64_t length,
                       stored_t *stored) noexcept nogil:
    cdef const uint8_t *raw = slot + at
    cdef uint8_t kind = raw[0]
    if kind == RECORD_ENTRY:
        return apply_entry(slot, at, length, stored)
    if kind == RECORD_TARGET or kind == RECORD_XATTR:
        return apply_value(raw, length, stored)
    if length != LOG_RECORD_BYTES:
        return False
    if kind == RECORD_ATTRIBUTES:
        apply_attributes(<const attributes_record_t *>raw, stored)
        return True
    if kind == RECORD_EXTENT or kind == RECORD_HOLE:
        return apply_extent(zone, <const extent_record_t *>raw, kind == RECORD_EXTENT, stored)
    if kind == RECORD_PARENT:
        stored.parent = (<const parent_record_t *>raw).inode
        return True
    return False


cdef inline void apply_attributes(const attributes_record_t *record,
                                  stored_t *stored) noexcept nogil:
    stored.mode, stored.link_count = record.mode, record.link_count
    stored.uid, stored.gid = record.uid, record.gid
    stored.device, stored.epoch, stored.flags = record.device, record.epoch, record.flags
    stored.size_bytes = record.size_bytes
    stored.accessed_ns, stored.modified_ns = record.accessed_ns, record.modified_ns
    stored.changed_ns = record.changed_ns
    stored.has_attributes = True


cdef bint apply_extent(const zone_t *zone, const extent_record_t *record, bint is_mapped,
                       stored_t *stored) noexcept nogil:
    cdef uint64_t limit = <uint64_t>1 << (INODE_SIZE_SHIFT - FRAME_SHIFT)
    cdef uint64_t count = record.frame_count
    cdef run_t *run
    if not count or count > limit or record.index > limit - count:
        return False
    if is_mapped and not is_usable(zone, record.pfn, count):
        return False
    unmap(stored, record.index, record.index + count)
    if is_mapped:
        run = &stored.runs[stored.run_count]
        run.index, run.pfn, run.count = record.index, record.pfn, count
        stored.run_count += 1
    return True


cdef void unmap(stored_t *stored, uint64_t start, uint64_t end) noexcept nogil:
    """Take a range away from the runs: of each, a part before and a part behind may be left."""
    cdef run_t old
    cdef uint32_t number = 0
    cdef uint32_t count = stored.run_count
    while number < count:
        old = stored.runs[number]
        if old.index >= end or old.index + old.count <= start:
            number += 1
            continue
        if old.index + old.count > end:
            # It comes behind all others, and no part of it is in the range.
            stored.runs[stored.run_count].index = end
            stored.runs[stored.run_count].pfn = old.pfn + (end - old.index)
            stored.runs[stored.run_count].count = old.index + old.count - end
            stored.run_count += 1
        if old.index < start:
            stored.runs[number].count = start - old.index
            number += 1
        else:
            stored.run_count -= 1
            stored.runs[number] = stored.runs[stored.run_count]
            count = min(count, stored.run_count)


cdef bint apply_entry(const uint8_t *slot, uint64_t at, uint64_t length,
                      stored_t *stored) noexcept nogil:
    """An entry of a new name. What replaces an entry takes a search, and is the long way's."""
    cdef const uint8_t *raw = slot + at
    cdef const uint8_t *name = raw + ENTRY_NAME_AT
    cdef uint8_t type = raw[ENTRY_TYPE_AT]
    cdef uint64_t name_bytes = two_bytes(raw + ENTRY_NAME_BYTES_AT)
    cdef const uint8_t *other
    cdef uint32_t number
    if ENTRY_NAME_AT + name_bytes > length:
        return False
    if not is_type(type) or not is_plain_name(name, name_bytes):
        return False
    for number in range(stored.entry_count):
        other = slot + stored.entries[number]
        if two_bytes(other) == name_bytes and not memcmp(other + 2, name, name_bytes):
            return False
    stored.entries[stored.entry_count] = <uint32_t>(at + ENTRY_NAME_BYTES_AT)
    stored.entry_count += 1
    stored.subdirectory_count += type == S_IFDIR >> TYPE_SHIFT
    memcpy(&stored.modified_ns, raw + ENTRY_TIME_NS_AT, 8)
    stored.changed_ns = stored.modified_ns
    return True


cdef inline bint is_plain_name(const uint8_t *name, uint64_t length) noexcept nogil:
    """Whether a user can have given this name."""
    if not length or length > LOG_NAME_MAX_BYTES:
        return False
    if name[0] == b"."[0] and (length == 1 or (length == 2 and name[1] == b"."[0])):
        return False
    return memchr(name, 0, length) == NULL and memchr(name, b"/"[0], length) == NULL


cdef bint apply_value(const uint8_t *raw, uint64_t length, stored_t *stored) noexcept nogil:
    """A value that is stored in one part."""
    cdef uint32_t total_bytes
    cdef uint32_t offset
    cdef uint64_t part_bytes = two_bytes(raw + VALUE_PART_BYTES_AT)
    cdef uint64_t name_bytes = two_bytes(raw + VALUE_NAME_BYTES_AT)
    memcpy(&total_bytes, raw + VALUE_TOTAL_BYTES_AT, 4)
    memcpy(&offset, raw + VALUE_OFFSET_AT, 4)
    if offset or part_bytes != total_bytes or VALUE_CONTENT_AT + name_bytes + part_bytes > length:
        return False
    if raw[0] == RECORD_XATTR:
        # A name may have 255 bytes, as that of an entry, and any value that fits here is possible.
        return 0 < name_bytes <= LOG_NAME_MAX_BYTES
    if name_bytes or not part_bytes or memchr(raw + VALUE_CONTENT_AT, 0, part_bytes) != NULL:
        return False
    stored.target_bytes = part_bytes
    return True


cdef inline uint64_t two_bytes(const uint8_t *raw) noexcept nogil:
    cdef uint16_t value
    memcpy(&value, raw, 2)
    return value


cdef inline bint is_type(uint32_t type) noexcept nogil:
    """Whether this is the type of an inode, as d_type has it."""
    return (type << TYPE_SHIFT) in (S_IFREG, S_IFDIR, S_IFLNK, S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK)


cdef bint is_possible(const zone_t *zone, const stored_t *stored) noexcept nogil:
    """Whether the records made an inode. As `Replay.finish`, and what `InodeCache` asks then."""
    cdef uint32_t type = stored.mode & S_IFMT
    cdef uint32_t number
    if not stored.has_attributes or stored.mode >> 16 or not is_type(type >> TYPE_SHIFT):
        return False
    if stored.size_bytes >> INODE_SIZE_SHIFT or stored.flags > ALL_FLAGS:
        return False
    if type == S_IFDIR:
        if not stored.parent or stored.run_count or stored.link_count >> 31:
            return False
    elif stored.entry_count or stored.parent:
        return False
    if type != S_IFREG and stored.run_count:
        return False
    if type != S_IFREG and type != S_IFDIR:
        if stored.flags & (INODE_FLAG_IMMUTABLE | INODE_FLAG_APPEND_ONLY):
            return False
    if (type == S_IFLNK) != (stored.target_bytes > 0):
        return False
    for number in range(stored.run_count):
        if has_inodes(zone, stored.runs[number].pfn, stored.runs[number].count):
            return False
    return True


cdef bint look_at_line(const live_t *live, stored_t *stored) noexcept nogil:
    """What the live line says counts; whether it is sound, and of this epoch. As `LiveLines`."""
    cdef uint64_t accessed = live.accessed_ns
    cdef uint64_t written = live.written_ns
    cdef uint64_t word = live.size_word
    if (stored.mode & S_IFMT) == S_IFREG:
        if word >> (LIVE_SIZE_SHIFT + INODE_SIZE_SHIFT) or key_of(word) != line_key(stored):
            return False
        stored.size_bytes = word >> LIVE_SIZE_SHIFT
        if written and not written >> 63 and stored.changed_ns <= <int64_t>written:
            stored.modified_ns = not_before(<int64_t>written, stored.modified_ns)
            stored.changed_ns = not_before(<int64_t>written, stored.modified_ns)
    if accessed and not accessed >> 63:
        stored.accessed_ns = <int64_t>accessed
    return True


cdef inline uint64_t key_of(uint64_t word) noexcept nogil:
    """As `media.live.key_of`."""
    cdef uint64_t size = word >> LIVE_SIZE_SHIFT
    cdef uint64_t mixed = size * LIVE_SIZE_FACTOR >> (65 - LIVE_SIZE_SHIFT)
    return (word & ((<uint64_t>1 << LIVE_SIZE_SHIFT) - 1)) ^ (mixed << 1 | parity(mixed ^ size))


cdef inline uint64_t line_key(const stored_t *stored) noexcept nogil:
    """As `media.live.line_key`."""
    cdef uint8_t whose[18]
    cdef uint64_t mixed
    memcpy(whose, &stored.number, 8)
    memcpy(whose + 8, &stored.generation, 8)
    memcpy(whose + 16, &stored.epoch, 2)
    mixed = crc32c(0, whose, 18) & ((1 << (LIVE_SIZE_SHIFT - 1)) - 1)
    return mixed << 1 | parity(mixed)


cdef inline int64_t not_before(int64_t now_ns, int64_t earlier_ns) noexcept nogil:
    """As `clock.not_before`; `now_ns` is above zero, so the difference is a number."""
    if earlier_ns > now_ns and earlier_ns - now_ns <= LONGEST_TICK_NS:
        return earlier_ns
    return now_ns
