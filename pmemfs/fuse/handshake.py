"""INIT: what the kernel offers, and what a mount takes of it."""

from __future__ import annotations

import errno
from typing import NamedTuple

from pmemfs.dataplane.tables import Agreement
from pmemfs.errors import system_error
from pmemfs.fuse import wire
from pmemfs.pfn import FRAME_BYTES

_ALWAYS = (
    wire.ASYNC_READ | wire.ATOMIC_O_TRUNC | wire.BIG_WRITES | wire.AUTO_INVAL_DATA
    | wire.DO_READDIRPLUS | wire.READDIRPLUS_AUTO | wire.ASYNC_DIO | wire.PARALLEL_DIROPS
    | wire.MAX_PAGES | wire.INIT_EXT | wire.DIRECT_IO_ALLOW_MMAP
)  # fmt: skip
"""Locks are not among these: the kernel keeps the locks of one machine by itself."""
_WITH_FILES = (
    wire.EXPORT_SUPPORT | wire.POSIX_ACL | wire.SETXATTR_EXT | wire.DONT_MASK
    | wire.HANDLE_KILLPRIV_V2
)  # fmt: skip
"""The handlers apply the umask, because only they know default lists. They also take privileges
away, in one step with the change."""
_LOW = (1 << 32) - 1


class Terms(NamedTuple):
    """What a mount wants to agree on."""

    max_write: int
    """In bytes; a request and its answer have room for this much behind their heads."""
    max_background: int
    has_files: bool
    over_uring: bool


def agree(operation: bytes, terms: Terms) -> tuple[bytes, Agreement]:
    """The answer to an INIT, and what it agrees on.

    Raises OSError: ENODEV if the kernel does not offer the transport, EPROTO for another major
    version. Raises struct.error for a kernel older than Linux 2.6.26.
    """
    padded = operation[: wire.INIT_IN.size].ljust(wire.INIT_IN.size, b"\0")
    major, minor, max_readahead, low, high = wire.INIT_IN.unpack(padded)
    if major != wire.MAJOR:
        raise system_error(errno.EPROTO)
    offered = low | (high << 32 if low & wire.INIT_EXT else 0)
    wanted = _ALWAYS | (_WITH_FILES if terms.has_files else 0)
    if terms.over_uring:
        wanted |= wire.OVER_IO_URING
        if not offered & wire.OVER_IO_URING:
            raise system_error(errno.ENODEV)
    flags = offered & wanted
    agreed = Agreement(
        min(minor, wire.MINOR), flags, terms.max_write, max_readahead, terms.max_background
    )
    answer = wire.INIT_OUT.pack(
        wire.MAJOR, agreed.minor, max_readahead, flags & _LOW, terms.max_background,
        terms.max_background // 4 * 3, terms.max_write, 1, terms.max_write // FRAME_BYTES, 0,
        flags >> 32,
    )  # fmt: skip
    return answer, agreed
