# A cache in the pool as the data plane reads it, and what it is about to change there.

from libc.stdint cimport uint64_t

from pmemfs.dataplane.pages cimport pages_t
from pmemfs.dataplane.structures cimport CACHE_WAYS

cdef enum:
    # So many blocks of a read are found at a time.
    PORTION_BLOCKS = 256
    # A batch of writes holds the locks of its sets for as long as it takes to copy so much, or one
    # block. Others wait for these locks awake.
    BATCH_BYTES = 65536
    BATCH_BLOCKS = 16

# What a set says of one block.
cdef struct tag_t:
    # 0: the block is not there.
    uint64_t word
    int way
    # An older tag of the same block, which a crash has left; -1: there is none.
    int older

# A block that is read.
cdef struct cached_t:
    uint64_t set_number
    uint64_t word
    int way

# A block that is written, out of place.
cdef struct change_t:
    uint64_t block
    uint64_t set_number
    # The tags of its set, since it is locked.
    uint64_t words[CACHE_WAYS]
    tag_t old
    # Its new place, whose pages are held.
    int way
    pages_t held

# Blocks that are written together. Their sets follow each other.
cdef struct batch_t:
    uint64_t first_set
    int set_count
    # The first so many sets are locked.
    int locked
    # The first so many changes may hold pages.
    int change_count
    change_t changes[BATCH_BLOCKS]
