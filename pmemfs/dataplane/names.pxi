"""Operations on names: LOOKUP, CREATE, MKDIR, UNLINK and RMDIR; `renames` has RENAME.

Each does what `volume/fs/names` and the handlers do, and says what `encode` says, errors and their
order included. Invariants:
- an operation hands over before anything counts, wherever it meets something that is not plain;
- an inode that is made is held, and its handle stands for it, before it counts. So whoever finds
  the operation carried out finds what its answer says;
- of a directory that is removed, nobody can have added a name: both need the lock.
"""

from libc.errno cimport EEXIST, EISDIR, ENOENT, ENOTDIR, ENOTEMPTY, ESTALE
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy, memset

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.memory cimport load, store
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *

cdef extern from "fcntl.h" nogil:
    enum: O_EXCL

cdef enum:
    FILE_MODE = 0o100000
    DIRECTORY_MODE = 0o040000
    SET_GROUP_ID = 0o2000
    INHERITED_FLAGS = INODE_FLAG_NO_DUMP | INODE_FLAG_NO_ACCESS_TIME

# A name in a request, without the zero behind it.
cdef struct name_t:
    const uint8_t *at
    uint32_t length


cdef verdict_t serve_names(worker_t *worker, request_t *request) noexcept nogil:
    """Answer a request that has to do with names or inodes, or say that the control plane has to."""
    cdef uint32_t opcode = request.head.opcode
    if not may_serve_names(worker, request):
        return FORWARD
    if opcode == FUSE_LOOKUP:
        return serve_named(worker, request, look_up)
    if opcode == FUSE_CREATE:
        return serve_named(worker, request, create)
    if opcode == FUSE_GETATTR:
        return serve_getattr(worker, request)
    if opcode == FUSE_SETATTR:
        return serve_setattr(worker, request)
    if opcode == FUSE_GETXATTR:
        return serve_named(worker, request, get_xattr)
    if opcode == FUSE_OPEN:
        return serve_open(worker, request)
    if opcode == FUSE_RELEASE:
        return serve_release(worker, request)
    if opcode == FUSE_READDIR or opcode == FUSE_READDIRPLUS:
        return serve_listing(worker, request)
    if opcode == FUSE_OPENDIR:
        return serve_named(worker, request, open_directory)
    if opcode == FUSE_RELEASEDIR:
        return serve_named(worker, request, release_directory)
    if opcode == FUSE_FORGET:
        return serve_forget(worker, request)
    if opcode == FUSE_BATCH_FORGET:
        return serve_batch_forget(worker, request)
    if opcode == FUSE_UNLINK or opcode == FUSE_RMDIR:
        return serve_named(worker, request, remove_name)
    if opcode == FUSE_RENAME or opcode == FUSE_RENAME2:
        return serve_named(worker, request, rename_name)
    if opcode == FUSE_MKDIR:
        return serve_named(worker, request, make_directory)
    return FORWARD


# What these have in common

cdef bint take_names_of(const request_t *request, uint32_t skipped, name_t *names,
                        int count) noexcept nogil:
    """Find the names behind a structure of so many bytes; False: hand over.

    With the transport fd they follow the structure, and with rings they are the payload.
    """
    cdef const uint8_t *at = request.operation + skipped
    cdef const uint8_t *end
    cdef uint32_t left
    cdef int number
    if request.operation_bytes < skipped:
        return False
    left = request.operation_bytes - skipped
    if not left:
        at, left = request.payload, request.payload_bytes
    elif request.payload_bytes:
        return False
    for number in range(count):
        end = <const uint8_t *>memchr(at, 0, left) if left else NULL
        if end == NULL:
            return False
        names[number].at, names[number].length = at, <uint32_t>(end - at)
        if not is_name(at, names[number].length):
            return False
        left -= names[number].length + 1
        at = end + 1
    return not left


cdef inline known_t *know_directory(names_change_t *change) noexcept nogil:
    """The directory that a request is about; NULL: hand over."""
    cdef known_t *known = know(change.worker, change.request.head.nodeid)
    return known if known != NULL and known.mode >> 12 == DIRECTORY_TYPE else NULL


