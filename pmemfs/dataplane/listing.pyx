# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Packs many entries of a listing with attributes (READDIRPLUS) at once, for the control plane, and
answers look-ups.

The entries are those that the file system has in memory; what they lead to is read from the pool
itself. So a listing makes no object of what it lists, and a million files cost no memory here.
Invariants:
- an entry that is not simple ends the work before it: whoever asked lists it the long way;
- an entry that leads to a directory is packed only if that says that it lies here (`volume/fs/names`
  says why);
- what was packed is held only by `hold_listed`, since memory may turn out bad after it was read.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_Resize
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItemWithError
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject

from pmemfs.dataplane.memory cimport store
from pmemfs.dataplane.protocol cimport fuse_attr, fuse_direntplus, fuse_entry_out

include "stored.pxi"

cdef enum:
    # So many entries are looked up, and what they lead to is fetched, before any is read.
    AHEAD = 16
    DOTS = 2
    ENTRY_TYPE_BITS = 4
    NS = 1000000000
    HEAD_BYTES = sizeof(fuse_direntplus)
    # As `layouts.HOLD_NOTES`.
    NOTES_HEAD_WORDS = 8

# An entry of the directory as it is in memory.
cdef struct entry_t:
    const uint8_t *name
    uint64_t name_bytes
    uint64_t number
    uint32_t type

cdef enum packed_t:
    PACKED
    NO_ROOM
    NOT_SIMPLE


cdef class StoredInodes:
    """The inodes of a file system. `memory` is the data zone, which begins with frame `first_pfn`.
    If it may have holes, it is not touched: `sparse_fd` is the pool, to be read.

    After each call ask whether a touch of the memory has failed; then what was returned is of no
    use.
    """

    cdef Py_buffer _view
    cdef zone_t _zone

    def __cinit__(self, memory, uint64_t first_pfn, int sparse_fd=-1) -> None:
        PyObject_GetBuffer(memory, &self._view, PyBUF_SIMPLE)
        self._zone.memory = <const uint8_t *>self._view.buf
        self._zone.fd, self._zone.first_pfn = sparse_fd, first_pfn
        self._zone.frame_count = <uint64_t>self._view.len >> FRAME_SHIFT

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self._view)

    def pack(self, uint64_t directory, dict words not None, list names not None, size_t start,
             bytearray answer not None, size_t room, uint64_t valid_seconds) -> tuple[int, bool]:
        """Add entries to an answer, which may have `room` bytes then: from position `start` on, all
        of `names` that `words` has still. It has words as `volume.fs.entries`.

        Returns the position of the next entry, and whether it has no room. If it has, and there is
        a next entry, that is not simple. The dots have positions, but no names.
        """
        cdef entry_t entries[AHEAD]
        cdef size_t position = start
        cdef size_t end = <size_t>PyList_GET_SIZE(names) + DOTS
        cdef size_t used = <size_t>len(answer)
        cdef size_t count
        cdef size_t number
        cdef packed_t packed = PACKED
        if start < DOTS:
            raise IndexError(start)
        if used >= room:
            return start, True
        PyByteArray_Resize(answer, <Py_ssize_t>room)
        try:
            while position < end and packed == PACKED:
                count = min(<size_t>AHEAD, end - position)
                for number in range(count):
                    find_entry(words, <object>PyList_GET_ITEM(
                        names, <Py_ssize_t>(position - DOTS + number)), &self._zone,
                        &entries[number])
                for number in range(count):
                    packed = self._pack(&entries[number], directory, position + 1,
                                        <uint8_t *>PyByteArray_AS_STRING(answer), &used, room,
                                        valid_seconds)
                    if packed != PACKED:
                        break
                    position += 1
        finally:
            PyByteArray_Resize(answer, <Py_ssize_t>used)
        return position, packed == NO_ROOM

    def look_up(self, uint64_t directory, dict words not None, bytes name not None,
                uint64_t valid_seconds) -> bytes | None:
        """The answer to a look-up of a name; None if `words` lacks it or it is not simple."""
        cdef fuse_entry_out found
        cdef entry_t entry
        cdef stored_t stored
        find_entry(words, name, &self._zone, &entry)
        if entry.name == NULL or not self._read(&entry, directory, &stored):
            return None
        memset(&found, 0, sizeof(found))
        put_entry(&stored, &found, valid_seconds)
        return (<char *>&found)[:sizeof(found)]

    cdef bint _read(self, const entry_t *entry, uint64_t directory, stored_t *stored) noexcept:
        """Read what an entry leads to; whether that is simple, and lies here if it is a directory."""
        if not read_stored(&self._zone, entry.number, stored):
            return False
        return (stored.mode & S_IFMT) != S_IFDIR or stored.parent == directory

    cdef packed_t _pack(self, const entry_t *entry, uint64_t directory, uint64_t next_position,
                        uint8_t *answer, size_t *used, size_t room,
                        uint64_t valid_seconds) noexcept:
        cdef size_t length = (HEAD_BYTES + entry.name_bytes + 7) & ~<size_t>7
        cdef fuse_direntplus *head = <fuse_direntplus *>(answer + used[0])
        cdef stored_t stored
        if entry.name == NULL:
            return PACKED
        if length > room - used[0]:
            return NO_ROOM
        if not self._read(entry, directory, &stored):
            return NOT_SIMPLE
        memset(head, 0, length)
        put_entry(&stored, &head.entry_out, valid_seconds)
        head.dirent.ino = entry.number
        head.dirent.off = next_position
        head.dirent.namelen = <uint32_t>entry.name_bytes
        head.dirent.type = entry.type
        memcpy(<uint8_t *>head + HEAD_BYTES, entry.name, entry.name_bytes)
        used[0] += length
        return PACKED


