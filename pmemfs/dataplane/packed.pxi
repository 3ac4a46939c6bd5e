"""READ of compressed pieces: decompressed by the worker, into the reply if all of a piece is asked
for.

A table names each piece by a forwarded extent that says where it is stored and how. What is not
right or not simple is forwarded as ever, so the control plane alone reports damage, and only it
changes a piece. Invariants:
- the frames of a piece keep its bytes until the section ends, because they are released as those of
  extents are: once the table is withdrawn and a grace period is over;
- stored bytes are copied first. The checksum is that of the copy, and the copy is decompressed:
  outside of a guard, where no fault can leave a library in the middle;
- the plain bytes of a piece are used again only if what is stored now is what they were made of,
  byte for byte. So nothing has to say that a piece has changed, and nothing is lost with a process;
- a piece that is read in three different seconds is hot. The control plane is told once, and counts
  anew if it leaves the piece as it is. Workers count together, and may lose some counts.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from pmemfs.dataplane.logs cimport crc32c
from pmemfs.dataplane.memory cimport load, peek, put, run_guarded
from pmemfs.dataplane.packed cimport *
from pmemfs.dataplane.plane cimport piece_t, plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *
from pmemfs.dataplane.transport cimport iovec

cdef enum:
    MOST_PIECE_BYTES = PIECE_FRAMES << FRAME_SHIFT
    MOST_ID = (1 << (PIECE_BYTES_SHIFT - PIECE_ID_SHIFT)) - 1


cdef inline uint32_t id_of(const extent_t *extent) noexcept nogil:
    """How a piece is compressed; 0: this extent is no piece that is stored."""
    return <uint32_t>(extent.flags >> PIECE_ID_SHIFT) & MOST_ID


cdef inline uint32_t stored_bytes_of(const extent_t *extent) noexcept nogil:
    return <uint32_t>extent.flags >> PIECE_BYTES_SHIFT


cdef void have_packers(plane_t *plane) noexcept nogil:
    """Be ready to decompress. Whatever is missing, pieces are forwarded then."""
    load_packers()
    plane.heat = <heat_t *>calloc(<size_t>1 << HEAT_SHIFT, sizeof(heat_t))


cdef unpacker_t *unpacker_of(worker_t *worker) noexcept nogil:
    """What this worker decompresses with; NULL if there is no memory for it."""
    cdef unpacker_t *unpacker = worker.unpacker
    if unpacker != NULL:
        return unpacker
    unpacker = <unpacker_t *>calloc(1, sizeof(unpacker_t))
    if unpacker == NULL:
        return NULL
    unpacker.stored = <uint8_t *>malloc(MOST_PIECE_BYTES)
    if unpacker.stored == NULL:
        free(unpacker)
        return NULL
    unpacker.zstd = new_zstd()
    worker.unpacker = unpacker
    return unpacker


cdef void free_unpacker(worker_t *worker) noexcept nogil:
    cdef unpacker_t *unpacker = worker.unpacker
    cdef int number
    if unpacker == NULL:
        return
    for number in range(KEPT_PIECES):
        free(unpacker.kept[number].stored)
        free(unpacker.kept[number].plain)
    free_zstd(unpacker.zstd)
    free(unpacker.stored)
    free(unpacker)
    worker.unpacker = NULL


cdef bint read_packed(request_t *request) noexcept nogil:
    """Answer what a read wants of the piece that it has come to. False: it has to be forwarded, or
    has failed (`request.error`, `request.is_faulty`)."""
    cdef const extent_t *extent = request.packed
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef uint64_t plain_bytes = extent.frame_count << FRAME_SHIFT
    cdef uint64_t skip = wanted.offset + request.done - (extent.index << FRAME_SHIFT)
    cdef uint64_t length = min(plain_bytes - skip, request.answer_bytes - request.done)
    cdef uint8_t *into = request.answer + request.done
    cdef unpacker_t *unpacker = unpacker_of(request.worker)
    cdef kept_t *kept
    if (unpacker == NULL or plain_bytes > MOST_PIECE_BYTES
            or stored_bytes_of(extent) > MOST_PIECE_BYTES):
        return False
    if not run_guarded(copy_stored_guarded, request):
        request.is_faulty = True
        return False
    if request.error:
        return False
    kept = find_kept(unpacker, extent)
    if kept == NULL and length == plain_bytes:
        if not unpack(unpacker, extent, into):
            return False
    else:
        if kept == NULL:
            kept = keep_plain(unpacker, extent)
        if kept == NULL:
            return False
        memcpy(into, kept.plain + skip, length)
    request.done += length
    note_heat(request.worker, request.head.nodeid, extent.index)
    return True


cdef void copy_stored_guarded(void *argument) noexcept nogil:
    """Copy what is stored of a piece."""
    cdef request_t *request = <request_t *>argument
    cdef plane_t *plane = request.worker.plane
    cdef const extent_t *extent = request.packed
    cdef uint8_t *into = request.worker.unpacker.stored
    cdef piece_t stored
    stored.pool_offset = extent.pfn << FRAME_SHIFT
    stored.length = stored_bytes_of(extent)
    if not hold_pages(request, stored, extent.index << FRAME_SHIFT, ACCESS_READ):
        return
    if is_whole(plane, stored.pool_offset, stored.length):
        memcpy(into, plane.pool + stored.pool_offset, stored.length)
    else:
        request.error = read_pool(plane, into, stored.length, stored.pool_offset)
        note_refusal(request, stored.pool_offset)
    drop_pages(request.worker, request)


cdef bint unpack(unpacker_t *unpacker, const extent_t *extent, uint8_t *into) noexcept nogil:
    """Decompress the piece whose stored bytes were copied; whether they are sound."""
    cdef size_t length = extent.frame_count << FRAME_SHIFT
    cdef uint32_t stored_bytes = stored_bytes_of(extent)
    if crc32c(0, unpacker.stored, stored_bytes) != <uint32_t>(extent.flags >> PIECE_CHECKSUM_SHIFT):
        return False
    if id_of(extent) == TRANSFORMATION_ZSTD:
        return unpacker.zstd != NULL and unpack_zstd(unpacker.zstd, into, length, unpacker.stored,
                                                     stored_bytes)
    return id_of(extent) == TRANSFORMATION_LZ4 and unpack_lz4(into, length, unpacker.stored,
                                                              stored_bytes)


cdef kept_t *find_kept(unpacker_t *unpacker, const extent_t *extent) noexcept nogil:
    """The piece whose stored bytes were copied, if this worker has its plain bytes."""
    cdef kept_t *kept
    cdef int number
    for number in range(KEPT_PIECES):
        kept = &unpacker.kept[number]
        if (kept.flags == extent.flags and kept.pfn == extent.pfn
                and not memcmp(kept.stored, unpacker.stored, stored_bytes_of(extent))):
            unpacker.uses += 1
            kept.used = unpacker.uses
            return kept
    return NULL


cdef kept_t *keep_plain(unpacker_t *unpacker, const extent_t *extent) noexcept nogil:
    """Decompress the piece whose stored bytes were copied, in place of the one that was least
    recently used; NULL if that is not possible."""
    cdef kept_t *kept = &unpacker.kept[0]
    cdef int number
    for number in range(1, KEPT_PIECES):
        if unpacker.kept[number].used < kept.used:
            kept = &unpacker.kept[number]
    # No piece has these.
    kept.flags = 0
    if kept.stored == NULL:
        kept.stored = <uint8_t *>malloc(MOST_PIECE_BYTES)
    if kept.plain == NULL:
        kept.plain = <uint8_t *>malloc(MOST_PIECE_BYTES)
    if kept.stored == NULL or kept.plain == NULL or not unpack(unpacker, extent, kept.plain):
        return NULL
    memcpy(kept.stored, unpacker.stored, stored_bytes_of(extent))
    unpacker.uses += 1
    kept.pfn, kept.flags, kept.used = extent.pfn, extent.flags, unpacker.uses
    return kept


cdef void note_heat(worker_t *worker, uint64_t inode, uint64_t index) noexcept nogil:
    """A piece was read. If that makes it hot, `tell_hot` will say so."""
    cdef uint64_t piece = inode * INODE_HASH ^ index
    cdef heat_t *heat
    cdef uint32_t second = <uint32_t>(worker.now_ns // SECOND_NS)
    if worker.plane.heat == NULL:
        return
    heat = &worker.plane.heat[piece * INODE_HASH >> (64 - HEAT_SHIFT)]
    if heat.piece != piece:
        heat.piece, heat.second, heat.seconds = piece, second, 1
    elif heat.second != second:
        heat.second = second
        heat.seconds += 1
        if heat.seconds >= HOT_SECONDS and worker.unpacker.hot_count < MOST_HOT:
            heat.seconds = 0
            worker.unpacker.hot[worker.unpacker.hot_count].inode = inode
            worker.unpacker.hot[worker.unpacker.hot_count].index = index
            worker.unpacker.hot_count += 1


cdef inline void tell_hot(worker_t *worker) noexcept nogil:
    """Tell the control plane which pieces are hot, outside of any section. Nobody replies."""
    if worker.unpacker != NULL and worker.unpacker.hot_count:
        send_hot(worker)


cdef void send_hot(worker_t *worker) noexcept nogil:
    cdef fuse_in_header head
    cdef iovec parts[2]
    memset(&head, 0, sizeof(head))
    head.opcode = HOT_OPCODE
    parts[0].iov_base, parts[0].iov_len = &head, sizeof(head)
    parts[1].iov_base = worker.unpacker.hot
    parts[1].iov_len = worker.unpacker.hot_count * sizeof(hot_t)
    head.len = <uint32_t>(parts[0].iov_len + parts[1].iov_len)
    # If it fails, the control plane is gone.
    send_parts(worker, parts, 2)
    worker.unpacker.hot_count = 0
