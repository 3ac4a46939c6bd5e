"""The entries of rings: requests of the kernel, and what became of them.

An entry is a header and a payload, which the kernel fills with a request, and `aside`, which is
ours. Its state is kept apart, closely packed. All of it may lie in memory that outlives the data
plane, and every data plane has it at the same addresses: the kernel goes on using those of the
first. Whatever `kill -9` strikes, the next data plane finds one of these and does what it says
(`outlook_of`):

    found                                     what has become of the request      what is done
    commit_id 0                               none ever came                      REGISTER_ENTRY
    head's number is not commit_id            the kernel could not deliver it     FAIL_LEFT
    answered == commit_id                     its reply is prepared; the kernel   COMMIT_AGAIN
                                              may have taken it
    pending == commit_id, of CONTROL          the control plane may have it       HAND_LEFT
    else                                      it is here, or was handed to a      SERVE_LEFT
                                              thread that has died as well

and the steps between them, each of which is one store:

    (the kernel stores op_in and payload, then commit_id, then the head)
    in hand  --note_pending----> pending    `handed_to` first
    in hand, pending
             --prepare_reply---> answered   what the reply is made of first: error, length, bytes
    answered --put_reply, then COMMIT_AND_FETCH--> the kernel stores the next request
    ENOENT for a COMMIT: the kernel has had it, and the entry went with the ring. REGISTER_ENTRY

Invariants:
- before `answered`, the request can be served or handed over again. So nothing is stored over the
  head, `op_in` and the payload, except: what a READ or a listing gives, which have no payload, and a
  reply of more than `aside` holds. Before such a reply the payload is saved into `aside` (`saved`).
  If it does not fit there, it is lost, and the request is handed over without it: that the control
  plane has answered it before is how it came to be lost, and its record says what;
- after `answered`, the reply can be put into place again: it is in `aside`, or whole in the payload;
- `aside` holds a saved payload or a reply, never both. A payload that was saved is put back before
  its request is handed over again, and only then a reply may come;
- a native operation may be carried out twice, because nobody was answered in between: READ, LSEEK,
  GETATTR, FSYNC, and WRITE of the same bytes. What the control plane was handed may be handed to it
  twice, because it knows the number. A FORGET has no number: it is `answered` before it is handed
  over, so that it is lost at worst, and never counted twice;
- only one thread at a time changes an entry: its worker, or once it is pending whoever replies.

Source: fs/fuse/dev_uring.c of Linux 6.18: fuse_uring_copy_to_ring, fuse_uring_commit_fetch.
"""

from libc.errno cimport EINVAL, EIO, ENOMEM, errno
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.mman cimport (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    mmap,
)
from posix.stat cimport fstat, struct_stat

from pmemfs.dataplane.entries cimport *
from pmemfs.dataplane.memory cimport load, peek, put, put_32, store
from pmemfs.dataplane.protocol cimport *
from pmemfs.dataplane.request cimport request_t
from pmemfs.dataplane.structures cimport *

cdef extern from "sys/mman.h" nogil:
    int madvise(void *start, size_t length, int advice)
    enum:
        MADV_HUGEPAGE
        MADV_POPULATE_WRITE
        MAP_FIXED_NOREPLACE

cdef extern from "entries.h" nogil:
    enum:
        MADV_COLLAPSE "PMEMFS_MADV_COLLAPSE"

cdef enum:
    LARGE_PAGE_BYTES = 2097152

# Where the first data plane tries to have entries: far from anything that the kernel places by
# itself, which is near the ends of the address space, of 47 bits and of 39.
cdef uint64_t[2] ENTRIES_ADDRESSES = [<uint64_t>1 << 44, <uint64_t>1 << 36]


cdef size_t entries_bytes_of(uint64_t queue_count, uint32_t depth, uint32_t max_write) noexcept nogil:
    """What all rings need; `layouts.entries_bytes` computes the same."""
    return queue_count * (states_bytes_of(depth) + depth * (ENTRY_PAYLOAD_AT + <size_t>max_write))


cdef inline size_t states_bytes_of(uint32_t depth) noexcept nogil:
    return (depth * sizeof(entry_state_t) + 4095) & ~<size_t>4095


