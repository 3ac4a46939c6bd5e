"""The operations that pyfuse3 lacks, as the kernel sends them.

The data plane hands them over on a socket of their own, one message each; each is answered with one
message. What a mode does not have answers ENOSYS, and the kernel does not ask again. Source:
include/uapi/linux/fuse.h of Linux 6.18.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from socket import socket

import trio

from pmemfs.errors import system_error
from pmemfs.fuse.barrier import errno_of

FALLOCATE = 43
LSEEK = 46
COPY_FILE_RANGE = 47
SYNCFS = 50
TMPFILE = 51
STATX = 52
COPY_FILE_RANGE_64 = 53

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
COLLAPSE_RANGE = 0x08
ZERO_RANGE = 0x10
INSERT_RANGE = 0x20

# len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
# fh, offset, length, mode, padding
_FALLOCATE_IN = struct.Struct("<QQQII")
# fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
_COPY_IN = struct.Struct("<QQQQQQQ")
_LONGEST_BYTES = 8192
_OFFSET_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what it is about, who asks, and what follows the header."""

    inode: int
    uid: int
    gid: int
    operation: bytes


Handler = Callable[[Request], Awaitable[bytes]]
"""Answers what follows the header of a reply. Raises OSError, and struct.error for too little."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """What fallocate(2) asks for."""

    offset_bytes: int
    length_bytes: int
    mode: int

    @property
    def keeps_size(self) -> bool:
        """Whether the file is not to become longer."""
        return bool(self.mode & KEEP_SIZE)

    @property
    def kind(self) -> int:
        """The mode but for the size."""
        return self.mode & ~KEEP_SIZE


@dataclass(frozen=True, slots=True)
class Copy:
    """What copy_file_range(2) asks for."""

    source_bytes: int
    target_inode: int
    target_bytes: int
    length_bytes: int


class ExtraOperations:
    """Answers requests with the handlers of a mode."""

    def __init__(self, handlers: Mapping[int, Handler]) -> None:
        self._handlers = handlers

    async def serve(self, connection: socket) -> None:
        """Answer what comes until the data plane hangs up; several requests at once."""
        requests = trio.socket.from_stdlib_socket(connection)
        async with trio.open_nursery() as nursery:
            while message := await requests.recv(_LONGEST_BYTES):
                nursery.start_soon(self._serve_one, requests, message)

    async def _serve_one(self, replies: trio.socket.SocketType, message: bytes) -> None:
        try:
            await replies.send(await self.answer(message))
        except (BrokenPipeError, ConnectionResetError):
            return

    async def answer(self, message: bytes) -> bytes:
        """The reply to one request, whatever it is."""
        if len(message) < _IN_HEADER.size:
            return _OUT_HEADER.pack(_OUT_HEADER.size, -errno.EINVAL, 0)
        _, opcode, unique, inode, uid, gid, *_ = _IN_HEADER.unpack_from(message)
        request = Request(inode, uid, gid, message[_IN_HEADER.size :])
        handler = self._handlers.get(opcode, _unknown)
        data, error = b"", 0
        try:
            data = await handler(request)
        except struct.error:
            error = errno.EINVAL
        except Exception as problem:
            error = errno_of(problem, handler, (request,))
        return _OUT_HEADER.pack(_OUT_HEADER.size + len(data), -error, unique) + data


def allocation_of(request: Request) -> Allocation:
    """What a FALLOCATE asks for. Raises OSError (EINVAL) for an impossible range."""
    _, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(request.operation)
    if not length or offset >= _OFFSET_LIMIT or length >= _OFFSET_LIMIT:
        raise OSError(errno.EINVAL, "no such range")
    return Allocation(offset, length, mode)


def copy_of(request: Request) -> Copy:
    """What a COPY_FILE_RANGE asks for. Raises OSError (EINVAL) for an impossible range."""
    _, source, inode_out, _, target, length, flags = _COPY_IN.unpack_from(request.operation)
    if flags or max(source, target) >= _OFFSET_LIMIT:
        raise OSError(errno.EINVAL, "no such range")
    return Copy(source, inode_out, target, length)


def copying(copy: Callable[[Request], Awaitable[int]]) -> dict[int, Handler]:
    """Handlers for both forms of COPY_FILE_RANGE, whose replies differ in the width of a number."""

    async def in_32_bits(request: Request) -> bytes:
        return struct.pack("<II", await copy(request), 0)

    async def in_64_bits(request: Request) -> bytes:
        return struct.pack("<Q", await copy(request))

    return {COPY_FILE_RANGE: in_32_bits, COPY_FILE_RANGE_64: in_64_bits}


async def _unknown(request: Request) -> bytes:
    raise system_error(errno.ENOSYS)
