"""The content of files: READ, WRITE and LSEEK inside published extents.

The size of a file with a live line (`media/live`) is read there at each request, and a write raises
it here as far as the file's table allows. Invariants:
- pages are held from before the first byte moves until after the last, so that their frames can't
  be given to another file meanwhile;
- where cache lines are what is durable, a write is flushed and fenced before it is answered. A
  fence orders only its own processor's write-backs, and the fsync may come to another processor;
- a size is raised after the bytes below it were stored, and after they are durable where fences
  make them durable. Otherwise a reader, or a mount after a power failure, would see what the frames
  held before.
"""

from libc.errno cimport EINTR, EINVAL, EIO, ENOSPC, ENXIO, EROFS, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.types cimport off_t
from posix.unistd cimport SEEK_SET, lseek, pread, pwrite

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.memory cimport fault_address, load, now_ns, peek, run_guarded
from pmemfs.dataplane.plane cimport piece_t, plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *

cdef enum:
    # From this length on, a copy past the caches is faster.
    STREAM_BYTES = 65536
    SECOND_NS = 1000000000

# As in `pmemfs/clock`.
cdef uint64_t NO_READ_COUNTS = ~<uint64_t>0
cdef uint64_t DAY_NS = <uint64_t>24 * 3600 * SECOND_NS

cdef extern from "unistd.h" nogil:
    enum:
        SEEK_DATA
        SEEK_HOLE

cdef extern from "fcntl.h" nogil:
    enum:
        O_DSYNC
        O_NOATIME

cdef extern from "time.h" nogil:
    enum: CLOCK_REALTIME_COARSE


cdef void release(worker_t *worker, request_t *request) noexcept nogil:
    """Let go of the memory that an answer points to. Until then it must stay as it is, so the
    worker's section lasts as long."""
    if request.pointed == NULL:
        return
    request.pointed = NULL
    drop_held(request)
    end_section(worker.slot)


cdef void fail_pointed(worker_t *worker, request_t *request) noexcept nogil:
    """The kernel could not read the memory that the answer points to: it faults."""
    cdef uint64_t offset = <uint64_t>(request.pointed - worker.plane.pool)
    release(worker, request)
    request.error = EIO
    request.answer_bytes = 0
    request.moved_bytes = 0
    record_fault(worker.plane, offset, request.head.nodeid, EIO, worker.now_ns)


cdef void find_file(worker_t *worker, request_t *request) noexcept nogil:
    """Find the table of a request's inode, and its live line, if they are published."""
    cdef plane_t *plane = worker.plane
    cdef table_t *table = NULL
    request.entry = find_inode(plane, request.head.nodeid)
    if request.entry != NULL:
        table = table_of(plane, request.entry)
    if table != NULL:
        request.size_bytes = table.size_bytes
        if table.live_offset:
            if has_live_line(plane, table):
                request.live = <live_t *>(plane.pool + table.live_offset)
            else:
                table = NULL
    request.table = table


