"""The kernel's flags of mounts: what mount_setattr(2) changes of one place, without any helper.

It asks the file system nothing, so it does not wait for a daemon, also for one that has not begun.
Source: mount_setattr(2), include/uapi/linux/mount.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

_MOUNT_SETATTR = 442
"""The number of the system call, on all machines: libraries older than glibc 2.36 lack it."""
_AT_FDCWD = -100
_ATTRIBUTES = struct.Struct("<QQQQ")
"""What to set, what to clear; nothing of propagation, no user namespace."""

_ACCESS_TIMES = 0x70
_SET = {
    "ro": 0x1, "nosuid": 0x2, "nodev": 0x4, "noexec": 0x8, "noatime": 0x10, "strictatime": 0x20,
    "nodiratime": 0x80, "nosymfollow": 0x20_0000,
}  # fmt: skip
_CLEAR = {
    "rw": 0x1, "suid": 0x2, "dev": 0x4, "exec": 0x8, "relatime": _ACCESS_TIMES,
    "atime": _ACCESS_TIMES, "nostrictatime": _ACCESS_TIMES, "diratime": 0x80,
    "symfollow": 0x20_0000,
}  # fmt: skip


def set_flags(mountpoint: str, words: Iterable[str]) -> None:
    """Change the flags that some words name, the later of two that contradict each other counting.

    What is said by no word stays as it is. Raises OSError.
    """
    to_set = to_clear = 0
    for word in words:
        bits, cleared = _SET.get(word, 0), _CLEAR.get(word, 0)
        if bits & _ACCESS_TIMES:
            # One of three, so what was there has to go.
            cleared |= _ACCESS_TIMES
        to_set = to_set & ~cleared | bits
        to_clear = to_clear & ~bits | cleared
    # The three are one number to the kernel, which is cleared before it is set.
    to_clear |= _ACCESS_TIMES if to_set & _ACCESS_TIMES else 0
    if not to_set | to_clear:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = _ATTRIBUTES.pack(to_set, to_clear, 0, 0)
    failed = libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR), ctypes.c_int(_AT_FDCWD), os.fsencode(mountpoint),
        ctypes.c_uint(0), attributes, ctypes.c_size_t(len(attributes)),
    )  # fmt: skip
    if failed:
        number = ctypes.get_errno() or errno.EIO
        raise OSError(number, os.strerror(number))
