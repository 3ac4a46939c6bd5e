"""The transport `uring`: FUSE over io_uring, with a queue for each possible CPU.

The kernel fills an entry of a queue with a request. The entry is the worker's until it commits a
reply, and the same command fetches the next request. What a killed data plane has left in entries
is told in entries.pxi. Invariants:
- only the worker of a queue submits to its ring, as the kernel demands;
- an entry whose request was handed over belongs to the replier alone, who finds it by the number of
  the request and fills it. The worker does this itself for replies on its own socket, which saves
  two wake-ups. Any other replier sends the entry's position to the worker's inbox, because it must
  not submit;
- whoever replies also hands over again, so nobody reads a request while a reply is put over it;
- a worker that is killed takes its entries back from the kernel first of all. For that its ring has
  one request that asks whether another ring, in which nothing ever happens, has completions: the
  kernel ends such requests, and with them all commands of the thread, when a thread begins to die.
  It cancels other commands only when the ring's last descriptor is gone, and fails the requests
  that it gives to the dead thread until then. Measured with three callers: 53 failed requests in
  150 kills without this, none in 450 with it. Source: io_uring_cancel_generic,
  io_req_track_inflight;
- what callers ask while no data plane has entries waits in the kernel, until a request of the same
  queue is committed. So `nudge` (process.pxi) makes some.

Source: Documentation/filesystems/fuse/fuse-io-uring.rst and fs/fuse/dev_uring.c of Linux 6.18.
"""

from libc.errno cimport EINTR, EINVAL, EIO, ENOMEM, ENOTCONN, errno
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME
from posix.unistd cimport pipe

from pmemfs.dataplane.entries cimport *
from pmemfs.dataplane.memory cimport load, now_ns, peek, put, store
from pmemfs.dataplane.plane cimport worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *
from pmemfs.dataplane.transport cimport SPIN_NS, iovec
from pmemfs.dataplane.uring cimport *

cdef extern from "liburing.h" nogil:
    cdef struct io_uring_sqe:
        uint64_t user_data

    cdef struct io_uring_cqe:
        uint64_t user_data
        int32_t res

    int io_uring_queue_init(unsigned entries, io_uring *ring, unsigned flags)
    int io_uring_register_files(io_uring *ring, const int *files, unsigned count)
    int io_uring_register_ring_fd(io_uring *ring)
    int io_uring_ring_dontfork(io_uring *ring)
    io_uring_sqe *io_uring_get_sqe(io_uring *ring)
    int io_uring_submit(io_uring *ring)
    int io_uring_submit_and_wait(io_uring *ring, unsigned count)
    unsigned io_uring_cq_ready(const io_uring *ring)
    unsigned io_uring_peek_batch_cqe(io_uring *ring, io_uring_cqe **cqes, unsigned count)
    void io_uring_cq_advance(io_uring *ring, unsigned count)
    void io_uring_prep_nop(io_uring_sqe *sqe)
    void io_uring_prep_read(io_uring_sqe *sqe, int fd, void *into, unsigned length, uint64_t offset)
    void io_uring_prep_poll_add(io_uring_sqe *sqe, int fd, unsigned events)
    void io_uring_prep_recv(io_uring_sqe *sqe, int fd, void *into, size_t length, int flags)
    enum:
        IORING_SETUP_SQE128
        IORING_SETUP_COOP_TASKRUN

cdef extern from "poll.h" nogil:
    enum:
        POLLIN

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "unistd.h" nogil:
    ssize_t c_write "write"(int fd, const void *data, size_t length)

cdef extern from "uring.h" nogil:
    void learn_place "pmemfs_learn_place"()
    void move_thread "pmemfs_move_thread"(int cpu, bint is_near)
    void *prepare_command "pmemfs_prepare_command"(io_uring_sqe *sqe, unsigned command,
                                                   const void *memory, unsigned count)

cdef enum:
    BATCH = 64
    AHEAD = 2
    # After so many requests a worker looks where it should run.
    WINDOW = 128
    LARGE_BYTES = 65536
    # How long to wait awake for the control plane's reply: an idle CPU would wake more slowly.
    REPLY_SPIN_NS = 100000

