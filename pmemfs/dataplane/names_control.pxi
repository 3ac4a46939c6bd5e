"""What the planes share about names, for the control plane: the lock, stacks, changes, versions.

Invariant: all that is here is used by who holds the lock, except `take`, `is_mine` and the words
that say nothing about a stack. names.pxd has the protocol.
"""

cimport cython

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdlib cimport malloc, qsort

cdef enum:
    # So often a lock that is taken is looked at before another thread gets the CPU.
    NAMES_LOOKS = 50


# A name of a list, by its position in a listing.
cdef struct named_t:
    uint64_t position
    uint64_t at


cdef int compare_named(const void *one, const void *other) noexcept nogil:
    cdef uint64_t a = (<const named_t *>one).position
    cdef uint64_t b = (<const named_t *>other).position
    return (a > b) - (a < b)


# The collector of cycles would let go of a buffer that is still used here, and no cycle has these.
@cython.no_gc
cdef class NamesStack:
    """A stack of numbers that workers take from, and put back to."""

    cdef uint64_t *_words
    cdef uint64_t *_count
    # Lasts as long as this.
    cdef object _memory

    @property
    def count(self) -> int:
        """How many numbers are on it."""
        return min(self._count[0], 1 << NAMES_STACK_SHIFT)

    def push(self, numbers) -> None:
        """Put numbers on top, the last one topmost. Raises IndexError if there is no room."""
        cdef uint64_t count = self._count[0]
        if count > (1 << NAMES_STACK_SHIFT) or len(numbers) > (1 << NAMES_STACK_SHIFT) - count:
            raise IndexError(len(numbers))
        for number in numbers:
            put(&self._words[count], number)
            count += 1
        # If this process dies before, they are not there, and leaked.
        store(self._count, count)

    def pop(self, uint64_t count) -> list[int]:
        """Take so many numbers from the top, or all there are; the topmost first."""
        cdef uint64_t there = self.count
        cdef uint64_t taken = min(count, there)
        cdef uint64_t at
        cdef list numbers = [self._words[there - 1 - at] for at in range(taken)]
        store(self._count, there - taken)
        return numbers

    def numbers(self) -> list[int]:
        """All that are on it."""
        cdef uint64_t at
        return [self._words[at] for at in range(<uint64_t>self.count)]


