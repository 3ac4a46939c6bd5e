"""The transport `fd`: read(2) takes requests from /dev/fuse, and writev(2) replies to it.

If the bytes of a READ are one run of the pool, the reply is written straight out of the pool, so
the kernel copies them only once.

A worker that finds no request waits awake for a while, as the workers of rings do, and then sleeps.
Each worker sleeps in an epoll of its own that asks for /dev/fuse exclusively, so a request wakes
one worker; poll(2) would wake all of them. The kernel wakes a sleeper even if a worker that is
awake takes the request first. A worker that was woken in vain many times in a row naps, so that one
caller costs one worker. A nap has an end, because a touch of the pool may hold up the worker that
is awake. Source: fuse_dev_do_read and fuse_dev_poll in fs/fuse/dev.c of Linux 6.18; epoll_ctl(2).
"""

from libc.errno cimport EAGAIN, ECONNABORTED, EFAULT, EINTR, ENODEV, ENOENT, ENOMEM, errno
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME
from posix.unistd cimport usleep

from pmemfs.dataplane.memory cimport load, now_ns, put, settle, store
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport slot_t
from pmemfs.dataplane.transport cimport HEADERS_BYTES, SPIN_NS, iovec, patience_t

cdef extern from "sys/uio.h" nogil:
    ssize_t writev(int fd, const iovec *parts, int count)

cdef extern from "sys/mman.h" nogil:
    enum: MAP_POPULATE

cdef extern from "sys/epoll.h" nogil:
    cdef struct epoll_event:
        uint32_t events
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll_fd, epoll_event *events, int room, int timeout)
    enum:
        EPOLL_CTL_ADD
        EPOLLEXCLUSIVE
        EPOLLIN

cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command, ...)
    enum:
        F_GETFL
        F_SETFL
        O_NONBLOCK

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t length)

cdef enum:
    # A worker that was woken in vain so often in a row is not needed now.
    MOST_VAIN = 8
    NAP_MICROSECONDS = 2000

# How a worker waits for its next request.
cdef struct wait_t:
    patience_t patience
    int epoll_fd
    bint was_woken
    uint32_t vain


cdef int stop_blocking(int fuse_fd) noexcept nogil:
    """Let a read that finds no request return at once; 0 or errno.

    A connection with rings must not get this: their commands go through the same open file.
    """
    cdef int flags = fcntl(fuse_fd, F_GETFL)
    return errno if flags < 0 or fcntl(fuse_fd, F_SETFL, flags | O_NONBLOCK) < 0 else 0


cdef int serve_classic(worker_t *worker) noexcept nogil:
    """Serve until the connection is over or `ends` is set; 0 or errno."""
    cdef plane_t *plane = worker.plane
    cdef size_t room = plane.max_write + HEADERS_BYTES
    cdef uint8_t *memory = <uint8_t *>mmap(NULL, 2 * room, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
    cdef ssize_t count
    cdef wait_t waiting
    cdef epoll_event wanted
    if memory == MAP_FAILED:
        return ENOMEM
    memset(&waiting, 0, sizeof(waiting))
    memset(&wanted, 0, sizeof(wanted))
    wanted.events = EPOLLIN | EPOLLEXCLUSIVE
    waiting.epoll_fd = epoll_create1(0)
    if (waiting.epoll_fd < 0
            or epoll_ctl(waiting.epoll_fd, EPOLL_CTL_ADD, plane.fuse_fd, &wanted)):
        return errno
    while not load(&plane.header.ends):
        # Before the request is taken, so that `ask_again` waits for its end.
        put(&worker.slot.busy, 1)
        settle()
        if load(&plane.stands):
            stand_aside(worker)
            continue
        count = c_read(plane.fuse_fd, memory, room)
        if count < 0 and errno == EAGAIN:
            count = await_request(worker, &waiting, memory, room)
        else:
            waiting.was_woken, waiting.vain = False, 0
        if count >= <ssize_t>sizeof(fuse_in_header):
            serve_message(worker, memory, <uint32_t>count, memory + room)
        elif count < 0 and (errno == ENODEV or errno == ECONNABORTED):
            end_all(plane)
            return 0
        elif count < 0 and errno != EINTR and errno != EAGAIN and errno != ENOENT:
            # ENOENT: the request was withdrawn while it was being read.
            return errno
    store(&worker.slot.busy, 0)
    return 0


cdef void stand_aside(worker_t *worker) noexcept nogil:
    """Have no request until `ask_again` is over."""
    store(&worker.slot.busy, 0)
    while load(&worker.plane.stands) and not load(&worker.plane.header.ends):
        usleep(PAUSE_MICROSECONDS)


cdef ssize_t await_request(worker_t *worker, wait_t *waiting, uint8_t *memory,
                           size_t room) noexcept nogil:
    """Wait awake for a request if that pays, and read it. Else sleep and return 0 bytes."""
    cdef slot_t *slot = worker.slot
    cdef epoll_event found
    cdef uint64_t until
    cdef ssize_t count
    if waiting.was_woken:
        waiting.was_woken = False
        waiting.vain += 1
        if waiting.vain >= MOST_VAIN:
            store(&slot.busy, 0)
            usleep(NAP_MICROSECONDS)
    elif may_wait_awake(&waiting.patience):
        until = now_ns(CLOCK_MONOTONIC) + SPIN_NS
        while now_ns(CLOCK_MONOTONIC) < until:
            # Another thread that wants this CPU gets it.
            sched_yield()
            count = c_read(worker.plane.fuse_fd, memory, room)
            if count >= 0 or errno != EAGAIN:
                waiting.patience.failures = waiting.vain = 0
                put(&slot.spins, slot.spins + 1)
                return count
        give_up(&waiting.patience)
    store(&slot.busy, 0)
    put(&slot.sleeps, slot.sleeps + 1)
    waiting.was_woken = epoll_wait(waiting.epoll_fd, &found, 1, -1) > 0
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
    request.is_again = request.is_left = False
    verdict = serve(worker, &request)
    if verdict != ANSWER and verdict != DROP:
        request.error = hand_over(worker, &request, verdict)
        if request.error and wants_reply(request.head):
            verdict = ANSWER
    if verdict == ANSWER:
        answer_request(worker, &request)
    forget_keys(worker)
    tell_hot(worker)
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
            # Of all that was handed to writev, only the pool can fault.
        fail_pointed(worker, request)
        head.error = -request.error
        reply_classic(worker.plane.fuse_fd, &head, NULL, 0)
    release(worker, request)


cdef int reply_classic(int fuse_fd, fuse_out_header *head, const void *data,
                       uint32_t data_bytes) noexcept nogil:
    """Write a reply; 0 or errno. ENOENT is harmless: the caller waits no more."""
    cdef iovec parts[2]
    head.len = <uint32_t>sizeof(fuse_out_header) + data_bytes
    parts[0].iov_base, parts[0].iov_len = head, sizeof(fuse_out_header)
    parts[1].iov_base, parts[1].iov_len = <void *>data, data_bytes
    while writev(fuse_fd, parts, 2 if data_bytes else 1) < 0:
        if errno != EINTR:
            return errno
    return 0
