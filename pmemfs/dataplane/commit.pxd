# How a worker changes what is stored of names: `commit.pxi` has the rules, and names.pxd the design.
#
#     serve_named      takes the lock, runs an operation, puts right what it left, frees the lock
#     in an operation  `begin_change`, then pops and `add_record`, then `commit`, then memory
#
# An operation fills the answer before it commits, and returns FORWARD only before that. A pop that
# was not used goes back by itself. An operation runs guarded: a touch of the pool that faults ends
# it, and hands over if nothing counts yet.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.names cimport known_t, names_t
from pmemfs.dataplane.plane cimport worker_t
from pmemfs.dataplane.request cimport request_t, verdict_t
from pmemfs.dataplane.structures cimport INODE_SLOT_BYTES, names_decision_t

cdef enum:
    # The most that one operation changes.
    MOST_WORDS = 8
    MOST_LOGS = 4
    MOST_RECORDS_BYTES = 2048
    # How long a worker waits for another one, who holds the lock for one operation.
    LOCK_SPIN_NS = 10000
    # As `encode.CACHE_SECONDS`.
    CACHE_SECONDS = 3600

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

# Records that one log gets: `length` bytes from `start` on in `records`, all of them added in a row.
# Of these, `here_length` bytes go behind its tail, and the rest into a new frame at the offset
# `frame`, if there is one. With `is_rewritten`, all of the log is in that frame from now on.
cdef struct addition_t:
    known_t *known
    uint32_t start
    uint32_t length
    uint32_t here_length
    uint64_t frame
    bint is_rewritten

cdef struct names_change_t

ctypedef verdict_t (*operation_t)(names_change_t *change) noexcept nogil

cdef struct names_change_t:
    operation_t operation
    verdict_t verdict
    worker_t *worker
    names_t *names
    request_t *request
    names_decision_t *decision
    # The time of all that changes, once it has begun.
    int64_t now_ns
    bint has_begun
    stage_t stage
    uint32_t addition_count
    addition_t additions[MOST_LOGS]
    uint32_t word_count
    word_t words[MOST_WORDS]
    # Set where a single word must not decide by itself; see `volume/fs/transaction`.
    bint needs_journal
    # `commit` leaves the decision begun, because something has to be stored after it that belongs to
    # the operation. `carried_out` ends it then.
    bint is_unfinished
    # Inodes that change, for the ring. What gets records or is removed is there by itself.
    uint32_t changed_count
    uint64_t changed[MOST_LOGS]
    # The slot of a new inode, which `pop_slot` and the operation fill; 0: it makes none. It and the
    # records are structures: they lie behind words, so that these are aligned.
    uint64_t slot_offset
    uint64_t slot_generation
    uint8_t slot[INODE_SLOT_BYTES]
    uint8_t records[MOST_RECORDS_BYTES]
    uint32_t slot_bytes
    uint32_t records_bytes