cdef uint64_t INBOX = <uint64_t>-1
cdef uint64_t REPLY = <uint64_t>-2
cdef uint64_t GUARD = <uint64_t>-3


cdef int set_up_queue(queue_t *queue, worker_t worker, int number, uint32_t depth,
                      bint has_own_socket, uint8_t *memory, int idle_ring) noexcept nogil:
    """Set up a ring and `depth` entries in the `memory` of all rings; 0 or errno.

    `idle_ring` is the descriptor of a ring that is never used.
    """
    cdef uint32_t max_write = worker.plane.max_write
    cdef uint32_t position
    cdef int ends[2]
    cdef int failed
    memory += number * entries_bytes_of(1, depth, max_write)
    if pipe(ends):
        return errno
    queue.worker = worker
    queue.worker.may_put_off = True
    queue.number = queue.place.cpu = number
    queue.inbox_reader, queue.inbox_writer = ends[0], ends[1]
    queue.idle_ring = idle_ring
    queue.entry_count = depth
    queue.entries = <entry_t *>calloc(depth, sizeof(entry_t))
    if has_own_socket:
        queue.reply = own_memory(reply_bytes(queue))
    if queue.entries == NULL or (has_own_socket and queue.reply == NULL):
        return ENOMEM
    for position in range(depth):
        lay_entry(&queue.entries[position], memory, memory + states_bytes_of(depth), position,
                  max_write)
    # Room for each entry's command, for the read of the inbox, the next reply, and the guard.
    failed = io_uring_queue_init(depth + 3, &queue.ring,
                                 IORING_SETUP_SQE128 | IORING_SETUP_COOP_TASKRUN)
    if failed:
        return -failed
    return -io_uring_register_files(&queue.ring, &worker.plane.fuse_fd, 1)


cdef int serve_queue(queue_t *queue) noexcept nogil:
    """Serve until all entries are gone with the connection, or `ends` is set; 0 or errno."""
    cdef io_uring_cqe *done[BATCH]
    cdef unsigned count, position
    cdef int failed
    cdef uint64_t tag
    cdef int32_t result, last_error = 0
    cdef uint64_t *ends = &queue.worker.plane.header.ends
    learn_place()
    io_uring_register_ring_fd(&queue.ring)
    failed = begin_entries(queue)
    if failed:
        return failed
    await_inbox(queue)
    await_reply(queue)
    queue.worker.now_ns = now_ns(CLOCK_REALTIME)
    for position in range(queue.entry_count):
        if queue.entries[position].is_left:
            take_left(queue, position)
    if queue.miss_count:
        hand_misses_over(queue)
    forget_keys(&queue.worker)
    tell_hot(&queue.worker)
    store(&queue.has_begun, 1)
    while queue.living and not load(ends):
        failed = await_requests(queue)
        if failed < 0 and failed != -EINTR:
            return -failed
        count = io_uring_peek_batch_cqe(&queue.ring, done, BATCH)
        queue.worker.now_ns = now_ns(CLOCK_REALTIME)
        for position in range(count):
            if position + 2 * AHEAD < count:
                expect_entry(queue, done[position + 2 * AHEAD], True)
            if position + AHEAD < count:
                expect_entry(queue, done[position + AHEAD], False)
            tag, result = done[position].user_data, done[position].res
            if tag == INBOX:
                empty_inbox(queue, result)
            elif tag == REPLY:
                take_reply(queue, result)
            elif tag == GUARD:
                continue
            elif result == 0:
                serve_entry(queue, <uint32_t>tag)
            elif result == -ENOENT:
                # A reply that the kernel has had already.
                submit_entry(queue, <uint32_t>tag, URING_REGISTER)
            else:
                queue.living -= 1
                last_error = result
        io_uring_cq_advance(&queue.ring, count)
        if queue.miss_count:
            hand_misses_over(queue)
        forget_keys(&queue.worker)
        tell_hot(&queue.worker)
        queue.place.requests += count
        queue.place.batches += 1
        if queue.place.requests >= WINDOW:
            choose_place(queue)
    if queue.living:
        return 0
    if last_error != -ENOTCONN:
        return -last_error
    end_all(queue.worker.plane)
    return 0


