from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.cache cimport batch_t
from pmemfs.dataplane.pages cimport pages_t
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport fuse_in_header
from pmemfs.dataplane.structures cimport extent_t, inode_t, live_t, table_t
from pmemfs.transform.secrets cimport secret_t

cdef enum verdict_t:
    ANSWER
    FORWARD
    SYNC
    DROP
    # Nothing was done: serve it again, after what has come since.
    LATER

cdef struct request_t:
    # What came in.
    const fuse_in_header *head
    const uint8_t *operation
    uint32_t operation_bytes
    const uint8_t *payload
    uint32_t payload_bytes
    # Where an answer may be written.
    uint8_t *answer
    uint32_t answer_room
    bint may_point
    # The answer: `answer_bytes` bytes, in `answer` or at `pointed` in the pool.
    int error
    uint32_t answer_bytes
    const uint8_t *pointed
    uint64_t moved_bytes
    # The worker that serves it.
    worker_t *worker
    # The file: its entry, its table or NULL, its live line or NULL for a device, and its size.
    inode_t *entry
    table_t *table
    live_t *live
    uint64_t size_bytes
    # Of an encrypted file: its key.
    const secret_t *secret
    # Of a read: how much of the answer is there, and the compressed piece that comes next, or NULL.
    uint64_t done
    const extent_t *packed
    # Of a listing, which has `done` bytes: where it goes on, and whether no more of it fits.
    uint64_t position
    bint has_ended
    # Memory was touched that faults.
    bint is_faulty
    pages_t held
    bint is_write
    # Something was in the way, so that the control plane has to answer.
    bint must_forward
    # A block was not found, which may be what was in the way.
    bint is_missed
    # A worker that was killed has left it, and may have carried it out.
    bint is_left
    # The control plane has brought its blocks, and accounted the access.
    bint is_again
    batch_t batch
