"""Kills a process so many instructions after it has stored into a word of memory.

A death at a random time rarely comes within the microseconds in which an operation was carried out
and has no answer. Here the processor stops the process when it stores into a word (a watchpoint, in
a debug register), and it is killed some single steps later.
"""

from __future__ import annotations

import ctypes
import os
import signal

_ATTACH, _POKEUSER, _CONT, _SINGLESTEP = 16, 6, 7, 9
_DEBUG_REGISTERS = 848
"""Where they are in `struct user` of x86-64."""
_STORES_INTO_8_BYTES = 1 | 0b01 << 16 | 0b10 << 18
"""Of register 7: register 0 counts, for stores into eight bytes."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def address_in(pid: int, name: str, offset: int) -> int:
    """Where a process has mapped this offset of a memfd of this name."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if f"memfd:{name}" in line:
                span, _, at, *_ = line.split()
                start, end = (int(part, 16) for part in span.split("-"))
                start_offset = int(at, 16)
                if start_offset <= offset < start_offset + end - start:
                    return start + offset - start_offset
    raise OSError(f"process {pid} has not mapped {name} there")


def kill_after_store(pid: int, address: int, steps: int) -> None:
    """Kill a process, whose main thread has stored into this word, after so many instructions.

    Raises ChildProcessError if it ended before.
    """
    _ptrace(_ATTACH, pid)
    _wait(pid)
    _ptrace(_POKEUSER, pid, _DEBUG_REGISTERS, address)
    _ptrace(_POKEUSER, pid, _DEBUG_REGISTERS + 7 * 8, _STORES_INTO_8_BYTES)
    passed_on = 0
    while True:
        _ptrace(_CONT, pid, 0, passed_on)
        stopped_by = _wait(pid)
        if stopped_by == signal.SIGTRAP:
            break
        passed_on = stopped_by
    _ptrace(_POKEUSER, pid, _DEBUG_REGISTERS + 7 * 8, 0)
    for _ in range(steps):
        _ptrace(_SINGLESTEP, pid)
        _wait(pid)
    os.kill(pid, signal.SIGKILL)


def _wait(pid: int) -> int:
    """The signal that has stopped it."""
    _, status = os.waitpid(pid, 0x40000000)
    if not os.WIFSTOPPED(status):
        raise ChildProcessError(f"process {pid} has ended")
    return os.WSTOPSIG(status)