cdef inline int await_requests(queue_t *queue) noexcept nogil:
    """Submit, and return when there is work. If that pays, wait awake for a while first."""
    cdef slot_t *slot = queue.worker.slot
    cdef uint64_t until
    cdef int failed = io_uring_submit(&queue.ring)
    if failed < 0 or io_uring_cq_ready(&queue.ring):
        return failed
    if may_wait_awake(&queue.patience):
        until = now_ns(CLOCK_MONOTONIC) + (REPLY_SPIN_NS if queue.awaited else SPIN_NS)
        while now_ns(CLOCK_MONOTONIC) < until:
            # Another thread that wants this CPU gets it. On the way back the kernel delivers
            # requests.
            sched_yield()
            if io_uring_cq_ready(&queue.ring):
                queue.patience.failures = 0
                put(&slot.spins, slot.spins + 1)
                return 0
        give_up(&queue.patience)
    put(&slot.sleeps, slot.sleeps + 1)
    return io_uring_submit_and_wait(&queue.ring, 1)


cdef int begin_entries(queue_t *queue) noexcept nogil:
    """Give the kernel all entries but those whose requests have to be served first; 0 or errno."""
    cdef uint32_t position
    cdef entry_t *entry
    cdef outlook_t outlook
    cdef int failed
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&queue.ring)
    memset(sqe, 0, 128)
    io_uring_prep_poll_add(sqe, queue.idle_ring, POLLIN)
    sqe.user_data = GUARD
    for position in range(queue.entry_count):
        entry = &queue.entries[position]
        outlook = outlook_of(entry)
        if outlook == SERVE_LEFT or outlook == HAND_LEFT:
            entry.is_left = True
            continue
        # A reply of the control plane may come to a request that is answered already.
        store(&entry.state.pending, 0)
        if outlook == REGISTER_ENTRY:
            submit_entry(queue, position, URING_REGISTER)
            continue
        if outlook == FAIL_LEFT:
            prepare_reply(entry, entry.header.entry.commit_id, -EIO, 0, False)
        put_reply(entry)
        submit_entry(queue, position, URING_COMMIT_AND_FETCH)
    queue.living = queue.entry_count
    failed = io_uring_submit(&queue.ring)
    return -failed if failed < 0 and failed != -EINTR else 0


cdef void take_left(queue_t *queue, uint32_t position) noexcept nogil:
    """Go on with a request that a worker has left who was killed."""
    cdef entry_t *entry = &queue.entries[position]
    cdef slot_t *slot = queue.worker.slot
    cdef bint was_missed = (load(&entry.state.pending) == entry.header.entry.commit_id
                            and entry.state.handed_to == HANDED_MISSES)
    if outlook_of(entry) == HAND_LEFT:
        entry.is_left = False
        if hand_again(queue, position) and queue.reply != NULL:
            queue.awaited += 1
        return
    store(&entry.state.pending, 0)
    if was_missed:
        # It is counted once more if it is missed once more.
        put(&slot.replied, slot.replied + 1)
    # It tells `serve` so.
    serve_entry(queue, position)
    entry.is_left = False


cdef bint hand_again(queue_t *queue, uint32_t position) noexcept nogil:
    """Hand a request over to the control plane once more. If that fails, it is answered, and False
    is returned."""
    cdef entry_t *entry = &queue.entries[position]
    cdef fuse_in_header head = (<fuse_in_header *>entry.header.in_out)[0]
    cdef request_t request
    cdef int failed = EIO
    if take_again(entry, &head, &request, queue.worker.plane.max_write):
        failed = send_request(&queue.worker, &request)
    if failed:
        fill_entry(entry, head.unique, -failed, NULL, 0, 0)
        if queue.reply != NULL:
            submit_entry(queue, position, URING_COMMIT_AND_FETCH)
        else:
            c_write(queue.inbox_writer, &position, 4)
    return not failed


