"""`burst.py FILE LENGTH ROUNDS`: many requests submitted to one file at once, by one CPU."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

_IO_SETUP, _IO_GETEVENTS, _IO_SUBMIT = 206, 208, 209
_PREAD, _PWRITE = 0, 1
REQUESTS = 32


class Iocb(ctypes.Structure):
    """struct iocb of linux/aio_abi.h."""

    _fields_ = (
        ("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16), ("priority", ctypes.c_int16), ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64), ("length", ctypes.c_uint64), ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64), ("more_flags", ctypes.c_uint32),
        ("event_fd", ctypes.c_uint32),
    )  # fmt: skip


class Event(ctypes.Structure):
    """struct io_event."""

    _fields_ = (
        ("data", ctypes.c_uint64), ("object", ctypes.c_uint64), ("result", ctypes.c_int64),
        ("more", ctypes.c_int64),
    )  # fmt: skip


def burst(path: str, length: int, rounds: int) -> None:
    """Half reads, half writes, all submitted at once by one CPU; each must be answered whole."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    memory = mmap.mmap(-1, length * REQUESTS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    context = ctypes.c_uint64()
    assert not libc.syscall(_IO_SETUP, REQUESTS, ctypes.byref(context))
    blocks = (Iocb * REQUESTS)()
    pointers = (ctypes.POINTER(Iocb) * REQUESTS)()
    for number, block in enumerate(blocks):
        block.opcode = _PREAD if number < REQUESTS // 2 else _PWRITE
        block.fd, block.length = fd, length
        block.buffer, block.offset = start + number * length, number * length
        pointers[number] = ctypes.pointer(block)
    events = (Event * REQUESTS)()
    for _ in range(rounds):
        assert libc.syscall(_IO_SUBMIT, context, REQUESTS, pointers) == REQUESTS
        # All of them, however long it takes: whoever called this limits the time.
        done = libc.syscall(_IO_GETEVENTS, context, REQUESTS, REQUESTS, events, None)
        assert [event.result for event in events[:done]] == [length] * REQUESTS


if __name__ == "__main__":
    burst(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
