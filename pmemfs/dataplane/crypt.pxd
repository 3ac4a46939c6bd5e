# What a worker encrypts and decrypts with.

from libc.stdint cimport uint8_t

from pmemfs.dataplane.structures cimport page_lock_t, redo_lock_t
from pmemfs.transform.secrets cimport xts_t

cdef struct crypt_t:
    # A page as callers see it, and as it lies in the pool.
    uint8_t plain[4096]
    uint8_t sealed[4096]
    # Contexts for either direction. They have a key only while a request is served.
    xts_t sealing
    xts_t opening
    # The locks that this worker has; a fault may leave them to be let go of.
    page_lock_t *page_lock
    redo_lock_t *redo_lock