cdef known_t *follow(names_change_t *change, known_t *directory,
                     const found_t *found) noexcept nogil:
    """What an entry leads to, as `Names._follow`; NULL: hand over."""
    cdef known_t *known = know(change.worker, found.inode)
    if known == NULL or not known.link_count or known.mode >> 12 != found.type:
        return NULL
    if (known.mode >> 12 == DIRECTORY_TYPE
            and (known.number == INODE_ROOT or known.parent != directory.number)):
        return NULL
    return known


cdef inline bint may_lose_name(const known_t *known) noexcept nogil:
    """Whether an inode is so simple that its names may change here."""
    cdef uint32_t type_ = known.mode >> 12
    if type_ == FILE_TYPE or type_ == DIRECTORY_TYPE:
        return known.is_plain
    return not known.flags & FIXED_FLAGS


cdef inline void touch_directory(names_change_t *change, known_t *directory) noexcept nogil:
    directory.modified_ns = directory.changed_ns = change.now_ns


# LOOKUP

cdef verdict_t look_up(names_change_t *change) noexcept nogil:
    cdef request_t *request = change.request
    cdef fuse_entry_out *out = <fuse_entry_out *>request.answer
    cdef known_t *directory
    cdef known_t *known
    cdef uint64_t *count
    cdef name_t name
    cdef found_t found
    cdef name_state_t state
    if (request.answer_room < sizeof(fuse_entry_out)
            or not take_names_of(request, 0, &name, 1)):
        return FORWARD
    directory = know_directory(change)
    if directory == NULL:
        return FORWARD
    state = find_entry(change.worker, directory, name.at, name.length, &found)
    if state == NAME_UNSURE:
        return FORWARD
    request.answer_bytes = sizeof(fuse_entry_out)
    if state == NAME_ABSENT:
        # The kernel may remember that there is no such name.
        memset(out, 0, sizeof(fuse_entry_out))
        out.entry_valid = CACHE_SECONDS
        return ANSWER
    known = follow(change, directory, &found)
    if known == NULL or not fill_entry_out(change.worker.plane, known, out):
        return FORWARD
    count = count_of(change.worker.plane, known.number)
    if count == NULL:
        return FORWARD
    begin_change(change)
    hold_once(change, known.number, count)
    carried_out(change)
    return ANSWER


# CREATE and MKDIR

cdef verdict_t create(names_change_t *change) noexcept nogil:
    cdef request_t *request = change.request
    cdef const fuse_create_in *wanted = <const fuse_create_in *>request.operation
    cdef fuse_open_out *opened
    cdef uint32_t mode
    cdef name_t name
    if (request.answer_room < sizeof(fuse_entry_out) + sizeof(fuse_open_out)
            or not change.names.head.handle_count
            or not take_names_of(request, sizeof(fuse_create_in), &name, 1)):
        return FORWARD
    mode = FILE_MODE | (wanted.mode & PERMISSIONS & ~wanted.umask)
    opened = <fuse_open_out *>(request.answer + sizeof(fuse_entry_out))
    memset(opened, 0, sizeof(fuse_open_out))
    opened.open_flags = <uint32_t>change.names.head.open_flags
    # The kernel looked the name up before, and checks no permissions of what it has created. So a
    # file that is there by now is opened only after another look.
    return make(change, &name, mode, EEXIST if wanted.flags & O_EXCL else ESTALE, opened,
                wanted.flags & ~<uint32_t>O_TRUNC)


cdef verdict_t make_directory(names_change_t *change) noexcept nogil:
    cdef request_t *request = change.request
    cdef const fuse_mkdir_in *wanted = <const fuse_mkdir_in *>request.operation
    cdef name_t name
    if (request.answer_room < sizeof(fuse_entry_out)
            or not take_names_of(request, sizeof(fuse_mkdir_in), &name, 1)):
        return FORWARD
    return make(change, &name, DIRECTORY_MODE | (wanted.mode & PERMISSIONS & ~wanted.umask),
                EEXIST, NULL, 0)