cdef void read_size(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    request.size_bytes = load(&request.live.size_word) >> LIVE_SIZE_SHIFT
    if request.head.opcode == FUSE_READ and request.operation_bytes >= sizeof(fuse_read_in):
        note_access(request)


cdef void stamp(uint64_t *time_ns) noexcept nogil:
    """Set a time to now, by the clock of the kernel's own file systems; see `pmemfs/clock`.

    If this worker was interrupted on the way, a later time that another has stored stays. A time
    that is further ahead than that can explain comes from a clock that was set back.
    """
    cdef uint64_t now = now_ns(CLOCK_REALTIME_COARSE)
    cdef uint64_t before = load(time_ns)
    while ((now > before or before - now > SECOND_NS)
           and not memory.swap(time_ns, &before, now)):
        pass


cdef inline uint64_t size_check(uint64_t size) noexcept nogil:
    """As `media.live.size_check`."""
    cdef uint64_t mixed = size * LIVE_SIZE_FACTOR >> (65 - LIVE_SIZE_SHIFT)
    return mixed << 1 | memory.parity(mixed ^ size)


cdef inline uint64_t raised(uint64_t word, uint64_t size) noexcept nogil:
    """As `media.live.raised`: the key stays in the word, and with it any damage."""
    cdef uint64_t mask = (<uint64_t>1 << LIVE_SIZE_SHIFT) - 1
    cdef uint64_t key = word & mask ^ size_check(word >> LIVE_SIZE_SHIFT)
    return size << LIVE_SIZE_SHIFT | key ^ size_check(size)


cdef inline void note_access(request_t *request) noexcept nogil:
    """A file is about to be read: note the access if the mount wants that (`clock.AccessTimes`)."""
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef uint64_t noted = request.worker.plane.header.access_times
    cdef live_t *live = request.live
    cdef uint64_t accessed = load(&live.accessed_ns)
    cdef uint64_t changed = load(&request.entry.changed_ns)
    if noted == ACCESSES_NEVER or wanted.flags & O_NOATIME or changed == NO_READ_COUNTS:
        return
    if (noted == ACCESSES_STRICT or request.worker.now_ns >= accessed + DAY_NS
            or accessed <= max(load(&live.written_ns), changed)):
        stamp(&live.accessed_ns)


cdef void note_write(request_t *request) noexcept nogil:
    """The bytes of a write are in a file with a live line: raise its size and set its time."""
    cdef live_t *live = request.live
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef uint64_t end = wanted.offset + wanted.size
    # Another worker may raise the size as well. The higher size wins, because its bytes are stored
    # already, and so are these.
    cdef uint64_t word = load(&live.size_word)
    while (word >> LIVE_SIZE_SHIFT < end
            and not memory.swap(&live.size_word, &word, raised(word, end))):
        pass
    stamp(&live.written_ns)


cdef verdict_t serve_read(worker_t *worker, request_t *request) noexcept nogil:
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef table_t *table = request.table
    cdef uint64_t length
    if request.operation_bytes < sizeof(fuse_read_in) or wanted.size > request.answer_room:
        return refuse(request, EINVAL)
    if table == NULL:
        return FORWARD
    if wanted.offset >= request.size_bytes:
        return ANSWER
    length = min(<uint64_t>wanted.size, request.size_bytes - wanted.offset)
    # Beyond the limit this table knows nothing: frames there may be mapped that it does not name.
    if wanted.offset + length > table.limit_bytes:
        return FORWARD
    request.answer_bytes = <uint32_t>length
    if table.key_slot:
        return serve_sealed_read(worker, request)
    while True:
        request.packed = NULL
        if not run_guarded(read_guarded, request):
            return fail_fault(worker, request)
        if request.packed == NULL:
            break
        if not read_packed(request):
            if request.is_faulty:
                return fail_fault(worker, request)
            request.must_forward = not request.error
            break
    if request.must_forward or request.error:
        request.answer_bytes = 0
    if request.must_forward:
        return FORWARD
    request.moved_bytes = request.answer_bytes
    return ANSWER


cdef void read_guarded(void *argument) noexcept nogil:
    """Read up to the end, or to what only the control plane or `read_packed` can read."""
    cdef request_t *request = <request_t *>argument
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef uint64_t done = request.done
    cdef piece_t piece
    while done < request.answer_bytes:
        piece = piece_at(request.table, wanted.offset + done, request.answer_bytes - done)
        if piece.is_hole:
            memset(request.answer + done, 0, piece.length)
        elif piece.is_forwarded:
            if id_of(piece.extent):
                request.packed, request.done = piece.extent, done
            else:
                request.must_forward = True
            return
        elif not read_piece(request, piece, wanted.offset + done, request.answer + done):
            return
        done += piece.length


cdef bint read_piece(request_t *request, piece_t piece, uint64_t offset,
                     uint8_t *into) noexcept nogil:
    cdef plane_t *plane = request.worker.plane
    cdef bint whole = is_whole(plane, piece.pool_offset, piece.length)
    if not whole and is_unused(plane, piece.pool_offset, piece.length):
            # A hole has no memory, so there is no page to hold, and reading must not make one.
        memset(into, 0, piece.length)
        return True
    if not hold_pages(request, piece, offset, ACCESS_READ):
        return False
    if not whole:
        request.error = read_pool(plane, into, piece.length, piece.pool_offset)
        note_refusal(request, piece.pool_offset)
    elif request.may_point and piece.length == request.answer_bytes:
        # The reply points into the pool. Pages stay held and the section open until `release`.
        request.pointed = plane.pool + piece.pool_offset
        return True
    else:
        memcpy(into, plane.pool + piece.pool_offset, piece.length)
    drop_pages(request.worker, request)
    return not request.error


cdef verdict_t serve_write(worker_t *worker, request_t *request) noexcept nogil:
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef table_t *table = request.table
    cdef uint64_t done = 0
    cdef piece_t piece
    if request.operation_bytes < sizeof(fuse_write_in) or wanted.size > request.payload_bytes:
        return refuse(request, EINVAL)
    if worker.plane.header.read_only:
        return refuse(request, EROFS)
    # A device's limit is its size. A write behind the end leaves a gap for the control plane to
    # fill.
    if (table == NULL or wanted.size == 0 or wanted.offset > request.size_bytes
            or wanted.offset > table.limit_bytes
            or wanted.size > table.limit_bytes - wanted.offset):
        return FORWARD
    if request.live != NULL and (wanted.offset + wanted.size) >> (64 - LIVE_SIZE_SHIFT):
        return FORWARD
    if (wanted.flags & O_DSYNC and worker.plane.header.durability != DURABILITY_VOLATILE
            and (request.live != NULL or worker.plane.header.durability == DURABILITY_MSYNC)):
        # Only the control plane makes size and time durable with the bytes, and calls msync for
        # one write. Of a device on cache lines each write is durable when it is answered.
        return FORWARD
    # All pieces first: a write that is forwarded must not have stored anything.
    while done < wanted.size:
        piece = piece_at(table, wanted.offset + done, wanted.size - done)
        if piece.is_hole or piece.is_forwarded:
            return FORWARD
        done += piece.length
    request.is_write = True
    if table.key_slot:
        return serve_sealed_write(worker, request)
    if not run_guarded(write_guarded, request):
        return fail_fault(worker, request)
    if request.error:
        return ANSWER
    if request.live == NULL:
        stamp(&request.entry.last_write_ns)
    (<fuse_write_out *>request.answer).size = wanted.size
    request.answer_bytes = 8
    request.moved_bytes = wanted.size
    return ANSWER


cdef void write_guarded(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    cdef plane_t *plane = request.worker.plane
    cdef const fuse_write_in *wanted = <const fuse_write_in *>request.operation
    cdef uint64_t done = 0
    cdef piece_t piece
    while done < wanted.size:
        piece = piece_at(request.table, wanted.offset + done, wanted.size - done)
        if not write_piece(request, piece, wanted.offset + done, request.payload + done):
            return
        done += piece.length
    # Only now, after the bytes of all pieces.
    if request.live != NULL:
        note_write(request)


cdef bint write_piece(request_t *request, piece_t piece, uint64_t offset,
                      const uint8_t *data) noexcept nogil:
    cdef plane_t *plane = request.worker.plane
    cdef bint whole = is_whole(plane, piece.pool_offset, piece.length)
    cdef uint8_t *into = plane.pool + piece.pool_offset
    if not hold_pages(request, piece, offset, ACCESS_WRITE):
        return False
    if plane.header.durability == DURABILITY_CACHE_LINES:
            # Always through the mapping: MAP_SYNC covers new blocks only there.
        put_stored(plane, piece.pool_offset, data, piece.length)
        fence_stored(plane)
    elif whole and piece.length >= STREAM_BYTES:
        memory.stream(into, data, piece.length)
    elif whole:
        memcpy(into, data, piece.length)
    else:
        request.error = write_pool(plane, data, piece.length, piece.pool_offset)
        note_refusal(request, piece.pool_offset)
    # After the write: a look for holes that came before it would find the hole still there, and
    # nothing would then ask for another look.
    if not whole:
        note_written(plane, piece.pool_offset, piece.length)
    drop_pages(request.worker, request)
    return not request.error


cdef inline bint hold_pages(request_t *request, piece_t piece, uint64_t offset,
                            int access) noexcept nogil:
    cdef plane_t *plane = request.worker.plane
    cdef uint64_t pfn = piece.pool_offset >> FRAME_SHIFT
    cdef uint64_t last = (piece.pool_offset + piece.length - 1) >> FRAME_SHIFT
    if plane.header.memmap_place == MEMMAP_NOWHERE:
        return True
    request.error = get_pages(&plane.memmap, &request.held, pfn, last - pfn + 1, access,
                              request.head.nodeid,
                              offset >> (FRAME_SHIFT + plane.header.page_order),
                              request.worker.now_ns)
    return not request.error


cdef inline void drop_pages(worker_t *worker, request_t *request) noexcept nogil:
    if request.held.count:
        put_pages(&worker.plane.memmap, &request.held, request.is_write)


cdef inline void note_refusal(request_t *request, uint64_t pool_offset) noexcept nogil:
    """A system call has met memory whose touch through the mapping would fault: record it."""
    if request.error == EIO:
        record_fault(request.worker.plane, pool_offset, request.head.nodeid, EIO,
                     request.worker.now_ns)


cdef verdict_t fail_fault(worker_t *worker, request_t *request) noexcept nogil:
    """A touch of the pool or of its page structures has faulted: find out what to answer."""
    cdef plane_t *plane = worker.plane
    cdef uint64_t offset = <uint64_t>(fault_address() - <size_t>plane.pool)
    cdef int error = EIO
    # A store into a hole that finds no memory is a SIGBUS too, but means a full file system.
    if (request.is_write and offset < peek(&plane.header.pool_bytes)
            and not is_whole(plane, offset, 1)):
        error = ENOSPC
    record_fault(plane, offset, request.head.nodeid, error, worker.now_ns)
    request.pointed = NULL
    request.moved_bytes = 0
    drop_held(request)
    return refuse(request, error)


cdef void drop_held(request_t *request) noexcept nogil:
    """Drop the references on all pages whose structures can be touched; the others are lost."""
    cdef uint64_t before
    while request.held.count:
        before = request.held.count
        if not run_guarded(drop_guarded, request) and request.held.count == before:
            request.held.count -= 1


cdef void drop_guarded(void *argument) noexcept nogil:
    cdef request_t *request = <request_t *>argument
    drop_pages(request.worker, request)


cdef verdict_t serve_seek(worker_t *worker, request_t *request) noexcept nogil:
    cdef const fuse_lseek_in *wanted = <const fuse_lseek_in *>request.operation
    cdef table_t *table = request.table
    cdef uint64_t size_bytes = request.size_bytes
    cdef uint64_t position
    cdef bint for_data
    if request.operation_bytes < sizeof(fuse_lseek_in):
        return refuse(request, EINVAL)
    if table == NULL or (wanted.whence != SEEK_DATA and wanted.whence != SEEK_HOLE):
        return FORWARD
    if wanted.offset >= size_bytes:
        return refuse(request, ENXIO)
    if size_bytes > table.limit_bytes:
        return FORWARD
    for_data = wanted.whence == SEEK_DATA
    position = seek(worker.plane, table, wanted.offset, size_bytes, for_data)
    if for_data and position >= size_bytes:
        return refuse(request, ENXIO)
    (<fuse_lseek_out *>request.answer).offset = min(position, size_bytes)
    request.answer_bytes = sizeof(fuse_lseek_out)
    return ANSWER


cdef uint64_t seek(plane_t *plane, table_t *table, uint64_t position, uint64_t size_bytes,
                   bint for_data) noexcept nogil:
    """The first data or hole from a position on; the size of the file if there is none."""
    cdef piece_t piece
    cdef off_t found
    cdef bint is_empty
    while position < size_bytes:
        piece = piece_at(table, position, size_bytes - position)
        if piece.is_hole:
            if not for_data:
                return position
        elif piece.is_forwarded:
            if for_data:
                return position
        else:
            found = lseek(plane.pool_fd, <off_t>piece.pool_offset,
                          SEEK_DATA if for_data else SEEK_HOLE)
            if found < <off_t>piece.pool_offset:
                # ENXIO: a hole up to the end of the pool's file. Otherwise this source can't tell
                # holes, and everything is data: there was an error, or it is a DAX device, which
                # answers any seek with where it is. A pool that was cut off is data, too, so that
                # its reader gets an error.
                is_empty = (found < 0 and errno == ENXIO
                            and not is_cut(plane, piece.pool_offset + piece.length))
                found = <off_t>piece.pool_offset
                if is_empty == for_data:
                    found += <off_t>piece.length
            if (<uint64_t>found < piece.pool_offset + piece.length
                    # Where the cut off file ends, no hole begins.
                    and (for_data or not is_cut(plane, <uint64_t>found + 1))):
                return position + (<uint64_t>found - piece.pool_offset)
        position += piece.length
    return position


cdef bint is_unused(plane_t *plane, uint64_t pool_offset, uint64_t length) noexcept nogil:
    cdef off_t found = lseek(plane.pool_fd, <off_t>pool_offset, SEEK_DATA)
    if found < 0:
        return errno == ENXIO and not is_cut(plane, pool_offset + length)
    return <uint64_t>found >= pool_offset + length


cdef bint is_cut(plane_t *plane, uint64_t end) noexcept nogil:
    """Whether the pool's file was cut off before a place that belongs to the pool."""
    cdef struct_stat status
    return (end <= peek(&plane.header.pool_bytes) and not fstat(plane.pool_fd, &status)
            and S_ISREG(status.st_mode) and <uint64_t>status.st_size < end)


cdef int read_pool(plane_t *plane, uint8_t *into, uint64_t length, uint64_t offset) noexcept nogil:
    """pread all of a range. The mapping would fill holes when it is touched. 0 or errno."""
    cdef ssize_t count
    while length:
        count = pread(plane.pool_fd, into, length, <off_t>offset)
        if count < 0 and errno == EINTR:
            continue
        if count <= 0:
            return errno if count else EIO
        into += count
        offset += <uint64_t>count
        length -= <uint64_t>count
    return 0


cdef int write_pool(plane_t *plane, const uint8_t *data, uint64_t length,
                    uint64_t offset) noexcept nogil:
    """pwrite all of a range: a hole that finds no memory is ENOSPC here, not a SIGBUS. 0 or errno.

    A file that was cut off is not made longer, because the lost bytes would read as zeroes then.
    """
    cdef ssize_t count
    if is_cut(plane, offset + length):
        return EIO
    while length:
        count = pwrite(plane.pool_fd, data, length, <off_t>offset)
        if count < 0 and errno == EINTR:
            continue
        if count <= 0:
            return errno if count else EIO
        data += count
        offset += <uint64_t>count
        length -= <uint64_t>count
    return 0
