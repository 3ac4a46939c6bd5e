"""Memory that can't be touched, for tests: poisoned by userfaultfd(2), or cut off with its file.

Poison is a property of this process's mapping, so whoever is to meet it runs here. A test that a
mistake would kill runs `in_child`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pmemfs.pfn import FRAME_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

# Source: userfaultfd(2), ioctl_userfaultfd(2) and linux/userfaultfd.h.
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(os.uname().machine, -1)
_API, _REGISTER, _UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_ZEROPAGE, _POISON = 0xC020AA04, 0xC020AA08
_FEATURE_POISON = 1 << 14
_MODE_MISSING = 1
_MADV_DONTNEED = 4
_MESSAGE_BYTES = 32
_PATIENCE_SECONDS = 30
_CHILD_SECONDS = 120

_libc = ctypes.CDLL(None, use_errno=True)


def address_of(buffer: Buffer) -> int:
    """Where a buffer lies in memory."""
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def mapping_of(path: str, *, longest: bool = False) -> int:
    """Where this process has a file mapped; the longest of its mappings, or the only one."""
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            if line.rstrip("\n").endswith(path):
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                found.append((end - start, start))
    assert found
    assert longest or len(found) == 1
    return max(found)[1]


@dataclass
class Poisoner:
    """A userfaultfd of this process."""

    fd: int

    def poison(self, address: int, length: int = FRAME_BYTES) -> None:
        """Let a touch of whole frames be a SIGBUS, and EFAULT in system calls."""
        self.watch(address, length)
        self._ioctl(_POISON, struct.pack("QQQq", address, length, 0, 0))

    def watch(self, address: int, length: int = FRAME_BYTES) -> None:
        """Take frames out of the page table; if they are holes, who touches them has to wait."""
        if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise failed")
        self._ioctl(_REGISTER, struct.pack("QQQQ", address, length, _MODE_MISSING, 0))

    def wait_for_touch(self) -> None:
        """Return when somebody touches a watched hole."""
        touched = select.poll()
        touched.register(self.fd, select.POLLIN)
        assert touched.poll(_PATIENCE_SECONDS * 1000), "nobody touches it"
        assert len(os.read(self.fd, _MESSAGE_BYTES)) == _MESSAGE_BYTES

    def fill(self, address: int, length: int = FRAME_BYTES) -> None:
        """Zeroes into watched holes, and let those who wait go on."""
        self._ioctl(_ZEROPAGE, struct.pack("QQQq", address, length, 0, 0))

    def _ioctl(self, request: int, argument: bytes) -> None:
        fcntl.ioctl(self.fd, request, bytearray(argument))


@contextmanager
def poisoner() -> Iterator[Poisoner]:
    """A userfaultfd, or a skipped test where the kernel has none that can poison."""
    fd = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC)
    if fd < 0:
        pytest.skip("there is no userfaultfd(2) for us here")
    try:
        try:
            fcntl.ioctl(fd, _API, bytearray(struct.pack("QQQ", 0xAA, _FEATURE_POISON, 0)))
        except OSError:
            pytest.skip("the kernel's userfaultfd can't poison")
        yield Poisoner(fd)
    finally:
        os.close(fd)


def in_child(test: Callable[[], object]) -> int:
    """Run a part of a test in a process of its own; the signal that ended it, or 0.

    Fails where it raises.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        # Who waits for a page that never comes can't be woken up in another way.
        signal.alarm(_CHILD_SECONDS)
        try:
            test()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "see what it wrote to standard error"
    return 0
