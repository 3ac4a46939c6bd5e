"""Operations on names: the lock, the decision of each, and what it takes from the reserves.

Invariants:
- a worker holds the lock for one operation, within a section, and waits for it in none;
- a decision has the slot, the frames and the handle before they leave their stacks, and has them
  until they are back there. So what is in a decision and on its stack, too, is there once;
- what was flushed is fenced before the lock is free, since a fence orders the flushes of its own
  processor alone, and the next holder, on another one, overwrites the journal.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.time cimport CLOCK_MONOTONIC
from posix.unistd cimport usleep

from pmemfs.dataplane cimport memory
from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.memory cimport load, now_ns, pause, peek, put, put_32, run_guarded, store
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *
from pmemfs.dataplane.transport cimport iovec
from pmemfs.medium.writeback cimport wait_for_write_back

cdef enum:
    STACK_ROOM = 1 << NAMES_STACK_SHIFT
    # With more on a stack, the control plane takes some back.
    HIGH_RESERVE = 3 << (NAMES_STACK_SHIFT - 2)
    # How long a worker that reads a long log leaves the lock alone, for the others.
    GIVE_WAY_PAUSES = 200
    # How long a worker waits for the lock: about what the control plane would take. And how long it
    # does not wait after it did so in vain, because the control plane has much to do.
    NAMES_WAIT_NS = 500000
    LISTING_WAIT_NS = 2000000
    NAMES_HASTE_NS = 5000000
    NAMES_NAP_US = 20

# In the number of a request: the kernel has given it to somebody before, who may have carried it out.
cdef uint64_t RESENT = <uint64_t>1 << 63


cdef inline uint64_t holder_of(worker_t *worker) noexcept nogil:
    """What a worker writes into the lock."""
    cdef plane_t *plane = worker.plane
    return 1 + <uint64_t>(<uint8_t *>worker.slot - plane.shared
                          - plane.header.slots_offset) // SLOT_BYTES


cdef bint take_names(worker_t *worker) noexcept nogil:
    """Try to take the lock of names; False: hand over."""
    cdef names_t *names = worker.plane.names
    cdef names_head_t *head
    cdef uint64_t holder = 0
    cdef uint64_t until = 0
    if names == NULL or not load(&names.head.on):
        return False
    head = names.head
    while not memory.swap(&head.holder, &holder, holder_of(worker)):
        # Another worker is done in a few us. The control plane may take much longer, and so does a
        # worker that has lost its CPU.
        until = until or now_ns(CLOCK_MONOTONIC) + LOCK_SPIN_NS
        while 0 < holder < CONTROL_HOLDER and now_ns(CLOCK_MONOTONIC) < until:
            pause()
            holder = peek(&head.holder)
        if holder:
            return False
    if not load(&head.on) or load(&head.failed):
        # It was switched off on the way here.
        free_names(worker)
        return False
    names.takes += 1
    return True


cdef bint wait_for_names(worker_t *worker, const request_t *request) noexcept nogil:
    """Wait a little, in no section, for whoever has the lock; whether it is free then.

    What is handed over keeps the control plane awake, which has the lock then. So without this,
    requests of two callers are handed over because of each other.
    """
    cdef names_t *names = worker.plane.names
    cdef uint64_t began_ns = now_ns(CLOCK_MONOTONIC)
    cdef uint64_t at_ns = began_ns
    cdef bint is_listing = request.head.opcode in (FUSE_READDIR, FUSE_READDIRPLUS)
    cdef uint64_t until_ns = began_ns + (LISTING_WAIT_NS if is_listing else NAMES_WAIT_NS)
    if not load(&names.head.on):
        return False
    if began_ns < worker.hasty_until_ns and not is_listing:
        return False
    end_section(worker.slot)
    while peek(&names.head.holder) and at_ns < until_ns:
        usleep(NAMES_NAP_US)
        at_ns = now_ns(CLOCK_MONOTONIC)
    begin_section(worker.slot)
    if not peek(&names.head.holder):
        return True
    worker.hasty_until_ns = at_ns + NAMES_HASTE_NS
    return False


cdef void free_names(worker_t *worker) noexcept nogil:
    """Free the lock, if this worker holds it."""
    cdef names_head_t *head = worker.plane.names.head
    if load(&head.holder) != holder_of(worker):
        return
    if worker.plane.header.durability == DURABILITY_CACHE_LINES:
        wait_for_write_back()
    store(&head.holder, 0)


cdef bint may_serve_names(worker_t *worker, const request_t *request) noexcept nogil:
    """Whether a request may be tried under the lock of names: not if it was given to somebody
    before, because only the control plane knows what became of it."""
    cdef names_t *names = worker.plane.names
    return (names != NULL and load(&names.head.on) and not request.is_left
            and not request.head.unique & RESENT)


cdef verdict_t serve_named(worker_t *worker, request_t *request,
                           operation_t operation) noexcept nogil:
    """Carry out an operation on names, if the lock is free. It is within a section, of its own if
    the caller has begun none."""
    cdef names_change_t change
    # Before the lock is taken: whoever has paused this worker may be waiting for the lock.
    cdef bint has_section = worker.slot.section & 1
    change.verdict = FORWARD
    change.operation = operation
    if not may_serve_names(worker, request):
        return FORWARD
    worker.reads_on = True
    while change.verdict == FORWARD and worker.reads_on:
        worker.reads_on = False
        if not has_section:
            begin_section(worker.slot)
        if take_names(worker) or (wait_for_names(worker, request) and take_names(worker)):
            run_change(&change, worker, request)
            free_names(worker)
        elif load(&worker.plane.names.head.on):
            memory.add(&worker.plane.names.head.busy, 1)
        if not has_section:
            end_section(worker.slot)
        if worker.reads_on and worker.may_put_off and wants_reply(request.head):
            return LATER
        if worker.reads_on:
            give_way()
    if change.verdict == FORWARD:
        request.error, request.answer_bytes = 0, 0
    else:
        wake_control(worker)
    return change.verdict


cdef void run_change(names_change_t *change, worker_t *worker, request_t *request) noexcept nogil:
    """Carry out an operation under the lock, and put right what it leaves."""
    cdef names_t *names = worker.plane.names
    change.worker, change.names, change.request = worker, names, request
    change.decision = names.decisions + (holder_of(worker) - 1)
    change.has_begun = change.needs_journal = change.is_unfinished = False
    change.stage = STAGE_OPEN
    change.addition_count = change.word_count = change.changed_count = 0
    change.slot_offset = 0
    change.slot_bytes = change.records_bytes = 0
    names.is_short = False
    if not run_guarded(run_operation, change):
        change.verdict = FORWARD
    if names.is_short and change.verdict == FORWARD and not worker.reads_on:
        put(&names.head.short, peek(&names.head.short) + 1)
    forget_rewritten(change)
    if change.stage == STAGE_OPEN and change.verdict == FORWARD and change.has_begun:
        put_back(change)
        put(&change.decision.number, 0)
        store(&change.decision.state, 0)
    elif change.stage != STAGE_OPEN and change.verdict == FORWARD:
        # What is stored differs from what is known, or only the next mount can tell. So nothing may
        # build on it.
        store(&names.head.failed, 1)
        change.verdict = refuse(request, EIO)


cdef void forget_rewritten(names_change_t *change) noexcept nogil:
    """What is known of a log that was written anew says where records lay before. The operation
    itself may still have used it."""
    cdef uint32_t number
    for number in range(change.addition_count if change.stage != STAGE_OPEN else 0):
        if change.additions[number].is_rewritten:
            forget_known(change.names, change.additions[number].known.number)


cdef void run_operation(void *argument) noexcept nogil:
    cdef names_change_t *change = <names_change_t *>argument
    change.verdict = change.operation(change)


cdef void give_way() noexcept nogil:
    """Leave the lock free for long enough that somebody else gets it."""
    cdef int count
    for count in range(GIVE_WAY_PAUSES):
        pause()


cdef void begin_change(names_change_t *change) noexcept nogil:
    """Say in the decision which request is about to be carried out. Before the first pop."""
    cdef names_decision_t *decision = change.decision
    change.has_begun = True
    change.now_ns = names_now(change.names)
    store(&decision.state, 0)
    put(&decision.number, change.request.head.unique)
    put(&decision.opcode, change.request.head.opcode)
    put(&decision.offset, 0)
    put(&decision.value, 0)
    put(&decision.inode, 0)
    put(&decision.slot, 0)
    put(&decision.handle, 0)
    put(&decision.popped_count, 0)
    put_32(&decision.error, 0)
    put_32(&decision.length, 0)
    step(change.worker.plane)
    store(&decision.state, 1)


cdef inline void note_answer(names_change_t *change) noexcept nogil:
    """Put the answer into the decision."""
    cdef names_decision_t *decision = change.decision
    cdef request_t *request = change.request
    memcpy(decision.answer, request.answer, request.answer_bytes)
    put_32(&decision.length, request.answer_bytes)
    put_32(&decision.error, <uint32_t>request.error)


cdef void hold_once(names_change_t *change, uint64_t number, uint64_t *count) noexcept nogil:
    """Hold an inode once more. The decision says how often it was held before, so that this is taken
    back if the process is killed before the operation is carried out."""
    put(&change.decision.value, count[0])
    store(&change.decision.inode, number)
    step(change.worker.plane)
    store(count, count[0] + 1)
    step(change.worker.plane)


cdef void carried_out(names_change_t *change) noexcept nogil:
    """An operation that stores nothing in the pool, or is unfinished after its commit, is carried
    out, and has its answer."""
    step(change.worker.plane)
    note_answer(change)
    store(&change.decision.state, 2)
    change.stage = STAGE_DONE
    step(change.worker.plane)


cdef verdict_t fail_named(names_change_t *change, int error) noexcept nogil:
    """An error is the answer, and nothing has changed."""
    refuse(change.request, error)
    if change.has_begun:
        put_back(change)
    else:
        begin_change(change)
    carried_out(change)
    return ANSWER


# The reserves

cdef uint64_t pop_slot(names_change_t *change) noexcept nogil:
    """Take a slot for a new inode, with its generation; 0: hand over."""
    cdef names_head_t *head = change.names.head
    while head.slot_count:
        change.slot_offset = change.names.slots[head.slot_count - 1]
        if not run_guarded(read_free_slot, change):
            break
        if change.slot_offset:
            # Before the slot, so that one that is noted has the number of its inode there.
            put(&change.decision.inode, change.slot_offset // INODE_SLOT_BYTES)
            store(&change.decision.slot, change.slot_offset)
            step(change.worker.plane)
            store(&head.slot_count, head.slot_count - 1)
            step(change.worker.plane)
            return change.slot_offset
        # As in `InodeTable.take`: a slot that is not free is no slot for anybody.
        store(&head.slot_count, head.slot_count - 1)
    change.slot_offset = 0
    return 0


cdef void read_free_slot(void *argument) noexcept nogil:
    """As `media.inode.read_free_slot`; the offset becomes 0 if the slot is not free."""
    cdef names_change_t *change = <names_change_t *>argument
    cdef inode_head_t *head = <inode_head_t *>(change.worker.plane.pool + change.slot_offset)
    if head.tail:
        change.slot_offset = 0
    else:
        change.slot_generation = head.generation + 1 if head.magic == INODE_MAGIC else 1


cdef uint64_t pop_handle(names_change_t *change) noexcept nogil:
    """Take a handle; 0: hand over."""
    cdef names_head_t *head = change.names.head
    cdef uint64_t handle
    if not head.handle_count:
        return 0
    handle = change.names.handles[head.handle_count - 1]
    store(&change.decision.handle, handle)
    step(change.worker.plane)
    store(&head.handle_count, head.handle_count - 1)
    step(change.worker.plane)
    return handle


cdef bint pop_frames(names_change_t *change, uint32_t count, uint64_t *pfns) noexcept nogil:
    """Take frames besides those that were taken; False: hand over."""
    cdef names_head_t *head = change.names.head
    cdef names_decision_t *decision = change.decision
    cdef uint64_t *popped = <uint64_t *>decision.popped
    cdef uint64_t before = decision.popped_count
    cdef uint32_t number
    if head.frame_stack_count < count or before + count > NAMES_POPPED:
        return False
    for number in range(count):
        pfns[number] = change.names.frames[head.frame_stack_count - 1 - number]
        put(&popped[before + number], pfns[number])
    store(&decision.popped_count, before + count)
    step(change.worker.plane)
    store(&head.frame_stack_count, head.frame_stack_count - count)
    step(change.worker.plane)
    return True


cdef bint pop_run(names_change_t *change, uint32_t count, uint64_t *pfns) noexcept nogil:
    """As `pop_frames`: frames that lie side by side, if there are such ones near the top."""
    cdef names_head_t *head = change.names.head
    cdef names_decision_t *decision = change.decision
    cdef uint64_t *popped = <uint64_t *>decision.popped
    cdef uint64_t before = decision.popped_count
    cdef uint64_t[NAMES_POPPED] taken
    cdef uint32_t above = frames_above_run(change, count)
    cdef uint32_t number
    if not above:
        return pop_frames(change, count, pfns)
    if not pop_frames(change, above + count, taken):
        return False
    # Those above go back first, and then the decision forgets them.
    for number in range(above):
        put(&change.names.frames[head.frame_stack_count + number], taken[above - 1 - number])
    store(&head.frame_stack_count, head.frame_stack_count + above)
    step(change.worker.plane)
    for number in range(count):
        pfns[number] = taken[above + number]
        store(&popped[before + number], pfns[number])
        step(change.worker.plane)
    store(&decision.popped_count, before + count)
    step(change.worker.plane)
    return True


cdef uint32_t frames_above_run(names_change_t *change, uint32_t count) noexcept nogil:
    """How many frames lie on top of the first so many that ascend by ones; 0 also if there are
    none that a decision has room for."""
    cdef names_head_t *head = change.names.head
    cdef uint64_t known = min(<uint64_t>head.frame_stack_count,
                              NAMES_POPPED - change.decision.popped_count)
    cdef uint32_t length = 0
    cdef uint64_t depth, pfn
    cdef uint64_t last = 0
    for depth in range(known):
        pfn = change.names.frames[head.frame_stack_count - 1 - depth]
        length = length + 1 if length and pfn == last + 1 else 1
        if length == count:
            return <uint32_t>depth + 1 - count
        last = pfn
    return 0


cdef bint push(uint64_t *stack, uint64_t *count, uint64_t value) noexcept nogil:
    if count[0] >= STACK_ROOM:
        return False
    put(&stack[count[0]], value)
    store(count, count[0] + 1)
    return True


cdef inline bint push_slot(names_t *names, uint64_t slot_offset) noexcept nogil:
    """Give a slot back that is free, durably; False: there is no room."""
    return push(names.slots, &names.head.slot_count, slot_offset)


cdef inline bint push_frame(names_t *names, uint64_t pfn) noexcept nogil:
    return push(names.frames, &names.head.frame_stack_count, pfn)


cdef inline bint push_handle(names_t *names, uint64_t handle) noexcept nogil:
    return push(names.handles, &names.head.handle_count, handle)


cdef inline bint push_orphan(names_t *names, uint64_t number) noexcept nogil:
    """Let the control plane free an inode."""
    return push(names.orphans, &names.head.orphan_count, number)


cdef inline uint64_t room_for_frames(names_t *names) noexcept nogil:
    return STACK_ROOM - names.head.frame_stack_count


cdef inline uint64_t room_for_slots(names_t *names) noexcept nogil:
    return STACK_ROOM - names.head.slot_count


cdef void put_back(names_change_t *change) noexcept nogil:
    """Give back what was taken for an operation that is not carried out."""
    cdef names_decision_t *decision = change.decision
    cdef uint64_t *popped = <uint64_t *>decision.popped
    cdef uint64_t *count
    cdef uint64_t number
    if decision.handle:
        store(&open_place_of(change.worker.plane, decision.handle).inode, 0)
        push_handle(change.names, decision.handle)
        store(&decision.handle, 0)
    if decision.slot:
        count = count_of(change.worker.plane, decision.inode)
        if count != NULL:
            store(count, 0)
        push_slot(change.names, decision.slot)
        store(&decision.slot, 0)
    for number in range(decision.popped_count):
        # In the order in which they lay there, so that neighbours stay neighbours.
        push_frame(change.names, popped[decision.popped_count - 1 - number])
    store(&decision.popped_count, 0)


cdef inline bint needs_control(names_head_t *head) noexcept nogil:
    """Whether the control plane has to hand out more, to take back what was freed, or to free what
    workers could not."""
    return (head.slot_count < head.slots_low or head.frame_stack_count < head.frames_low
            or head.handle_count < head.handles_low or head.orphan_count
            or head.slot_count > HIGH_RESERVE or head.frame_stack_count > HIGH_RESERVE
            or head.handle_count > HIGH_RESERVE)


cdef void wake_control(worker_t *worker) noexcept nogil:
    """Ask the control plane to look at reserves and orphans, if it has to and was not asked."""
    cdef names_head_t *head = worker.plane.names.head
    cdef fuse_in_header message
    cdef iovec part
    cdef uint64_t none = 0
    if not needs_control(head):
        return
    if not memory.swap(&head.was_woken, &none, 1):
        return
    memset(&message, 0, sizeof(message))
    message.len, message.opcode = sizeof(message), NAMES_OPCODE
    part.iov_base, part.iov_len = &message, sizeof(message)
    # Where there is no room for this, the control plane is awake, and looks before it sleeps. To
    # wait for it here could be to wait for each other.
    if send_parts(worker, &part, 1, MSG_DONTWAIT):
        store(&head.was_woken, 0)
