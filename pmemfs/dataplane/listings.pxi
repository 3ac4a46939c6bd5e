"""Listing directories: OPENDIR, READDIR, READDIRPLUS and RELEASEDIR.

A directory is listed in the order of the hashes of its names, and the position behind an entry is
the hash of its name. So a position needs no state: it means the same to each worker and to the
control plane, while names come and go, after the log was written anew, and after either plane has
died. A name that is there all along has one place in that order, so it is listed once. The control
plane counts positions in listings that it began by itself, so it goes on with them, too.

Invariants:
- the lock is held for some entries only, and a listing goes on from a position that stands in the
  answer already;
- each entry of an answer that leads to an inode is counted once, and noted before it is counted. If
  the request comes again, the control plane takes back what is noted of it;
- an entry that can't be told of here ends the answer before it, or is handed over.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.logs cimport *
from pmemfs.dataplane.memory cimport pause, put, store
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t, worker_t
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport *
from pmemfs.dataplane.structures cimport *

cdef enum:
    # The dots have the positions 1 and 2.
    DOTS = 2
    # In a position, with the bit that tells it from those that are counted.
    POSITION_BITS = 62
    # Entries of one hold of the lock, with attributes and without.
    ENTRIES_AT_ONCE = 16
    NAMES_AT_ONCE = 64
    # Words of an index with no free word between; more are left to the control plane.
    MOST_IN_A_ROW = 1024
    # In one answer, so that each is noted.
    MOST_LISTED = 2016 // 8 - 1
    LISTING_PAUSES = 8

cdef uint64_t FIRST_POSITION = <uint64_t>1 << POSITION_BITS

# An entry of a directory, by its place in the listing.
cdef struct placed_t:
    uint64_t position
    uint64_t record_offset

cdef enum listed_t:
    ENTRY_LISTED
    ENTRY_HAS_NO_ROOM
    ENTRY_IS_UNSURE

cdef struct listing_t:
    names_change_t *change
    known_t *directory
    # How many entries may still come before the lock is freed.
    int left
    uint32_t count
    placed_t entries[MOST_IN_A_ROW]


cdef inline uint64_t position_of(const uint64_t *seeds, const uint8_t *name,
                                 uint32_t name_bytes) noexcept nogil:
    """The position behind the entry of a name."""
    return FIRST_POSITION | whole_hash(seeds, name, name_bytes) >> (64 - POSITION_BITS)


# OPENDIR and RELEASEDIR

cdef verdict_t open_directory(names_change_t *change) noexcept nogil:
    """As `DirectoryHandlers.open`. The kernel holds what it has open."""
    cdef request_t *request = change.request
    cdef fuse_open_out *out = <fuse_open_out *>request.answer
    cdef known_t *directory
    if (request.operation_bytes < sizeof(fuse_open_in)
            or request.answer_room < sizeof(fuse_open_out)):
        return FORWARD
    directory = know_directory(change)
    if directory == NULL or not directory.link_count:
        return FORWARD
    begin_change(change)
    memset(out, 0, sizeof(fuse_open_out))
    out.fh = pop_handle(change)
    if not out.fh:
        return FORWARD
    request.answer_bytes = sizeof(fuse_open_out)
    fill_place(change, out.fh, directory.number, HANDLE_DIRECTORY,
               (<const fuse_open_in *>request.operation).flags)
    carried_out(change)
    return ANSWER


cdef inline open_place_t *listed_place(names_change_t *change, uint64_t handle) noexcept nogil:
    """The place of an open directory; NULL: it is none of the directory that is asked for."""
    cdef open_place_t *place = open_place_of(change.worker.plane, handle)
    cdef uint64_t number = change.request.head.nodeid
    if (not handle or place.handle != handle or place.kind != HANDLE_DIRECTORY or not number
            or place.inode != number):
        return NULL
    return place


cdef verdict_t release_directory(names_change_t *change) noexcept nogil:
    """As `DirectoryHandlers.close`, of a handle that was opened here."""
    cdef uint64_t handle
    cdef open_place_t *place
    if change.request.operation_bytes < sizeof(fuse_release_in):
        return FORWARD
    handle = (<const fuse_release_in *>change.request.operation).fh
    place = listed_place(change, handle)
    if (place == NULL or place.owner != OWNER_WORKER
            or not has_room_for_one(change.names.head.handle_count)):
        return FORWARD
    begin_change(change)
    store(&place.inode, 0)
    push_handle(change.names, handle + (<uint64_t>1 << OPEN_PLACES_SHIFT))
    carried_out(change)
    return ANSWER


# READDIR and READDIRPLUS

cdef verdict_t serve_listing(worker_t *worker, request_t *request) noexcept nogil:
    """List as much as an answer holds, some entries at a time."""
    cdef verdict_t verdict
    cdef int count
    if request.operation_bytes < sizeof(fuse_read_in):
        return FORWARD
    request.position = (<const fuse_read_in *>request.operation).offset
    request.has_ended = False
    verdict = serve_named(worker, request, list_some)
    while verdict == ANSWER and not request.has_ended:
        # Whoever waits for the lock gets it.
        for count in range(LISTING_PAUSES):
            pause()
        verdict = serve_named(worker, request, list_some)
    if verdict != ANSWER and request.position <= DOTS:
        # Without the dots alone: overlayfs, for one, judges a directory by the first answer.
        request.done = 0
    if not request.done:
        return verdict
    # What could not be listed now is asked for by the next request.
    worker.reads_on = False
    request.error, request.answer_bytes = 0, <uint32_t>request.done
    return ANSWER


cdef verdict_t list_some(names_change_t *change) noexcept nogil:
    """Add some entries to an answer."""
    cdef request_t *request = change.request
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef open_place_t *place = listed_place(change, wanted.fh)
    cdef listing_t listing
    cdef bint has_attributes = request.head.opcode == FUSE_READDIRPLUS
    if place == NULL or DOTS < request.position < FIRST_POSITION:
        return FORWARD
    listing.change = change
    listing.directory = know_directory(change)
    if listing.directory == NULL or not listing.directory.link_count:
        return FORWARD
    if not request.done:
        if not note_listing(change, listing.directory, place.flags):
            return FORWARD
        if has_attributes:
            begin_listed(change)
    listing.left = ENTRIES_AT_ONCE if has_attributes else NAMES_AT_ONCE
    if not list_dots(&listing):
        request.has_ended = True
    elif not list_rows(&listing):
        return FORWARD
    request.answer_bytes = <uint32_t>request.done
    return ANSWER


cdef bint note_listing(names_change_t *change, known_t *directory, uint32_t flags) noexcept nogil:
    """Note an access of a directory; False: hand over."""
    if not change.names.head.notes_directories:
        return True
    withdraw_attributes(change.worker.plane, directory.number)
    return note_small_read(change, directory, flags)


cdef bint list_dots(listing_t *listing) noexcept nogil:
    """`.` and `..`, if they come next; False: there is no room for them."""
    cdef request_t *request = listing.change.request
    cdef found_t found
    found.type = DIRECTORY_TYPE
    while request.position < DOTS:
        found.inode = listing.directory.parent if request.position else listing.directory.number
        if list_entry(listing, NULL, <const uint8_t *>"..", <uint32_t>request.position + 1, &found,
                      request.position + 1) != ENTRY_LISTED:
            return False
    return True


cdef bint list_rows(listing_t *listing) noexcept nogil:
    """The entries that come next in the index; False: one of them can't be told of here.

    Words of an index lie in rows, with free words between. A row has all the words of some hashes,
    so rows are in the order of hashes, and the entries of a row are sorted before they are listed.
    """
    cdef request_t *request = listing.change.request
    cdef names_index_t *index = &listing.directory.index
    cdef uint64_t start = 0
    if index.capacity and request.position >= FIRST_POSITION:
        start = home_of(index, hash_at(request.position))
    while start and index.words[start - 1]:
        start -= 1
    while start < index.capacity:
        if not listing.left:
            return True
        if not index.words[start]:
            start += 1
        elif not take_row(listing, &start) or not list_row(listing):
            return False
        elif request.has_ended:
            return True
    # Unless the last row has more.
    request.has_ended = listing.left > 0
    return True


cdef inline uint64_t hash_at(uint64_t position) noexcept nogil:
    """The bits of a position that words of an index have, too."""
    return (position & (FIRST_POSITION - 1)) >> (POSITION_BITS - HASH_BITS)


cdef bint take_row(listing_t *listing, uint64_t *start) noexcept nogil:
    """Collect the entries of a row that come next, in their order, and find its end. False: one of
    them can't be read.

    The last row goes on at the start of the index, with words that lie before their homes there.
    """
    cdef names_index_t *index = &listing.directory.index
    cdef uint64_t at = start[0]
    listing.count = 0
    while at < index.capacity and index.words[at]:
        if home_of(index, index.words[at]) <= at and not take_word(listing, index.words[at]):
            return False
        at += 1
    start[0] = at
    if at < index.capacity:
        return True
    at = 0
    while index.words[at]:
        if home_of(index, index.words[at]) > at and not take_word(listing, index.words[at]):
            return False
        at += 1
    return True


cdef bint take_word(listing_t *listing, uint64_t word) noexcept nogil:
    """Collect the entry of a word, if it comes next; False: it can't be read."""
    cdef names_t *names = listing.change.names
    cdef uint64_t raw[ENTRY_WORDS]
    cdef uint8_t *record = <uint8_t *>raw
    cdef uint64_t after = max(listing.change.request.position, FIRST_POSITION - 1)
    cdef uint64_t position
    cdef uint32_t at = listing.count
    if after >= FIRST_POSITION and hash_in(word) < hash_at(after):
        return True
    if not read_entry(listing, offset_in(word), record) or listing.count == MOST_IN_A_ROW:
        return False
    position = position_of(names.seeds, record + ENTRY_NAME_AT, name_length(record))
    if position <= after:
        return True
    while at and listing.entries[at - 1].position > position:
        listing.entries[at] = listing.entries[at - 1]
        at -= 1
    listing.entries[at].position, listing.entries[at].record_offset = position, offset_in(word)
    listing.count += 1
    return True


