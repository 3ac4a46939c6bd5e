"""Words that another process may be reading or writing meanwhile, for the control plane.

Invariant: whatever an offset says, only what is inside of the buffer is touched.
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
    """What this thread wrote before is seen by whoever does not see what it reads after."""
    full_fence()


def store_word(buffer, size_t offset, uint64_t value) -> None:
    """Write a word that another process may be reading, before anything that is read later."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    try:
        store(words_of(&view, offset, 1), value)
    finally:
        PyBuffer_Release(&view)
    full_fence()


def write_seqlocked(buffer, size_t offset, bytes data not None) -> None:
    """Write what is behind the sequence at `offset`, as its only writer. `offset` in bytes, and the
    length of `data`, are multiples of eight."""
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
        # Odd it is already where a writer was killed.
        put(sequence, sequence[0] | 1)
        full_fence()
        for position in range(count):
            memcpy(&word, source + position * 8, 8)
            put(&sequence[1 + position], word)
        store(sequence, sequence[0] + 1)
    finally:
        PyBuffer_Release(&view)


def odd_words(buffer, size_t offset, size_t stride, size_t count) -> tuple[tuple[int, int], ...]:
    """The odd ones of `count` words that others may be writing, each with its number, as they are
    after a `fence`. `offset` of the first and `stride` in bytes, multiples of eight."""
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
