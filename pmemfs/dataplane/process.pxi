"""The process of the data plane: its threads, from the kernel's first request to its last.

    main      the first request (INIT) and its reply; then it passes on the control plane's replies
    workers   one for each CPU: they serve requests
    sync      does msync for the FSYNCs that need it, once for all that wait
    notices   tells the kernel what changed: it may have to wait, so it serves no queue

The end comes from either side: the kernel has closed the connection, or the control plane is gone
or says so (`ends`). Whatever was begun is finished, except what waits for the control plane.
"""

from libc.errno cimport EINTR, EINVAL, ENOTCONN, errno
from libc.signal cimport SIGUSR1
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close, pipe, usleep

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.memory cimport catch_faults, load, peek, put, store
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.structures cimport HAND_AGAIN, HAVE_SECRETS, header_t
from pmemfs.dataplane.transport cimport HEADERS_BYTES
from pmemfs.dataplane.uring cimport io_uring, queue_t
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
    int poll(pollfd *wanted, unsigned long count, int timeout)

cdef extern from "sys/mman.h" nogil:
    int madvise(void *start, size_t length, int advice)
    enum: MADV_DONTFORK

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void *into, size_t length, int flags)

cdef extern from "unistd.h" nogil:
    ssize_t c_read "read"(int fd, void *data, size_t length)
    ssize_t c_write "write"(int fd, const void *data, size_t length)

cdef extern from "process.h" nogil:
    void nudge "pmemfs_nudge"(const char *path, int cpu, int count)
    void may_fence_others "pmemfs_may_fence_others"()
    void fence_others "pmemfs_fence_others"()
    void become_wakeable "pmemfs_wakeable"()
    void ignore_endings "pmemfs_ignore_endings"()
    int become_io_flusher "pmemfs_become_io_flusher"()
    int lock_memory "pmemfs_lock_memory"(const void *pool, size_t pool_bytes)
    long thread_id "pmemfs_thread_id"()
    void dump_nothing "pmemfs_dump_nothing"()
    ssize_t receive "pmemfs_receive"(int source, void *into, size_t length, int *fd)

cdef enum:
    SYNCS = 64
    WAKE_MICROSECONDS = 1000
    NOTICE_BYTES = 512

cdef struct thread_t:
    pthread_t thread
    worker_t worker
    # With the transport uring; NULL for a thread that reads /dev/fuse.
    queue_t *queue
    int failed
    uint64_t is_over