cdef void hand_all_again(queue_t *queue) noexcept nogil:
    """The control plane is a new one: hand over what its predecessor has not answered."""
    cdef slot_t *slot = queue.worker.slot
    cdef uint32_t position
    cdef entry_t *entry
    cdef fuse_in_header head
    cdef request_t request
    if queue.miss_count:
        hand_misses_over(queue)
    for position in range(queue.entry_count):
        entry = &queue.entries[position]
        if not load(&entry.state.pending):
            continue
        if entry.state.handed_to == HANDED_CONTROL:
            hand_again(queue, position)
        elif entry.state.handed_to == HANDED_MISSES:
            head = (<fuse_in_header *>entry.header.in_out)[0]
            take_apart(entry, &head, &request, queue.worker.plane.max_write)
            # Counted twice, and then once not at all.
            put(&slot.replied, slot.replied + 1)
            queue.awaited -= 1
            note_miss(queue, entry, &request)


cdef void choose_place(queue_t *queue) noexcept nogil:
    """Run on the CPU whose callers this queue serves, or wherever there is room.

    Measured: on another CPU, the work of one caller and of this thread overlap, and a wake-up finds
    an idle CPU. But many callers are each served best on their own CPU, and so is a caller that
    moves much, because of the caches.
    """
    cdef place_t *place = &queue.place
    cdef header_t *header = queue.worker.plane.header
    cdef uint64_t others = 0
    cdef uint64_t number
    cdef bint is_alone, is_near
    for number in range(header.worker_count):
        if number != <uint64_t>queue.number:
            others += peek(&slot_of(queue.worker.plane, <int>number).section)
    # A section word rises by two for a request, or by four if the request was expected before.
    is_alone = others - place.others < place.requests
    is_near = place.moved_bytes > <uint64_t>place.requests * LARGE_BYTES
    if place.requests > place.batches * 2 and not is_alone:
        is_near = True
    if is_near != place.is_near:
        place.is_near = is_near
        move_thread(place.cpu, is_near)
    place.others = others
    place.moved_bytes = 0
    place.requests = place.batches = 0


cdef void submit_entry(queue_t *queue, uint32_t position, unsigned command) noexcept nogil:
    cdef entry_t *entry = &queue.entries[position]
    cdef bint is_new = command == URING_REGISTER
    # The ring has room for each entry's command, and an entry is submitted once at a time.
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&queue.ring)
    cdef uring_command_t *wanted = <uring_command_t *>prepare_command(
        sqe, command, entry.memory if is_new else NULL, 2 if is_new else 0)
    sqe.user_data = position
    wanted.qid = <uint16_t>queue.number
    wanted.commit_id = 0 if is_new else entry.header.entry.commit_id


cdef inline void expect_entry(queue_t *queue, io_uring_cqe *done, bint is_soon) noexcept nogil:
    cdef entry_t *entry
    cdef fuse_in_header *head
    if done.user_data < queue.entry_count and done.res == 0:
        entry = &queue.entries[done.user_data]
        head = <fuse_in_header *>entry.header.in_out
        if is_soon:
            expect_soon(&queue.worker, head, <uint8_t *>entry.header.op_in)
        else:
            expect(&queue.worker, head, <uint8_t *>entry.header.op_in)


cdef void serve_entry(queue_t *queue, uint32_t position) noexcept nogil:
    cdef entry_t *entry = &queue.entries[position]
    cdef worker_t *worker = &queue.worker
    # A copy, because the reply is written over the head of the request.
    cdef fuse_in_header head = (<fuse_in_header *>entry.header.in_out)[0]
    cdef uint64_t since = worker.now_ns
    cdef request_t request
    cdef verdict_t verdict
    cdef bint is_sound = take_apart(entry, &head, &request, worker.plane.max_write)
    if is_sound:
        verdict = serve(worker, &request)
    else:
        verdict = ANSWER
        request.error, request.answer_bytes, request.moved_bytes = EINVAL, 0, 0
    if verdict == LATER:
        put_off(queue, position)
        return
    if verdict != ANSWER and not wants_reply(&head):
        # The kernel sends a FORGET here if it can't use what it was told of an inode, and its
        # caller waits until the entry comes back. So the entry is committed at once.
        prepare_reply(entry, head.unique, 0, 0, False)
        if verdict != DROP:
            hand_over(worker, &request, verdict)
        request.error = 0
        put_reply(entry)
        submit_entry(queue, position, URING_COMMIT_AND_FETCH)
    elif verdict == FORWARD and request.is_missed and may_be_brought(queue):
        note_miss(queue, entry, &request)
        return
    elif verdict != ANSWER:
        note_pending(entry, head.unique, HANDED_SYNC if verdict == SYNC else HANDED_CONTROL)
        request.error = hand_over(worker, &request, verdict)
        if request.error:
            verdict = ANSWER
            store(&entry.state.pending, 0)
        elif verdict == FORWARD and queue.reply != NULL:
            queue.awaited += 1
    if verdict == ANSWER:
        answer_entry(entry, &request)
        submit_entry(queue, position, URING_COMMIT_AND_FETCH)
    worker.now_ns = now_ns(CLOCK_REALTIME)
    account(worker, &request, verdict, since)
    queue.place.moved_bytes += request.moved_bytes


