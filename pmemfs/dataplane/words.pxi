"""Words that another process may be reading or writing at the same time, for the control plane.

Invariant: whatever an offset says, only memory inside the buffer is touched.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from pmemfs.dataplane.memory cimport full_fence, load, put, store


cdef uint64_t *words_of(Py_buffer *view, size_t offset, size_t count) except NULL:
    """Where `count` words of a buffer begin; `offset` in bytes, a multiple of eight."""
    cdef size_t room = <size_t>view.len // 8
    if offset % 8 or offset // 8 > room or count > room - offset // 8:
        raise IndexError(offset)
    return <uint64_t *>(<uint8_t *>view.buf + offset)


def load_word(buffer, size_t offset) -> int:
    """A word that another process may be writing; `offset` in bytes, a multiple of eight."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        return load(words_of(&view, offset, 1))
    finally:
        PyBuffer_Release(&view)


def fence() -> None:
    """Order what this thread wrote before this ahead of what it reads after this.

    If two threads each store, fence, and then load the other's word, at least one sees the other's
    store.
    """
    full_fence()


def store_word(buffer, size_t offset, uint64_t value) -> None:
    """Write a word that another process may be reading, ahead of anything that is read later."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    try:
        store(words_of(&view, offset, 1), value)
    finally:
        PyBuffer_Release(&view)
    full_fence()


def write_seqlocked(buffer, size_t offset, bytes data not None) -> None:
    """Write the words behind the sequence at `offset`, as their only writer. `offset` and the
    length of `data` are in bytes, and multiples of eight."""
    cdef size_t count = <size_t>len(data) // 8
    cdef size_t position
    cdef uint64_t word
    cdef uint64_t *sequence
    cdef const uint8_t *source = data
    cdef Py_buffer view
    if len(data) % 8:
        raise IndexError(offset)
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    try:
        sequence = words_of(&view, offset, 1 + count)
        # If a writer was killed here before, the sequence is odd already, and a sum would make it
        # even while the words change.
        put(sequence, sequence[0] | 1)
        # No word below may be seen before the sequence is odd: a reader would take a mixture.
        full_fence()
        for position in range(count):
            memcpy(&word, source + position * 8, 8)
            put(&sequence[1 + position], word)
        store(sequence, sequence[0] + 1)
    finally:
        PyBuffer_Release(&view)


def odd_words(buffer, size_t offset, size_t stride, size_t count) -> tuple[tuple[int, int], ...]:
    """The odd words among `count` words that others may be writing, each with its number, as they
    are after a `fence`. `offset`, of the first, and `stride` are in bytes, multiples of eight."""
    cdef size_t number
    cdef uint64_t word
    cdef list found = []
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        full_fence()
        for number in range(count):
            word = load(words_of(&view, offset + number * stride, 1))
            if word & 1:
                found.append((number, word))
    finally:
        PyBuffer_Release(&view)
    return tuple(found)
