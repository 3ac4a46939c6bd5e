"""FSYNC and SYNCFS: once they are answered, everything that was written before is durable.

Invariant: a write-back that failed is never forgotten, because the kernel reports it only once. A
later fsync would otherwise call lost bytes durable.
"""

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.memory cimport load, run_guarded
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *
from pmemfs.medium.writeback cimport wait_for_write_back, write_back


cdef verdict_t serve_fsync(worker_t *worker, request_t *request) noexcept nogil:
    cdef header_t *header = worker.plane.header
    if request.table == NULL and header.has_files:
        # Only the control plane knows whether an unpublished file has anything to make durable.
        return FORWARD
    if (request.live != NULL and header.durability == DURABILITY_CACHE_LINES
            and not run_guarded(write_back_live, request)):
        return fail_fault(worker, request)
    return serve_sync(worker, request)


cdef void write_back_live(void *argument) noexcept nogil:
    """Each write has fenced its bytes before it was answered; the size was not fenced yet."""
    cdef request_t *request = <request_t *>argument
    write_back(request.live, sizeof(live_t))
    wait_for_write_back()


cdef verdict_t serve_sync(worker_t *worker, request_t *request) noexcept nogil:
    cdef header_t *header = worker.plane.header
    if load(&header.lost_errno):
        return refuse(request, <int>load(&header.lost_errno))
    if header.durability == DURABILITY_MSYNC and not header.read_only:
        return SYNC
    # Each write was fenced before it was answered, or this medium has nothing to fence.
    raise_persisted(header, memory.add(&header.write_epoch, 1))
    return ANSWER


cdef int finish_sync(plane_t *plane, uint64_t epoch, int error) noexcept nogil:
    """All that was written in `epoch` or before is durable, or lost for ever; the errno to answer.

    The kernel reports a failed write-back once and then forgets it, so no fsync of any file may
    succeed after that.
    """
    cdef uint64_t none = 0
    if error:
        memory.swap(&plane.header.lost_errno, &none, <uint64_t>error)
    else:
        raise_persisted(plane.header, epoch)
    return <int>load(&plane.header.lost_errno)
