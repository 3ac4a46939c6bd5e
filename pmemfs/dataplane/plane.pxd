# What all workers of a data plane share, and what belongs to one of them.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from pmemfs.dataplane.crypt cimport crypt_t
from pmemfs.dataplane.names cimport names_t, recorder_t
from pmemfs.dataplane.packed cimport heat_t, unpacker_t
from pmemfs.dataplane.pages cimport memmap_t, pages_t
from pmemfs.dataplane.structures cimport (
    attributes_t,
    counts_t,
    extent_t,
    header_t,
    inode_t,
    live_t,
    page_lock_t,
    redo_lock_t,
    slot_t,
    table_t,
)
from pmemfs.transform.secrets cimport secret_t

cdef struct plane_t:
    uint8_t *shared
    size_t shared_bytes
    uint8_t *pool
    size_t mapped_bytes
    int pool_fd
    header_t *header
    inode_t *inodes
    attributes_t *attributes
    uint8_t *presence
    # Of a cache: the locks of its sets, and a byte a group that says whether they may change.
    uint64_t *cache_locks
    uint8_t *cache_groups
    # The locks of encrypted pages and of redo records.
    page_lock_t *page_locks
    redo_lock_t *redo_locks
    # What workers know of names, in mode `fs`. `recorder` is for tests, and NULL else.
    names_t *names
    recorder_t *recorder
    # The keys of encrypted files. NULL until the control plane has some; then never another place.
    secret_t *secrets
    # When compressed pieces were read lately. NULL: that is not counted.
    heat_t *heat
    memmap_t memmap
    int fuse_fd
    # Where requests are handed over: to the control plane, for workers that have no socket of their
    # own, and to the thread that syncs.
    int forward_fd
    int sync_fd
    uint32_t max_write
    # With the transport fd, 1: no worker may take a request. See `ask_again`.
    uint64_t stands

cdef struct worker_t:
    plane_t *plane
    slot_t *slot
    # Where this worker hands requests over: its own socket, or the plane's `forward_fd`.
    int forward_fd
    uint64_t now_ns
    # What it encrypts and decrypts with; NULL until it does.
    crypt_t *crypt
    # A log was too long to be read at once: begin the operation on names again, which reads on.
    # With `may_put_off`, other requests of this worker are served first.
    bint reads_on
    bint may_put_off
    # It has waited for the lock of names in vain, and waits no more until then.
    uint64_t hasty_until_ns
    # As `crypt`, of compressed pieces.
    unpacker_t *unpacker

cdef struct piece_t:
    uint64_t pool_offset
    uint64_t length
    bint is_hole
    # It has data, but only the control plane can tell or change it.
    bint is_forwarded
    # What the table says of it; NULL: a hole.
    const extent_t *extent
