"""Reads the logs of inodes, and keeps what they say; logs.pxd says what others ask of it.

Invariants:
- only the holder of the lock of names calls anything here;
- whatever a pool holds, reading ends, and touches nothing outside the data zone. What is read is
  copied first, so that it can't change while it is looked at.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.structures cimport *


cdef known_t *know(worker_t *worker, uint64_t number) noexcept nogil:
    """An inode, up to date with the pool; NULL: hand over."""
    return NULL


cdef known_t *known_made(worker_t *worker, uint64_t number) noexcept nogil:
    """An inode that was just made in a slot, or NULL."""
    return NULL


cdef void forget_known(names_t *names, uint64_t number) noexcept nogil:
    """Drop what is known of an inode."""


cdef void apply_attributes(known_t *known, const attributes_record_t *record) noexcept nogil:
    """Take an ATTRIBUTES."""


cdef void known_moved(known_t *known, uint64_t tail, uint64_t slots) noexcept nogil:
    """Records of so many slots, which were applied already, end at this tail."""
    known.tail = tail
    known.slot_count += slots


cdef bint line_says(const known_t *known, uint64_t size_word,
                    uint64_t *size_bytes) noexcept nogil:
    """The size of a regular file, of which this is the live line's word; False: it is damaged."""
    return False


cdef bint is_usable(const names_head_t *head, uint64_t pfn, uint64_t frame_count) noexcept nogil:
    """Whether a run lies in the data zone and in one group, and not in what the group keeps."""
    return False


cdef uint32_t crc_record(uint64_t number, uint64_t generation, uint64_t offset,
                         const uint8_t *raw, size_t length) noexcept nogil:
    """The checksum of a record at an offset in the pool."""
    return 0


cdef void seal_record(uint64_t number, uint64_t generation, uint64_t offset, uint8_t *raw,
                      size_t length) noexcept nogil:
    """Store the checksum of a record in it."""


cdef uint16_t line_key(uint64_t number, uint64_t generation, uint16_t epoch) noexcept nogil:
    """The key of a live line, as `media.live.line_key`."""
    return 0
