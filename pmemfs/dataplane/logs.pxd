# What other rooms ask of known.pxi, directories.pxi, replay.pxi and logs.pxi: inodes that are known,
# and their names.
#
# `know` compares an inode with its slot in the pool, and replays what its log has since. So nobody
# has to tell these rooms what was committed. `index_add`, `index_remove`, `apply_attributes` and
# `known_moved` only spare the next `know` that. The functions, all noexcept nogil, for the holder of
# the lock of names:
#
#     known_t *know(worker_t *, uint64_t number)
#         The inode, up to date, or NULL: hand over, whatever the reason. It never frees the lock, and
#         what it gave stays where it is until the lock is taken again (`names.takes`), unless
#         `forget_known` drops it.
#         Of a long log it reads FRAMES_AT_ONCE frames, says NULL, and sets `worker.reads_on`. Then
#         `serve_named` frees the lock, takes it again, and begins the operation anew, which reads on.
#     void forget_known(names_t *, uint64_t number)
#         Its slot was freed; or who knows.
#     name_state_t find_entry(worker_t *, known_t *directory, const uint8_t *name,
#                             uint32_t name_bytes, found_t *found)
#         NAME_UNSURE: hand over. The inode that `found` names may be anything: ask `know`.
#     bint is_name(const uint8_t *name, uint32_t name_bytes)
#         Whether a directory may have an entry of this name.
#     bint index_add(worker_t *, known_t *directory, const uint8_t *name, uint32_t name_bytes,
#                    uint64_t record_offset, uint8_t type)
#         The name is new, or leads somewhere else from now on. False: `directory` stays where it is,
#         but says nothing any more, and the next `know` reads it anew.
#     void index_remove(known_t *directory, const found_t *found)
#         Nothing may have been added or removed since `found` was found.
#     void apply_attributes(known_t *, const attributes_record_t *)
#     void known_moved(known_t *, uint64_t tail, uint64_t slots)
#         Records of so many slots, which were applied as above, end at this tail.
#     bint line_says(const known_t *, uint64_t size_word, uint64_t *size_bytes)
#         The size of a regular file, of its live line or of its log; False: the word is damaged.
#     bint is_usable(const names_head_t *, uint64_t pfn, uint64_t frame_count)
#         As Geometry.is_usable.
#     uint32_t crc_record(uint64_t number, uint64_t generation, uint64_t offset, const uint8_t *raw,
#                         size_t length)
#     void seal_record(uint64_t number, uint64_t generation, uint64_t offset, uint8_t *raw,
#                      size_t length)
#         Stores the checksum of a record in it.
#     uint16_t line_key(uint64_t number, uint64_t generation, uint16_t epoch)
#
# Whatever touches the pool here does so by `copy_pool`, which is guarded, also in a guarded function.
# So a fault says NULL, NAME_UNSURE or False, and what is known is right then, too.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "crc32c.h" nogil:
    # Of bytes behind those whose checksum is `before`, 0 at the start.
    uint32_t crc32c "pmemfs_crc32c"(uint32_t before, const void *data, size_t length)
    # The same where the processor has no instruction for it.
    uint32_t crc_by_table "pmemfs_crc_by_table"(uint32_t before, const void *data, size_t length)

cdef enum name_state_t:
    NAME_ABSENT
    NAME_FOUND
    NAME_UNSURE

cdef struct found_t:
    uint64_t inode
    # Of the ENTRY, in the pool.
    uint64_t record_offset
    uint32_t record_slots
    # As d_type.
    uint8_t type
    # Where it is in the index.
    uint64_t position

# What became of records.
cdef enum replayed_t:
    REPLAYED
    # There is more, which is read later.
    REPLAY_UNFINISHED
    # Damage, or what only the control plane knows.
    REPLAY_ODD
    # The memory could not be touched. The records up to `tail` count.
    REPLAY_FAULT
