# What a worker encrypts and decrypts with.

from libc.stdint cimport uint8_t, uint32_t

from pmemfs.dataplane.structures cimport page_lock_t, redo_lock_t
from pmemfs.transform.secrets cimport secret_t, xts_t

cdef struct crypt_t:
    # A page as callers see it, and as it lies in the pool.
    uint8_t plain[4096]
    uint8_t sealed[4096]
    # Contexts for either direction, and the fillings of the slots whose keys they have; NULL: none.
    xts_t sealing
    xts_t opening
    const secret_t *sealing_key
    const secret_t *opening_key
    uint32_t sealing_serial
    uint32_t opening_serial
    # The locks that this worker has; a fault may leave them to be let go of.
    page_lock_t *page_lock
    redo_lock_t *redo_lock
