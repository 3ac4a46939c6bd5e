"""The wire door: converts between the kernel's bytes and the handlers.

With the native engine, every operation that the data plane doesn't answer comes in here. The
handlers decide what an operation does. Invariants:
- a request comes from the kernel or from a crafted peer. A request that is too short is EINVAL, and
  its lengths are never believed, so it can't make this process read or write past a buffer;
- an answer is never longer than the request allows;
- `answered` is the only table of what is answered here. Everything else is ENOSYS, which the data
  plane answers by itself.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from pmemfs.dataplane.tables import SharedMemory
from pmemfs.errors import system_error
from pmemfs.fuse import wire
from pmemfs.fuse.encode import (
    NS,
    attr_out,
    dirent,
    direntplus,
    entry_out,
    look_up_stored,
    open_out,
    statx_out,
    take_stored,
)
from pmemfs.fuse.handlers.attributes import Change
from pmemfs.fuse.handlers.directories import Listed
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.handlers.ioctls import Command
from pmemfs.fuse.handlers.notifications import later
from pmemfs.fuse.handlers.openfiles import Opened
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.handshake import Terms, agree
from pmemfs.fuse.wire import Opcode
from pmemfs.media.log import NAME_MAX_BYTES
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.base import Later, Room

Answer = bytes | memoryview | None
"""What follows the header of a reply; None if the kernel waits for no reply."""


class Request(NamedTuple):
    """One request: its inode, its caller, and what follows the header."""

    inode: int
    caller: Caller
    operation: bytes


Handler = Callable[[Request], Later[Answer]]
"""Answers at once, or with a coroutine. Raises OSError, and struct.error for a request that is too
short."""


class WireDoor:
    """The way in for one mount. `terms` answer its INIT. If there is shared memory, it keeps what
    INIT agreed on, and an earlier daemon may have agreed on that already.
    """

    def __init__(
        self, handlers: Handlers, terms: Terms, shared: SharedMemory | None = None
    ) -> None:
        self._handlers = handlers
        self._terms = terms
        self._shared = shared
        self._flags = shared.agreement.flags if shared else 0
        self.answered: dict[int, Handler] = {
            **self._whole(), **self._names(), **self._inodes(), **self._files()
        }  # fmt: skip

    @property
    def opcodes(self) -> int:
        """The opcodes that are answered here, as a bitmap for the data plane."""
        return sum(1 << opcode for opcode in self.answered)

    def answer(self, opcode: int, request: Request) -> Later[Answer]:
        """Answer a request. Raises what a `Handler` raises."""
        handler = self.answered.get(opcode)
        if handler is None:
            raise system_error(errno.ENOSYS)
        return self._handlers.patience.begin(handler, request)

    def _whole(self) -> dict[int, Handler]:
        return {
            Opcode.INIT: self._init,
            Opcode.DESTROY: _nothing,
            Opcode.STATFS: self._statfs,
            Opcode.SYNCFS: lambda r: later(self._handlers.files.sync_all(), _empty),
            Opcode.INTERRUPT: lambda r: None,
        }

    def _names(self) -> dict[int, Handler]:
        names = self._handlers.names
        return {
            Opcode.LOOKUP: self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._forget_many,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.SYMLINK: self._symlink,
            Opcode.LINK: self._link,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: lambda r: self._rename(r, wire.RENAME_IN),
            Opcode.RENAME2: lambda r: self._rename(r, wire.RENAME2_IN),
            Opcode.READLINK: lambda r: names.readlink(r.inode),
        }

    def _inodes(self) -> dict[int, Handler]:
        attributes = self._handlers.attributes
        return {
            Opcode.GETATTR: lambda r: attr_out(attributes.get(r.inode)),
            Opcode.SETATTR: self._setattr,
            Opcode.STATX: lambda r: statx_out(attributes.get(r.inode)),
            # The kernel has checked, because the mount has default_permissions.
            Opcode.ACCESS: _nothing,
            Opcode.SETXATTR: self._setxattr,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.REMOVEXATTR: self._removexattr,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: lambda r: self._list(r, with_attributes=False),
            Opcode.READDIRPLUS: lambda r: self._list(r, with_attributes=True),
            Opcode.RELEASEDIR: self._releasedir,
            # A change of a directory is durable when it is answered.
            Opcode.FSYNCDIR: _nothing,
        }

    def _files(self) -> dict[int, Handler]:
        files = self._handlers.files
        return {
            Opcode.OPEN: self._open,
            Opcode.CREATE: lambda r: self._create(r, _name(r.operation[wire.CREATE_IN.size :])),
            Opcode.TMPFILE: lambda r: self._create(r, None),
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            # Each write is in the pool when it is answered.
            Opcode.FLUSH: _nothing,
            Opcode.FSYNC: lambda r: later(files.fsync(_head(wire.FSYNC_IN, r)[0]), _empty),
            Opcode.RELEASE: self._release,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            # The older form of the answer has only 32 bits for the length.
            Opcode.COPY_FILE_RANGE: lambda r: later(self._copy(r), wire.WRITE_OUT.pack),
            Opcode.COPY_FILE_RANGE_64: lambda r: later(self._copy(r), wire.COPY_OUT_64.pack),
            Opcode.IOCTL: self._ioctl,
        }

    # The whole

    def _init(self, request: Request) -> Answer:
        answer, agreed = agree(request.operation, self._terms)
        self._flags = agreed.flags
        if self._shared:
            self._shared.agree(agreed)
        return answer

    def _statfs(self, request: Request) -> Later[Answer]:
        return later(self._handlers.attributes.room(), _room_out)

    # Names

    def _lookup(self, request: Request) -> Answer:
        names, name = self._handlers.names, _name(request.operation)
        found = names.lookup_stored(request.inode, name, look_up_stored)
        return entry_out(names.lookup(request.inode, name)) if found is None else found

    def _forget(self, request: Request) -> Answer:
        self._handlers.names.forget(request.inode, *_head(wire.FORGET_IN, request))
        return None

    def _forget_many(self, request: Request) -> Answer:
        (count,) = _head(wire.BATCH_FORGET_IN, request)
        pairs = request.operation[wire.BATCH_FORGET_IN.size :]
        whole = min(count, len(pairs) // wire.FORGET_ONE.size) * wire.FORGET_ONE.size
        for ino, times in wire.FORGET_ONE.iter_unpack(pairs[:whole]):
            self._handlers.names.forget(ino, times)
        return None

    def _mknod(self, request: Request) -> Answer:
        mode, rdev, umask = _head(wire.MKNOD_IN, request)
        name = _name(request.operation[wire.MKNOD_IN.size :])
        return self._made(request, name, mode, umask, rdev)

    def _mkdir(self, request: Request) -> Answer:
        mode, umask = _head(wire.MKDIR_IN, request)
        name = _name(request.operation[wire.MKDIR_IN.size :])
        return self._made(request, name, stat.S_IFDIR | stat.S_IMODE(mode), umask, 0)

    def _made(self, request: Request, name: bytes, mode: int, umask: int, rdev: int) -> Answer:
        made = self._handlers.names.make(
            request.caller, request.inode, name, mode, umask=umask, rdev=rdev
        )
        return entry_out(made)

    def _symlink(self, request: Request) -> Answer:
        name, target = _names(request.operation)
        return entry_out(self._handlers.names.symlink(request.caller, request.inode, name, target))

    def _link(self, request: Request) -> Answer:
        (ino,) = _head(wire.LINK_IN, request)
        name = _name(request.operation[wire.LINK_IN.size :])
        return entry_out(self._handlers.names.link(ino, request.inode, name))

    def _unlink(self, request: Request) -> Answer:
        self._handlers.names.unlink(request.inode, _name(request.operation))
        return b""

    def _rmdir(self, request: Request) -> Answer:
        self._handlers.names.rmdir(request.inode, _name(request.operation))
        return b""

    def _rename(self, request: Request, head: wire.Structure) -> Answer:
        target, *flags = _head(head, request)
        old, new = _names(request.operation[head.size :])
        self._handlers.names.rename(
            request.caller, request.inode, old, target, new, flags[0] if flags else 0
        )
        return b""

    # Inodes

    def _setattr(self, request: Request) -> Later[Answer]:
        change = change_of(_head(wire.SETATTR_IN, request))
        changed = self._handlers.attributes.change(request.caller, request.inode, change)
        return later(changed, attr_out)

    def _setxattr(self, request: Request) -> Answer:
        operation = request.operation
        is_extended = bool(self._flags & wire.SETXATTR_EXT)
        head_bytes = wire.SETXATTR_IN.size if is_extended else wire.SHORT_SETXATTR_BYTES
        if len(operation) < head_bytes:
            raise system_error(errno.EINVAL)
        size, flags, more = wire.SETXATTR_IN.unpack(operation[:head_bytes].ljust(16, b"\0"))
        name, end, value = operation[head_bytes:].partition(b"\0")
        if not end or len(value) < size:
            raise system_error(errno.EINVAL)
        keeps = not more & wire.SETXATTR_ACL_KILL_SGID if is_extended else None
        self._handlers.xattrs.set(
            request.caller, request.inode, name, value[:size], flags, keeps_group_id=keeps
        )
        return b""

    def _getxattr(self, request: Request) -> Answer:
        (room,) = _head(wire.GETXATTR_IN, request)
        name = _name(request.operation[wire.GETXATTR_IN.size :])
        return _sized(self._handlers.xattrs.get(request.inode, name), room)

    def _listxattr(self, request: Request) -> Answer:
        (room,) = _head(wire.GETXATTR_IN, request)
        names = self._handlers.xattrs.names(request.caller, request.inode)
        return _sized(b"".join(name + b"\0" for name in names), room)

    def _removexattr(self, request: Request) -> Answer:
        self._handlers.xattrs.remove(request.inode, _name(request.operation))
        return b""

    def _opendir(self, request: Request) -> Answer:
        flags, _ = _head(wire.OPEN_IN, request)
        handle = self._handlers.directories.open(request.caller, request.inode, flags)
        return wire.OPEN_OUT.pack(handle, 0)

    def _list(self, request: Request, *, with_attributes: bool) -> Answer:
        handle, start, size, *_ = _head(wire.READ_IN, request)
        answer, room = bytearray(), min(size, self._terms.max_write)

        def take(listed: Listed) -> bool:
            entry = dirent(listed.ino, listed.position, listed.type, listed.name)
            if with_attributes:
                entry = direntplus(listed.attributes, entry)
            if len(answer) + len(entry) > room:
                return False
            answer.extend(entry)
            return True

        self._handlers.directories.listing(
            handle, start, take, with_attributes=with_attributes,
            take_stored=partial(take_stored, answer, room) if with_attributes else None,
        )  # fmt: skip
        return bytes(answer)

    def _releasedir(self, request: Request) -> Answer:
        self._handlers.directories.close(_head(wire.RELEASE_IN, request)[0])
        return b""

    # Files

    def _open(self, request: Request) -> Later[Answer]:
        flags, open_flags = _head(wire.OPEN_IN, request)
        may_keep = not open_flags & wire.OPEN_KILL_SUIDGID
        opened = self._handlers.files.open(request.caller, request.inode, flags, may_keep=may_keep)
        return later(opened, _opened)

    def _create(self, request: Request, name: bytes | None) -> Answer:
        flags, mode, umask, _ = _head(wire.CREATE_IN, request)
        made, opened = self._handlers.files.create(
            request.caller, request.inode, name, mode, flags, umask=umask
        )
        return entry_out(made) + _opened(opened)

    def _read(self, request: Request) -> Later[Answer]:
        handle, offset, size, *_ = _head(wire.READ_IN, request)
        return self._handlers.files.read(handle, offset, min(size, self._terms.max_write))

    def _write(self, request: Request) -> Later[Answer]:
        handle, offset, size, write_flags, _, flags = _head(wire.WRITE_IN, request)
        data = memoryview(request.operation)[wire.WRITE_IN.size :][:size]
        if len(data) < size:
            raise system_error(errno.EINVAL)
        written = self._handlers.files.write(
            request.caller, handle, offset, data,
            may_keep=not write_flags & wire.WRITE_KILL_SUIDGID,
            is_append=bool(flags & os.O_APPEND) and not write_flags & wire.WRITE_CACHE,
            is_synchronous=bool(flags & os.O_DSYNC),
        )  # fmt: skip
        return later(written, wire.WRITE_OUT.pack)

    def _release(self, request: Request) -> Later[Answer]:
        closed = self._handlers.files.release(_head(wire.RELEASE_IN, request)[0])
        return later(closed, _empty)

    def _fallocate(self, request: Request) -> Later[Answer]:
        _, offset, length, mode = _head(wire.FALLOCATE_IN, request)
        done = self._handlers.ranges.allocate(request.caller, request.inode, offset, length, mode)
        return later(done, _empty)

    def _lseek(self, request: Request) -> Answer:
        _, offset, whence = _head(wire.LSEEK_IN, request)
        return wire.LSEEK_OUT.pack(self._handlers.ranges.seek(request.inode, offset, whence))

    def _copy(self, request: Request) -> Later[int]:
        handle, source, target_ino, target_handle, target, length, flags = _head(
            wire.COPY_IN, request
        )
        if flags:
            raise system_error(errno.EINVAL)
        return self._handlers.ranges.copy(
            request.caller, request.inode, handle, source, target_ino, target_handle, target, length
        )

    def _ioctl(self, request: Request) -> Later[Answer]:
        """Answer an ioctl. The number of its command says how many bytes go in and out
        (_IOC_SIZE), so the answer must have no other length. Source: fuse_do_ioctl in
        fs/fuse/ioctl.c of Linux."""
        _, _, number, pointer, in_bytes, out_bytes = _head(wire.IOCTL_IN, request)
        argument = request.operation[wire.IOCTL_IN.size :][:in_bytes]
        answer = self._handlers.ioctls.ioctl(
            request.caller, request.inode, Command(number, argument, pointer)
        )
        return later(answer, lambda data: wire.IOCTL_OUT.pack(0, 0, 0, 0) + data[:out_bytes])


def _nothing(request: Request) -> Answer:
    """Answer an operation that has nothing to do."""
    return b""


def _room_out(room: Room) -> Answer:
    # There is no limit to the number of free files, which is told as 0.
    return wire.STATFS_OUT.pack(
        room.total_frames, room.free_frames, room.free_frames - room.reserved_frames,
        room.file_count, 0, FRAME_BYTES, NAME_MAX_BYTES, FRAME_BYTES,
    )  # fmt: skip


def _empty(_: None) -> Answer:
    """The answer to an operation that is done and returns nothing."""
    return b""


def _opened(opened: Opened) -> bytes:
    return open_out(opened.handle, cached=opened.is_cached)


def _head(structure: wire.Structure, request: Request) -> tuple[int, ...]:
    """The fields at the start of a request. Raises struct.error if it is too short."""
    return structure.unpack_from(request.operation)


def _sized(value: bytes, room: int) -> Answer:
    """A value, if the caller has room for it; with room for nothing, only its length."""
    if not room:
        return wire.GETXATTR_OUT.pack(len(value))
    if len(value) > room:
        raise system_error(errno.ERANGE)
    return value


def change_of(fields: tuple[int, ...]) -> Change:
    """What SETATTR asks for."""
    (valid, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, uid,
     gid) = fields  # fmt: skip

    def wanted(flag: int, value: int) -> int | None:
        return value if valid & flag else None

    both_now = wire.SETS_ATIME_NOW | wire.SETS_MTIME_NOW
    return Change(
        mode=wanted(wire.SETS_MODE, mode),
        uid=wanted(wire.SETS_UID, uid),
        gid=wanted(wire.SETS_GID, gid),
        size_bytes=wanted(wire.SETS_SIZE, size),
        atime_ns=wanted(wire.SETS_ATIME, atime * NS + atime_ns),
        mtime_ns=wanted(wire.SETS_MTIME, mtime * NS + mtime_ns),
        ctime_ns=wanted(wire.SETS_CTIME, ctime * NS + ctime_ns),
        is_touch=valid & both_now == both_now,
        takes_privileges=bool(valid & wire.SETATTR_KILL_SUIDGID),
    )


def _name(raw: bytes) -> bytes:
    """The name at the start, which ends with a zero byte."""
    name, end, _ = raw.partition(b"\0")
    if not end:
        raise system_error(errno.EINVAL)
    return name


def _names(raw: bytes) -> tuple[bytes, bytes]:
    """Two names, one behind the other."""
    old, _, rest = raw.partition(b"\0")
    return old, _name(rest)
