"""What a known inode is for whoever asks: its state and its times, as the control plane tells them."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_REALTIME

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.memory cimport load, now_ns, run_guarded, store
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.structures cimport *

# A word from here on is not a time.
cdef uint64_t NO_TIME_NS = <uint64_t>1 << 63


cdef int64_t names_now(names_t *names) noexcept nogil:
    """The time of a change, as `FileClock.now_ns`."""
    cdef int64_t now = <int64_t>now_ns(CLOCK_REALTIME_COARSE)
    cdef int64_t last = <int64_t>names.head.last_time_ns
    return last if 0 < last - now <= LONGEST_TICK_NS else now


cdef void time_was_set(names_t *names, int64_t time_ns) noexcept nogil:
    """A user has set a time, perhaps to the present; as `FileClock.was_set`."""
    if (<int64_t>names.head.last_time_ns < time_ns
            and time_ns <= <int64_t>now_ns(CLOCK_REALTIME)):
        store(&names.head.last_time_ns, <uint64_t>time_ns)


cdef struct line_reader_t:
    const live_t *line
    uint64_t size_word
    uint64_t written_ns
    uint64_t accessed_ns


cdef void read_line(void *argument) noexcept nogil:
    cdef line_reader_t *reader = <line_reader_t *>argument
    reader.size_word = load(&reader.line.size_word)
    reader.written_ns = load(&reader.line.written_ns)
    reader.accessed_ns = load(&reader.line.accessed_ns)


cdef inline int64_t not_before(int64_t now, int64_t earlier) noexcept nogil:
    """As `clock.not_before`; `now` is above zero, so the difference is a number."""
    return earlier if earlier > now and earlier - now <= LONGEST_TICK_NS else now


cdef void copy_state(const known_t *known, attributes_record_t *state) noexcept nogil:
    """The attributes that the log of an inode has, but not the record's head."""
    state.mode, state.link_count = known.mode, known.link_count
    state.uid, state.gid = known.uid, known.gid
    state.size_bytes = known.size_bytes
    state.accessed_ns, state.modified_ns = known.accessed_ns, known.modified_ns
    state.changed_ns = known.changed_ns
    state.device, state.epoch, state.flags = known.device, known.epoch, known.flags


cdef bint known_state(plane_t *plane, known_t *known, attributes_record_t *state) noexcept nogil:
    """All attributes of an inode now, as `LiveLines.state_of`, but not the record's head. False:
    its live line is damaged, so hand over."""
    cdef line_reader_t reader
    cdef uint64_t size_bytes
    copy_state(known, state)
    reader.line = <live_t *>(plane.pool + known.slot_offset + INODE_LIVE_OFFSET)
    if not run_guarded(read_line, &reader):
        return False
    if known.mode >> 12 == FILE_TYPE:
        if not line_says(known, reader.size_word, &size_bytes):
            return False
        state.size_bytes = size_bytes
        if (0 < reader.written_ns < NO_TIME_NS
                and known.changed_ns <= <int64_t>reader.written_ns):
            state.modified_ns = not_before(<int64_t>reader.written_ns, known.modified_ns)
            state.changed_ns = not_before(<int64_t>reader.written_ns, state.modified_ns)
    if 0 < reader.accessed_ns < NO_TIME_NS:
        state.accessed_ns = <int64_t>reader.accessed_ns
    return True


cdef inline void fill_time(int64_t time_ns, uint64_t *seconds, uint32_t *ns) noexcept nogil:
    """Split a time, also one before 1970, and the earliest that a record can have."""
    cdef int64_t second = time_ns // SECOND_NS
    cdef int64_t rest = time_ns % SECOND_NS
    if rest < 0:
        second, rest = second - 1, rest + SECOND_NS
    seconds[0], ns[0] = <uint64_t>second, <uint32_t>rest


cdef void fill_times(fuse_attr *out, const attributes_record_t *state) noexcept nogil:
    fill_time(state.accessed_ns, &out.atime, &out.atimensec)
    fill_time(state.modified_ns, &out.mtime, &out.mtimensec)
    fill_time(state.changed_ns, &out.ctime, &out.ctimensec)


cdef bint fill_attr(plane_t *plane, known_t *known, fuse_attr *out) noexcept nogil:
    """As `encode._attr` of `InodeAttributes.attributes`. False: hand over."""
    cdef attributes_record_t state
    if not known_state(plane, known, &state):
        return False
    memset(out, 0, sizeof(fuse_attr))
    out.ino = known.number
    out.mode, out.uid, out.gid, out.rdev = state.mode, state.uid, state.gid, state.device
    out.nlink = state.link_count
    out.size = known.target_bytes if known.target_bytes else state.size_bytes
    if state.mode >> 12 == DIRECTORY_TYPE:
        out.size = known.slot_count * LOG_RECORD_BYTES
        if out.nlink:
            out.nlink += 1 + <uint32_t>known.index.subdirectory_count
    out.blocks = (known.data_frames + known.log_frame_count) * 8
    out.blksize = 1 << FRAME_SHIFT
    fill_times(out, &state)
    return True


cdef bint fill_entry_out(plane_t *plane, known_t *known, fuse_entry_out *out) noexcept nogil:
    """As `encode.entry_out`. False: hand over."""
    memset(out, 0, sizeof(fuse_entry_out))
    out.nodeid, out.generation = known.number, known.generation
    out.entry_valid = out.attr_valid = CACHE_SECONDS
    return fill_attr(plane, known, &out.attr)


cdef inline uint64_t compacted_slots(const known_t *known) noexcept nogil:
    """As `Inode.compacted_slots`."""
    return known.live_slots + known.extent_count


cdef inline bint is_mostly_dead(const known_t *known) noexcept nogil:
    """As `Inode.is_mostly_dead`."""
    cdef uint64_t compacted = compacted_slots(known)
    return known.slot_count > 2 * compacted + LOG_MOST_SLOTS


cdef inline bint may_grow(const names_head_t *head, const known_t *known,
                          uint64_t slots) noexcept nogil:
    """Whether a log may get so many live slots more where it lies now."""
    return not known.log_frame_count or may_grow_in_frames(head, known, slots)


cdef inline bint may_grow_in_frames(const names_head_t *head, const known_t *known,
                                    uint64_t slots) noexcept nogil:
    """Whether a log in frames may get so many live slots more. If it became the longest of all, the
    control plane would have to note that, and to keep room for it; see `Housekeeping.keep_reserve`
    and `log.frames_needed`."""
    cdef uint64_t needed = compacted_slots(known) + slots
    return (needed <= LOG_INLINE_RECORDS
            or (needed + LOG_MOST_SLOTS - 10) // (LOG_MOST_SLOTS - 9) <= head.log_frames)
