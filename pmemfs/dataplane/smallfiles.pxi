"""The content of small files that no table is published for: most files are written once, from the
start to the end.

A file with a table is served by that, without the lock of names; here the lock is held. A larger
file is left to the control plane, which publishes a table if more requests look likely. Invariants:
- bytes for new frames are stored, and durable where fences make them so, before the log says which
  frames have them, and the size is raised last of all. So a crash shows the file as it was, or with
  all of these bytes;
- no frame is mapped ahead of the size: who opened the file here could not take it back;
- pages are held while bytes move, as always. No answer points into the pool, because without a
  table no grace period would wait for its reader.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.stat cimport S_ISGID, S_ISUID

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.memory cimport load
from pmemfs.dataplane.names cimport KNOWN_EXTENTS, known_extent_t, known_t
from pmemfs.dataplane.plane cimport piece_t, plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *

cdef enum:
    # What one request moves at most.
    SMALL_BYTES = 65536
    # Files up to this size are served here. They can also be freed here.
    SMALL_FILE_BYTES = MOST_FREED << FRAME_SHIFT
    # A file that would lie in more pieces is left to the control plane, which may put the rest
    # where it likes, and the file is still known.
    MOST_WRITTEN_EXTENTS = 5

# A table of a file that nobody else sees.
cdef struct small_t:
    table_t table
    extent_t extents[KNOWN_EXTENTS]


cdef verdict_t serve_small(worker_t *worker, request_t *request) noexcept nogil:
    """READ, WRITE, LSEEK or FSYNC of a file without a table."""
    cdef verdict_t verdict = serve_named(worker, request, serve_known)
    # After a fault, some pages may still be held.
    drop_held(request)
    request.table, request.live = NULL, NULL
    if verdict == FORWARD:
        request.error, request.answer_bytes, request.moved_bytes = 0, 0, 0
    return verdict


cdef verdict_t serve_known(names_change_t *change) noexcept nogil:
    cdef request_t *request = change.request
    cdef plane_t *plane = change.worker.plane
    cdef known_t *known = know(change.worker, request.head.nodeid)
    cdef inode_t *entry = find_inode(plane, request.head.nodeid)
    cdef uint32_t opcode = request.head.opcode
    cdef small_t small
    if (known == NULL or known.mode >> 12 != FILE_TYPE
            # It was published before the lock was taken.
            or entry != NULL and table_of(plane, entry) != NULL):
        return FORWARD
    request.live = <live_t *>(plane.pool + known.slot_offset + INODE_LIVE_OFFSET)
    if opcode == FUSE_FSYNC:
        return sync_small(change, known)
    if (not line_says(known, load(&request.live.size_word), &request.size_bytes)
            or request.size_bytes > SMALL_FILE_BYTES or not fill_small(known, request, &small)):
        return FORWARD
    request.table = &small.table
    if opcode == FUSE_READ:
        return read_small(change, known)
    if opcode == FUSE_WRITE:
        return write_small(change, known)
    return seek_small(request)


cdef bint fill_small(known_t *known, request_t *request, small_t *small) noexcept nogil:
    """Make a table of what is known of a file; False: its extents are in no order."""
    cdef known_extent_t *extent
    cdef uint64_t end = 0
    cdef uint64_t limit = request.size_bytes >> FRAME_SHIFT
    cdef uint32_t position
    for position in range(known.extent_count):
        extent = &known.extents[position]
        if extent.index < end:
            return False
        end = extent.index + extent.frame_count
        # As `FileFrames.append_limit`.
        if extent.index <= limit < end:
            limit = end
        small.extents[position].index = extent.index
        small.extents[position].pfn = extent.pfn
        small.extents[position].frame_count = extent.frame_count
        small.extents[position].flags = 0
    small.table.size_bytes = request.size_bytes
    small.table.limit_bytes = max(request.size_bytes, limit << FRAME_SHIFT)
    small.table.live_offset = known.slot_offset + INODE_LIVE_OFFSET
    small.table.extent_count = known.extent_count
    small.table.key_slot = 0
    return True


cdef verdict_t read_small(names_change_t *change, known_t *known) noexcept nogil:
    cdef request_t *request = change.request
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef bint may_point = request.may_point
    if (request.operation_bytes < sizeof(fuse_read_in) or wanted.size > request.answer_room
            or min(<uint64_t>wanted.size, request.size_bytes) > SMALL_BYTES):
        return FORWARD
    if wanted.offset < request.size_bytes:
        request.answer_bytes = <uint32_t>min(<uint64_t>wanted.size,
                                             request.size_bytes - wanted.offset)
    request.may_point = False
    read_guarded(request)
    request.may_point = may_point
    if request.error or not note_small_read(change, known, wanted.flags):
        return FORWARD
    request.moved_bytes = request.answer_bytes
    return ANSWER


cdef bint note_small_read(names_change_t *change, known_t *known, uint32_t flags) noexcept nogil:
    """Note an access if the mount wants that, as `InodeAttributes.note_read`; False: hand over."""
    cdef plane_t *plane = change.worker.plane
    cdef uint64_t noted = plane.header.access_times
    cdef attributes_record_t state
    cdef int64_t now
    if (noted == ACCESSES_NEVER or flags & O_NOATIME
            or known.flags & INODE_FLAG_NO_ACCESS_TIME):
        return True
    if not known_state(plane, known, &state):
        return False
    now = names_now(change.names)
    if (now != state.accessed_ns
            and (noted == ACCESSES_STRICT
                 or state.accessed_ns <= max(state.modified_ns, state.changed_ns)
                 or state.accessed_ns <= now - <int64_t>DAY_NS)):
        put_word(plane, known.slot_offset + INODE_LIVE_OFFSET + LIVE_ACCESSED_AT, <uint64_t>now)
    return True


cdef verdict_t write_small(names_change_t *change, known_t *known) noexcept nogil:
    cdef request_t *request = change.request
    cdef header_t *header = change.worker.plane.header
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef uint64_t word = load(&request.live.size_word)
    cdef uint64_t mask = (<uint64_t>1 << LIVE_SIZE_SHIFT) - 1
    if (request.operation_bytes < sizeof(fuse_write_in) or wanted.size > request.payload_bytes
            or not wanted.size or wanted.offset > request.size_bytes
            or wanted.size > SMALL_BYTES or not known.is_plain or header.read_only
            # What takes these bits away, and durability of single writes, are not known here.
            or known.mode & (S_ISUID | S_ISGID) or wanted.write_flags & FUSE_WRITE_CACHE
            or wanted.flags & O_DSYNC and header.durability != DURABILITY_VOLATILE
            # The size can be raised only in a line of this epoch.
            or (word & mask ^ size_check(word >> LIVE_SIZE_SHIFT)) != known.key):
        return FORWARD
    request.is_write = True
    if not is_all_mapped(request, wanted):
        return write_on(change, known, wanted)
    store_pieces(request, wanted)
    if request.error:
        return FORWARD
    raise_size(change, known, wanted)
    answer_written(request, wanted)
    return ANSWER


cdef bint is_all_mapped(request_t *request, const fuse_write_in *wanted) noexcept nogil:
    """Whether a write finds frames for all its bytes."""
    cdef uint64_t done = 0
    cdef piece_t piece
    if wanted.size > request.table.limit_bytes - wanted.offset:
        return False
    while done < wanted.size:
        piece = piece_at(request.table, wanted.offset + done, wanted.size - done)
        if piece.is_hole:
            return False
        done += piece.length
    return True


cdef void store_pieces(request_t *request, const fuse_write_in *wanted) noexcept nogil:
    cdef uint64_t done = 0
    cdef piece_t piece
    while done < wanted.size:
        piece = piece_at(request.table, wanted.offset + done, wanted.size - done)
        if not write_piece(request, piece, wanted.offset + done, request.payload + done):
            return
        done += piece.length


cdef verdict_t write_on(names_change_t *change, known_t *known,
                        const fuse_write_in *wanted) noexcept nogil:
    """A write that needs frames behind those of its file, as `FileBytes.write`."""
    cdef request_t *request = change.request
    cdef uint64_t start = frames_of_size(request.size_bytes)
    cdef uint64_t frame_count = frames_of_size(wanted.offset + wanted.size) - start
    cdef uint64_t pfns[NAMES_POPPED]
    cdef extent_t added[MOST_WRITTEN_EXTENTS]
    cdef uint32_t count, position
    if not is_filled(known, start) or frame_count > NAMES_POPPED:
        return FORWARD
    begin_change(change)
    if not pop_run(change, <uint32_t>frame_count, pfns):
        return FORWARD
    sort_frames(pfns, frame_count)
    count = join_frames(pfns, frame_count, start, added)
    if (not count or known.extent_count + count > MOST_WRITTEN_EXTENTS
            or (change.names.head.in_one_piece and not is_one_piece(known, added, count))):
        store(&change.names.head.scattered, 1)
        return FORWARD
    for position in range(count):
        if not add_extent(change, known, &added[position]):
            return FORWARD
        extend_table(request.table, &added[position])
    if not store_new(request, wanted):
        return FORWARD
    answer_written(request, wanted)
    # Until the size is raised, a successor that finds this begun lets it come again.
    change.is_unfinished = True
    if not commit(change):
        return FORWARD
    for position in range(count):
        note_extent(known, &added[position])
    raise_size(change, known, wanted)
    carried_out(change)
    return ANSWER


cdef inline uint64_t frames_of_size(uint64_t size_bytes) noexcept nogil:
    return (size_bytes + (1 << FRAME_SHIFT) - 1) >> FRAME_SHIFT


cdef bint is_filled(const known_t *known, uint64_t frame_count) noexcept nogil:
    """Whether just these frames of a file, from the start on, are mapped. `fill_small` has seen
    that its extents are in order."""
    cdef const known_extent_t *last
    if known.data_frames != frame_count:
        return False
    if not frame_count:
        return True
    last = &known.extents[known.extent_count - 1]
    return last.index + last.frame_count == frame_count


cdef bint add_extent(names_change_t *change, known_t *known, const extent_t *extent) noexcept nogil:
    """A record of new frames; False: hand over."""
    cdef extent_record_t *record = <extent_record_t *>add_record(change, known, RECORD_EXTENT, 1)
    if record == NULL:
        return False
    record.index, record.pfn, record.frame_count = extent.index, extent.pfn, extent.frame_count
    return True


cdef inline void extend_table(table_t *table, const extent_t *extent) noexcept nogil:
    (<extent_t *>(<uint8_t *>table + sizeof(table_t)))[table.extent_count] = extent[0]
    table.extent_count += 1


cdef void note_extent(known_t *known, const extent_t *extent) noexcept nogil:
    """Know of new frames behind all others."""
    cdef known_extent_t new
    new.index, new.pfn, new.frame_count = extent.index, extent.pfn, extent.frame_count
    known.extent_count = with_extent(known.extents, known.extent_count, new)
    known.data_frames += new.frame_count


cdef bint store_new(request_t *request, const fuse_write_in *wanted) noexcept nogil:
    """Store the bytes of a write, which are durable with the next fence; False: hand over."""
    cdef plane_t *plane = request.worker.plane
    cdef uint64_t done = 0
    cdef piece_t piece
    if plane.header.durability != DURABILITY_CACHE_LINES:
        store_pieces(request, wanted)
        return not request.error
    while done < wanted.size:
        piece = piece_at(request.table, wanted.offset + done, wanted.size - done)
        if not hold_pages(request, piece, wanted.offset + done, ACCESS_WRITE):
            return False
        # Not as `write_piece`, whose fence would be one more than that of the commit.
        put_stored(plane, piece.pool_offset, request.payload + done, piece.length)
        if not is_whole(plane, piece.pool_offset, piece.length):
            note_written(plane, piece.pool_offset, piece.length)
        drop_pages(request.worker, request)
        done += piece.length
    return True


cdef void sort_frames(uint64_t *pfns, uint64_t count) noexcept nogil:
    """Sort a few frames: what files have given back lies in no order."""
    cdef uint64_t position, at, pfn
    for position in range(1, count):
        pfn = pfns[position]
        at = position
        while at and pfns[at - 1] > pfn:
            pfns[at] = pfns[at - 1]
            at -= 1
        pfns[at] = pfn


cdef uint32_t join_frames(const uint64_t *pfns, uint64_t count, uint64_t start,
                          extent_t *extents) noexcept nogil:
    """Let frames follow one another in a file, from an index on; in how many extents, 0: too many."""
    cdef uint32_t extent_count = 0
    cdef uint64_t position
    for position in range(count):
        if position and pfns[position] == pfns[position - 1] + 1:
            extents[extent_count - 1].frame_count += 1
            continue
        if extent_count == MOST_WRITTEN_EXTENTS:
            return 0
        extents[extent_count].index = start + position
        extents[extent_count].pfn = pfns[position]
        extents[extent_count].frame_count = 1
        extents[extent_count].flags = 0
        extent_count += 1
    return extent_count


cdef bint is_one_piece(const known_t *known, const extent_t *added, uint32_t count) noexcept nogil:
    """Whether a file lies in one piece with what is added behind it."""
    cdef const known_extent_t *last
    if not known.extent_count:
        return count == 1
    last = &known.extents[known.extent_count - 1]
    return (known.extent_count == count == 1 and last.pfn + last.frame_count == added.pfn
            and last.index + last.frame_count == added.index)


cdef void raise_size(names_change_t *change, known_t *known,
                     const fuse_write_in *wanted) noexcept nogil:
    """The bytes of a write are stored: raise the size, and set the time of writing. The line is
    flushed by whoever makes the file durable, or closes it."""
    cdef plane_t *plane = change.worker.plane
    cdef uint64_t line = known.slot_offset + INODE_LIVE_OFFSET
    cdef live_t *live = change.request.live
    cdef uint64_t end = wanted.offset + wanted.size
    cdef uint64_t word = load(&live.size_word)
    if word >> LIVE_SIZE_SHIFT < end:
        set_word(plane, line, raised(word, end))
    set_word(plane, line + LIVE_WRITTEN_AT, <uint64_t>names_now(change.names))


cdef void answer_written(request_t *request, const fuse_write_in *wanted) noexcept nogil:
    memset(request.answer, 0, sizeof(fuse_write_out))
    (<fuse_write_out *>request.answer).size = wanted.size
    request.answer_bytes = sizeof(fuse_write_out)
    request.moved_bytes = wanted.size


cdef verdict_t sync_small(names_change_t *change, known_t *known) noexcept nogil:
    """Each write has fenced its bytes before it was answered; its size was not fenced yet."""
    cdef plane_t *plane = change.worker.plane
    if plane.header.durability == DURABILITY_MSYNC:
        return FORWARD
    flush_stored(plane, known.slot_offset + INODE_LIVE_OFFSET, LIVE_ACCESSED_AT)
    fence_stored(plane)
    return serve_sync(change.worker, change.request)


cdef verdict_t seek_small(request_t *request) noexcept nogil:
    """As `FileBytes.seek`."""
    cdef const fuse_lseek_in *wanted = <const fuse_lseek_in *>request.operation
    cdef uint64_t position
    cdef piece_t piece
    if (request.operation_bytes < sizeof(fuse_lseek_in)
            or wanted.whence != SEEK_DATA and wanted.whence != SEEK_HOLE
            or wanted.offset >= request.size_bytes):
        return FORWARD
    position = wanted.offset
    while position < request.size_bytes:
        piece = piece_at(request.table, position, request.size_bytes - position)
        if piece.is_hole == (wanted.whence == SEEK_HOLE):
            break
        position += piece.length
    if position >= request.size_bytes and wanted.whence == SEEK_DATA:
        return FORWARD
    (<fuse_lseek_out *>request.answer).offset = min(position, request.size_bytes)
    request.answer_bytes = sizeof(fuse_lseek_out)
    return ANSWER