cdef int find_entry(dict words, object name, const zone_t *zone, entry_t *entry) except -1:
    """What a name leads to, which is about to be read; no name if it leads nowhere."""
    cdef PyObject *word = PyDict_GetItemWithError(words, name)
    cdef uint64_t value = 0
    entry.name = NULL
    if word == NULL:
        return 0
    if not PyBytes_CheckExact(name):
        raise TypeError("a name is bytes")
    try:
        value = <object>word
    except OverflowError:
        # No inode has such a number, and none has 0.
        pass
    entry.name = <const uint8_t *>PyBytes_AS_STRING(name)
    entry.name_bytes = <uint64_t>PyBytes_GET_SIZE(name)
    entry.number = value >> ENTRY_TYPE_BITS
    entry.type = value & ((1 << ENTRY_TYPE_BITS) - 1)
    expect(zone, entry.number)
    return 0


cdef inline void put_entry(const stored_t *stored, fuse_entry_out *entry,
                           uint64_t valid_seconds) noexcept nogil:
    """`entry` is all zeroes."""
    entry.nodeid = stored.number
    entry.generation = stored.generation
    entry.entry_valid = entry.attr_valid = valid_seconds
    put_attributes(stored, &entry.attr)


cdef inline void put_attributes(const stored_t *stored, fuse_attr *attr) noexcept nogil:
    """As `InodeAttributes.attributes`, and as `encode` packs them."""
    cdef uint64_t frames = 0
    cdef uint32_t number
    for number in range(stored.run_count):
        frames += stored.runs[number].count
    attr.ino = stored.number
    attr.size = stored.target_bytes or stored.size_bytes
    attr.nlink = stored.link_count
    if (stored.mode & S_IFMT) == S_IFDIR:
        attr.size = stored.slot_count * LOG_RECORD_BYTES
        if stored.link_count:
            attr.nlink += 1 + stored.subdirectory_count
    attr.blocks = frames * (FRAME_BYTES // 512)
    put_time(stored.accessed_ns, <int64_t *>&attr.atime, &attr.atimensec)
    put_time(stored.modified_ns, <int64_t *>&attr.mtime, &attr.mtimensec)
    put_time(stored.changed_ns, <int64_t *>&attr.ctime, &attr.ctimensec)
    attr.mode, attr.uid, attr.gid = stored.mode, stored.uid, stored.gid
    attr.rdev = stored.device
    attr.blksize = FRAME_BYTES


cdef inline void put_time(int64_t time_ns, int64_t *seconds, uint32_t *rest_ns) noexcept nogil:
    """Whole seconds, and the rest, which is never below zero."""
    cdef int64_t rest = time_ns % NS
    seconds[0] = time_ns // NS
    if rest < 0:
        rest += NS
        seconds[0] -= 1
    rest_ns[0] = <uint32_t>rest


def hold_listed(counts, notes, bytearray answer not None, size_t start) -> None:
    """Count what was packed into an answer, from its byte `start` on, as looked up once more.

    `counts` has a word for each number of an inode. Raises IndexError if one is too large, with all
    before it counted. Each count is noted before it changes (`holdnotes`), unless `notes` is None.
    """
    cdef const uint8_t *packed = <const uint8_t *>PyByteArray_AS_STRING(answer)
    cdef const fuse_direntplus *head
    cdef size_t end = <size_t>len(answer)
    cdef uint64_t number
    cdef uint64_t *count
    cdef Py_buffer view, noted
    cdef bint has_notes = notes is not None
    PyObject_GetBuffer(counts, &view, PyBUF_WRITABLE)
    if has_notes:
        try:
            PyObject_GetBuffer(notes, &noted, PyBUF_WRITABLE)
        except BaseException:
            PyBuffer_Release(&view)
            raise
    try:
        while start + HEAD_BYTES <= end:
            head = <const fuse_direntplus *>(packed + start)
            number = head.entry_out.nodeid
            if number >= <uint64_t>view.len // 8:
                raise IndexError(number)
            count = <uint64_t *>view.buf + number
            if has_notes:
                note_count(<uint64_t *>noted.buf, <uint64_t>noted.len // 8, number, count[0])
            store(count, count[0] + 1)
            start += (HEAD_BYTES + head.dirent.namelen + 7) & ~<size_t>7
    finally:
        PyBuffer_Release(&view)
        if has_notes:
            PyBuffer_Release(&noted)


cdef inline void note_count(uint64_t *notes, uint64_t room_words, uint64_t number,
                            uint64_t count) noexcept nogil:
    """As `HoldNotes.note`."""
    cdef uint64_t at = NOTES_HEAD_WORDS + 2 * notes[1]
    if not notes[0] or at + 2 > room_words:
        return
    notes[at], notes[at + 1] = number, count
    # In this order, whatever instruction the process is killed at.
    store(&notes[1], notes[1] + 1)
