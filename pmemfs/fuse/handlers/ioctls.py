"""The commands of ioctl(2) that a file system answers: flags of chattr(1) and lsattr(1), FITRIM.

The kernel reads and sets flags this way. Before that it checks who may set them (the owner; with
CAP_LINUX_IMMUTABLE), and it opens the inode. All other commands are ENOTTY. Invariants:
- a process that asks for flags past the kernel, as it could before Linux 5.13, gets no answer,
  because the kernel has then checked nothing;
- a flag that can't be kept is refused with EOPNOTSUPP, as on tmpfs, so no flag is lost in silence;
- once a flag that forbids writing is answered, no worker of the data plane writes any more.
Source: fs/file_attr.c and fs/fuse/ioctl.c (fuse_fileattr_set) of Linux; ioctl_iflags(2),
ioctl_xfs_fsgetxattr(2).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import trio

from pmemfs.engine.trimming import Trimmer
from pmemfs.errors import system_error
from pmemfs.fuse.handlers.flags import CHATTR_BITS, XFLAG_BITS, bits_of
from pmemfs.fuse.handlers.notifications import after
from pmemfs.fuse.handlers.openfiles import OpenFiles
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.media.log import InodeFlags
from pmemfs.volume.base import Later, Volume

GET_FLAGS = 0x8008_6601
SET_FLAGS = 0x4008_6602
GET_EXTENDED = 0x801C_581F
SET_EXTENDED = 0x401C_5820
FITRIM = 0xC018_5879
_FLAGS = struct.Struct("<I")
# xflags, extsize, nextents, projid, cowextsize, padding
_EXTENDED = struct.Struct("<IIIII8x")
# start, len, minlen: struct fstrim_range
_FSTRIM_RANGE = struct.Struct("<QQQ")
_GRACE_POLL_SECONDS = 0.0005


class Command(NamedTuple):
    """An ioctl(2): its number, the bytes of its argument, and the pointer, 0 from the kernel."""

    number: int
    argument: bytes
    pointer: int = 0


class IoctlHandlers:
    """Answers commands with the bytes that belong where the caller's argument points."""

    def __init__(self, volume: Volume, files: OpenFiles, trimmer: Trimmer) -> None:
        self._fs = volume
        self._files = files
        self._trimmer = trimmer
        self._commands: dict[int, Callable[[Caller, int, Command], Later[bytes]]] = {}
        if volume.has_files:
            self._commands = {
                GET_FLAGS: self._get_flags,
                SET_FLAGS: self._set_flags,
                GET_EXTENDED: self._get_extended,
                SET_EXTENDED: self._set_extended,
                FITRIM: self._trim,
            }

    def ioctl(self, caller: Caller, ino: int, command: Command) -> Later[bytes]:
        """Answer a command. Raises struct.error if its argument is too short."""
        handler = self._commands.get(command.number)
        if handler is None:
            raise system_error(errno.ENOTTY)
        return handler(caller, ino, command)

    def _get_flags(self, caller: Caller, ino: int, command: Command) -> bytes:
        return _FLAGS.pack(self._bits(ino, command, CHATTR_BITS))

    def _get_extended(self, caller: Caller, ino: int, command: Command) -> bytes:
        return _EXTENDED.pack(self._bits(ino, command, XFLAG_BITS), 0, 0, 0, 0)

    def _set_flags(self, caller: Caller, ino: int, command: Command) -> Later[bytes]:
        (bits,) = _FLAGS.unpack(command.argument)
        return self._set(ino, command, bits, CHATTR_BITS)

    def _set_extended(self, caller: Caller, ino: int, command: Command) -> Later[bytes]:
        bits, extent_bytes, _, project, copied_extent_bytes = _EXTENDED.unpack(command.argument)
        if extent_bytes or project or copied_extent_bytes:
            raise system_error(errno.EOPNOTSUPP)
        return self._set(ino, command, bits, XFLAG_BITS)

    def _bits(self, ino: int, command: Command, bits: Mapping[InodeFlags, int]) -> int:
        _refuse_processes(command)
        return bits_of(self._fs.attributes(ino).flags, bits)

    def _set(
        self, ino: int, command: Command, wanted: int, bits: Mapping[InodeFlags, int]
    ) -> Later[bytes]:
        _refuse_processes(command)
        if wanted & ~sum(bits.values()):
            raise system_error(errno.EOPNOTSUPP)
        flags = InodeFlags(sum(flag for flag, bit in bits.items() if wanted & bit))
        # What this numbering has no bit for stays as it is.
        flags |= InodeFlags(self._fs.attributes(ino).flags & ~sum(bits))
        token = self._fs.set_flags(ino, flags)
        self._files.note_change(ino)
        # The kernel does not forget attributes because of flags, but the ctime has changed.
        told = self._files.tell(ino)
        return after(told, b"") if token is None else self._until_over(token, told)

    async def _until_over(self, token: object, told: Awaitable[None] | None) -> bytes:
        if told is not None:
            await told
        # Polled, as every grace period, because telling us would slow down the workers.
        while not self._fs.is_over(token):  # noqa: ASYNC110
            await trio.sleep(_GRACE_POLL_SECONDS)
        return b""

    async def _trim(self, caller: Caller, ino: int, command: Command) -> bytes:
        if caller.uid:
            raise system_error(errno.EPERM)
        start, length, least = _FSTRIM_RANGE.unpack(command.argument)
        trimmed = await self._trimmer.trim(start, length, least)
        return _FSTRIM_RANGE.pack(start, trimmed.given_back_bytes, least)


def _refuse_processes(command: Command) -> None:
    """Raise OSError (ENOTTY) for a process that asks past the kernel: its command has a pointer,
    the kernel's has none."""
    if command.pointer:
        raise system_error(errno.ENOTTY)