cdef void put_off(queue_t *queue, uint32_t position) noexcept nogil:
    """Serve an entry again after all that has come meanwhile: as if it came once more."""
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&queue.ring)
    memset(sqe, 0, 128)
    io_uring_prep_nop(sqe)
    sqe.user_data = position


cdef inline bint may_be_brought(queue_t *queue) noexcept nogil:
    """Whether the control plane takes one more read of blocks that are not there."""
    return (queue.reply != NULL and queue.miss_count < MISSES_ROOM
            and load(&queue.worker.plane.header.cache_misses))


cdef void note_miss(queue_t *queue, entry_t *entry, request_t *request) noexcept nogil:
    """Let the blocks of a read be brought; then it is served again, from its entry."""
    cdef miss_t *miss = &queue.misses[queue.miss_count]
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    miss.unique, miss.pid = request.head.unique, request.head.pid
    miss.offset_bytes, miss.length_bytes = wanted.offset, wanted.size
    entry.since_ns = queue.worker.now_ns
    note_pending(entry, miss.unique, HANDED_MISSES)
    queue.miss_count += 1


cdef void hand_misses_over(queue_t *queue) noexcept nogil:
    """Give all reads that were noted to the control plane, by one message."""
    cdef worker_t *worker = &queue.worker
    cdef fuse_in_header head
    cdef iovec parts[2]
    cdef uint32_t number, position
    cdef int failed
    memset(&head, 0, sizeof(head))
    head.opcode = MISSES_OPCODE
    parts[0].iov_base, parts[0].iov_len = &head, sizeof(head)
    parts[1].iov_base, parts[1].iov_len = queue.misses, queue.miss_count * sizeof(miss_t)
    head.len = <uint32_t>(parts[0].iov_len + parts[1].iov_len)
    failed = send_parts(worker, parts, 2)
    if not failed:
        put(&worker.slot.handed_over, worker.slot.handed_over + queue.miss_count)
        queue.awaited += queue.miss_count
    for number in range(queue.miss_count if failed else 0):
        if fill_pending(queue, queue.misses[number].unique, -failed, NULL, 0, &position):
            submit_entry(queue, position, URING_COMMIT_AND_FETCH)
    queue.miss_count = 0


cdef void serve_again(queue_t *queue, const uint64_t *uniques, uint32_t count) noexcept nogil:
    """Serve reads whose blocks were brought. What is still not there goes the usual way."""
    cdef worker_t *worker = &queue.worker
    cdef uint32_t number, position
    cdef entry_t *entry
    cdef fuse_in_header head
    cdef request_t request
    cdef verdict_t verdict
    for number in range(count):
        entry = find_pending(queue, uniques[number], &position)
        if entry == NULL:
            continue
        # Both parts are as they came, since nothing was answered.
        head = (<fuse_in_header *>entry.header.in_out)[0]
        take_apart(entry, &head, &request, worker.plane.max_write)
        request.is_again = True
        put(&worker.slot.replied, worker.slot.replied + 1)
        verdict = serve(worker, &request)
        if verdict != ANSWER:
            note_pending(entry, head.unique, HANDED_CONTROL)
            request.error = hand_over(worker, &request, verdict)
        if verdict == ANSWER or request.error:
            store(&entry.state.pending, 0)
            queue.awaited -= 1
            answer_entry(entry, &request)
            submit_entry(queue, position, URING_COMMIT_AND_FETCH)
        worker.now_ns = now_ns(CLOCK_REALTIME)
        account(worker, &request, verdict, entry.since_ns)