cdef struct process_t:
    plane_t plane
    thread_t *threads
    int thread_count
    queue_t *queues
    int queue_count
    io_uring idle_ring
    const char *mountpoint
    pthread_t sync_thread
    bint has_sync_thread
    int sync_reader
    uint8_t *buffer
    size_t buffer_bytes
    pthread_t notices_thread
    bint has_notices_thread
    int notices_fd


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
    """Make everything durable and answer all who wait for that, until the pipe is closed."""
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
        # The epoch opens before msync: a write that comes meanwhile belongs to the next epoch, so
        # its page stays dirty if this msync has missed it. One msync answers all that have waited.
        epoch = memory.add(&plane.header.write_epoch, 1)
        head.error = -finish_sync(
            plane, epoch, errno if synchronise(plane.pool, load(&plane.header.pool_bytes)) else 0)
        for position in range(received // 8):
            head.unique = waiting[position]
            reply(process, &head, NULL, 0)


cdef int reply(process_t *process, fuse_out_header *head, const void *data,
               uint32_t data_bytes) noexcept nogil:
    """Reply to a request that was handed over; 0 or errno. What answers no request goes by
    writev(2) always."""
    if (process.queue_count and head.unique
            and reply_uring(process.queues, process.queue_count, head, data, data_bytes)):
        return 0
    return reply_classic(process.plane.fuse_fd, head, data, data_bytes)


cdef int take_up(process_t *process) noexcept nogil:
    """Go on where a data plane was killed; 0 or errno."""
    cdef pollfd first
    cdef int failed = resend(process)
    first.fd, first.events = process.plane.fuse_fd, POLLIN
    # With the transport fd, an INIT that was not answered is forwarded as any other request. With
    # rings the kernel sends nothing else before it has the answer, and takes no entry.
    if failed or not process.queue_count or process.plane.header.greeted or poll(&first, 1, 0) != 1:
        return failed
    return handshake(process)


cdef int resend(process_t *process) noexcept nogil:
    """Let all requests that were read from /dev/fuse and not answered be read again; 0 or errno.

    No worker may have one of these: it would be carried out again, maybe after a later one.
    """
    cdef header_t *header = process.plane.header
    cdef fuse_out_header head
    cdef uint64_t handed_over = 0
    cdef int number
    if not process.queue_count:
        # What was handed over and not answered will be handed over and counted once more.
        for number in range(process.thread_count):
            handed_over += peek(&slot_of(&process.plane, number).handed_over)
        put(&header.replied, handed_over)
    head.error, head.unique = NOTIFY_RESEND, 0
    return reply_classic(process.plane.fuse_fd, &head, NULL, 0)


cdef void ask_again(process_t *process) noexcept nogil:
    """Hand over again what the predecessor of the control plane was handed."""
    cdef plane_t *plane = &process.plane
    cdef int number
    if process.queue_count:
        want_again(process.queues, process.queue_count)
        return
    store(&plane.stands, 1)
    # A worker stores `busy`, and then loads `stands`. Thanks to this it needs no fence in between:
    # it sees that word, or is seen to be busy.
    fence_others()
    for number in range(process.thread_count):
        while (load(&process.threads[number].worker.slot.busy)
               and not load(&process.threads[number].is_over)):
            usleep(PAUSE_MICROSECONDS)
    resend(process)
    store(&plane.stands, 0)


cdef int handshake(process_t *process) noexcept nogil:
    """Let the control plane answer INIT; 0 or errno."""
    cdef plane_t *plane = &process.plane
    cdef fuse_in_header *asked = <fuse_in_header *>process.buffer
    cdef uint64_t unique
    cdef fuse_out_header *head = <fuse_out_header *>process.buffer
    cdef int failed
    cdef ssize_t count = c_read(plane.fuse_fd, process.buffer, process.buffer_bytes)
    if count < 0:
        return errno
    if count < <ssize_t>sizeof(fuse_in_header) or asked.opcode != FUSE_INIT:
        return EINVAL
    if c_write(plane.forward_fd, process.buffer, <size_t>count) != count:
        return errno
    unique = asked.unique
    while True:
        count = receive_reply(process)
        if count < <ssize_t>sizeof(fuse_out_header):
            return errno if count < 0 else ENOTCONN
        if head.unique == unique:
            break
        # It answers what the kernel has asked a data plane that was killed.
    failed = -head.error
    count -= sizeof(fuse_out_header)
    failed = reply_classic(plane.fuse_fd, head, process.buffer + sizeof(fuse_out_header),
                           <uint32_t>count) or failed
    if not failed:
        put(&plane.header.greeted, 1)
    return failed


cdef void *run_notices(void *argument) noexcept nogil:
    """Tell the kernel what the control plane asks for, in order, and send back what came of it.

    In front of each notice stands its number, which comes back with the errno.
    """
    cdef process_t *process = <process_t *>argument
    cdef char notice[NOTICE_BYTES]
    cdef uint64_t answer[2]
    cdef ssize_t count
    while True:
        count = recv(process.notices_fd, notice, NOTICE_BYTES, 0)
        if count < 0 and errno == EINTR:
            continue
        if count < <ssize_t>sizeof(uint64_t):
            return NULL
        memcpy(answer, notice, sizeof(uint64_t))
        count -= sizeof(uint64_t)
        answer[1] = 0
        if c_write(process.plane.fuse_fd, notice + sizeof(uint64_t), <size_t>count) < 0:
            answer[1] = <uint64_t>errno
        if c_write(process.notices_fd, answer, sizeof(answer)) < 0:
            return NULL


cdef ssize_t receive_reply(process_t *process) noexcept nogil:
    """As recv(2): the next message of the control plane for workers without a socket of their own.
    If it comes with secret memory, that is there when this returns."""
    cdef int fd
    cdef ssize_t count = receive(process.plane.forward_fd, process.buffer, process.buffer_bytes,
                                 &fd)
    if fd >= 0:
        # A daemon that took over can't know whether its predecessor has sent it.
        if process.plane.secrets == NULL:
            take_secrets(process, fd)
            lock_memory(process.plane.pool, process.plane.mapped_bytes)
        close(fd)
    return count


cdef int take_secrets(process_t *process, int fd) noexcept nogil:
    """Have the keys of encrypted files from now on; 0 or errno. If it fails, requests for such
    files are forwarded."""
    dump_nothing()
    return have_secrets(&process.plane, fd)


cdef void route(process_t *process) noexcept nogil:
    """Pass on the replies for workers without a socket of their own, until the control plane or the
    connection is gone."""
    cdef fuse_out_header *head = <fuse_out_header *>process.buffer
    cdef uint8_t *data = process.buffer + sizeof(fuse_out_header)
    cdef ssize_t count
    while not load(&process.plane.header.ends):
        count = receive_reply(process)
        if count < 0 and errno == EINTR:
            continue
        if count <= 0:
            return
        if count < <ssize_t>sizeof(fuse_out_header):
            continue
        if head.error == HAND_AGAIN:
            ask_again(process)
        elif head.error == HAVE_SECRETS:
            continue
        elif (not reply(process, head, data, <uint32_t>(count - sizeof(fuse_out_header)))
              and head.unique):
            # Only this thread writes that word. The kernel refuses a reply if its request is about
            # to be handed over again; that was not answered yet.
            put(&process.plane.header.replied, process.plane.header.replied + 1)


cdef int start(process_t *process) noexcept nogil:
    cdef int number, ends[2]
    cdef int failed
    cdef plane_t *plane = &process.plane
    # With rings the only reader gets few requests, so it may block.
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
    failed = pthread_create(&process.notices_thread, NULL, run_notices, process)
    if failed:
        process.thread_count = 0
        return failed
    process.has_notices_thread = True
    for number in range(process.thread_count):
        failed = pthread_create(&process.threads[number].thread, NULL, run_worker,
                                &process.threads[number])
        if failed:
            # `stop` waits for the threads that exist.
            process.thread_count = number
            break
    return failed


cdef int stop(process_t *process) noexcept nogil:
    """Wait for all threads to end; the first error of one."""
    cdef int number
    cdef int failed = 0
    cdef thread_t *thread
    store(&process.plane.header.ends, 1)
    for number in range(process.thread_count):
        thread = &process.threads[number]
        # The control plane that has paused this worker may be gone.
        store(&thread.worker.slot.paused, 0)
        # Again and again, because a thread may have looked at `ends` just before the store, and
        # then begun to wait.
        while not load(&thread.is_over):
            pthread_kill(thread.thread, SIGUSR1)
            usleep(WAKE_MICROSECONDS)
        pthread_join(thread.thread, NULL)
        failed = failed or thread.failed
    close(process.plane.sync_fd)
    if process.has_sync_thread:
        pthread_join(process.sync_thread, NULL)
    shutdown(process.notices_fd, SHUT_RDWR)
    if process.has_notices_thread:
        pthread_join(process.notices_thread, NULL)
    return failed


def stay_in_memory() -> int:
    """Keep this process's memory, and let it wait for no file system to get more; 0 or an errno.

    This is for a process that must run before a mount can answer: if it needs memory, and memory
    comes back only by writing to the mount, it would wait for itself. Source: prctl(2),
    PR_SET_IO_FLUSHER; mlockall(2).
    """
    cdef int refused = become_io_flusher()
    return lock_memory(NULL, 0) or refused


def run(int fuse_fd, int shared_fd, int pool_fd, int notices_fd, list forward_fds, *, int map_flags,
        uint32_t max_write, int queue_count, int depth, int reader_count,
        int entries_fd=-1, int secrets_fd=-1, int resumes=0, bytes mountpoint not None=b"") -> int:
    """Serve one mount until it ends, and let no signal end it before; 0 or an errno.

    `queue_count` is the number of possible CPUs with the transport uring, and 0 with the other.
    `depth` is the number of requests of each queue that may be under way. `reader_count` threads
    read /dev/fuse. Requests are handed over on `forward_fds`: the first is for all workers, each
    other for one queue, if there are as many. On `notices_fd` comes what the kernel must be told.
    `max_write` is in bytes. Only if the memory of all rings is that of `entries_fd`, another data
    plane can go on with what is in them. `secrets_fd` is the secret memory, if there is one; it
    may also come later (`HAVE_SECRETS`).

    With `resumes`, a data plane of this mount was killed, and no thread of it lives any more. Then
    `mountpoint` is where the mount is.

    The word `ended` tells an end from a death to whoever is not the parent of this process.
    """
    cdef process_t process
    cdef int failed
    ignore_endings()
    memset(&process, 0, sizeof(process))
    failed = attach(&process.plane, shared_fd, pool_fd, map_flags)
    if failed:
        return failed
    put(&process.plane.header.ended, 0)
    process.plane.fuse_fd, process.plane.forward_fd = fuse_fd, forward_fds[0]
    process.plane.max_write, process.notices_fd = max_write, notices_fd
    process.buffer_bytes = max_write + 2 * HEADERS_BYTES
    process.buffer = <uint8_t *>calloc(1, process.buffer_bytes)
    process.queue_count, process.thread_count = queue_count, queue_count + reader_count
    process.queues = <queue_t *>calloc(queue_count + 1, sizeof(queue_t))
    process.threads = <thread_t *>calloc(process.thread_count, sizeof(thread_t))
    process.mountpoint = mountpoint
    failed = set_up_workers(&process, depth, forward_fds, entries_fd)
    if secrets_fd >= 0:
        take_secrets(&process, secrets_fd)
    if process.plane.header.has_files:
        have_packers(&process.plane)
    if not failed and catch_faults():
        failed = EINVAL
    if not failed:
        become_wakeable()
        may_fence_others()
        with nogil:
            failed = serve_mount(&process, resumes)
    store(&process.plane.header.ended, 1 + <uint64_t>failed)
    return failed


cdef int set_up_workers(process_t *process, int depth, list forward_fds, int entries_fd) except -1:
    """Set up all that workers need; 0 or errno. Each begins in a slot that no other is using."""
    cdef int number
    cdef int failed = 0
    cdef uint8_t *entries = NULL
    cdef bint has_own
    cdef thread_t *thread
    cdef worker_t worker
    memset(&worker, 0, sizeof(worker))
    if process.queue_count:
        failed = map_entries(process.plane.header, entries_fd, entries_bytes_of(
            process.queue_count, depth, process.plane.max_write), &entries)
        # Nothing ever happens in it; see uring.pxi.
        failed = failed or -io_uring_queue_init(1, &process.idle_ring, 0)
    for number in range(process.thread_count):
        thread = &process.threads[number]
        worker.plane, worker.slot = &process.plane, slot_of(&process.plane, number)
        has_own = number < process.queue_count and number + 1 < len(forward_fds)
        worker.forward_fd = forward_fds[number + 1 if has_own else 0]
        # A worker that was killed may have left these as they are in the middle of a request.
        put(&worker.slot.section, worker.slot.section + (worker.slot.section & 1))
        put(&worker.slot.busy, 0)
        put(&worker.slot.thread_id, 0)
        thread.worker = worker
        if number < process.queue_count:
            thread.queue = &process.queues[number]
            failed = failed or set_up_queue(
                thread.queue, worker, number, depth, has_own, entries, process.idle_ring.ring_fd)
    return failed


cdef void await_queues(process_t *process) noexcept nogil:
    """Wait until workers look at no entry any more that another thread may reply to."""
    cdef int number
    for number in range(process.queue_count):
        while (not load(&process.queues[number].has_begun)
               and not load(&process.threads[number].is_over)):
            usleep(PAUSE_MICROSECONDS)


cdef void nudge_all(process_t *process) noexcept nogil:
    """Let the kernel go on with what callers have asked while there was no data plane.

    It gives the next request of a queue only to an entry that is committed. So there is one request
    for each entry of each queue, from the queue's CPU; any of them may be held up by what it lets
    go on.
    """
    cdef int number
    # A child that had them mapped would keep the connection from ending, and the pool in use. If
    # all else has died, it would wait for ever, and with it all callers.
    madvise(process.plane.pool, process.plane.mapped_bytes, MADV_DONTFORK)
    io_uring_ring_dontfork(&process.idle_ring)
    for number in range(process.queue_count):
        io_uring_ring_dontfork(&process.queues[number].ring)
    for number in range(process.queue_count):
        nudge(process.mountpoint, number, <int>process.queues[number].entry_count)


cdef int serve_mount(process_t *process, bint resumes) noexcept nogil:
    """Serve until the mount ends, when all is set up; 0 or errno."""
    cdef int failed = take_up(process) if resumes else handshake(process)
    if failed:
        return failed
    # If this is refused, the control plane has said so; see `stay_in_memory`.
    become_io_flusher()
    failed = start(process)
    if not failed:
        lock_memory(process.plane.pool, process.plane.mapped_bytes)
        await_queues(process)
        if resumes:
            nudge_all(process)
        route(process)
    return stop(process) or failed
