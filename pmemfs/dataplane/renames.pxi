"""RENAME, within a directory and from one into another.

Invariants:
- what moves, what it leaves, where it comes and what it replaces change by one journal;
- a directory is moved only if all directories above its new place are known here, and it is none of
  them. So no directory comes to lie in itself.
"""

from libc.errno cimport EEXIST, EISDIR, ENOENT, ENOTDIR, ENOTEMPTY
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.memory cimport load
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *

cdef enum:
    RENAME_NOREPLACE = 1
    # A directory that would lie deeper is moved by the control plane.
    MOST_ABOVE = 64

# What RENAME is about: the name `old` of `source` becomes `new` of `target`, and `victim` (or NULL)
# loses it.
cdef struct move_t:
    known_t *source
    known_t *target
    known_t *known
    known_t *victim
    name_t old
    name_t new
    found_t found


cdef verdict_t rename_name(names_change_t *change) noexcept nogil:
    cdef request_t *request = change.request
    cdef const fuse_rename2_in *wanted = <const fuse_rename2_in *>request.operation
    cdef uint32_t skipped = sizeof(fuse_rename2_in)
    cdef uint32_t flags = 0
    cdef move_t move
    cdef name_t[2] names
    if request.head.opcode == FUSE_RENAME:
        skipped = sizeof(fuse_rename_in)
    if load(&change.names.head.pins) or not take_names_of(request, skipped, names, 2):
        return FORWARD
    if request.head.opcode == FUSE_RENAME2:
        flags = wanted.flags
    if flags & ~<uint32_t>RENAME_NOREPLACE:
        return FORWARD
    move.old, move.new = names[0], names[1]
    move.source = know_directory(change)
    if move.source == NULL or not move.source.is_plain:
        return FORWARD
    move.target = know(change.worker, wanted.newdir)
    if (move.target == NULL or move.target.mode >> 12 != DIRECTORY_TYPE
            or not move.target.is_plain):
        return FORWARD
    return rename_known(change, &move, flags & RENAME_NOREPLACE)


cdef verdict_t rename_known(names_change_t *change, move_t *move, bint keeps) noexcept nogil:
    """Do as `Names.rename`; with `keeps`, what has the new name stays."""
    cdef worker_t *worker = change.worker
    cdef found_t there
    cdef name_state_t is_there
    cdef name_state_t is_found = find_entry(worker, move.source, move.old.at, move.old.length,
                                            &move.found)
    cdef int error
    if is_found == NAME_ABSENT:
        return fail_named(change, ENOENT)
    move.known = follow(change, move.source, &move.found) if is_found == NAME_FOUND else NULL
    move.victim = NULL
    is_there = find_entry(worker, move.target, move.new.at, move.new.length, &there)
    if move.known == NULL or is_there == NAME_UNSURE or not may_lie_in(change, move):
        return FORWARD
    if is_there == NAME_FOUND:
        if keeps:
            return fail_named(change, EEXIST)
        if there.inode == move.known.number:
            # Two names of one inode: nothing happens.
            begin_change(change)
            carried_out(change)
            return ANSWER
        move.victim = follow(change, move.target, &there)
        if move.victim == NULL or not may_lose_name(move.victim):
            return FORWARD
    if not may_lose_name(move.known):
        return FORWARD
    error = 0 if move.victim == NULL else why_not_replaced(move.known, move.victim)
    if error:
        return fail_named(change, error)
    return carry_out_move(change, move)


cdef bint may_lie_in(names_change_t *change, const move_t *move) noexcept nogil:
    """Whether what moves is no directory above its new place; False also if that is not known."""
    cdef known_t *above = move.target
    cdef int left
    if move.source == move.target or move.known.mode >> 12 != DIRECTORY_TYPE:
        return True
    for left in range(MOST_ABOVE):
        if above == NULL or above == move.known or above.mode >> 12 != DIRECTORY_TYPE:
            return False
        if above.number == INODE_ROOT:
            return True
        above = know(change.worker, above.parent)
    return False


cdef inline int why_not_replaced(const known_t *known, const known_t *victim) noexcept nogil:
    """As `names._check_replaced`."""
    cdef bint is_directory = known.mode >> 12 == DIRECTORY_TYPE
    if victim.mode >> 12 != DIRECTORY_TYPE:
        return ENOTDIR if is_directory else 0
    if not is_directory:
        return EISDIR
    return ENOTEMPTY if victim.index.entry_count else 0


cdef verdict_t carry_out_move(names_change_t *change, move_t *move) noexcept nogil:
    cdef worker_t *worker = change.worker
    cdef known_t *known = move.known
    cdef attributes_record_t *state
    cdef attributes_record_t *victim_state = NULL
    cdef uint64_t offset
    cdef uint8_t type_ = <uint8_t>(known.mode >> 12)
    begin_change(change)
    # Both records, because a log goes on in another way if they don't fit where it ends.
    if (move.source == move.target
            and not make_log_room(change, move.target, entry_slots(move.new.length)
                                  + entry_slots(move.old.length))):
        return FORWARD
    offset = add_entry(change, move.target, move.new.at, move.new.length, known.number, type_)
    if not offset or not add_entry(change, move.source, move.old.at, move.old.length,
                                   known.number, 0):
        return FORWARD
    state = add_moved(change, move)
    if state == NULL:
        return FORWARD
    if move.victim != NULL:
        victim_state = add_lost_link(change, move.victim)
        if victim_state == NULL:
            return FORWARD
    if not commit(change):
        return FORWARD
    # In this order, because an index that grows puts its names elsewhere.
    index_remove(move.source, &move.found)
    index_add(worker, move.target, move.new.at, move.new.length, offset, type_)
    touch_directory(change, move.source)
    touch_directory(change, move.target)
    if type_ == DIRECTORY_TYPE:
        known.parent = move.target.number
    apply_attributes(known, state)
    touched(worker.plane, known)
    if move.victim != NULL:
        lose_name(change, move.victim, victim_state)
    return ANSWER


cdef attributes_record_t *add_moved(names_change_t *change, const move_t *move) noexcept nogil:
    """What moves has changed; a directory says where it lies now. NULL: hand over."""
    cdef known_t *known = move.known
    cdef attributes_record_t *state
    cdef uint8_t *record
    if known.mode >> 12 == DIRECTORY_TYPE and move.source != move.target:
        if not make_log_room(change, known, 2):
            return NULL
        record = add_record(change, known, RECORD_PARENT, 1)
        if record == NULL:
            return NULL
        memcpy(record + 8, &move.target.number, 8)
    state = add_attributes(change, known)
    if state != NULL:
        state.changed_ns = change.now_ns
    return state