cdef int map_entries(header_t *header, int entries_fd, size_t length, uint8_t **found) noexcept nogil:
    """Map the memory of all rings; 0 or errno. With `entries_fd` -1 it ends with this process."""
    cdef void *mapped = MAP_FAILED
    cdef struct_stat status
    cdef size_t number
    cdef int choice
    if entries_fd < 0:
        found[0] = own_memory(length)
        return 0 if found[0] != NULL else ENOMEM
    # To the end of the file, because large pages are whole.
    if fstat(entries_fd, &status):
        return errno
    if <size_t>status.st_size < length:
        return EINVAL
    length = <size_t>status.st_size
    if header.entries_address:
        mapped = map_at(entries_fd, length, header.entries_address)
    else:
        for choice in range(2):
            if mapped == MAP_FAILED:
                mapped = map_at(entries_fd, length, ENTRIES_ADDRESSES[choice])
        if mapped == MAP_FAILED:
            mapped = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, entries_fd, 0)
    if mapped == MAP_FAILED:
        return errno
    # Shared memory gets large pages only if somebody asks for them now, and only around a page that
    # is there. Measured: without them, moving 1 MiB takes 5 to 10 % longer.
    for number in range(length // LARGE_PAGE_BYTES):
        peek(<uint64_t *>(<uint8_t *>mapped + number * LARGE_PAGE_BYTES))
    madvise(mapped, length, MADV_COLLAPSE)
    prepare_memory(mapped, length)
    # Before the kernel gets to know it.
    store(&header.entries_address, <uint64_t>mapped)
    found[0] = <uint8_t *>mapped
    return 0


cdef uint8_t *own_memory(size_t length) noexcept nogil:
    """Memory that ends with this process; NULL if there is none."""
    cdef void *mapped = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                             0)
    if mapped == MAP_FAILED:
        return NULL
    prepare_memory(mapped, length)
    return <uint8_t *>mapped


cdef void prepare_memory(void *memory, size_t length) noexcept nogil:
    """Large pages for large payloads if possible, and no page faults while serving. Besides, the
    kernel can't deliver a request to a missing page once this process is being killed."""
    madvise(memory, length, MADV_HUGEPAGE)
    madvise(memory, length, MADV_POPULATE_WRITE)


cdef inline void *map_at(int fd, size_t length, uint64_t address) noexcept nogil:
    return mmap(<void *>address, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE,
                fd, 0)


cdef void lay_entry(entry_t *entry, uint8_t *states, uint8_t *entries, uint32_t position,
                    uint32_t max_write) noexcept nogil:
    """Find the parts of an entry of a queue in its memory."""
    cdef uint8_t *memory = entries + position * (ENTRY_PAYLOAD_AT + <size_t>max_write)
    entry.state = <entry_state_t *>states + position
    entry.header = <uring_header_t *>memory
    entry.aside = memory + ENTRY_ASIDE_AT
    entry.payload = memory + ENTRY_PAYLOAD_AT
    entry.memory[0].iov_base, entry.memory[0].iov_len = entry.header, sizeof(uring_header_t)
    entry.memory[1].iov_base, entry.memory[1].iov_len = entry.payload, max_write
    entry.is_left = False


cdef outlook_t outlook_of(entry_t *entry) noexcept nogil:
    """What is to be done with an entry that this data plane finds; nothing is changed."""
    cdef uint64_t commit_id = entry.header.entry.commit_id
    if not commit_id:
        return REGISTER_ENTRY
    if load(&entry.state.answered) == commit_id:
        # First, because the number of the reply's head may not be there yet.
        return COMMIT_AGAIN
    if (<fuse_in_header *>entry.header.in_out).unique != commit_id:
        return FAIL_LEFT
    if load(&entry.state.pending) == commit_id and entry.state.handed_to == HANDED_CONTROL:
        return HAND_LEFT
    return SERVE_LEFT


