"""Decides which requests the data plane answers, whatever the transport.

The rule: the data plane answers only if the published tables prove the answer. These are READ and
WRITE inside extents that have a run, holes as zeroes, LSEEK, FSYNC, and GETATTR; in mode `cache`
the tags in the pool prove it. `names` proves by the logs of inodes what has to do with names. It
forwards everything else that the control plane answers.
Invariants:
- a request comes from the kernel or from a crafted peer, so every length is checked before it is
  used;
- a touch that faults costs only this request: EIO. If a hole found no memory, the control plane
  looks for some, or this is ENOSPC.
"""

from libc.errno cimport ENOSPC, ENOSYS
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.memory cimport load, prefetch, run_guarded
from pmemfs.dataplane.plane cimport piece_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *


cdef verdict_t serve(worker_t *worker, request_t *request) noexcept nogil:
    """Answer a request, or say who has to. `release` must follow an ANSWER."""
    cdef uint32_t opcode = request.head.opcode
    cdef verdict_t verdict = judge(worker, request)
    if (verdict == FORWARD
            and (opcode >= 64 or not worker.plane.header.answered >> opcode & 1)):
        # Only here: after one ENOSYS the kernel never asks for this operation again.
        return refuse(request, ENOSYS)
    return verdict


cdef verdict_t judge(worker_t *worker, request_t *request) noexcept nogil:
    """Answer a request, or say that the control plane has to."""
    cdef uint32_t opcode = request.head.opcode
    cdef verdict_t verdict
    request.worker = worker
    request.error = 0
    request.answer_bytes = 0
    request.pointed = NULL
    request.moved_bytes = request.done = 0
    request.packed = NULL
    request.held.count = 0
    request.is_write = False
    request.must_forward = request.is_missed = request.is_faulty = False
    request.live = NULL
    if (opcode == FUSE_READ or opcode == FUSE_WRITE or opcode == FUSE_LSEEK
            or opcode == FUSE_FSYNC):
        begin_section(worker.slot)
        find_file(worker, request)
        verdict = FORWARD
        if request.table == NULL and may_serve_names(worker, request):
            verdict = serve_small(worker, request)
        if verdict != FORWARD:
            pass
        elif worker.plane.header.cache_set_count:
            verdict = serve_cached(worker, request)
        elif opcode == FUSE_FSYNC:
            verdict = serve_fsync(worker, request)
        elif request.live != NULL and not run_guarded(read_size, request):
            verdict = fail_fault(worker, request)
        elif opcode == FUSE_READ:
            verdict = serve_read(worker, request)
        elif opcode == FUSE_WRITE:
            verdict = serve_write(worker, request)
            if verdict == ANSWER and request.error == ENOSPC and worker.plane.header.has_files:
                # The control plane knows free frames whose memory this can have.
                request.error = 0
                verdict = FORWARD
        else:
            verdict = serve_seek(worker, request)
        # An answer that points into the pool keeps the section open until `release`.
        if request.pointed == NULL:
            end_section(worker.slot)
        return verdict
    if opcode == FUSE_SYNCFS and worker.plane.header.cache_set_count:
        return (serve_sync(worker, request) if load(&worker.plane.header.cache_fsyncs)
                else FORWARD)
    if opcode == FUSE_SYNCFS:
        # Of several files, no table says whose live lines are not durable yet.
        return FORWARD if worker.plane.header.has_files else serve_sync(worker, request)
    if opcode == FUSE_GETATTR and serve_attributes(worker, request) == ANSWER:
        return ANSWER
    if opcode == FUSE_FLUSH:
        return ANSWER
    if opcode == FUSE_INTERRUPT:
        # No answer is due. Only who waits for the origin of a cache can be interrupted.
        return FORWARD if worker.plane.header.cache_set_count else DROP
    return serve_names(worker, request)


cdef void expect(worker_t *worker, const fuse_in_header *head,
                 const uint8_t *operation) noexcept nogil:
    """Begin to fetch what a request will touch first, while other requests are served before it.

    For 4 KiB somewhere in a large pool, the page structure and the first line are likely in no
    cache, and neither are their translations. The processor foresees the rest by itself.
    """
    cdef inode_t *entry
    cdef table_t *table
    cdef piece_t piece
    cdef uint64_t offset = (<const fuse_read_in *>operation).offset
    if head.opcode != FUSE_READ and head.opcode != FUSE_WRITE:
        return
    begin_section(worker.slot)
    entry = find_inode(worker.plane, head.nodeid)
    table = table_of(worker.plane, entry) if entry != NULL else NULL
    if table != NULL and offset < table.limit_bytes and worker.plane.header.cache_set_count:
        expect_block(worker, operation, head.opcode == FUSE_WRITE)
    elif table != NULL and offset < table.limit_bytes:
        piece = piece_at(table, offset, 1)
        if not piece.is_hole and not piece.is_forwarded:
            prefetch(worker.plane.pool + piece.pool_offset)
            prefetch(worker.plane.pool + piece.pool_offset + 64)
            expect_page(&worker.plane.memmap, piece.pool_offset >> FRAME_SHIFT)
    end_section(worker.slot)


cdef inline void expect_soon(worker_t *worker, const fuse_in_header *head,
                             const uint8_t *operation) noexcept nogil:
    """Begin to fetch what `expect` will read for a request."""
    if (worker.plane.header.cache_set_count
            and (head.opcode == FUSE_READ or head.opcode == FUSE_WRITE)):
        expect_tags(worker, operation)


cdef void account(worker_t *worker, request_t *request, verdict_t verdict,
                  uint64_t since_ns) noexcept nogil:
    """Count a request that was served, at `worker.now_ns`."""
    cdef uint32_t opcode = request.head.opcode
    cdef int operation = OPERATION_OTHER
    if opcode == FUSE_READ:
        operation = OPERATION_READ
    elif opcode == FUSE_WRITE:
        operation = OPERATION_WRITE
    elif opcode == FUSE_FSYNC or opcode == FUSE_SYNCFS:
        operation = OPERATION_FSYNC
    elif opcode == FUSE_LSEEK:
        operation = OPERATION_SEEK
    elif opcode == FUSE_FALLOCATE:
        operation = OPERATION_TRIM
    # People may set this clock back.
    # For a FORGET (DROP) nobody waits, but it is done.
    count_request(worker.slot, operation, verdict != FORWARD,
                  request.error != 0, request.moved_bytes,
                  worker.now_ns - since_ns if worker.now_ns > since_ns else 0)


cdef verdict_t serve_attributes(worker_t *worker, request_t *request) noexcept nogil:
    """Answer GETATTR, which the kernel asks of a directory after each change of its names."""
    if (request.answer_room < sizeof(fuse_attr_out)
            or not read_attributes(worker.plane, request.head.nodeid, request.answer)):
        return FORWARD
    request.answer_bytes = sizeof(fuse_attr_out)
    return ANSWER


cdef inline verdict_t refuse(request_t *request, int error) noexcept nogil:
    request.error = error
    request.answer_bytes = 0
    return ANSWER
