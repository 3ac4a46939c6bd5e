"""The names of directories, as an index over the records in the pool."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport worker_t


cdef name_state_t find_entry(worker_t *worker, known_t *directory, const uint8_t *name,
                             uint32_t name_bytes, found_t *found) noexcept nogil:
    """What a name leads to."""
    return NAME_UNSURE


cdef bint index_add(worker_t *worker, known_t *directory, const uint8_t *name,
                    uint32_t name_bytes, uint64_t record_offset, uint8_t type) noexcept nogil:
    """Let a name lead to what the ENTRY at an offset says; False: no memory."""
    return False


cdef void index_remove(known_t *directory, const found_t *found) noexcept nogil:
    """Let a name that was just found lead nowhere."""