cdef inline bint take_apart(entry_t *entry, fuse_in_header *head, request_t *request,
                            uint32_t room) noexcept nogil:
    """Take a request apart, if the lengths of its parts agree. `head` is a copy."""
    cdef uint32_t payload_bytes = entry.header.entry.payload_sz
    request.head = head
    request.operation = <uint8_t *>entry.header.op_in
    request.operation_bytes = 0
    request.payload = entry.payload
    request.payload_bytes = payload_bytes
    if (head.opcode == FUSE_READ or head.opcode == FUSE_READDIR
            or head.opcode == FUSE_READDIRPLUS):
        request.answer, request.answer_room = entry.payload, room
    else:
        request.answer, request.answer_room = entry.aside, ENTRY_ASIDE_BYTES
    request.may_point = request.is_again = False
    request.is_left = entry.is_left
    request.pointed = NULL
    if payload_bytes > room or head.len < sizeof(fuse_in_header) + payload_bytes:
        return False
    request.operation_bytes = head.len - <uint32_t>sizeof(fuse_in_header) - payload_bytes
    return request.operation_bytes <= sizeof(entry.header.op_in)


cdef inline void note_pending(entry_t *entry, uint64_t unique, uint32_t handed_to) noexcept nogil:
    """Somebody else will reply. Before he is told: his reply is matched by the number."""
    put_32(&entry.state.handed_to, handed_to)
    store(&entry.state.pending, unique)


cdef inline void prepare_reply(entry_t *entry, uint64_t unique, int32_t error, uint32_t answer_bytes,
                               bint is_aside) noexcept nogil:
    """From here on the request is answered, whatever happens."""
    put_32(&entry.state.error, <uint32_t>-error)
    put_32(&entry.state.answer_bytes, answer_bytes)
    put_32(&entry.state.is_aside, is_aside)
    store(&entry.state.answered, unique)


cdef inline void put_reply(entry_t *entry) noexcept nogil:
    """Put the reply that was prepared where the kernel will take it, over the request."""
    cdef fuse_out_header *out = <fuse_out_header *>entry.header.in_out
    cdef entry_state_t *state = entry.state
    if state.is_aside:
        memcpy(entry.payload, entry.aside, state.answer_bytes)
    out.len = <uint32_t>sizeof(fuse_out_header) + state.answer_bytes
    out.error = -<int32_t>state.error
    out.unique = state.answered
    entry.header.entry.payload_sz = state.answer_bytes


cdef inline void answer_entry(entry_t *entry, request_t *request) noexcept nogil:
    """Put the reply to a request that its worker has served in place."""
    prepare_reply(entry, request.head.unique, -request.error, request.answer_bytes,
                  request.answer == entry.aside)
    put_reply(entry)


cdef void fill_entry(entry_t *entry, uint64_t unique, int32_t error, const void *data,
                     uint32_t data_bytes, uint32_t room) noexcept nogil:
    """Put a reply of somebody else in place."""
    if data_bytes > room:
        error, data_bytes = -EIO, 0
    if data_bytes <= ENTRY_ASIDE_BYTES:
        memcpy(entry.aside, data, data_bytes)
    else:
        save_payload(entry, unique)
        memcpy(entry.payload, data, data_bytes)
    prepare_reply(entry, unique, error, data_bytes, data_bytes <= ENTRY_ASIDE_BYTES)
    # With release: a thread that finds the entry pending no more finds the whole reply.
    store(&entry.state.pending, 0)
    put_reply(entry)


cdef void save_payload(entry_t *entry, uint64_t unique) noexcept nogil:
    """Before the payload of a request is overwritten, and it is not answered yet."""
    cdef uint32_t payload_bytes = entry.header.entry.payload_sz
    if not payload_bytes:
        return
    if payload_bytes > ENTRY_ASIDE_BYTES:
        payload_bytes = 0
    memcpy(entry.aside, entry.payload, payload_bytes)
    put_32(&entry.state.saved_bytes, payload_bytes)
    store(&entry.state.saved, unique)


cdef bint take_again(entry_t *entry, fuse_in_header *head, request_t *request,
                     uint32_t room) noexcept nogil:
    """Take a request apart that is handed over once more, as far as it is still there."""
    cdef entry_state_t *state = entry.state
    if load(&state.saved) == head.unique and state.saved_bytes:
        memcpy(entry.payload, entry.aside, state.saved_bytes)
        # Only now, and before a reply can take its place.
        store(&state.saved, 0)
    if not take_apart(entry, head, request, room):
        return False
    if load(&state.saved) == head.unique:
        head.len -= request.payload_bytes
        request.payload_bytes = 0
    return True
