"""Inodes without their names: attributes, handles of files, holds, and freeing what nobody needs.

Each function that is called `serve_…` answers one kind of request. It is called with the lock of
names held, within a section, and within a guard. Its verdict is FORWARD, before anything was stored
that counts, or ANSWER, or DROP where the kernel waits for no answer. Invariants:
- a handle holds its inode: the hold comes before the handle, and goes after it;
- an inode is freed once nobody holds it and it has no name. Its frames and its slot come to another
  inode only if no page of them is held, no program has pinned one, and no worker can see a table of
  it; else the control plane frees it;
- the place of a file's frames in the reserve is taken by its frames only after the journal says
  durably that the file is gone.
"""

from libc.stdint cimport uint64_t

from pmemfs.dataplane.plane cimport worker_t
from pmemfs.dataplane.request cimport *


cdef verdict_t serve_getattr(worker_t *worker, request_t *request) noexcept nogil:
    return FORWARD


cdef verdict_t serve_setattr(worker_t *worker, request_t *request) noexcept nogil:
    return FORWARD


cdef verdict_t serve_open(worker_t *worker, request_t *request) noexcept nogil:
    return FORWARD


cdef verdict_t serve_release(worker_t *worker, request_t *request) noexcept nogil:
    return FORWARD


cdef verdict_t serve_forget(worker_t *worker, request_t *request) noexcept nogil:
    return FORWARD


cdef verdict_t serve_batch_forget(worker_t *worker, request_t *request) noexcept nogil:
    return FORWARD


cdef void fill_place(worker_t *worker, request_t *request, uint64_t handle, uint64_t inode,
                     uint32_t flags) noexcept nogil:
    """Let a handle that was taken from the reserve stand for an open file. The inode must be held
    for it already."""
    pass
