# How a worker changes what is stored of names: `commit.pxi` has the rules, and names.pxd the design.
#
#     serve_named      takes the lock, runs an operation guarded, puts right what it left, frees it
#     in an operation  `begin_change`, then pops and `add_record`, then `commit`, then memory
#
# An operation fills the answer before it commits, and returns FORWARD only before that. A pop that
# was not used goes back by itself.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.names cimport known_t, names_t
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport fuse_attr, fuse_entry_out
from pmemfs.dataplane.request cimport request_t, verdict_t
from pmemfs.dataplane.structures cimport attributes_record_t, names_decision_t

cdef enum:
    # The most that one operation changes.
    MOST_WORDS = 8
    MOST_LOGS = 4
    MOST_RECORDS_BYTES = 2048

cdef enum stage_t:
    # Nothing of it counts yet, and the control plane may carry it out.
    STAGE_OPEN
    # Whether it counts can't be told if this fails.
    STAGE_COMMITTING
    # It counts; what follows is memory.
    STAGE_DONE

cdef struct word_t:
    uint64_t offset
    uint64_t old
    uint64_t new

# Records that go behind the tail of one log: `length` bytes from `start` on in `records`. A log may
# come several times; its records follow one another.
cdef struct addition_t:
    known_t *known
    uint32_t start
    uint32_t length

cdef struct names_change_t:
    worker_t *worker
    names_t *names
    request_t *request
    names_decision_t *decision
    # The time of all that changes; of `names_now`, once an operation has begun.
    int64_t now_ns
    # `names.takes` at its start: if it is another, the lock was free meanwhile.
    uint64_t takes
    stage_t stage
    verdict_t verdict
    uint32_t addition_count
    addition_t additions[MOST_LOGS]
    uint32_t word_count
    word_t words[MOST_WORDS]
    # Set where a single word must not decide by itself; see `volume/fs/transaction`.
    bint needs_journal
    # `commit` leaves the decision begun, because something has to be stored after it that belongs to
    # the operation. `carried_out` ends it then.
    bint is_unfinished
    # Inodes that change, for the ring; those with additions are there by themselves.
    uint32_t changed_count
    uint64_t changed[MOST_LOGS]
    uint32_t records_bytes
    uint8_t records[MOST_RECORDS_BYTES]

ctypedef verdict_t (*operation_t)(names_change_t *change) noexcept nogil