cdef verdict_t make(names_change_t *change, const name_t *name, uint32_t mode, int error_if_there,
                    fuse_open_out *opened, uint32_t flags) noexcept nogil:
    """Make an inode with a name, and open it if `opened` is given."""
    cdef worker_t *worker = change.worker
    cdef request_t *request = change.request
    cdef attributes_record_t state
    cdef known_t *directory
    cdef found_t found
    cdef name_state_t there
    cdef uint64_t number, offset
    directory = know_directory(change)
    if directory == NULL or not directory.is_plain:
        return FORWARD
    there = find_entry(worker, directory, name.at, name.length, &found)
    if there == NAME_FOUND:
        return fail_named(change, error_if_there)
    if there == NAME_UNSURE:
        return FORWARD
    begin_change(change)
    if not pop_slot(change):
        return FORWARD
    number = change.slot_offset // INODE_SLOT_BYTES
    offset = add_entry(change, directory, name.at, name.length, number, mode >> 12)
    if not offset:
        return FORWARD
    inherit(change, directory, mode, &state)
    fill_slot(change, directory, &state)
    fill_new(change, &state, <fuse_entry_out *>request.answer)
    request.answer_bytes = sizeof(fuse_entry_out)
    if not hold_new(change, number, opened, flags) or not commit(change):
        return FORWARD
    index_add(worker, directory, name.at, name.length, offset, mode >> 12)
    touch_directory(change, directory)
    # So that the next request finds it known.
    know(worker, number)
    return ANSWER


cdef void inherit(names_change_t *change, const known_t *directory, uint32_t mode,
                  attributes_record_t *state) noexcept nogil:
    """The attributes of a new inode, as `newinode.new_inode` and `Names._new_inode`."""
    cdef const fuse_in_header *head = change.request.head
    memset(state, 0, sizeof(attributes_record_t))
    state.head[0], state.head[1] = RECORD_ATTRIBUTES, 1
    state.uid, state.gid = head.uid, head.gid
    if directory.mode & SET_GROUP_ID:
        state.gid = directory.gid
        if mode >> 12 == DIRECTORY_TYPE:
            mode |= SET_GROUP_ID
    state.mode = mode
    state.link_count = 1
    state.accessed_ns = state.modified_ns = state.changed_ns = change.now_ns
    state.flags = directory.flags & INHERITED_FLAGS


cdef void fill_slot(names_change_t *change, const known_t *directory,
                    const attributes_record_t *state) noexcept nogil:
    """What stands in the slot of a new inode: its head, its live line and its log. The tail is 0, so
    nothing of it counts."""
    cdef inode_head_t *head = <inode_head_t *>change.slot
    cdef live_t *line = <live_t *>(change.slot + INODE_LIVE_OFFSET)
    cdef uint8_t *record = change.slot + INODE_INLINE_OFFSET
    cdef uint64_t number = change.slot_offset // INODE_SLOT_BYTES
    cdef uint64_t generation = change.slot_generation
    cdef uint64_t start = change.slot_offset + INODE_INLINE_OFFSET
    cdef uint64_t offset = start
    memset(change.slot, 0, INODE_INLINE_OFFSET + 2 * LOG_RECORD_BYTES)
    head.magic, head.number, head.generation = INODE_MAGIC, number, generation
    head.birth_ns = change.now_ns
    head.checksum = crc32c(0, head, INODE_HEAD_WORD_AT)
    head.head = start
    if state.mode >> 12 == FILE_TYPE:
        # The slot's former inode has left a line there that would count as damage for this one.
        line.size_word = line_key(number, generation, 0) ^ size_check(0)
    else:
        record[0], record[1] = RECORD_PARENT, 1
        memcpy(record + 8, &directory.number, 8)
        seal_record(number, generation, offset, record, LOG_RECORD_BYTES)
        record += LOG_RECORD_BYTES
        offset += LOG_RECORD_BYTES
    memcpy(record, state, sizeof(attributes_record_t))
    seal_record(number, generation, offset, record, LOG_RECORD_BYTES)
    offset += LOG_RECORD_BYTES
    change.slot_bytes = <uint32_t>(offset - change.slot_offset)
    add_word(change, change.slot_offset + INODE_TAIL_WORD_AT, 0, offset)
    change.needs_journal = True


