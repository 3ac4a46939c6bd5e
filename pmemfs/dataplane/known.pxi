"""The memory of what workers know of inodes.

Invariants:
- only the holder of the lock of names touches it;
- it takes at most `memory_bytes`. The inodes that were used longest ago make room. What the
  operation under way has used stays where it is, because the operation points to it;
- it is a cache: whatever is dropped is read again from the pool. A fault between any two stores
  here can't happen, because nothing here touches the pool.
"""

from libc.errno cimport EIO, ENOMEM
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.memory cimport peek, put
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t
from pmemfs.dataplane.structures cimport *

cdef extern from "sys/random.h" nogil:
    ssize_t getrandom(void *buffer, size_t length, unsigned int flags)

cdef enum:
    # What malloc adds to a block, at most.
    BLOCK_BYTES = 16
    # A bucket for so many bytes of memory, which is about one inode.
    BYTES_A_BUCKET = 512
    LEAST_BUCKETS = 64
    MOST_BUCKETS = 1 << 20


cdef int attach_names(plane_t *plane) noexcept nogil:
    """Find what is shared about names, and know nothing; 0 or errno."""
    cdef names_t *names
    cdef uint8_t *at = plane.shared + plane.header.names_offset
    if not plane.header.names_offset:
        return 0
    names = <names_t *>calloc(1, sizeof(names_t))
    if names == NULL:
        return ENOMEM
    plane.names = names
    names.head = <names_head_t *>at
    names.slots = <uint64_t *>(at + NAMES_SLOTS_AT)
    names.frames = <uint64_t *>(at + NAMES_FRAMES_AT)
    names.handles = <uint64_t *>(at + NAMES_HANDLES_AT)
    names.orphans = <uint64_t *>(at + NAMES_ORPHANS_AT)
    names.changes = <uint64_t *>(at + NAMES_CHANGES_AT)
    names.versions = <uint64_t *>(at + NAMES_VERSIONS_AT)
    names.decisions = <names_decision_t *>(at + NAMES_DECISIONS_AT)
    return have_seeds(names)


cdef int have_seeds(names_t *names) noexcept nogil:
    """The seeds are those of the data plane before, because positions in listings come from them;
    0 or errno."""
    cdef uint64_t *words = &names.head.seed_0
    cdef uint64_t none
    cdef int number
    if getrandom(names.seeds, sizeof(names.seeds), 0) != sizeof(names.seeds):
        return EIO
    for number in range(2):
        none = 0
        if not memory.swap(&words[number], &none, names.seeds[number]):
            names.seeds[number] = none
    return 0


cdef void detach_names(plane_t *plane) noexcept nogil:
    """Forget everything."""
    cdef names_t *names = plane.names
    if names == NULL:
        return
    while names.oldest != NULL:
        drop_known(names, names.oldest)
    free(names.buckets)
    free(names)
    plane.names = NULL


cdef bint have_buckets(names_t *names) noexcept nogil:
    """Whether anything can be known: the control plane has said how much memory that may take."""
    cdef uint64_t count = LEAST_BUCKETS
    cdef uint64_t memory_bytes
    if names.buckets != NULL:
        return True
    memory_bytes = peek(&names.head.memory_bytes)
    while count < MOST_BUCKETS and count * BYTES_A_BUCKET < memory_bytes:
        count *= 2
    if memory_bytes < count * sizeof(known_t *):
        return False
    names.buckets = <known_t **>calloc(count, sizeof(known_t *))
    if names.buckets == NULL:
        return False
    names.bucket_count = count
    charge(names, count * sizeof(known_t *))
    return True


cdef void charge(names_t *names, int64_t more_bytes) noexcept nogil:
    """So much more memory is in use, or less."""
    names.used_bytes += <uint64_t>more_bytes
    put(&names.head.used_bytes, names.used_bytes)
    put(&names.head.known_inodes, names.known_count)


cdef bint make_room(names_t *names, uint64_t more_bytes) noexcept nogil:
    """Drop what was used longest ago until so much may be added; False: too much is in use."""
    cdef uint64_t most = peek(&names.head.memory_bytes)
    names.is_short |= more_bytes > most
    if more_bytes > most:
        return False
    while names.used_bytes > most - more_bytes:
        if names.oldest == NULL or names.oldest.used_at == names.takes:
            names.is_short = True
            return False
        drop_known(names, names.oldest)
    return True


cdef inline known_t **bucket_of_inode(names_t *names, uint64_t number) noexcept nogil:
    return &names.buckets[(number * INODE_HASH >> 32) & (names.bucket_count - 1)]


cdef inline known_t *find_known(names_t *names, uint64_t number) noexcept nogil:
    """What is known of an inode, up to date or not, or NULL."""
    cdef known_t *known = bucket_of_inode(names, number)[0]
    while known != NULL and known.number != number:
        known = known.next
    return known


cdef known_t *new_known(names_t *names, uint64_t number) noexcept nogil:
    """An inode of which nothing is known yet; NULL: no room."""
    cdef known_t *known
    cdef known_t **bucket
    if not make_room(names, sizeof(known_t) + BLOCK_BYTES):
        return NULL
    known = <known_t *>calloc(1, sizeof(known_t))
    if known == NULL:
        return NULL
    known.number = number
    bucket = bucket_of_inode(names, number)
    known.next, bucket[0] = bucket[0], known
    names.known_count += 1
    charge(names, sizeof(known_t) + BLOCK_BYTES)
    become_newest(names, known)
    return known


cdef inline void use_known(names_t *names, known_t *known) noexcept nogil:
    """Note that the operation under way uses an inode."""
    if known.used_at != names.takes:
        take_out(names, known)
        become_newest(names, known)


cdef void take_out(names_t *names, known_t *known) noexcept nogil:
    """Take an inode out of the order of use."""
    if known.older != NULL:
        known.older.newer = known.newer
    else:
        names.oldest = known.newer
    if known.newer != NULL:
        known.newer.older = known.older
    else:
        names.newest = known.older


cdef void become_newest(names_t *names, known_t *known) noexcept nogil:
    """Put an inode at the end of the order of use."""
    known.used_at = names.takes
    known.older, known.newer = names.newest, NULL
    if names.newest != NULL:
        names.newest.newer = known
    else:
        names.oldest = known
    names.newest = known


cdef void drop_known(names_t *names, known_t *known) noexcept nogil:
    """Forget an inode."""
    cdef known_t **place = bucket_of_inode(names, known.number)
    while place[0] != known:
        place = &place[0].next
    place[0] = known.next
    take_out(names, known)
    free_index(names, known)
    free(known)
    names.known_count -= 1
    charge(names, -<int64_t>(sizeof(known_t) + BLOCK_BYTES))


cdef void clear_known(names_t *names, known_t *known) noexcept nogil:
    """Know nothing of an inode but its number. It stays where it is."""
    cdef uint64_t number = known.number
    free_index(names, known)
    memset(known, 0, <size_t>(<uint8_t *>&known.used_at - <uint8_t *>known))
    known.number = number


cdef void forget_known(names_t *names, uint64_t number) noexcept nogil:
    """Drop what is known of an inode: its slot was freed, or somebody is not sure."""
    cdef known_t *known = find_known(names, number) if names.buckets != NULL else NULL
    if known != NULL:
        drop_known(names, known)
