"""Handles of files, holds of inodes, and freeing what nobody needs.

Invariants:
- a handle holds its inode: the hold comes before the handle, and goes after it;
- no handle is closed here that leaves frames behind the size of its file: only the control plane
  maps frames ahead, so it also takes them back;
- an inode is freed once nobody holds it and it has no name. Its frames and its slot come to others
  only if no page of them is held, no program has pinned any, and no worker can see a table of it.
  Otherwise a late write would land in another file. So the control plane frees all others;
- frames and slots are in a reserve only after the journal says durably that their inode is gone.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from pmemfs.dataplane cimport memory
from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.memory cimport load, load_8, run_guarded, store
from pmemfs.dataplane.names cimport known_extent_t, known_t, names_t
from pmemfs.dataplane.pages cimport memmap_t
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *

cdef extern from "fcntl.h" nogil:
    enum:
        O_TRUNC

cdef enum:
    # An inode with more frames than this is left to the control plane.
    MOST_FREED = 64
    OWNER_WORKER = 1

# Bit 63 is no part of a request's number.
cdef uint64_t NUMBER_MASK = ~<uint64_t>0 >> 1


# An inode without a name that is being freed.
cdef struct freed_t:
    names_change_t *change
    known_t *known
    uint64_t frames[MOST_FREED]
    uint32_t frame_count
    bint is_free


# OPEN and RELEASE

cdef verdict_t serve_open(worker_t *worker, request_t *request) noexcept nogil:
    """Answer OPEN of a file, unless that empties it."""
    return serve_named(worker, request, open_file)


cdef verdict_t open_file(names_change_t *change) noexcept nogil:
    """As `OpenFiles.open`."""
    cdef request_t *request = change.request
    cdef const fuse_open_in *wanted = <const fuse_open_in *>request.operation
    cdef fuse_open_out *out = <fuse_open_out *>request.answer
    cdef known_t *known
    cdef uint64_t *count
    cdef uint64_t handle
    if (request.operation_bytes < sizeof(fuse_open_in)
            or request.answer_room < sizeof(fuse_open_out) or wanted.flags & O_TRUNC):
        return FORWARD
    known = know(change.worker, request.head.nodeid)
    count = count_of(change.worker.plane, request.head.nodeid)
    if known == NULL or count == NULL or not known.is_plain or known.mode >> 12 != FILE_TYPE:
        return FORWARD
    begin_change(change)
    handle = pop_handle(change)
    if not handle:
        return FORWARD
    memset(out, 0, sizeof(fuse_open_out))
    out.fh = handle
    out.open_flags = <uint32_t>load(&change.names.head.open_flags)
    request.answer_bytes = sizeof(fuse_open_out)
    hold_once(change, known.number, count)
    fill_place(change, handle, known.number, HANDLE_FILE, wanted.flags)
    carried_out(change)
    return ANSWER


cdef void fill_place(names_change_t *change, uint64_t handle, uint64_t inode,
                     uint32_t kind, uint32_t flags) noexcept nogil:
    """Let a handle of the reserve stand for an open file, which is held for it already, or for a
    directory."""
    cdef open_place_t *place = open_place_of(change.worker.plane, handle)
    cdef const fuse_in_header *head = change.request.head
    place.handle = handle
    place.flags = flags
    place.kind = kind
    place.uid, place.gid, place.pid = head.uid, head.gid, head.pid
    place.number = head.unique & NUMBER_MASK
    place.owner = OWNER_WORKER
    # Last, because it makes the place count.
    store(&place.inode, inode)


cdef inline open_place_t *open_place_of(plane_t *plane, uint64_t handle) noexcept nogil:
    """The place for a handle, which may stand for something else by now."""
    cdef open_place_t *places = <open_place_t *>(plane.shared + plane.header.opens_offset)
    return &places[handle & ((1 << OPEN_PLACES_SHIFT) - 1)]


cdef verdict_t serve_release(worker_t *worker, request_t *request) noexcept nogil:
    """Answer RELEASE of a handle that was opened here."""
    return serve_named(worker, request, release_file)


cdef verdict_t release_file(names_change_t *change) noexcept nogil:
    """As `OpenFiles.close`."""
    cdef plane_t *plane = change.worker.plane
    cdef names_t *names = change.names
    cdef uint64_t number = change.request.head.nodeid
    cdef uint64_t *count = count_of(plane, number)
    cdef uint64_t handle
    cdef open_place_t *place
    if change.request.operation_bytes < sizeof(fuse_release_in):
        return FORWARD
    handle = (<const fuse_release_in *>change.request.operation).fh
    place = open_place_of(plane, handle)
    if (place.handle != handle or place.owner != OWNER_WORKER or place.kind != HANDLE_FILE
            or place.inode != number or not number or count == NULL
            or not has_room_for_one(names.head.handle_count)
            or not has_room_for_one(names.head.orphan_count)):
        return FORWARD
    if place.flags & O_ACCMODE and not is_trimmed(change, number):
        return FORWARD
    begin_change(change)
    store(&place.inode, 0)
    push_handle(names, handle + (<uint64_t>1 << OPEN_PLACES_SHIFT))
    drop_hold(count, 1)
    if count[0] or not free_unnamed(change, number):
        carried_out(change)
    return ANSWER


cdef inline bint has_room_for_one(uint64_t count) noexcept nogil:
    return count < (1 << NAMES_STACK_SHIFT)


cdef bint is_trimmed(names_change_t *change, uint64_t number) noexcept nogil:
    """Whether a file has no frames behind its size; then what its live line says is made durable.

    As `FileFrames.trim_ahead`, which takes such frames back.
    """
    cdef plane_t *plane = change.worker.plane
    cdef known_t *known = know(change.worker, number)
    cdef attributes_record_t state
    cdef known_extent_t *extent
    cdef uint64_t size_frames
    cdef uint32_t position
    if known == NULL or not known_state(plane, known, &state):
        return False
    size_frames = (state.size_bytes + (1 << FRAME_SHIFT) - 1) >> FRAME_SHIFT
    for position in range(known.extent_count):
        extent = &known.extents[position]
        if (extent.index + extent.frame_count > size_frames
                and not known.flags & INODE_FLAG_KEEPS_AHEAD):
            return False
    flush_stored(plane, known.slot_offset + INODE_LIVE_OFFSET, LIVE_ACCESSED_AT)
    fence_stored(plane)
    return True


# FORGET and BATCH_FORGET

cdef verdict_t serve_forget(worker_t *worker, request_t *request) noexcept nogil:
    """Do FORGET; DROP if it is done."""
    return FORWARD if serve_named(worker, request, forget) == FORWARD else DROP


cdef verdict_t serve_batch_forget(worker_t *worker, request_t *request) noexcept nogil:
    """Do BATCH_FORGET, one inode at a time; what can't be done is handed over, in this request."""
    cdef const fuse_batch_forget_in *wanted = <const fuse_batch_forget_in *>request.operation
    cdef const fuse_forget_one *one
    cdef fuse_in_header head = request.head[0]
    cdef request_t single = request[0]
    cdef uint32_t position, count
    if request.operation_bytes < sizeof(fuse_batch_forget_in):
        return FORWARD
    count = min(wanted.count, <uint32_t>((request.operation_bytes - sizeof(fuse_batch_forget_in))
                                         // sizeof(fuse_forget_one)))
    one = <const fuse_forget_one *>(request.operation + sizeof(fuse_batch_forget_in))
    head.opcode = FUSE_FORGET
    single.head = &head
    single.operation_bytes = sizeof(fuse_forget_in)
    for position in range(count):
        head.nodeid = one[position].nodeid
        single.operation = <const uint8_t *>&one[position].nlookup
        if serve_forget(worker, &single) == FORWARD:
            keep_rest(request, position, count - position)
            return FORWARD
    return DROP


cdef void keep_rest(request_t *request, uint32_t done, uint32_t left) noexcept nogil:
    """Let a BATCH_FORGET ask only for what was not done, in the same memory."""
    cdef uint8_t *rest = <uint8_t *>request.operation + done * sizeof(fuse_forget_one)
    cdef fuse_batch_forget_in head
    if not done:
        return
    head.count, head.dummy = left, 0
    memcpy(rest, &head, sizeof(head))
    request.operation = rest
    request.operation_bytes -= done * <uint32_t>sizeof(fuse_forget_one)


cdef verdict_t forget(names_change_t *change) noexcept nogil:
    """As `NameHandlers.forget`."""
    cdef uint64_t number = change.request.head.nodeid
    cdef uint64_t *count = count_of(change.worker.plane, number)
    if (change.request.operation_bytes < sizeof(fuse_forget_in) or count == NULL
            or not has_room_for_one(change.names.head.orphan_count)):
        return FORWARD
    drop_hold(count, (<const fuse_forget_in *>change.request.operation).nlookup)
    if not count[0]:
        begin_change(change)
        if not free_unnamed(change, number):
            carried_out(change)
    return DROP


cdef inline void drop_hold(uint64_t *count, uint64_t times) noexcept nogil:
    store(count, count[0] - min(count[0], times))


cdef bint free_unnamed(names_change_t *change, uint64_t number) noexcept nogil:
    """Free an inode that nobody holds any more, if it has no name, or let the control plane do so;
    whether it was freed here.

    Of an inode that can't be looked at here, the control plane finds out whether it has a name.
    """
    cdef known_t *known = know(change.worker, number)
    # This must not be begun again, because the hold is dropped.
    change.worker.reads_on = False
    if known != NULL and known.link_count:
        return False
    if known != NULL and free_inode(change, known):
        return True
    push_orphan(change.names, number)
    return False


cdef bint free_inode(names_change_t *change, known_t *known) noexcept nogil:
    """Free an inode without a name, its frames and its slot; False: the control plane has to."""
    cdef freed_t freed
    freed.change, freed.known, freed.frame_count = change, known, 0
    freed.is_free = False
    # A fault leaves it as it is, or is one of page structures after it is free.
    run_guarded(free_guarded, &freed)
    return freed.is_free


cdef void free_guarded(void *argument) noexcept nogil:
    cdef freed_t *freed = <freed_t *>argument
    cdef names_change_t *change = freed.change
    cdef plane_t *plane = change.worker.plane
    cdef names_t *names = change.names
    cdef uint64_t number = freed.known.number
    cdef uint64_t slot_offset = freed.known.slot_offset
    cdef uint32_t position
    if (load(&names.head.pins) or freed.known.index.entry_count
            or find_inode(plane, number) != NULL
            or not collect_data_frames(freed) or not collect_log_frames(freed)
            or not room_for_slots(names) or room_for_frames(names) < freed.frame_count):
        return
    for position in range(freed.frame_count):
        if not is_idle(&plane.memmap, freed.frames[position]):
            return
    remove_inode(change, freed.known)
    if not commit(change):
        return
    forget_known(names, number)
    push_slot(names, slot_offset)
    # The lowest frame last, so that those that are taken next ascend.
    for position in range(freed.frame_count, 0, -1):
        push_frame(names, freed.frames[position - 1])
    # Nothing is lost any more if this process is killed.
    store(&change.decision.offset, 0)
    freed.is_free = True
    memory.settle()
    # Before the lock is free: their next owner must not find a page dirty.
    for position in range(freed.frame_count):
        clean_page(&plane.memmap, freed.frames[position])


cdef bint collect_data_frames(freed_t *freed) noexcept nogil:
    """The frames of a file; False: too many of them."""
    cdef known_extent_t *extent
    cdef uint64_t frame
    cdef uint32_t position
    for position in range(freed.known.extent_count):
        extent = &freed.known.extents[position]
        if extent.frame_count > MOST_FREED - freed.frame_count:
            return False
        for frame in range(extent.frame_count):
            freed.frames[freed.frame_count] = extent.pfn + frame
            freed.frame_count += 1
    return True


cdef bint collect_log_frames(freed_t *freed) noexcept nogil:
    """The frames of a log; False: too many of them, or they are not those that were read once."""
    cdef known_t *known = freed.known
    cdef plane_t *plane = freed.change.worker.plane
    cdef uint64_t offset = known.head - LOG_FRAME_HEAD_BYTES
    cdef log_frame_t head
    cdef uint64_t left
    if known.log_frame_count > MOST_FREED - freed.frame_count:
        return False
    for left in range(known.log_frame_count, 0, -1):
        if (offset & ((1 << FRAME_SHIFT) - 1)
                or not is_usable(freed.change.names.head, offset >> FRAME_SHIFT, 1)):
            return False
        memcpy(&head, plane.pool + offset, sizeof(head))
        if not is_frame_of(known, &head, offset):
            return False
        freed.frames[freed.frame_count] = offset >> FRAME_SHIFT
        freed.frame_count += 1
        # The tail says which frame is the last one; a link there may be anything.
        if left == 1 and not 0 < known.tail - offset <= 1 << FRAME_SHIFT:
            return False
        offset = head.next
    return True


cdef bint is_idle(memmap_t *memmap, uint64_t pfn) noexcept nogil:
    """Whether nobody holds the page of a frame."""
    cdef header_t *header = memmap.header
    cdef uint64_t position = (pfn - header.first_pfn) >> header.page_order
    cdef uint8_t section
    cdef page_t *page
    if memmap.base == NULL:
        return True
    section = load_8(&memmap.sections[position >> header.section_shift])
    page = &pages_of(memmap)[position]
    if section != SECTION_LIVE and section != SECTION_DROPPING:
        return True
    return load(&page.generation) != header.generation or not memory.peek_32(&page.refcount)


cdef void clean_page(memmap_t *memmap, uint64_t pfn) noexcept nogil:
    """The content of a frame is gone: its page is not dirty any more, if it has no other frame."""
    cdef header_t *header = memmap.header
    cdef uint64_t position = pfn - header.first_pfn
    cdef page_t *page
    if memmap.base == NULL or header.page_order:
        return
    page = &pages_of(memmap)[position]
    if (load_8(&memmap.sections[position >> header.section_shift]) == SECTION_LIVE
            and load(&page.generation) == header.generation):
        memory.and_16(&page.flags, <uint16_t>~PAGE_DIRTY)