cdef bint read_entry(listing_t *listing, uint64_t offset, uint8_t *record) noexcept nogil:
    """Copy the record of an entry; whether it is one."""
    cdef uint32_t slots = copy_entry(listing.change.worker.plane, offset, record)
    return (slots and record[0] == RECORD_ENTRY
            and is_sealed(listing.directory, offset, record, slots * LOG_RECORD_BYTES)
            and name_length(record) <= slots * LOG_RECORD_BYTES - ENTRY_NAME_AT)


cdef bint list_row(listing_t *listing) noexcept nogil:
    """List what was collected; False: one of the entries can't be told of here."""
    cdef request_t *request = listing.change.request
    cdef uint64_t raw[ENTRY_WORDS]
    cdef uint8_t *record = <uint8_t *>raw
    cdef placed_t *entry
    cdef found_t found
    cdef listed_t listed
    cdef known_t *known = NULL
    cdef uint32_t number
    for number in range(listing.count):
        if not listing.left:
            return True
        entry = &listing.entries[number]
        if not read_entry(listing, entry.record_offset, record):
            return False
        memcpy(&found.inode, record + ENTRY_INODE_AT, 8)
        found.type = record[ENTRY_TYPE_AT]
        if request.head.opcode == FUSE_READDIRPLUS:
            known = follow(listing.change, listing.directory, &found)
            if known == NULL:
                return False
        listed = list_entry(listing, known, record + ENTRY_NAME_AT, name_length(record), &found,
                            entry.position)
        if listed == ENTRY_HAS_NO_ROOM:
            request.has_ended = True
            return True
        if listed == ENTRY_IS_UNSURE:
            return False
        listing.left -= 1
    return True


