"""How a worker changes what is stored of names, wholly or not at all, as `volume/fs/transaction`.

An operation takes the lock of names, runs guarded, and frees the lock; `commit` is its only way to
make something count. Invariants are in names.pxd.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.names cimport known_t, names_t
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport fuse_attr, fuse_entry_out
from pmemfs.dataplane.request cimport FORWARD, request_t, verdict_t
from pmemfs.dataplane.structures cimport *


# The lock. `take_names` tries; False: hand over. `free_names` does nothing where this worker
# does not hold it. What was flushed is fenced before it is free.
cdef bint take_names(worker_t *worker) noexcept nogil:
    return 0


cdef void free_names(worker_t *worker) noexcept nogil:
    pass


cdef uint64_t holder_of(worker_t *worker) noexcept nogil:
    return 0


# One operation. FORWARD if the lock is not free, or the operation says so, or a touch faulted
# before anything counted.
cdef verdict_t serve_named(worker_t *worker, request_t *request, operation_t operation) noexcept nogil:
    return FORWARD


# Fill the decision, with nothing popped, and set `now_ns`. Before the first pop.
cdef void begin_change(names_change_t *change) noexcept nogil:
    pass


# For an operation that stores nothing in the pool, or `is_unfinished` after its commit: it is
# carried out, and has its answer.
cdef void carried_out(names_change_t *change) noexcept nogil:
    pass


# An error is the answer, and nothing has changed. For `return fail_named(change, ENOENT)`.
cdef verdict_t fail_named(names_change_t *change, int error) noexcept nogil:
    return FORWARD


# What it takes from the reserves: 0 (False) if there is not enough, and then nothing is taken.
cdef uint64_t pop_slot(names_change_t *change) noexcept nogil:
    return 0


cdef uint64_t pop_handle(names_change_t *change) noexcept nogil:
    return 0


cdef bint pop_frames(names_change_t *change, uint32_t count, uint64_t *pfns) noexcept nogil:
    return 0


# What is given back, after a commit; False if the stack is full.
cdef bint push_slot(names_t *names, uint64_t slot_offset) noexcept nogil:
    return 0


cdef bint push_frame(names_t *names, uint64_t pfn) noexcept nogil:
    return 0


cdef bint push_handle(names_t *names, uint64_t handle) noexcept nogil:
    return 0


cdef bint push_orphan(names_t *names, uint64_t number) noexcept nogil:
    return 0


cdef uint64_t room_for_frames(names_t *names) noexcept nogil:
    return 0


cdef uint64_t room_for_slots(names_t *names) noexcept nogil:
    return 0


# What it stores. A record is zero but for its head; NULL (False) if the log's area or the
# change has no room for it: hand over.
cdef uint8_t *add_record(names_change_t *change, known_t *known, uint8_t kind, uint32_t slots) noexcept nogil:
    return NULL


cdef bint add_entry(names_change_t *change, known_t *directory, const uint8_t *name, uint32_t name_bytes,
                    uint64_t inode, uint8_t type_) noexcept nogil:
    return 0


# ATTRIBUTES as `known_state` has them, to be changed; NULL also if the live line is damaged.
cdef attributes_record_t *add_attributes(names_change_t *change, known_t *known) noexcept nogil:
    return NULL


cdef void add_word(names_change_t *change, uint64_t offset, uint64_t old, uint64_t new) noexcept nogil:
    pass


# The tail of an inode's log becomes 0: its slot is free. Frames and slot are the caller's then.
cdef void remove_inode(names_change_t *change, known_t *known) noexcept nogil:
    pass


# Seal, store, decide, tell the ring, move the words. False: nothing counts, hand over. Afterwards
# the tail and slot_count of each known inode are right, published attributes are withdrawn, the
# decision is done. All else of known inodes is the caller's.
cdef bint commit(names_change_t *change) noexcept nogil:
    return 0


# Stores into the pool, as the durability wants, and as a test records them.
cdef void put_stored(plane_t *plane, uint64_t offset, const void *data, size_t length) noexcept nogil:
    pass


cdef void put_word(plane_t *plane, uint64_t offset, uint64_t value) noexcept nogil:
    pass


cdef void store_stored(plane_t *plane, uint64_t offset, const void *data, size_t length) noexcept nogil:
    pass


cdef void flush_stored(plane_t *plane, uint64_t offset, size_t length) noexcept nogil:
    pass


cdef void fence_stored(plane_t *plane) noexcept nogil:
    pass


# Memory that is shared.
# The lookup count of an inode; NULL if there is none of that number.
cdef uint64_t *count_of(plane_t *plane, uint64_t number) noexcept nogil:
    return NULL


# Withdraw published attributes, and tell a published table when the inode changed last.
cdef void touched(plane_t *plane, known_t *known) noexcept nogil:
    pass


# As `FileClock.now_ns`, and `FileClock.was_set` for a time that a user has set.
cdef int64_t names_now(names_t *names) noexcept nogil:
    return 0


cdef void time_was_set(names_t *names, int64_t time_ns) noexcept nogil:
    pass


# Ask the control plane to look at reserves and orphans, if one of them is at its mark.
cdef void wake_control(worker_t *worker) noexcept nogil:
    pass


# What is said of an inode. False if its live line is damaged: hand over.
cdef bint known_state(plane_t *plane, known_t *known, attributes_record_t *state) noexcept nogil:
    return 0


cdef bint fill_attr(plane_t *plane, known_t *known, fuse_attr *out) noexcept nogil:
    return 0


cdef bint fill_entry_out(plane_t *plane, known_t *known, fuse_entry_out *out) noexcept nogil:
    return 0


# Have these attributes from now on, in memory.
cdef void set_state(known_t *known, const attributes_record_t *state) noexcept nogil:
    pass


# `compacted_slots` and `is_mostly_dead` of an inode, and whether the log may get `more` live slots
# without a note in the head.
cdef uint64_t compacted_slots(known_t *known) noexcept nogil:
    return 0


cdef bint is_mostly_dead(known_t *known) noexcept nogil:
    return 0
