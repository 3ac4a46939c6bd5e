"""How a worker changes what is stored of names, wholly or not at all, as `volume/fs/transaction`.

    records behind tails, a free slot | fence | ring, journal | fence | words

Invariants:
- nothing counts before a word moves. A single word moves alone only where a tail advances within
  one slot or frame; all else goes through the journal, or an old journal could match again;
- records are durable before any word leads to them, and the journal before any of its words;
- the inodes that change are in the ring, and their attributes withdrawn, before they change. What is
  there too early costs a look; what came too late would be believed.
"""

from libc.signal cimport SIGKILL
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.signal cimport kill
from posix.unistd cimport getpid

from pmemfs.dataplane.commit cimport *
from pmemfs.dataplane.logs cimport crc32c
from pmemfs.dataplane.memory cimport full_fence, peek, put, run_guarded, settle, store
from pmemfs.dataplane.names cimport *
from pmemfs.dataplane.plane cimport plane_t
from pmemfs.dataplane.structures cimport *
from pmemfs.medium.writeback cimport wait_for_write_back, write_back

cdef enum:
    # In the head of a frame of a log.
    LOG_NEXT_AT = 16


cdef inline void add_word(names_change_t *change, uint64_t offset, uint64_t old,
                          uint64_t new) noexcept nogil:
    cdef word_t *word = &change.words[change.word_count]
    word.offset, word.old, word.new = offset, old, new
    change.word_count += 1


cdef void remove_inode(names_change_t *change, known_t *known) noexcept nogil:
    """Free an inode's slot. It, and the frames of the inode, are the caller's after the commit."""
    add_word(change, known.slot_offset + INODE_TAIL_WORD_AT, known.tail, 0)
    change.needs_journal = True
    change.changed[change.changed_count] = known.number
    change.changed_count += 1


cdef bint commit(names_change_t *change) noexcept nogil:
    """Make all of it count; False: nothing counts, so hand over. Afterwards the tails of known
    inodes are right, and all else in memory is the caller's."""
    cdef plane_t *plane = change.worker.plane
    cdef names_decision_t *decision = change.decision
    cdef uint32_t number
    note_answer(change)
    if not run_guarded(store_records, change):
        return False
    fence_stored(plane)
    for number in range(change.addition_count):
        add_words_of(change, &change.additions[number])
        announce(change, change.additions[number].known.number)
    for number in range(change.changed_count):
        announce(change, change.changed[number])
    put(&decision.value, change.words[0].new)
    store(&decision.offset, change.words[0].offset)
    step(plane)
    change.stage = STAGE_COMMITTING
    settle()
    if not run_guarded(move_words, change):
        return False
    change.stage = STAGE_DONE
    if not change.is_unfinished:
        store(&decision.state, 2)
    step(plane)
    for number in range(change.addition_count):
        note_moved(&change.additions[number])
    return True


cdef void add_words_of(names_change_t *change, const addition_t *addition) noexcept nogil:
    """The words of a log that has got records."""
    cdef const known_t *known = addition.known
    if addition.is_rewritten:
        add_word(change, known.slot_offset + INODE_HEAD_WORD_AT, known.head,
                 addition.frame + LOG_FRAME_HEAD_BYTES)
    add_word(change, known.slot_offset + INODE_TAIL_WORD_AT, known.tail, tail_after(addition))
    # With a frame, the tail may be lower than before, or where an older log of this inode ended.
    change.needs_journal = change.needs_journal or addition.frame != 0


cdef inline uint64_t tail_after(const addition_t *addition) noexcept nogil:
    if not addition.frame:
        return addition.known.tail + addition.length
    return addition.frame + LOG_FRAME_HEAD_BYTES + addition.length - addition.here_length


