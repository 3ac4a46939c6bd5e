"""Attributes of inodes: GETATTR, SETATTR without the size, and GETXATTR of what has none.

Invariants:
- what is set is durable before it is answered, in the log and then in the live line;
- what may take privileges away is handed over: only the control plane asks who the caller is.
"""

from libc.errno cimport ENODATA
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset
from posix.stat cimport S_ISGID, S_ISUID

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.memory cimport load
from pmemfs.dataplane.names cimport known_t, names_t
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *

cdef enum:
    PERMISSIONS = 0o7777
    LIVE_WRITTEN_AT = 8
    LIVE_ACCESSED_AT = 16
    SETS_TIMES = FATTR_ATIME | FATTR_MTIME | FATTR_CTIME

# A time that is further from 1970 may be none that can be stored in ns.
cdef int64_t MOST_SECONDS = 9223372035


# GETATTR and SETATTR

cdef verdict_t serve_getattr(worker_t *worker, request_t *request) noexcept nogil:
    """Answer GETATTR of an inode that is known."""
    return serve_named(worker, request, get_attributes)


cdef verdict_t get_attributes(names_change_t *change) noexcept nogil:
    """As `AttributeHandlers.get`."""
    cdef known_t *known
    if change.request.answer_room < sizeof(fuse_attr_out):
        return FORWARD
    known = know(change.worker, change.request.head.nodeid)
    return ANSWER if known != NULL and answer_attributes(change, known) else FORWARD


cdef bint answer_attributes(names_change_t *change, known_t *known) noexcept nogil:
    """Answer with the attributes of an inode; False: hand over."""
    cdef fuse_attr_out *out = <fuse_attr_out *>change.request.answer
    memset(out, 0, sizeof(fuse_attr_out))
    out.attr_valid = CACHE_SECONDS
    if not fill_attr(change.worker.plane, known, &out.attr):
        return False
    change.request.answer_bytes = sizeof(fuse_attr_out)
    return True


cdef verdict_t serve_setattr(worker_t *worker, request_t *request) noexcept nogil:
    """Answer SETATTR, unless it sets the size or may take privileges."""
    return serve_named(worker, request, set_attributes)


cdef verdict_t set_attributes(names_change_t *change) noexcept nogil:
    """As `AttributeHandlers.change` and `InodeAttributes.set_attributes`."""
    cdef request_t *request = change.request
    cdef const fuse_setattr_in *wanted = <const fuse_setattr_in *>request.operation
    cdef known_t *known
    cdef attributes_record_t *state
    cdef uint32_t mode
    if (request.operation_bytes < sizeof(fuse_setattr_in)
            or request.answer_room < sizeof(fuse_attr_out) or wanted.valid & FATTR_SIZE
            # What asks for nothing may still take privileges.
            or not wanted.valid & (FATTR_MODE | FATTR_UID | FATTR_GID | SETS_TIMES)
            or not has_possible_times(wanted)):
        return FORWARD
    known = know(change.worker, request.head.nodeid)
    if known == NULL or not known.is_plain:
        return FORWARD
    mode = known.mode | (wanted.mode if wanted.valid & FATTR_MODE else 0)
    if known.mode >> 12 == FILE_TYPE and mode & (S_ISUID | S_ISGID):
        # Whether the caller may keep these bits depends on its groups and capabilities.
        return FORWARD
    note_set_times(change.names, wanted)
    begin_change(change)
    state = add_attributes(change, known)
    if state == NULL:
        return FORWARD
    set_wanted(state, wanted, change.now_ns)
    # The live line has to follow. So whoever finds this begun sees to the times again.
    change.is_unfinished = True
    if not commit(change):
        return FORWARD
    apply_attributes(known, state)
    touched(change.worker.plane, known)
    times_were_set(change, known, wanted)
    if not answer_attributes(change, known):
        return FORWARD
    carried_out(change)
    return ANSWER


cdef bint has_possible_times(const fuse_setattr_in *wanted) noexcept nogil:
    """Whether all times that are set can be stored as they are."""
    return (is_possible_time(wanted.atime, wanted.atimensec)
            and is_possible_time(wanted.mtime, wanted.mtimensec)
            and is_possible_time(wanted.ctime, wanted.ctimensec))