@cython.no_gc
cdef class NamesShared:
    """The area of names in the shared memory, which begins at an offset in bytes.

    It takes a writable buffer of all of that memory. Raises ValueError if there is no such area.
    """

    cdef Py_buffer _shared
    cdef object _memory
    cdef header_t *_header
    cdef names_head_t *_head
    cdef uint64_t *_changes
    cdef uint64_t *_versions
    cdef readonly NamesStack slots
    cdef readonly NamesStack frames
    cdef readonly NamesStack handles
    cdef readonly NamesStack orphans

    def __cinit__(self, shared) -> None:
        cdef uint8_t *area
        PyObject_GetBuffer(shared, &self._shared, PyBUF_WRITABLE)
        self._memory = shared
        self._header = <header_t *>self._shared.buf
        if not self._header.names_offset:
            raise ValueError("there are no names here")
        area = <uint8_t *>self._shared.buf + self._header.names_offset
        self._head = <names_head_t *>area
        self._changes = <uint64_t *>(area + NAMES_CHANGES_AT)
        self._versions = <uint64_t *>(area + NAMES_VERSIONS_AT)
        self.slots = self._stack(area + NAMES_SLOTS_AT, &self._head.slot_count)
        self.frames = self._stack(area + NAMES_FRAMES_AT, &self._head.frame_stack_count)
        self.handles = self._stack(area + NAMES_HANDLES_AT, &self._head.handle_count)
        self.orphans = self._stack(area + NAMES_ORPHANS_AT, &self._head.orphan_count)

    cdef NamesStack _stack(self, uint8_t *words, uint64_t *count):
        cdef NamesStack stack = NamesStack.__new__(NamesStack)
        stack._words, stack._count = <uint64_t *>words, count
        stack._memory = self._memory
        return stack

    def __dealloc__(self) -> None:
        PyBuffer_Release(&self._shared)

    def take(self, uint64_t patience_ns=10_000_000_000) -> bool | None:
        """Take the lock, which this may have; whether a worker that has died had it. None: a
        worker has had it for so long, and has it still.

        Workers hold it for some microseconds, unless they are stopped.
        """
        cdef int found
        with nogil:
            found = self._take(patience_ns)
        return None if found < 0 else found > 0

    def free(self) -> None:
        """Free the lock, if this has it."""
        if peek(&self._head.holder) >= CONTROL_HOLDER:
            # As of `free_names`: the words behind the journal were flushed by this processor.
            if self._header.durability == DURABILITY_CACHE_LINES:
                wait_for_write_back()
            store(&self._head.holder, 0)

    @property
    def is_mine(self) -> bool:
        """Whether the control plane has the lock."""
        return peek(&self._head.holder) >= CONTROL_HOLDER

    @property
    def is_on(self) -> bool:
        """Whether workers may change names."""
        return peek(&self._head.on) != 0

    @is_on.setter
    def is_on(self, bint value) -> None:
        store(&self._head.on, value)

    @property
    def has_failed(self) -> bool:
        """Whether a worker's commit has failed."""
        return load(&self._head.failed) != 0

    @property
    def needs_control(self) -> bool:
        """Whether there is something to hand out, to take back, or to free."""
        return needs_control(self._head)

    @property
    def is_scattered(self) -> bool:
        """Whether a worker has found the frames on the stack in too many pieces."""
        return peek(&self._head.scattered) != 0

    @is_scattered.setter
    def is_scattered(self, bint value) -> None:
        store(&self._head.scattered, value)

    @property
    def removal_count(self) -> int:
        """How many names workers have taken from inodes."""
        return peek(&self._head.removals)

    @property
    def last_time_ns(self) -> int:
        """The latest time that a user has set to the present, in ns since 1970."""
        return self._head.last_time_ns

    @last_time_ns.setter
    def last_time_ns(self, uint64_t value) -> None:
        put(&self._head.last_time_ns, value)

    @property
    def changes(self) -> int:
        """How many inodes workers have changed, one after the other."""
        return load(&self._head.changes)

    def changed_since(self, uint64_t seen) -> list[int] | None:
        """The inodes that workers have changed since `changes` was `seen`; None: any may be."""
        cdef uint64_t count = load(&self._head.changes)
        cdef uint64_t at
        if count - seen > (1 << NAMES_CHANGES_SHIFT):
            return None
        return [self._changes[at & ((1 << NAMES_CHANGES_SHIFT) - 1)] for at in range(seen, count)]

    def rewritten(self, uint64_t number) -> None:
        """The log of an inode is about to be replaced: workers read it anew."""
        cdef uint64_t *version = &self._versions[number & ((1 << NAMES_VERSIONS_SHIFT) - 1)]
        store(version, version[0] + 1)

    def names_after(self, list names not None, uint64_t position, size_t count) -> list:
        """Of names, those that come next behind a position in a listing by workers, at most so
        many, each with its position. See listings.pxi."""
        cdef size_t room = 2 * count
        cdef size_t there = 0
        cdef uint64_t at
        cdef uint64_t last = ~<uint64_t>0
        cdef bytes name
        cdef named_t one
        cdef named_t *found = <named_t *>malloc((room + 1) * sizeof(named_t))
        if found == NULL:
            raise MemoryError
        try:
            for at in range(<uint64_t>len(names)):
                name = names[at]
                one.position = position_of(
                    &self._head.seed_0, <const uint8_t *>PyBytes_AS_STRING(name),
                    <uint32_t>PyBytes_GET_SIZE(name))
                one.at = at
                if not position < one.position < last:
                    continue
                found[there] = one
                there += 1
                if there == room:
                    # Of so many, the first half is all that may be among the next ones.
                    qsort(found, there, sizeof(named_t), compare_named)
                    there = count
                    last = found[count - 1].position
            qsort(found, there, sizeof(named_t), compare_named)
            return [(found[at].position, names[found[at].at]) for at in range(min(there, count))]
        finally:
            free(found)

    cdef int _take(self, uint64_t patience_ns) noexcept nogil:
        cdef uint64_t *lock = &self._head.holder
        cdef uint64_t found = 0
        cdef uint64_t until = 0
        cdef int looks
        while True:
            for looks in range(NAMES_LOOKS):
                found = 0
                if not peek(lock) and memory.swap(lock, &found, CONTROL_HOLDER):
                    return 0
                if found >= CONTROL_HOLDER:
                    # Of the control plane, this process is the only one that lives.
                    return 0
                pause()
            sched_yield()
            found = peek(lock)
            if found >= CONTROL_HOLDER:
                return 0
            if found and not self._lives(found) and memory.swap(lock, &found, CONTROL_HOLDER):
                return 1
            until = until or now_ns(CLOCK_MONOTONIC) + patience_ns
            if now_ns(CLOCK_MONOTONIC) > until:
                return -1

    cdef bint _lives(self, uint64_t holder) noexcept nogil:
        cdef uint8_t *slots = <uint8_t *>self._shared.buf + self._header.slots_offset
        if holder > self._header.worker_count:
            return False
        return thread_lives(peek(&(<slot_t *>(slots + (holder - 1) * SLOT_BYTES)).thread_id))
