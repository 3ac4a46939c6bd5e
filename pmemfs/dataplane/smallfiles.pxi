"""The content of small files that no table is published for: most files are written once, whole.

These are called as those of `inodes`, with the lock of names held, for a file whose table was not
found. Invariants:
- the first bytes of a file are stored, and durable where fences make them so, before its log says
  which frames have them; and the size is raised last of all. So a crash shows the file empty, or
  shows these bytes;
- pages are held while bytes move, as always. No answer points into the pool, because without a
  table no grace period would wait for its reader.
"""

from pmemfs.dataplane.plane cimport worker_t
from pmemfs.dataplane.request cimport *


cdef verdict_t serve_small(worker_t *worker, request_t *request) noexcept nogil:
    """READ, WRITE, LSEEK or FSYNC of a file without a table."""
    return FORWARD