cdef void note_moved(const addition_t *addition) noexcept nogil:
    """Know that a log is longer. One that was written anew is forgotten after the operation."""
    cdef known_t *known = addition.known
    if addition.is_rewritten:
        known.slot_count = 0
    known_moved(known, tail_after(addition), addition.length // LOG_RECORD_BYTES)
    if addition.frame:
        known.area_end = addition.frame + (1 << FRAME_SHIFT)
        known.log_frame_count += 1


cdef void announce(names_change_t *change, uint64_t number) noexcept nogil:
    """Tell the control plane which inode changes, and answer no more what is published of it."""
    cdef names_t *names = change.names
    cdef uint64_t changes = names.head.changes
    put(&names.changes[changes & ((1 << NAMES_CHANGES_SHIFT) - 1)], number)
    store(&names.head.changes, changes + 1)
    step(change.worker.plane)
    withdraw_attributes(change.worker.plane, number)


cdef void store_records(void *argument) noexcept nogil:
    """Store what counts only once a word leads to it."""
    cdef names_change_t *change = <names_change_t *>argument
    cdef plane_t *plane = change.worker.plane
    cdef addition_t *addition
    cdef uint32_t number
    if change.slot_bytes and change.slot_offset:
        put_stored(plane, change.slot_offset, change.slot, change.slot_bytes)
    for number in range(change.addition_count):
        addition = &change.additions[number]
        if addition.here_length:
            seal_all(addition.known, addition.known.tail, change.records + addition.start,
                     addition.here_length)
            put_stored(plane, addition.known.tail, change.records + addition.start,
                       addition.here_length)
        if addition.frame:
            store_frame(change, addition)


cdef void seal_all(const known_t *known, uint64_t offset, uint8_t *records,
                   uint32_t length) noexcept nogil:
    """Seal records for an offset in the pool."""
    cdef uint32_t at = 0
    cdef uint32_t slots
    while at < length:
        slots = records[at + 1]
        seal_record(known.number, known.generation, offset + at, records + at,
                    slots * LOG_RECORD_BYTES)
        at += slots * LOG_RECORD_BYTES


cdef void store_frame(names_change_t *change, const addition_t *addition) noexcept nogil:
    """Store a new frame of a log, and link it to the last one.

    The link lies in a frame that counts. A reader follows it only if the tail is not in that frame,
    and the tail moves last.
    """
    cdef plane_t *plane = change.worker.plane
    cdef const known_t *known = addition.known
    # Words, for their alignment.
    cdef uint64_t stored[(LOG_FRAME_HEAD_BYTES + MOST_RECORDS_BYTES) >> 3]
    cdef log_frame_t *head = <log_frame_t *>stored
    cdef uint8_t *records = <uint8_t *>stored + LOG_FRAME_HEAD_BYTES
    cdef uint32_t length = addition.length - addition.here_length
    cdef uint64_t magic = LOG_FRAME_MAGIC
    memset(head, 0, sizeof(log_frame_t))
    head.magic, head.inode = LOG_FRAME_MAGIC, known.number
    head.checksum = crc32c(crc_place(known.number, known.generation, addition.frame), &magic, 8)
    memcpy(records, change.records + addition.start + addition.here_length, length)
    seal_all(known, addition.frame + LOG_FRAME_HEAD_BYTES, records, length)
    put_stored(plane, addition.frame, stored, LOG_FRAME_HEAD_BYTES + length)
    if not addition.is_rewritten:
        put_word(plane, known.area_end - (1 << FRAME_SHIFT) + LOG_NEXT_AT, addition.frame)


cdef void move_words(void *argument) noexcept nogil:
    """Make it count: by one store, or by the journal, which a mount after a crash carries out."""
    cdef names_change_t *change = <names_change_t *>argument
    cdef plane_t *plane = change.worker.plane
    cdef bint has_journal = change.word_count > 1 or change.needs_journal
    cdef word_t *word
    cdef uint32_t number
    if has_journal:
        put_journal(change)
        fence_stored(plane)
    for number in range(change.word_count):
        word = &change.words[number]
        set_word(plane, word.offset, word.new)
        # The head and the tail of one log lie in one line.
        if number + 1 == change.word_count or word[1].offset >> 6 != word.offset >> 6:
            flush_stored(plane, word.offset, 8)
    if not has_journal:
        fence_stored(plane)
    # After a journal, the first fence of the next operation is early enough: nobody overwrites the
    # journal before it.


cdef void put_journal(names_change_t *change) noexcept nogil:
    """As `media.journal.pack_journal`."""
    cdef uint64_t raw[2 + MOST_WORDS * 3]
    cdef uint8_t *journal = <uint8_t *>raw
    cdef journal_head_t *head = <journal_head_t *>journal
    cdef uint32_t length = (<uint32_t>sizeof(journal_head_t)
                            + change.word_count * <uint32_t>sizeof(word_t))
    memset(head, 0, sizeof(journal_head_t))
    head.count = change.word_count
    memcpy(journal + sizeof(journal_head_t), change.words, change.word_count * sizeof(word_t))
    head.checksum = crc32c(0, journal + 4, length - 4)
    put_stored(change.worker.plane, change.names.head.journal_offset, journal, length)


# Stores into the pool

cdef inline void step(plane_t *plane) noexcept nogil:
    """A place where a test may kill this process."""
    if plane.recorder != NULL:
        plane.recorder.steps += 1
        if plane.recorder.steps == plane.recorder.killed_before:
            kill(getpid(), SIGKILL)


cdef void record_call(recorder_t *recorder, uint64_t kind, uint64_t offset, const void *data,
                      size_t length) noexcept nogil:
    cdef uint64_t words[3]
    cdef size_t filled = (length + 7) & ~<size_t>7 if data != NULL else 0
    words[0], words[1], words[2] = kind, offset, length
    if recorder.length + 24 + filled <= recorder.room:
        memcpy(recorder.buffer + recorder.length, words, 24)
        if data != NULL:
            memcpy(recorder.buffer + recorder.length + 24, data, length)
    recorder.length += 24 + filled


cdef bint is_left_out(recorder_t *recorder) noexcept nogil:
    """Whether a test leaves this flush or fence out."""
    recorder.count += 1
    return recorder.count == recorder.left_out


cdef inline void flush_stored(plane_t *plane, uint64_t offset, size_t length) noexcept nogil:
    """Write cache lines back, if that makes them durable. A fence must follow."""
    if plane.header.durability != DURABILITY_CACHE_LINES:
        return
    if plane.recorder != NULL:
        if is_left_out(plane.recorder):
            return
        record_call(plane.recorder, RECORDED_FLUSH, offset, NULL, length)
    write_back(plane.pool + offset, length)


cdef inline void fence_stored(plane_t *plane) noexcept nogil:
    """What this processor has flushed is durable."""
    if plane.header.durability != DURABILITY_CACHE_LINES:
        return
    if plane.recorder != NULL:
        if is_left_out(plane.recorder):
            return
        record_call(plane.recorder, RECORDED_FENCE, 0, NULL, 0)
    wait_for_write_back()


cdef inline void put_stored(plane_t *plane, uint64_t offset, const void *data,
                            size_t length) noexcept nogil:
    """Store bytes, and flush them."""
    step(plane)
    memcpy(plane.pool + offset, data, length)
    if plane.recorder != NULL:
        record_call(plane.recorder, RECORDED_STORE, offset, data, length)
    flush_stored(plane, offset, length)


cdef inline void set_word(plane_t *plane, uint64_t offset, uint64_t value) noexcept nogil:
    """Store an aligned word, whole."""
    step(plane)
    store(<uint64_t *>(plane.pool + offset), value)
    if plane.recorder != NULL:
        record_call(plane.recorder, RECORDED_STORE, offset, &value, 8)


cdef inline void put_word(plane_t *plane, uint64_t offset, uint64_t value) noexcept nogil:
    """Store an aligned word, whole, and flush it."""
    set_word(plane, offset, value)
    flush_stored(plane, offset, 8)


# Memory that is shared

cdef inline uint64_t *count_of(plane_t *plane, uint64_t number) noexcept nogil:
    """How often an inode is held; NULL if no inode has the number."""
    if number >= plane.header.inode_numbers:
        return NULL
    return <uint64_t *>(plane.shared + plane.header.counts_offset) + number


cdef void withdraw_attributes(plane_t *plane, uint64_t number) noexcept nogil:
    """Answer no more what is published of an inode's attributes; see `tables`."""
    cdef attributes_t *entry = &plane.attributes[number * INODE_HASH >> (64 - ATTRIBUTES_SHIFT)]
    cdef uint64_t *words = &entry.inode
    cdef int position
    if peek(&entry.inode) != number:
        return
    # A writer that was killed has left it odd.
    put(&entry.sequence, entry.sequence | 1)
    full_fence()
    for position in range(ATTRIBUTES_WORDS):
        put(&words[position], 0)
    store(&entry.sequence, entry.sequence + 1)


cdef void touched(plane_t *plane, known_t *known) noexcept nogil:
    """Tell a table that is published when its file has changed, as `Tables.touched`: a read that
    comes later counts as an access."""
    cdef inode_t *entry = find_inode(plane, known.number)
    cdef int64_t changed = max(known.modified_ns, known.changed_ns)
    if entry == NULL:
        return
    if known.flags & INODE_FLAG_NO_ACCESS_TIME:
        store(&entry.changed_ns, NO_READ_COUNTS)
    else:
        store(&entry.changed_ns, <uint64_t>max(changed, <int64_t>0))
