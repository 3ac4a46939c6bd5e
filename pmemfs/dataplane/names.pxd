# Names in the data plane: the protocol between the planes, and what workers know of inodes.
#
# The stored rules of mode `fs` (media/: records, journal, inodes) have two writers: the control
# plane, complete, and workers, for the operations that come by the thousand. What each keeps in
# memory is auxiliary, and made again by replaying logs. Invariants:
# - only who holds the lock of names (names_head_t.holder) reads or changes anything here, in a log,
#   in the journal, in lookup counts or in open places. A worker waits for it a little at most, has
#   it for one operation, and never waits for anything then. The control plane has it whenever it
#   runs;
# - whatever a worker can't do wholly, it hands over before it has stored anything that counts;
# - before a worker commits, the changed inodes are in the ring of changes, and its decision says
#   what it is about to do and what it answers. So whoever finds the lock of a dead holder carries
#   out the journal, and knows what became of the request;
# - before either side uses what it knows of an inode, it has applied all that the log has since;
# - what a worker takes from a reserve is marked as used in the pool, and owned by nobody, or is in a
#   decision. So nothing is given out twice, and nothing is lost while any process of the mount lives.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from pmemfs.dataplane.structures cimport extent_record_t, names_decision_t, names_head_t

cdef enum:
    # A file with more extents than this is handed over.
    KNOWN_EXTENTS = 8
    # A log that is longer is read in pieces, and the lock is free in between.
    FRAMES_AT_ONCE = 64

# An extent of a file that is known.
cdef struct known_extent_t:
    uint64_t index
    uint64_t pfn
    uint64_t frame_count

# The names of a directory: a table of words with open addressing, 0 free, else offset of the ENTRY
# in the pool / 64 << 24 | 24 bits of the name's hash. See directories.pxi.
cdef struct names_index_t:
    uint64_t *words
    # A power of two.
    uint64_t capacity
    uint64_t entry_count
    uint64_t subdirectory_count

# An inode as its log says up to `tail`.
cdef struct known_t:
    uint64_t number
    uint64_t generation
    uint64_t slot_offset
    int64_t birth_ns
    # Of the log: both words as they were applied, the version of `names.versions`, the end of the
    # slot or frame that the tail lies in, its frames, and its slots of records, dead ones included.
    uint64_t head
    uint64_t tail
    uint64_t version
    uint64_t area_end
    uint64_t log_frame_count
    uint64_t slot_count
    # Slots that a compacted log would need, extents not counted; as `Inode.live_slots`.
    uint64_t live_slots
    uint64_t parent
    # The last ATTRIBUTES; of a directory, later entries have set the times.
    uint32_t mode
    uint32_t link_count
    uint32_t uid
    uint32_t gid
    uint64_t size_bytes
    int64_t accessed_ns
    int64_t modified_ns
    int64_t changed_ns
    uint32_t device
    uint16_t epoch
    uint16_t flags
    # Of a link: the length of its target, and how much of it was read.
    uint32_t target_bytes
    uint32_t target_read
    # Keys of the live line: of the epoch, and of the epoch before.
    uint16_t key
    uint16_t key_before
    # A regular file or directory that may be changed here: no flag forbids it, and a directory has
    # a name and a parent. Whatever `know` gives may be looked up and asked for its attributes: it
    # has no attributes of its own, transformation or pieces, and at most KNOWN_EXTENTS extents.
    bint is_plain
    # It has any of these, or something is odd. So it is handed over until it has another log.
    bint is_odd
    # All of the log up to the stored tail was read once. If not, reading goes on behind `tail`.
    bint is_whole
    bint has_attributes
    # To find a log that goes in a circle: a frame, and at how many frames the next one is noted.
    uint64_t noted_frame
    uint64_t note_at
    uint32_t extent_count
    known_extent_t extents[KNOWN_EXTENTS]
    uint64_t data_frames
    names_index_t index
    # The operation that used it last, those that were used before and after it, and the next one
    # in its bucket.
    uint64_t used_at
    known_t *older
    known_t *newer
    known_t *next

# What the workers of one data plane know. Only the holder of the lock touches it.
cdef struct names_t:
    names_head_t *head
    uint64_t *slots
    uint64_t *frames
    uint64_t *handles
    uint64_t *orphans
    uint64_t *changes
    uint64_t *versions
    names_decision_t *decisions
    known_t **buckets
    uint64_t bucket_count
    known_t *oldest
    known_t *newest
    # Mixed into hashes of names, so that nobody can make names whose hashes are the same.
    uint64_t seeds[2]
    uint64_t known_count
    uint64_t used_bytes
    # Whether the operation under way has found no memory for what it has to know.
    bint is_short
    # Times that a worker has taken the lock: if it is another than before, what is known may be, too.
    # What was used since the last time is not dropped.
    uint64_t takes

# Records all stores into the pool, flushes and fences, for a test that pulls the power between any
# two, or kills the process there: each is three words (kind, offset, length), and for a store its
# bytes follow, filled up to eight. If `length` is above `room`, some are missing.
cdef enum:
    RECORDED_STORE = 1
    RECORDED_FLUSH = 2
    RECORDED_FENCE = 3

cdef struct recorder_t:
    uint8_t *buffer
    size_t room
    size_t length
    # The number of the flush or fence that is left out, from 1 on, and how many there were.
    uint64_t left_out
    uint64_t count
    # The step (a store, there or in the shared memory) before which the process is killed.
    uint64_t killed_before
    uint64_t steps
