"""Records that logs get: what they say, and where they lie.

Invariants:
- a record never crosses the end of a frame, and what is left of a frame is padding;
- a log goes on, or is written anew, just where `volume/fs/transaction` would do the same. Whatever
  else would be needed (a log in frames that is mostly dead, the longest log of all) is handed over;
- a log in a slot is written anew into a frame, because nothing in the slot has room for a link.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.structures cimport *


# Room in a log

cdef addition_t *addition_for(names_change_t *change, known_t *known) noexcept nogil:
    """What a log gets, in addition to what it got last; NULL: too many logs change."""
    cdef addition_t *addition = &change.additions[change.addition_count]
    if change.addition_count and addition[-1].known == known:
        return &addition[-1]
    if change.addition_count == MOST_LOGS:
        return NULL
    memset(addition, 0, sizeof(addition_t))
    addition.known, addition.start = known, change.records_bytes
    change.addition_count += 1
    return addition


cdef bint make_log_room(names_change_t *change, known_t *known, uint32_t slots) noexcept nogil:
    """Have room for records of so many slots, before the first of them; False: hand over."""
    if known.tail + slots * LOG_RECORD_BYTES <= known.area_end:
        return True
    if known.log_frame_count:
        # What fits goes behind the tail, and the rest into a new frame.
        return not is_mostly_dead(known)
    return rewrite_inline(change, known, slots)


cdef uint8_t *add_record(names_change_t *change, known_t *known, uint8_t kind,
                         uint32_t slots) noexcept nogil:
    """Room for a record that a log gets: zeroes, and its head. NULL: hand over."""
    cdef addition_t *addition = addition_for(change, known)
    cdef uint32_t length = slots * LOG_RECORD_BYTES
    if addition == NULL:
        return NULL
    if not addition.frame and known.tail + addition.length + length > known.area_end:
        if known.log_frame_count:
            if not go_on_in_frame(change, addition):
                return NULL
        elif addition.length or not rewrite_inline(change, known, slots):
            return NULL
    return new_record(change, addition, kind, slots)


cdef uint8_t *new_record(names_change_t *change, addition_t *addition, uint8_t kind,
                         uint32_t slots) noexcept nogil:
    """As `add_record`, where the addition goes now."""
    cdef uint8_t *record = change.records + change.records_bytes
    cdef uint32_t length = slots * LOG_RECORD_BYTES
    if change.records_bytes + length > MOST_RECORDS_BYTES:
        return NULL
    memset(record, 0, length)
    record[0], record[1] = kind, <uint8_t>slots
    change.records_bytes += length
    addition.length += length
    if not addition.frame:
        addition.here_length = addition.length
    return record


cdef bint go_on_in_frame(names_change_t *change, addition_t *addition) noexcept nogil:
    """Give a log one more frame, as `Transaction._append_to_frames`; False: hand over."""
    cdef known_t *known = addition.known
    cdef uint64_t pfn
    if is_mostly_dead(known) or not pop_frames(change, 1, &pfn):
        return False
    if (known.tail + addition.length < known.area_end
            and new_record(change, addition, RECORD_PADDING, 1) == NULL):
        return False
    addition.frame = pfn << FRAME_SHIFT
    return True


cdef bint rewrite_inline(names_change_t *change, known_t *known, uint32_t slots) noexcept nogil:
    """Write a log in a slot anew, into a frame, with room for so many slots more; False: hand
    over. As `Transaction._rewrite` and `Inode.records`."""
    cdef addition_t *addition
    cdef attributes_record_t *state
    cdef uint64_t pfn
    if not may_grow_in_frames(change.names.head, known, slots):
        return False
    addition = addition_for(change, known)
    if addition == NULL or not pop_frames(change, 1, &pfn):
        return False
    addition.frame, addition.is_rewritten = pfn << FRAME_SHIFT, True
    if known.mode >> 12 == DIRECTORY_TYPE:
        if not add_names_anew(change, addition):
            return False
    elif known.mode >> 12 != FILE_TYPE or not add_extents_anew(change, addition):
        return False
    state = <attributes_record_t *>new_record(change, addition, RECORD_ATTRIBUTES, 1)
    if state == NULL:
        return False
    copy_state(known, state)
    return True


cdef bint add_names_anew(names_change_t *change, addition_t *addition) noexcept nogil:
    """Its parent, and what its names lead to, of a directory whose log lies in its slot."""
    cdef known_t *known = addition.known
    cdef uint8_t raw[LOG_INLINE_RECORDS * LOG_RECORD_BYTES]
    cdef uint32_t entries[LOG_INLINE_RECORDS]
    cdef uint32_t length = <uint32_t>(known.tail - known.slot_offset - INODE_INLINE_OFFSET)
    cdef uint8_t *record = new_record(change, addition, RECORD_PARENT, 1)
    cdef uint32_t count, number
    if record == NULL or length > sizeof(raw):
        return False
    memcpy(record + 8, &known.parent, 8)
    memcpy(raw, change.worker.plane.pool + known.slot_offset + INODE_INLINE_OFFSET, length)
    count = find_entries(raw, length, entries)
    if count != known.index.entry_count:
        return False
    for number in range(count):
        record = new_record(change, addition, RECORD_ENTRY, raw[entries[number] + 1])
        if record == NULL:
            return False
        memcpy(record + 8, raw + entries[number] + 8,
               raw[entries[number] + 1] * LOG_RECORD_BYTES - 8)
        memcpy(record + ENTRY_TIME_NS_AT, &known.modified_ns, 8)
    return True


cdef uint32_t find_entries(const uint8_t *raw, uint32_t length, uint32_t *entries) noexcept nogil:
    """Where the ENTRY records lie that count, in the order in which their names were added; how
    many there are. A name that leads elsewhere keeps its place, as in a dictionary of Python."""
    cdef uint32_t at = 0
    cdef uint32_t count = 0
    cdef uint32_t number, slots
    while at < length:
        slots = raw[at + 1]
        if not slots or at + slots * LOG_RECORD_BYTES > length:
            return ~<uint32_t>0
        if raw[at] == RECORD_ENTRY or raw[at] == RECORD_REMOVED:
            number = 0
            while number < count and not has_same_name(raw + entries[number], raw + at):
                number += 1
            if raw[at] == RECORD_ENTRY:
                entries[number] = at
                count += number == count
            elif number < count:
                count -= 1
                for number in range(number, count):
                    entries[number] = entries[number + 1]
        at += slots * LOG_RECORD_BYTES
    return count


cdef inline bint has_same_name(const uint8_t *one, const uint8_t *other) noexcept nogil:
    """Whether two records of names have the same one: its length and its bytes are one string."""
    cdef uint32_t length = min(one[1], other[1]) * LOG_RECORD_BYTES
    cdef uint32_t name_bytes = name_length(one)
    return (name_length(other) == name_bytes and ENTRY_NAME_AT + name_bytes <= length
            and not memcmp(one + ENTRY_NAME_AT, other + ENTRY_NAME_AT, name_bytes))


cdef bint add_extents_anew(names_change_t *change, addition_t *addition) noexcept nogil:
    """The extents of a file."""
    cdef known_t *known = addition.known
    cdef extent_record_t *record
    cdef uint32_t number
    for number in range(known.extent_count):
        record = <extent_record_t *>new_record(change, addition, RECORD_EXTENT, 1)
        if record == NULL:
            return False
        record.index = known.extents[number].index
        record.pfn = known.extents[number].pfn
        record.frame_count = known.extents[number].frame_count
    return True


# What records say

cdef uint64_t add_entry(names_change_t *change, known_t *directory, const uint8_t *name,
                        uint32_t name_bytes, uint64_t inode, uint8_t type_) noexcept nogil:
    """An ENTRY, or a REMOVED if `type_` is 0, of `now_ns`. Where in the pool it will lie; 0: hand
    over."""
    cdef uint32_t slots = entry_slots(name_bytes)
    cdef uint8_t *record
    if type_ and not may_grow(change.names.head, directory, slots):
        return 0
    record = add_record(change, directory, RECORD_ENTRY if type_ else RECORD_REMOVED, slots)
    if record == NULL:
        return 0
    memcpy(record + ENTRY_INODE_AT, &inode, 8)
    memcpy(record + ENTRY_TIME_NS_AT, &change.now_ns, 8)
    record[ENTRY_TYPE_AT] = type_
    record[ENTRY_NAME_BYTES_AT] = <uint8_t>name_bytes
    record[ENTRY_NAME_BYTES_AT + 1] = <uint8_t>(name_bytes >> 8)
    memcpy(record + ENTRY_NAME_AT, name, name_bytes)
    return tail_after(&change.additions[change.addition_count - 1]) - slots * LOG_RECORD_BYTES


cdef attributes_record_t *add_attributes(names_change_t *change, known_t *known) noexcept nogil:
    """ATTRIBUTES as they are now, to be changed; NULL: hand over."""
    cdef attributes_record_t *record
    record = <attributes_record_t *>add_record(change, known, RECORD_ATTRIBUTES, 1)
    if record == NULL or not known_state(change.worker.plane, known, record):
        return NULL
    return record
