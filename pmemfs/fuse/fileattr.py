"""The flags of chattr(1) and lsattr(1), which the kernel asks for and sets by ioctl(2).

It looks first who may set them (the owner; CAP_LINUX_IMMUTABLE), and it opens the inode for that.
Invariants:
- a process that asks past the kernel, as one could before Linux 5.13, gets no answer;
- what cannot be kept is refused with EOPNOTSUPP, as on tmpfs: no flag is lost without a word;
- once a flag is answered that forbids to write, no worker of the data plane still does.
Source: fs/file_attr.c and fs/fuse/ioctl.c (fuse_fileattr_set) of Linux; ioctl_iflags(2),
ioctl_xfs_fsgetxattr(2).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Coroutine, Mapping

import trio

from pmemfs.errors import system_error
from pmemfs.fuse import wire
from pmemfs.fuse.openfiles import OpenFiles
from pmemfs.fuse.raw import IoctlHandler, Request
from pmemfs.media.log import InodeFlags
from pmemfs.volume.fs.filesystem import FileSystem

GET_FLAGS = 0x8008_6601
SET_FLAGS = 0x4008_6602
GET_EXTENDED = 0x801C_581F
SET_EXTENDED = 0x401C_5820
_FLAGS = struct.Struct("<I")
# xflags, extsize, nextents, projid, cowextsize, padding
_EXTENDED = struct.Struct("<IIIII8x")
_EXTENDED_BITS = {
    InodeFlags.IMMUTABLE: 0x08,
    InodeFlags.APPEND_ONLY: 0x10,
    InodeFlags.NO_ACCESS_TIME: 0x40,
    InodeFlags.NO_DUMP: 0x80,
}
_GRACE_POLL_SECONDS = 0.0005


class FlagCommands:
    """Answers what the kernel asks of flags. `files` tells the data plane."""

    def __init__(self, fs: FileSystem, files: OpenFiles) -> None:
        self._fs = fs
        self._files = files

    def by_number(self) -> dict[int, IoctlHandler]:
        """The handlers by the number of the command."""
        return {
            GET_FLAGS: self._get_flags,
            SET_FLAGS: self._set_flags,
            GET_EXTENDED: self._get_extended,
            SET_EXTENDED: self._set_extended,
        }

    def _get_flags(self, request: Request, argument: bytes) -> bytes:
        return _FLAGS.pack(self._bits(request, wire.FLAG_BITS))

    def _get_extended(self, request: Request, argument: bytes) -> bytes:
        return _EXTENDED.pack(self._bits(request, _EXTENDED_BITS), 0, 0, 0, 0)

    def _set_flags(self, request: Request, argument: bytes) -> bytes | Coroutine[None, None, bytes]:
        (bits,) = _FLAGS.unpack(argument)
        return self._set(request, bits, wire.FLAG_BITS)

    def _set_extended(
        self, request: Request, argument: bytes
    ) -> bytes | Coroutine[None, None, bytes]:
        bits, extent_bytes, _, project, copied_extent_bytes = _EXTENDED.unpack(argument)
        if extent_bytes or project or copied_extent_bytes:
            raise system_error(errno.EOPNOTSUPP)
        return self._set(request, bits, _EXTENDED_BITS)

    def _bits(self, request: Request, bits: Mapping[InodeFlags, int]) -> int:
        _refuse_processes(request)
        return wire.bits_of(self._fs.attributes(request.inode).flags, bits)

    def _set(
        self, request: Request, wanted: int, bits: Mapping[InodeFlags, int]
    ) -> bytes | Coroutine[None, None, bytes]:
        _refuse_processes(request)
        if wanted & ~sum(bits.values()):
            raise system_error(errno.EOPNOTSUPP)
        flags = InodeFlags(sum(flag for flag, bit in bits.items() if wanted & bit))
        token = self._fs.set_flags(request.inode, flags)
        self._files.note_change(request.inode)
        return b"" if token is None else self._until_over(token)

    async def _until_over(self, token: object) -> bytes:
        # Polled, as any grace period: no worker is to be slowed down by telling.
        while not self._fs.tables.is_over(token):  # noqa: ASYNC110
            await trio.sleep(_GRACE_POLL_SECONDS)
        return b""


def _refuse_processes(request: Request) -> None:
    """Raise OSError (ENOTTY) for a process that asks by itself: it has an argument, the kernel
    none."""
    _, _, _, argument, _, _ = wire.IOCTL_IN.unpack_from(request.operation)
    if argument:
        raise system_error(errno.ENOTTY)
