"""The seam: how requests leave for the control plane, and what is changed in its replies.

A request is handed over as the kernel sent it but for two bits of its number, which tell later that
the reply is to an OPEN, or to a CREATE or TMPFILE; the kernel's numbers are counters and never come
near them.
"""

from libc.errno cimport ECONNRESET, EINTR, ENOTCONN, EPIPE, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.types cimport off_t

from pmemfs.dataplane.memory cimport store
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport FORWARD_RAW, SYNC, request_t, verdict_t
from pmemfs.dataplane.transport cimport MOST_FAILURES, iovec, patience_t

cdef extern from "sys/socket.h" nogil:
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen

    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)
    enum:
        MSG_NOSIGNAL
        SHUT_RDWR

cdef extern from "unistd.h" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t length)

cdef uint64_t IS_OPEN = <uint64_t>1 << 62
cdef uint64_t IS_CREATE = <uint64_t>1 << 61


cdef inline bint may_wait_awake(patience_t *patience) noexcept nogil:
    """Whether a worker without a request waits awake this time."""
    if not patience.sleeps_left:
        return True
    patience.sleeps_left -= 1
    return False


cdef inline void give_up(patience_t *patience) noexcept nogil:
    """Waiting awake was in vain: the next attempt follows after twice as many sleeps."""
    patience.failures = min(patience.failures + 1, <uint32_t>MOST_FAILURES)
    patience.sleeps_left = (<uint32_t>1 << patience.failures) - 1


cdef bint wants_reply(const fuse_in_header *head) noexcept nogil:
    """Whether the kernel waits for a reply to a request."""
    return (head.opcode != FUSE_FORGET and head.opcode != FUSE_BATCH_FORGET
            and head.opcode != FUSE_INTERRUPT)


cdef int hand_over(worker_t *worker, request_t *request, verdict_t verdict) noexcept nogil:
    """Give a request to whom the verdict names, who will reply; 0 or errno."""
    cdef plane_t *plane = worker.plane
    cdef fuse_in_header head = request.head[0]
    cdef iovec parts[3]
    cdef msghdr message
    cdef ssize_t sent
    if verdict == SYNC:
        # A pipe takes eight bytes whole.
        return 0 if c_write(plane.sync_fd, &head.unique, 8) == 8 else errno
    if head.opcode == FUSE_OPEN:
        head.unique |= IS_OPEN
    elif head.opcode == FUSE_CREATE or head.opcode == TMPFILE:
        head.unique |= IS_CREATE
    parts[0].iov_base, parts[0].iov_len = &head, sizeof(head)
    parts[1].iov_base, parts[1].iov_len = <void *>request.operation, request.operation_bytes
    parts[2].iov_base, parts[2].iov_len = <void *>request.payload, request.payload_bytes
    memset(&message, 0, sizeof(message))
    message.msg_iov = parts
    message.msg_iovlen = 3
    while True:
        sent = sendmsg(worker.raw_fd if verdict == FORWARD_RAW else plane.forward_fd, &message,
                       MSG_NOSIGNAL)
        if sent >= 0:
            return 0
        if errno == EPIPE or errno == ECONNRESET:
            # To a user this is a mount without anybody who serves it, not a pipe.
            return ENOTCONN
        if errno != EINTR:
            return errno


cdef void rewrite_reply(fuse_out_header *head, void *data, uint32_t data_bytes) noexcept nogil:
    """Take the marks off a reply's number, and open files as direct I/O deserves it.

    Direct writes of one file need no order among them but their own, and a close has nothing to
    flush: each write is in the pool when it is answered.
    """
    cdef uint64_t marks = head.unique & (IS_OPEN | IS_CREATE)
    cdef uint32_t skipped = ENTRY_OUT_BYTES if marks & IS_CREATE else 0
    cdef fuse_open_out *opened
    head.unique &= ~(IS_OPEN | IS_CREATE)
    if not marks or head.error or data_bytes < skipped + sizeof(fuse_open_out):
        return
    opened = <fuse_open_out *>(<char *>data + skipped)
    if opened.open_flags & FOPEN_DIRECT_IO:
        opened.open_flags |= FOPEN_PARALLEL_DIRECT_WRITES | FOPEN_NOFLUSH


cdef void end_all(plane_t *plane) noexcept nogil:
    """The connection is over: let the main thread, and pyfuse3 with it, know."""
    store(&plane.header.ends, 1)
    shutdown(plane.forward_fd, SHUT_RDWR)
