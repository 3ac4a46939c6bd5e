"""What a process leaves in shared memory if kill -9 strikes between any two of its instructions."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable

import pytest

_TRACEME, _SINGLESTEP = 0, 9

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def states_of(memory: mmap.mmap, action: Callable[[], object]) -> list[bytes]:
    """All contents of `memory`, which is shared, from before `action` to after it.

    A child does it, one instruction at a time. Skips the test if nobody may trace here.
    """
    child = os.fork()
    if not child:
        try:
            if _libc.ptrace(_TRACEME, 0, None, None):
                os._exit(2)
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    states = [memory[:]]
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        pytest.skip("no process may be traced here")
    while os.WIFSTOPPED(status):
        if _libc.ptrace(_SINGLESTEP, child, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")
        _, status = os.waitpid(child, 0)
        found = memory[:]
        if found != states[-1]:
            states.append(found)
    assert status == 0, "the action has failed"
    return states
