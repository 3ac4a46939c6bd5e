# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The transport `fd`: read(2) requests from /dev/fuse, writev(2) replies to it.

A reply to a READ that is one run of the pool is written straight out of it: the kernel copies once.
"""

from libc.errno cimport EAGAIN, ECONNABORTED, EFAULT, EINTR, ENODEV, ENOENT, ENOMEM, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from posix.time cimport CLOCK_REALTIME

from pmemfs.dataplane.memory cimport load, now_ns
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.serve cimport *
from pmemfs.dataplane.transport cimport HEADERS_BYTES, end_all, hand_over, iovec, wants_reply

cdef extern from "sys/uio.h" nogil:
    ssize_t writev(int fd, const iovec *parts, int count)

cdef extern from "sys/mman.h" nogil:
    enum: MAP_POPULATE

cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t length)


cdef int serve_classic(worker_t *worker) noexcept nogil:
    """Serve until the connection is over or `ends` is set; 0 or errno."""
    cdef plane_t *plane = worker.plane
    cdef size_t room = plane.max_write + HEADERS_BYTES
    cdef uint8_t *memory = <uint8_t *>mmap(NULL, 2 * room, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
    cdef ssize_t count
    if memory == MAP_FAILED:
        return ENOMEM
    while not load(&plane.header.ends):
        count = c_read(plane.fuse_fd, memory, room)
        if count >= <ssize_t>sizeof(fuse_in_header):
            serve_message(worker, memory, <uint32_t>count, memory + room)
        elif count < 0 and (errno == ENODEV or errno == ECONNABORTED):
            end_all(plane)
            return 0
        elif count < 0 and errno != EINTR and errno != EAGAIN and errno != ENOENT:
            # ENOENT: the request was withdrawn while it was read.
            return errno
    return 0


cdef void serve_message(worker_t *worker, uint8_t *message, uint32_t message_bytes,
                        uint8_t *answer) noexcept nogil:
    cdef request_t request
    cdef verdict_t verdict
    cdef uint64_t since = now_ns(CLOCK_REALTIME)
    worker.now_ns = since
    request.head = <fuse_in_header *>message
    request.operation = message + sizeof(fuse_in_header)
    request.operation_bytes = message_bytes - <uint32_t>sizeof(fuse_in_header)
    request.payload = NULL
    request.payload_bytes = 0
    if request.head.opcode == FUSE_WRITE and request.operation_bytes >= sizeof(fuse_write_in):
        request.payload = request.operation + sizeof(fuse_write_in)
        request.payload_bytes = request.operation_bytes - <uint32_t>sizeof(fuse_write_in)
        request.operation_bytes = sizeof(fuse_write_in)
    request.answer = answer
    request.answer_room = worker.plane.max_write
    request.may_point = True
    verdict = serve(worker, &request)
    if verdict != ANSWER and verdict != DROP:
        request.error = hand_over(worker, &request, verdict)
        if request.error and wants_reply(request.head):
            verdict = ANSWER
    if verdict == ANSWER:
        answer_request(worker, &request)
    worker.now_ns = now_ns(CLOCK_REALTIME)
    account(worker, &request, verdict, since)


cdef void answer_request(worker_t *worker, request_t *request) noexcept nogil:
    cdef fuse_out_header head
    cdef const void *data = request.pointed
    if data == NULL:
        data = request.answer
    head.unique = request.head.unique
    head.error = -request.error
    if reply_classic(worker.plane.fuse_fd, &head, data, request.answer_bytes) == EFAULT:
        # Only what is in the pool may fault.
        fail_pointed(worker, request)
        head.error = -request.error
        reply_classic(worker.plane.fuse_fd, &head, NULL, 0)
    release(worker, request)


cdef int reply_classic(int fuse_fd, fuse_out_header *head, const void *data,
                       uint32_t data_bytes) noexcept nogil:
    """Write a reply; 0 or errno, of which ENOENT (nobody waits any more) is none to care about."""
    cdef iovec parts[2]
    head.len = <uint32_t>sizeof(fuse_out_header) + data_bytes
    parts[0].iov_base, parts[0].iov_len = head, sizeof(fuse_out_header)
    parts[1].iov_base, parts[1].iov_len = <void *>data, data_bytes
    while writev(fuse_fd, parts, 2 if data_bytes else 1) < 0:
        if errno != EINTR:
            return errno
    return 0
