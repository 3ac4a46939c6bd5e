"""Mode `block` without pyfuse3: TRIM and copies, which it lacks."""

from __future__ import annotations

import errno

from pmemfs.fuse import wire
from pmemfs.fuse.native import NativeEngine
from pmemfs.fuse.raw import (
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    Handler,
    Request,
    allocation_of,
    copy_of,
    copying,
    ioctls,
)
from pmemfs.volume.linear import INODE


class RawBlock:
    """Answers for the one file that there is."""

    def __init__(self, engine: NativeEngine, *, read_only: bool) -> None:
        self._engine = engine
        self._read_only = read_only

    def handlers(self) -> dict[int, Handler]:
        """The handlers by opcode."""
        return {
            wire.FALLOCATE: self._fallocate,
            wire.IOCTL: ioctls({}),
            **copying(self._copy),
        }

    async def _fallocate(self, request: Request) -> bytes:
        wanted = allocation_of(request)
        self._check_device(request.inode)
        offset, length = wanted.offset_bytes, wanted.length_bytes
        if wanted.mode == PUNCH_HOLE | KEEP_SIZE:
            await self._engine.punch(offset, length)
        elif wanted.kind == ZERO_RANGE:
            await self._engine.zero(offset, length)
        elif wanted.kind == 0:
            await self._engine.reserve(offset, length)
        else:
            raise OSError(errno.EOPNOTSUPP, "a device has no such mode")
        return b""

    async def _copy(self, request: Request) -> int:
        wanted = copy_of(request)
        self._check_device(request.inode)
        self._check_device(wanted.target_inode)
        return await self._engine.copy(
            wanted.source_bytes, wanted.target_bytes, wanted.length_bytes
        )

    def _check_device(self, inode: int) -> None:
        if inode != INODE:
            raise OSError(errno.ENOENT, "no such inode")
        if self._read_only:
            raise OSError(errno.EROFS, "the mount is read-only")