cdef void await_inbox(queue_t *queue) noexcept nogil:
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&queue.ring)
    memset(sqe, 0, 128)
    io_uring_prep_read(sqe, queue.inbox_reader, queue.inbox, sizeof(queue.inbox), 0)
    sqe.user_data = INBOX


cdef void empty_inbox(queue_t *queue, int32_t received_bytes) noexcept nogil:
    cdef uint32_t position
    for position in range(<uint32_t>max(received_bytes, 0) // 4):
        if queue.inbox[position] == AGAIN:
            hand_all_again(queue)
        else:
            submit_entry(queue, queue.inbox[position], URING_COMMIT_AND_FETCH)
    await_inbox(queue)


cdef void await_reply(queue_t *queue) noexcept nogil:
    cdef io_uring_sqe *sqe
    if queue.reply == NULL:
        return
    sqe = io_uring_get_sqe(&queue.ring)
    memset(sqe, 0, 128)
    io_uring_prep_recv(sqe, queue.worker.forward_fd, queue.reply, reply_bytes(queue), 0)
    sqe.user_data = REPLY


cdef inline uint32_t reply_bytes(queue_t *queue) noexcept nogil:
    """Room for the longest reply, and one byte to tell a longer reply from it."""
    return queue.worker.plane.max_write + <uint32_t>sizeof(fuse_out_header) + 1


cdef void take_reply(queue_t *queue, int32_t received_bytes) noexcept nogil:
    """Give the kernel a reply that came on the worker's own socket."""
    cdef fuse_out_header *head = <fuse_out_header *>queue.reply
    cdef uint8_t *data = queue.reply + sizeof(fuse_out_header)
    cdef uint32_t data_bytes, position
    if received_bytes <= 0 and received_bytes != -EINTR:
        # The control plane is gone, which the other sockets will show.
        return
    if received_bytes >= <int32_t>sizeof(fuse_out_header):
        data_bytes = <uint32_t>received_bytes - <uint32_t>sizeof(fuse_out_header)
        if head.error == SERVE_AGAIN:
            serve_again(queue, <const uint64_t *>data, data_bytes // sizeof(uint64_t))
        elif fill_pending(queue, head.unique, head.error, data, data_bytes, &position):
            queue.awaited -= 1
            put(&queue.worker.slot.replied, queue.worker.slot.replied + 1)
            submit_entry(queue, position, URING_COMMIT_AND_FETCH)
    await_reply(queue)


cdef entry_t *find_pending(queue_t *queue, uint64_t unique, uint32_t *found) noexcept nogil:
    """The entry that waits for the reply to a request; NULL if it belongs to no entry here."""
    cdef uint32_t position
    for position in range(queue.entry_count):
        if load(&queue.entries[position].state.pending) == unique:
            found[0] = position
            return &queue.entries[position]
    return NULL


cdef bint fill_pending(queue_t *queue, uint64_t unique, int32_t error, const void *data,
                       uint32_t data_bytes, uint32_t *found) noexcept nogil:
    """Fill the entry that waits for a reply, if it belongs to this queue."""
    cdef entry_t *entry = find_pending(queue, unique, found)
    if entry == NULL:
        return False
    fill_entry(entry, unique, error, data, data_bytes, queue.worker.plane.max_write)
    return True


cdef bint reply_uring(queue_t *queues, int queue_count, fuse_out_header *head, const void *data,
                      uint32_t data_bytes) noexcept nogil:
    """Reply to a request that was handed over; False if no entry waits for it."""
    cdef int number
    cdef uint32_t position
    for number in range(queue_count):
        if fill_pending(&queues[number], head.unique, head.error, data, data_bytes, &position):
            # A pipe has room for the positions of all entries, and takes each of them whole.
            return c_write(queues[number].inbox_writer, &position, 4) == 4
    return False


cdef void want_again(queue_t *queues, int queue_count) noexcept nogil:
    """Let each queue hand over again what is pending: by its worker if that is who replies."""
    cdef uint32_t again = AGAIN
    cdef int number
    for number in range(queue_count):
        if queues[number].reply == NULL:
            hand_all_again(&queues[number])
        else:
            c_write(queues[number].inbox_writer, &again, 4)