cdef inline bint is_possible_time(uint64_t seconds, uint32_t ns) noexcept nogil:
    cdef int64_t since_1970 = <int64_t>seconds
    return -MOST_SECONDS < since_1970 < MOST_SECONDS and ns < SECOND_NS


cdef inline int64_t time_of(uint64_t seconds, uint32_t ns) noexcept nogil:
    return <int64_t>seconds * SECOND_NS + ns


cdef void note_set_times(names_t *names, const fuse_setattr_in *wanted) noexcept nogil:
    if wanted.valid & FATTR_ATIME:
        time_was_set(names, time_of(wanted.atime, wanted.atimensec))
    if wanted.valid & FATTR_MTIME:
        time_was_set(names, time_of(wanted.mtime, wanted.mtimensec))


cdef void set_wanted(attributes_record_t *state, const fuse_setattr_in *wanted,
                     int64_t now) noexcept nogil:
    """Let attributes be as they are wanted from now on."""
    if wanted.valid & FATTR_MODE:
        state.mode = (state.mode & ~<uint32_t>PERMISSIONS) | (wanted.mode & PERMISSIONS)
    if wanted.valid & FATTR_UID:
        state.uid = wanted.uid
    if wanted.valid & FATTR_GID:
        state.gid = wanted.gid
    if wanted.valid & FATTR_ATIME:
        state.accessed_ns = time_of(wanted.atime, wanted.atimensec)
    if wanted.valid & FATTR_MTIME:
        state.modified_ns = time_of(wanted.mtime, wanted.mtimensec)
    state.changed_ns = now
    if wanted.valid & FATTR_CTIME:
        state.changed_ns = time_of(wanted.ctime, wanted.ctimensec)


cdef void times_were_set(names_change_t *change, known_t *known,
                         const fuse_setattr_in *wanted) noexcept nogil:
    """As `InodeAttributes.times_were_set`: the times count that the log has now, not those of the
    live line."""
    cdef plane_t *plane = change.worker.plane
    cdef uint64_t line = known.slot_offset + INODE_LIVE_OFFSET
    cdef live_t *live = <live_t *>(plane.pool + line)
    cdef bint must_fence = False
    if (wanted.valid & FATTR_MTIME and known.mode >> 12 == FILE_TYPE
            and (known.changed_ns < 0 or load(&live.written_ns) >= <uint64_t>known.changed_ns)):
        put_word(plane, line + LIVE_WRITTEN_AT, 0)
        must_fence = True
    if wanted.valid & FATTR_ATIME and accessed_of(live):
        # 0 would mean that the log has it, and then reads through a table would not be compared.
        put_word(plane, line + LIVE_ACCESSED_AT, <uint64_t>max(<int64_t>0, known.accessed_ns))
        must_fence = True
    if must_fence:
        fence_stored(plane)


cdef inline uint64_t accessed_of(live_t *live) noexcept nogil:
    """When an inode was accessed last, as its live line says; 0: its log says it."""
    cdef uint64_t accessed = load(&live.accessed_ns)
    return accessed if accessed <= NUMBER_MASK else 0


# GETXATTR

cdef verdict_t get_xattr(names_change_t *change) noexcept nogil:
    """As `XattrHandlers.get`. The kernel asks for capabilities whenever an owner is set, and
    ls(1) asks for the lists of access of all that it shows.

    What is known has no attributes, or it would not be known here.
    """
    cdef request_t *request = change.request
    cdef name_t name
    if (not take_names_of(request, sizeof(fuse_getxattr_in), &name, 1)
            or not is_in_namespace(&name) or know(change.worker, request.head.nodeid) == NULL):
        return FORWARD
    return refuse(request, ENODATA)


cdef inline bint is_in_namespace(const name_t *name) noexcept nogil:
    """Whether an attribute may have this name. Of others it depends on more what is answered."""
    return (name.length > 5 and not memcmp(name.at, b"user.", 5)
            or name.length > 9 and not memcmp(name.at, b"security.", 9)
            or name.length > 8 and not memcmp(name.at, b"trusted.", 8)
            or name.length == 23 and not memcmp(name.at, b"system.posix_acl_access", 23)
            or name.length == 24 and not memcmp(name.at, b"system.posix_acl_default", 24))
