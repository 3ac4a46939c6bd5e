"""The names of directories, as an index over the records in the pool.

A word of the index has 24 bits of a name's hash and the place of its ENTRY. The name itself is
compared in the pool, which is memory too. Invariants:
- a word lies at the place that the upper bits of its hash say, or behind it with no free word
  between. So an index grows without a look at any name, and a name that goes leaves nothing behind;
- a record counts only if its checksum is right when it is looked at, not only when it was read;
- hashes are mixed with a secret, so that no user can make names that all lie at one place.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memchr, memcmp, memcpy

from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.memory cimport multiply_high, peek
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.structures cimport *

cdef enum:
    HASH_BITS = 24
    LEAST_WORDS = 16
    # An ENTRY of the longest name.
    MOST_ENTRY_SLOTS = 5
    ENTRY_WORDS = 40
    DIRECTORY_TYPE = 4

cdef extern from *:
    """
    /* Odd, with as many bits set as not: as wyhash has them. */
    #define PMEMFS_NAME_MIX 0xa0761d6478bd642fULL
    #define PMEMFS_NAME_END 0xe7037ed1a0b428dbULL
    """
    const uint64_t NAME_MIX "PMEMFS_NAME_MIX"
    const uint64_t NAME_END "PMEMFS_NAME_END"

cdef extern from *:
    int __builtin_ctzll(unsigned long long value) noexcept nogil


cdef inline uint64_t fold(uint64_t a, uint64_t b) noexcept nogil:
    return a * b ^ multiply_high(a, b)


cdef inline uint64_t hash_of_name(const names_t *names, const uint8_t *name,
                                  uint32_t name_bytes) noexcept nogil:
    """The hash of a name, of HASH_BITS bits."""
    return whole_hash(names.seeds, name, name_bytes) >> (64 - HASH_BITS)


cdef uint64_t whole_hash(const uint64_t *seeds, const uint8_t *name,
                         uint32_t name_bytes) noexcept nogil:
    """The hash of a name, of which an index has the upper bits."""
    cdef uint64_t mixed = seeds[0] ^ name_bytes
    cdef uint64_t factor = seeds[1] ^ NAME_MIX
    cdef uint64_t word
    while name_bytes >= 8:
        memcpy(&word, name, 8)
        mixed = fold(mixed ^ word, factor)
        name += 8
        name_bytes -= 8
    word = 0
    memcpy(&word, name, name_bytes)
    mixed = fold(mixed ^ word, factor)
    return fold(mixed ^ seeds[0], NAME_END)


cdef inline uint64_t hash_in(uint64_t word) noexcept nogil:
    return word & ((1 << HASH_BITS) - 1)


cdef inline uint64_t offset_in(uint64_t word) noexcept nogil:
    return word >> HASH_BITS << 6


cdef inline uint64_t word_of(uint64_t hashed, uint64_t record_offset) noexcept nogil:
    return record_offset >> 6 << HASH_BITS | hashed


cdef inline uint64_t home_of(const names_index_t *index, uint64_t word) noexcept nogil:
    """Where a word would lie if it were the only one."""
    return hash_in(word) >> (HASH_BITS - __builtin_ctzll(index.capacity))


cdef inline uint32_t entry_slots(uint32_t name_bytes) noexcept nogil:
    """The slots of an ENTRY."""
    return (ENTRY_NAME_AT + name_bytes + LOG_RECORD_BYTES - 1) // LOG_RECORD_BYTES


cdef inline uint32_t name_length(const uint8_t *raw) noexcept nogil:
    """The length of the name in an ENTRY or REMOVED, in bytes."""
    return raw[ENTRY_NAME_BYTES_AT] | <uint32_t>raw[ENTRY_NAME_BYTES_AT + 1] << 8


cdef bint is_name(const uint8_t *name, uint32_t name_bytes) noexcept nogil:
    """As `volume.fs.inode.is_name`."""
    if not 0 < name_bytes <= LOG_NAME_MAX_BYTES:
        return False
    if name[0] == 46 and (name_bytes == 1 or name_bytes == 2 and name[1] == 46):
        return False
    return memchr(name, 0, name_bytes) == NULL and memchr(name, 47, name_bytes) == NULL


cdef name_state_t find_entry(worker_t *worker, known_t *directory, const uint8_t *name,
                             uint32_t name_bytes, found_t *found) noexcept nogil:
    """What a name leads to; NAME_UNSURE: hand over."""
    cdef uint64_t hashed
    if not 0 < name_bytes <= LOG_NAME_MAX_BYTES:
        return NAME_UNSURE
    hashed = hash_of_name(worker.plane.names, name, name_bytes)
    return find_hashed(worker.plane, directory, hashed, name, name_bytes, found)


cdef name_state_t find_hashed(plane_t *plane, known_t *directory, uint64_t hashed,
                              const uint8_t *name, uint32_t name_bytes,
                              found_t *found) noexcept nogil:
    cdef names_index_t *index = &directory.index
    cdef uint64_t at, word
    cdef name_state_t state
    if not index.capacity:
        return NAME_ABSENT
    at = home_of(index, hashed)
    while index.words[at]:
        word = index.words[at]
        if hash_in(word) == hashed:
            found.position = at
            found.record_offset = offset_in(word)
            state = compare_entry(plane, directory, name, name_bytes, found)
            if state != NAME_ABSENT:
                return state
        at = (at + 1) & (index.capacity - 1)
    return NAME_ABSENT


cdef name_state_t compare_entry(plane_t *plane, known_t *directory, const uint8_t *name,
                                uint32_t name_bytes, found_t *found) noexcept nogil:
    """Whether an ENTRY in the pool has this name, and what it says."""
    # Words, for their alignment.
    cdef uint64_t raw[ENTRY_WORDS]
    cdef uint8_t *record = <uint8_t *>raw
    found.record_slots = copy_entry(plane, found.record_offset, record)
    if (not found.record_slots
            or not is_sealed(directory, found.record_offset, record,
                             found.record_slots * LOG_RECORD_BYTES)
            or record[0] != RECORD_ENTRY):
        return NAME_UNSURE
    if name_length(record) != name_bytes or memcmp(record + ENTRY_NAME_AT, name, name_bytes):
        return NAME_ABSENT
    memcpy(&found.inode, record + ENTRY_INODE_AT, 8)
    found.type = record[ENTRY_TYPE_AT]
    return NAME_FOUND


cdef replayed_t take_name(plane_t *plane, known_t *directory, const uint8_t *name,
                          uint32_t name_bytes, uint64_t record_offset,
                          uint8_t type_) noexcept nogil:
    """Let a name lead to what the ENTRY at an offset says, whether it is new or not."""
    cdef names_index_t *index = &directory.index
    cdef uint64_t hashed = hash_of_name(plane.names, name, name_bytes)
    cdef found_t found
    cdef name_state_t state = find_hashed(plane, directory, hashed, name, name_bytes, &found)
    if state == NAME_UNSURE:
        return REPLAY_FAULT
    if state == NAME_FOUND:
        index.words[found.position] = word_of(hashed, record_offset)
        index.subdirectory_count -= found.type == DIRECTORY_TYPE
    else:
        if not grow_index(plane.names, index):
            return REPLAY_ODD
        place_word(index, word_of(hashed, record_offset))
        index.entry_count += 1
        directory.live_slots += entry_slots(name_bytes)
    index.subdirectory_count += type_ == DIRECTORY_TYPE
    return REPLAYED


cdef bint index_add(worker_t *worker, known_t *directory, const uint8_t *name,
                    uint32_t name_bytes, uint64_t record_offset, uint8_t type) noexcept nogil:
    """Let a name lead to what the ENTRY at an offset says; False: the directory was forgotten,
    though it stays where it is, and the next `know` reads it anew."""
    if take_name(worker.plane, directory, name, name_bytes, record_offset, type) == REPLAYED:
        return True
    clear_known(worker.plane.names, directory)
    return False


cdef void index_remove(known_t *directory, const found_t *found) noexcept nogil:
    """Let a name that was just found lead nowhere. Nothing was added since then."""
    cdef names_index_t *index = &directory.index
    cdef uint64_t mask = index.capacity - 1
    cdef uint64_t hole = found.position
    cdef uint64_t at = hole
    # The words behind move up, unless they would lie before their places then.
    while True:
        at = (at + 1) & mask
        if not index.words[at]:
            break
        if ((at - home_of(index, index.words[at])) & mask) >= ((at - hole) & mask):
            index.words[hole] = index.words[at]
            hole = at
    index.words[hole] = 0
    index.entry_count -= 1
    index.subdirectory_count -= found.type == DIRECTORY_TYPE
    directory.live_slots -= found.record_slots


cdef inline void place_word(names_index_t *index, uint64_t word) noexcept nogil:
    """Add a word to an index that has room."""
    cdef uint64_t at = home_of(index, word)
    while index.words[at]:
        at = (at + 1) & (index.capacity - 1)
    index.words[at] = word


cdef bint grow_index(names_t *names, names_index_t *index) noexcept nogil:
    """Have room for one name more; False: the index would take too much memory."""
    cdef names_index_t larger = index[0]
    cdef uint64_t number
    if (index.entry_count + 1) * 4 <= index.capacity * 3:
        return True
    larger.capacity = index.capacity * 2 if index.capacity else LEAST_WORDS
    # A quarter at most, so that a directory leaves room for those beside it.
    if (larger.capacity > 1 << HASH_BITS
            or larger.capacity * 8 > peek(&names.head.memory_bytes) // 4):
        names.is_short = True
        return False
    if not make_room(names, larger.capacity * 8):
        return False
    larger.words = <uint64_t *>calloc(larger.capacity, 8)
    if larger.words == NULL:
        return False
    for number in range(index.capacity):
        if index.words[number]:
            place_word(&larger, index.words[number])
    free(index.words)
    charge(names, <int64_t>(larger.capacity - index.capacity) * 8)
    index[0] = larger
    return True


cdef void free_index(names_t *names, known_t *directory) noexcept nogil:
    """Have no names."""
    if directory.index.words != NULL:
        free(directory.index.words)
        charge(names, -<int64_t>(directory.index.capacity * 8))
    directory.index.words = NULL
    directory.index.capacity = directory.index.entry_count = 0
    directory.index.subdirectory_count = 0
