"""How requests leave for the control plane, exactly as the kernel sent them."""

from libc.errno cimport ECONNRESET, EINTR, ENOTCONN, EPIPE, errno
from libc.string cimport memset
from posix.types cimport off_t

from pmemfs.dataplane.memory cimport put, store
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport SYNC, request_t, verdict_t
from pmemfs.dataplane.transport cimport MOST_FAILURES, iovec, patience_t

cdef extern from "sys/socket.h" nogil:
    cdef struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen

    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int shutdown(int fd, int how)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
        SHUT_RDWR

cdef extern from "unistd.h" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t length)


cdef inline bint may_wait_awake(patience_t *patience) noexcept nogil:
    """Whether a worker without a request waits awake this time."""
    if not patience.sleeps_left:
        return True
    patience.sleeps_left -= 1
    return False


cdef inline void give_up(patience_t *patience) noexcept nogil:
    """Waiting awake was in vain: try again only after twice as many sleeps as last time."""
    patience.failures = min(patience.failures + 1, <uint32_t>MOST_FAILURES)
    patience.sleeps_left = (<uint32_t>1 << patience.failures) - 1


cdef bint wants_reply(const fuse_in_header *head) noexcept nogil:
    """Whether the kernel waits for a reply to a request."""
    return (head.opcode != FUSE_FORGET and head.opcode != FUSE_BATCH_FORGET
            and head.opcode != FUSE_INTERRUPT)


cdef int hand_over(worker_t *worker, request_t *request, verdict_t verdict) noexcept nogil:
    """Give a request to the thread or process that the verdict names; 0 or errno."""
    cdef plane_t *plane = worker.plane
    cdef int failed
    if verdict == SYNC:
        # A pipe takes eight bytes whole.
        return 0 if c_write(plane.sync_fd, &request.head.unique, 8) == 8 else errno
    failed = send_request(worker, request)
    if not failed and wants_reply(request.head):
        put(&worker.slot.handed_over, worker.slot.handed_over + 1)
    return failed


cdef int send_request(worker_t *worker, request_t *request) noexcept nogil:
    """Send a request to the control plane as it came; 0 or errno."""
    cdef iovec parts[3]
    parts[0].iov_base, parts[0].iov_len = <void *>request.head, sizeof(fuse_in_header)
    parts[1].iov_base, parts[1].iov_len = <void *>request.operation, request.operation_bytes
    parts[2].iov_base, parts[2].iov_len = <void *>request.payload, request.payload_bytes
    return send_parts(worker, parts, 3)


cdef int send_parts(worker_t *worker, iovec *parts, int count, int flags=0) noexcept nogil:
    """Send a message to the control plane; 0 or errno. `flags` are of sendmsg(2)."""
    cdef msghdr message
    memset(&message, 0, sizeof(message))
    message.msg_iov = parts
    message.msg_iovlen = count
    while True:
        if sendmsg(worker.forward_fd, &message, MSG_NOSIGNAL | flags) >= 0:
            return 0
        if errno == EPIPE or errno == ECONNRESET:
            # For a user this is a mount that is not served any more, not a broken pipe.
            return ENOTCONN
        if errno != EINTR:
            return errno


cdef void end_all(plane_t *plane) noexcept nogil:
    """The connection is over: tell the main thread, and the control plane."""
    store(&plane.header.ends, 1)
    shutdown(plane.forward_fd, SHUT_RDWR)
