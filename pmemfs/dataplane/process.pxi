"""The process of the data plane: its threads, from the first request of the kernel to the last.

    main      the first request (INIT) and its reply; then replies of the control plane to the kernel
    workers   one for each CPU: requests
    sync      msync, for the FSYNCs that need it: one for all that wait

The end comes from either side: the kernel has no connection any more, or the control plane is gone
or says so (`ends`). Whatever was begun is finished, except what waits for the control plane.
"""

from libc.errno cimport EINTR, EINVAL, ENODEV, ENOTCONN, errno
from libc.signal cimport SIGUSR1
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memset
from posix.unistd cimport close, pipe, usleep

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.memory cimport catch_faults, load, put, store
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.transport cimport HEADERS_BYTES
from pmemfs.dataplane.uring cimport queue_t
from pmemfs.medium.writeback cimport synchronise

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t *thread, void *attributes, void *(*start)(void *) noexcept nogil,
                       void *argument)
    int pthread_kill(pthread_t thread, int number)
    int pthread_join(pthread_t thread, void **result)

cdef extern from "poll.h" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *files, unsigned long count, int timeout)
    enum: POLLIN

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void *into, size_t length, int flags)

cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t length)
    ssize_t c_write "write"(int fd, const void *data, size_t length)

cdef extern from "process.h" nogil:
    void become_wakeable "pmemfs_wakeable"()
    int become_io_flusher "pmemfs_become_io_flusher"()
    int lock_memory "pmemfs_lock_memory"(const void *pool, size_t pool_bytes)
    long thread_id "pmemfs_thread_id"()

cdef enum:
    SYNCS = 64
    WAKE_MICROSECONDS = 1000

cdef struct thread_t:
    pthread_t thread
    worker_t worker
    # Of the transport uring; NULL for a thread that reads /dev/fuse.
    queue_t *queue
    int failed
    uint64_t is_over

cdef struct process_t:
    plane_t plane
    thread_t *threads
    int thread_count
    queue_t *queues
    int queue_count
    pthread_t sync_thread
    bint has_sync_thread
    int sync_reader
    uint8_t *buffer
    size_t buffer_bytes
    # The socket whose replies `route` passes on, as the one of `forward_fd`.
    int raw_fd


cdef void *run_worker(void *argument) noexcept nogil:
    cdef thread_t *thread = <thread_t *>argument
    put(&thread.worker.slot.thread_id, <uint64_t>thread_id())
    if thread.queue != NULL:
        thread.failed = serve_queue(thread.queue)
    else:
        thread.failed = serve_classic(&thread.worker)
    put(&thread.worker.slot.thread_id, 0)
    if thread.failed:
        end_all(thread.worker.plane)
    store(&thread.is_over, 1)
    return NULL