cdef listed_t list_entry(listing_t *listing, known_t *known, const uint8_t *name,
                         uint32_t name_bytes, const found_t *found,
                         uint64_t position) noexcept nogil:
    """Add an entry to an answer, and count what it leads to. Of the dots nothing is known, and they
    don't count."""
    cdef request_t *request = listing.change.request
    cdef const fuse_read_in *wanted = <const fuse_read_in *>request.operation
    cdef uint8_t *at = request.answer + request.done
    cdef bint has_attributes = request.head.opcode == FUSE_READDIRPLUS
    cdef uint64_t head_bytes = sizeof(fuse_direntplus) if has_attributes else sizeof(fuse_dirent)
    cdef uint64_t length = (head_bytes + name_bytes + 7) & ~<uint64_t>7
    cdef fuse_dirent *head = <fuse_dirent *>(at + head_bytes - sizeof(fuse_dirent))
    if request.done + length > min(wanted.size, request.answer_room):
        return ENTRY_HAS_NO_ROOM
    if known != NULL and not has_room_to_note(listing.change):
        return ENTRY_HAS_NO_ROOM
    memset(at, 0, length)
    if known != NULL and (not fill_entry_out(listing.change.worker.plane, known,
                                             &(<fuse_direntplus *>at).entry_out)
                          or not count_listed(listing.change, known.number)):
        return ENTRY_IS_UNSURE
    head.ino, head.off, head.namelen, head.type = found.inode, position, name_bytes, found.type
    memcpy(<uint8_t *>head + sizeof(fuse_dirent), name, name_bytes)
    request.done += length
    request.position = position
    return ENTRY_LISTED


# What an answer has counted

cdef names_listed_t *listed_of(names_change_t *change) noexcept nogil:
    """Where a worker notes what it has counted; as `layouts.names_listed_at`."""
    cdef header_t *header = change.worker.plane.header
    cdef uint8_t *area = (<uint8_t *>change.names.head + NAMES_DECISIONS_AT
                          + header.worker_count * sizeof(names_decision_t))
    return <names_listed_t *>area + (holder_of(change.worker) - 1)


cdef void begin_listed(names_change_t *change) noexcept nogil:
    """Note that nothing is counted yet for this request. Whatever was noted of another request has
    been answered."""
    cdef names_listed_t *listed = listed_of(change)
    store(&listed.number, 0)
    put(&listed.count, 0)
    put(<uint64_t *>listed.inodes, 0)
    store(&listed.number, change.request.head.unique)


cdef inline bint has_room_to_note(names_change_t *change) noexcept nogil:
    return listed_of(change).count < MOST_LISTED


cdef bint count_listed(names_change_t *change, uint64_t number) noexcept nogil:
    """Count an inode as looked up once more, for the entry that comes next; False: hand over.

    It is noted with the count that it gets. So whoever finds this cut off knows whether it has it.
    """
    cdef names_listed_t *listed = listed_of(change)
    cdef uint64_t *inodes = <uint64_t *>listed.inodes
    cdef uint64_t *count = count_of(change.worker.plane, number)
    if count == NULL:
        return False
    put(&inodes[listed.count + 1], 0)
    put(&listed.value, count[0] + 1)
    store(&inodes[listed.count], number)
    step(change.worker.plane)
    store(count, count[0] + 1)
    step(change.worker.plane)
    store(&listed.count, listed.count + 1)
    step(change.worker.plane)
    return True
