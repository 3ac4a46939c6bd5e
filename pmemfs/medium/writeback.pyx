# cython: language_level=3
"""The instructions and system calls that a medium needs and Python lacks.

`flush_lines` writes the cache lines of a range back to memory, and `fence` waits until they are
there. `msync` is mmap.flush() without the interpreter's lock. `punch_hole` gives memory back. On
x86-64, lines are written back by clwb if the processor has it, else by clflushopt, else by clflush.
On arm64 it is dc cvac, because user space can't find out portably whether it may use dc cvap.
Source: Intel SDM vol. 2, "CLWB"; Arm ARM, "DC CVAC".
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport errno

cdef extern from "../medium/writeback.h" nogil:
    const char *pmemfs_instruction
    int pmemfs_punch(int fd, long long offset, long long length)


INSTRUCTION = pmemfs_instruction.decode()


def flush_lines(memory) -> None:
    """Write back every cache line that `memory` touches; durable after the next `fence`."""
    cdef Py_buffer view
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
    if view.len:
        with nogil:
            write_back(view.buf, <size_t>view.len)
    PyBuffer_Release(&view)


def fence() -> None:
    """Wait until all cache lines that this thread wrote back are in memory."""
    wait_for_write_back()


def msync(memory) -> None:
    """Write the pages that `memory` touches to their device. Raises OSError."""
    cdef Py_buffer view
    cdef int failed = 0
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
    if view.len:
        with nogil:
            failed = errno if synchronise(view.buf, <size_t>view.len) else 0
    PyBuffer_Release(&view)
    if failed:
        raise OSError(failed, "msync failed")


def punch_hole(int fd, long long offset_bytes, long long length_bytes) -> None:
    """Give back the memory behind a range of a file, which then reads as zeroes. Raises OSError."""
    cdef int failed
    with nogil:
        failed = pmemfs_punch(fd, offset_bytes, length_bytes)
    if failed:
        raise OSError(errno, "punching a hole failed")
