"""The operations that pyfuse3 lacks: FALLOCATE and COPY_FILE_RANGE, as the kernel sends them.

The data plane hands them over on a socket of their own, one message each; each is answered with one
message. Source: include/uapi/linux/fuse.h, fallocate(2), copy_file_range(2).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Awaitable, Callable
from socket import socket

import trio

from pmemfs.fuse.barrier import errno_of
from pmemfs.fuse.native import NativeEngine
from pmemfs.volume.linear import INODE

FALLOCATE = 43
COPY_FILE_RANGE = 47
COPY_FILE_RANGE_64 = 53

KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

# len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
# fh, offset, length, mode, padding
_FALLOCATE_IN = struct.Struct("<QQQII")
# fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
_COPY_IN = struct.Struct("<QQQQQQQ")
_LONGEST_BYTES = 4096
_COPY_AT_ONCE_BYTES = 1 << 27
"""copy_file_range(2) may copy less than it is asked for, so one request need not last for long."""

Handler = Callable[[int, bytes], Awaitable[bytes]]


class ExtraOperations:
    """Answers these operations for the device of mode `block`."""

    def __init__(self, engine: NativeEngine, *, read_only: bool) -> None:
        self._engine = engine
        self._read_only = read_only
        self._handlers: dict[int, Handler] = {
            FALLOCATE: self._fallocate,
            COPY_FILE_RANGE: self._copy_file_range,
            COPY_FILE_RANGE_64: self._copy_file_range_64,
        }

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
        _, opcode, unique, inode, *_ = _IN_HEADER.unpack_from(message)
        operation = message[_IN_HEADER.size :]
        handler = self._handlers.get(opcode, self._unknown)
        data, error = b"", 0
        try:
            data = await handler(inode, operation)
        except struct.error:
            error = errno.EINVAL
        except Exception as problem:
            error = errno_of(problem, handler, (inode, operation))
        return _OUT_HEADER.pack(_OUT_HEADER.size + len(data), -error, unique) + data

    async def _unknown(self, inode: int, operation: bytes) -> bytes:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    async def _fallocate(self, inode: int, operation: bytes) -> bytes:
        _, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(operation)
        self._check_device(inode)
        if not length or offset >= 1 << 63 or length >= 1 << 63:
            raise OSError(errno.EINVAL, "no such range")
        if mode == PUNCH_HOLE | KEEP_SIZE:
            await self._engine.punch(offset, length)
        elif mode & ~KEEP_SIZE == ZERO_RANGE:
            await self._engine.zero(offset, length)
        elif mode in (0, KEEP_SIZE):
            await self._engine.reserve(offset, length)
        else:
            raise OSError(errno.EOPNOTSUPP, "a device has no such mode")
        return b""

    async def _copy_file_range(self, inode: int, operation: bytes) -> bytes:
        return struct.pack("<II", await self._copy(inode, operation), 0)

    async def _copy_file_range_64(self, inode: int, operation: bytes) -> bytes:
        return struct.pack("<Q", await self._copy(inode, operation))

    async def _copy(self, inode: int, operation: bytes) -> int:
        _, source, inode_out, _, target, length, flags = _COPY_IN.unpack_from(operation)
        self._check_device(inode)
        self._check_device(inode_out)
        if flags or max(source, target) >= 1 << 63:
            raise OSError(errno.EINVAL, "no such range")
        return await self._engine.copy(source, target, min(length, _COPY_AT_ONCE_BYTES))

    def _check_device(self, inode: int) -> None:
        if inode != INODE:
            raise OSError(errno.ENOENT, "no such inode")
        if self._read_only:
            raise OSError(errno.EROFS, "the mount is read-only")