cdef void *run_sync(void *argument) noexcept nogil:
    """Make durable, and answer all who wait for it, until the pipe is closed."""
    cdef process_t *process = <process_t *>argument
    cdef plane_t *plane = &process.plane
    cdef uint64_t waiting[SYNCS]
    cdef fuse_out_header head
    cdef ssize_t received, position
    cdef uint64_t epoch
    while True:
        received = c_read(process.sync_reader, waiting, sizeof(waiting))
        if received < 0 and errno == EINTR:
            continue
        if received <= 0:
            return NULL
        epoch = memory.add(&plane.header.write_epoch, 1)
        head.error = -finish_sync(
            plane, epoch, errno if synchronise(plane.pool, load(&plane.header.pool_bytes)) else 0)
        for position in range(received // 8):
            head.unique = waiting[position]
            reply(process, &head, NULL, 0)


cdef void reply(process_t *process, fuse_out_header *head, const void *data,
                uint32_t data_bytes) noexcept nogil:
    """Reply to a request that was handed over. Messages without one go the classic way always."""
    if (process.queue_count == 0 or head.unique == 0
            or not reply_uring(process.queues, process.queue_count, head, data, data_bytes)):
        reply_classic(process.plane.fuse_fd, head, data, data_bytes)


cdef int handshake(process_t *process, int max_background, bint has_files) noexcept nogil:
    """Let pyfuse3 answer INIT, and change the answer to what the data plane can do; 0 or errno."""
    cdef plane_t *plane = &process.plane
    cdef fuse_out_header *head = <fuse_out_header *>process.buffer
    cdef uint8_t *data = process.buffer + sizeof(fuse_out_header)
    cdef fuse_init_out *agreed = <fuse_init_out *>data
    cdef uint32_t offered, offered_more = 0
    cdef ssize_t count = c_read(plane.fuse_fd, process.buffer, process.buffer_bytes)
    cdef fuse_in_header *asked = <fuse_in_header *>process.buffer
    cdef fuse_init_in *offer = <fuse_init_in *>(process.buffer + sizeof(fuse_in_header))
    if count < 0:
        return errno
    if count < <ssize_t>(sizeof(fuse_in_header) + sizeof(fuse_init_in)) or asked.opcode != FUSE_INIT:
        return EINVAL
    offered = offer.flags
    if offered & FUSE_INIT_EXT:
        offered_more = offer.flags2
    if c_write(plane.forward_fd, process.buffer, <size_t>count) != count:
        return errno
    count = recv(plane.forward_fd, process.buffer, process.buffer_bytes, 0)
    if count < 0:
        return errno
    if count < <ssize_t>(sizeof(fuse_out_header) + sizeof(fuse_init_out)) or head.error:
        return -head.error if count and head.error else ENOTCONN
    agreed.max_write = plane.max_write
    agreed.max_pages = <uint16_t>(plane.max_write // 4096)
    agreed.max_background = <uint16_t>max_background
    agreed.congestion_threshold = <uint16_t>(max_background // 4 * 3)
    agreed.flags |= offered & (FUSE_MAX_PAGES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS
                               | FUSE_INIT_EXT)
    if has_files:
        agreed.flags |= offered & (FUSE_DONT_MASK | FUSE_HANDLE_KILLPRIV_V2)
        agreed.flags &= ~<uint32_t>FUSE_HANDLE_KILLPRIV
    agreed.flags2 |= offered_more & DIRECT_IO_ALLOW_MMAP
    if process.queue_count:
        if not offered_more & OVER_IO_URING:
            return ENODEV
        agreed.flags2 |= OVER_IO_URING
    return reply_classic(plane.fuse_fd, head, data, <uint32_t>(count - sizeof(fuse_out_header)))


cdef void route(process_t *process) noexcept nogil:
    """Pass the control plane's replies on, until it or the connection is gone."""
    cdef plane_t *plane = &process.plane
    cdef fuse_out_header *head = <fuse_out_header *>process.buffer
    cdef uint8_t *data = process.buffer + sizeof(fuse_out_header)
    cdef pollfd files[2]
    cdef int position
    cdef ssize_t count
    files[0].fd, files[1].fd = plane.forward_fd, process.raw_fd
    files[0].events = files[1].events = POLLIN
    while not load(&plane.header.ends):
        if poll(files, 2, -1) < 0:
            continue
        for position in range(2):
            if not files[position].revents:
                continue
            count = recv(files[position].fd, process.buffer, process.buffer_bytes, 0)
            if count < 0 and errno == EINTR:
                continue
            if count <= 0:
                return
            if count >= <ssize_t>sizeof(fuse_out_header):
                count -= sizeof(fuse_out_header)
                rewrite_reply(head, data, <uint32_t>count)
                reply(process, head, data, <uint32_t>count)


cdef int start(process_t *process) noexcept nogil:
    cdef int number, ends[2]
    cdef int failed
    cdef plane_t *plane = &process.plane
    # With rings, the only reader gets few requests.
    failed = 0 if process.queue_count else stop_blocking(plane.fuse_fd)
    if failed or pipe(ends):
        process.thread_count = 0
        return failed or errno
    process.sync_reader, plane.sync_fd = ends[0], ends[1]
    failed = pthread_create(&process.sync_thread, NULL, run_sync, process)
    if failed:
        process.thread_count = 0
        close(process.sync_reader)
        return failed
    process.has_sync_thread = True
    for number in range(process.thread_count):
        failed = pthread_create(&process.threads[number].thread, NULL, run_worker,
                                &process.threads[number])
        if failed:
            # `stop` waits for those that are there.
            process.thread_count = number
            break
    return failed


cdef int stop(process_t *process) noexcept nogil:
    """See all threads end; the first error of one."""
    cdef int number
    cdef int failed = 0
    cdef thread_t *thread
    store(&process.plane.header.ends, 1)
    for number in range(process.thread_count):
        thread = &process.threads[number]
        # Whoever has paused it may be gone.
        store(&thread.worker.slot.paused, 0)
        # Again and again: one may have looked at `ends` just before, and wait since.
        while not load(&thread.is_over):
            pthread_kill(thread.thread, SIGUSR1)
            usleep(WAKE_MICROSECONDS)
        pthread_join(thread.thread, NULL)
        failed = failed or thread.failed
    close(process.plane.sync_fd)
    if process.has_sync_thread:
        pthread_join(process.sync_thread, NULL)
    return failed


def stay_in_memory() -> int:
    """Keep this process's memory, and let it wait for no file system to get more; 0 or an errno.

    For a process that a mount needs to answer: memory that is needed to give memory back must not
    wait for that itself. Source: prctl(2), PR_SET_IO_FLUSHER; mlockall(2).
    """
    cdef int refused = become_io_flusher()
    return lock_memory(NULL, 0) or refused


def run(int fuse_fd, int shared_fd, int pool_fd, int forward_fd, list raw_fds, *, int map_flags,
        uint32_t max_write, int max_background, int queue_count, int depth,
        int reader_count, bint has_files) -> int:
    """Serve one mount until it ends; 0 or an errno.

    `queue_count` is the number of possible CPUs for the transport uring, and 0 for the other;
    `depth` the requests of each that may be under way; `reader_count` the threads that read
    /dev/fuse; `raw_fds` are for what needs no pyfuse3: the first for everybody, the others for a
    queue each, as far as there are any; with `has_files`, umask is the control plane's business,
    which knows of default ACLs, and so are privileges that go with a change.
    `max_write` is in bytes.
    """
    cdef process_t process
    cdef int failed, number
    cdef bint has_own
    cdef thread_t *thread
    cdef worker_t worker
    memset(&process, 0, sizeof(process))
    failed = attach(&process.plane, shared_fd, pool_fd, map_flags)
    if failed:
        return failed
    process.plane.fuse_fd, process.plane.forward_fd = fuse_fd, forward_fd
    process.plane.max_write, process.raw_fd = max_write, raw_fds[0]
    process.buffer_bytes = max_write + 2 * HEADERS_BYTES
    process.buffer = <uint8_t *>calloc(1, process.buffer_bytes)
    process.queue_count, process.thread_count = queue_count, queue_count + reader_count
    process.queues = <queue_t *>calloc(queue_count + 1, sizeof(queue_t))
    process.threads = <thread_t *>calloc(process.thread_count, sizeof(thread_t))
    for number in range(process.thread_count):
        thread = &process.threads[number]
        worker.plane, worker.slot, worker.now_ns = &process.plane, slot_of(&process.plane, number), 0
        has_own = number < queue_count and number + 1 < len(raw_fds)
        worker.raw_fd = raw_fds[number + 1 if has_own else 0]
        thread.worker = worker
        if number < queue_count:
            thread.queue = &process.queues[number]
            failed = failed or set_up_queue(thread.queue, worker, number, depth, has_own)
    if failed or catch_faults():
        return failed or EINVAL
    become_wakeable()
    with nogil:
        failed = handshake(&process, max_background, has_files)
        if not failed:
            # Where this is refused, the control plane has said so: see `stay_in_memory`.
            become_io_flusher()
            failed = start(&process)
            if not failed:
                lock_memory(process.plane.pool, process.plane.mapped_bytes)
                route(&process)
            failed = stop(&process) or failed
    return failed