cdef void fill_new(names_change_t *change, const attributes_record_t *state,
                   fuse_entry_out *out) noexcept nogil:
    """What is answered of a new inode."""
    memset(out, 0, sizeof(fuse_entry_out))
    out.nodeid, out.generation = change.slot_offset // INODE_SLOT_BYTES, change.slot_generation
    out.entry_valid = out.attr_valid = CACHE_SECONDS
    out.attr.ino = out.nodeid
    out.attr.mode, out.attr.uid, out.attr.gid = state.mode, state.uid, state.gid
    out.attr.nlink, out.attr.blksize = 1, 1 << FRAME_SHIFT
    if state.mode >> 12 == DIRECTORY_TYPE:
        out.attr.nlink = 2
        out.attr.size = change.slot_bytes - INODE_INLINE_OFFSET
    fill_times(&out.attr, state)


cdef bint hold_new(names_change_t *change, uint64_t number, fuse_open_out *opened,
                   uint32_t flags) noexcept nogil:
    """Hold a new inode once for its name, and once for its handle; False: hand over."""
    cdef uint64_t *count = count_of(change.worker.plane, number)
    if count == NULL:
        return False
    step(change.worker.plane)
    store(count, 1 if opened == NULL else 2)
    if opened == NULL:
        return True
    opened.fh = pop_handle(change)
    if not opened.fh:
        return False
    fill_place(change, opened.fh, number, HANDLE_FILE, flags)
    step(change.worker.plane)
    change.request.answer_bytes += sizeof(fuse_open_out)
    return True


# UNLINK and RMDIR

cdef verdict_t remove_name(names_change_t *change) noexcept nogil:
    cdef worker_t *worker = change.worker
    cdef request_t *request = change.request
    cdef attributes_record_t *state
    cdef known_t *directory
    cdef known_t *known
    cdef name_t name
    cdef found_t found
    cdef name_state_t there
    cdef int error
    if load(&change.names.head.pins) or not take_names_of(request, 0, &name, 1):
        return FORWARD
    directory = know_directory(change)
    if directory == NULL or not directory.is_plain:
        return FORWARD
    there = find_entry(worker, directory, name.at, name.length, &found)
    if there == NAME_ABSENT:
        return fail_named(change, ENOENT)
    known = follow(change, directory, &found) if there == NAME_FOUND else NULL
    if known == NULL or not may_lose_name(known):
        return FORWARD
    error = why_not_removed(known, request.head.opcode == FUSE_RMDIR)
    if error:
        return fail_named(change, error)
    begin_change(change)
    if not add_entry(change, directory, name.at, name.length, known.number, 0):
        return FORWARD
    state = add_lost_link(change, known)
    if state == NULL or not commit(change):
        return FORWARD
    index_remove(directory, &found)
    touch_directory(change, directory)
    lose_name(change, known, state)
    return ANSWER


cdef inline int why_not_removed(const known_t *known, bint is_rmdir) noexcept nogil:
    if known.mode >> 12 != DIRECTORY_TYPE:
        return ENOTDIR if is_rmdir else 0
    if not is_rmdir:
        return EISDIR
    return ENOTEMPTY if known.index.entry_count else 0


cdef attributes_record_t *add_lost_link(names_change_t *change, known_t *known) noexcept nogil:
    """One name less, as `Names._drop_link`, of an inode that lives on; NULL: hand over."""
    cdef uint64_t *count = count_of(change.worker.plane, known.number)
    cdef attributes_record_t *state
    if known.link_count == 1 and (count == NULL or not count[0]):
        # Nobody holds it, so it has to be freed at once. But whoever removes a name has looked it
        # up, so this is rare.
        return NULL
    state = add_attributes(change, known)
    if state != NULL:
        state.link_count -= 1
        state.changed_ns = change.now_ns
    return state


cdef void lose_name(names_change_t *change, known_t *known,
                    const attributes_record_t *state) noexcept nogil:
    """Know and count what the commit of `add_lost_link` has done."""
    cdef names_head_t *head = change.names.head
    apply_attributes(known, state)
    touched(change.worker.plane, known)
    put(&head.removals, peek(&head.removals) + 1)
