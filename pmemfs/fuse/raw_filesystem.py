"""Mode `fs` without pyfuse3: the requests that come most often, and those that it lacks.

The latter are fallocate, copies, holes, unnamed files, times of birth. Nothing is awaited here but
durability and long copies, so each answer is one step to everybody else.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Coroutine

import trio

from pmemfs.errors import system_error
from pmemfs.fuse import wire
from pmemfs.fuse.changes import Change, change_inode
from pmemfs.fuse.fileattr import FlagCommands
from pmemfs.fuse.filesystem import CACHE_SECONDS, find, let_go
from pmemfs.fuse.newinode import Maker, new_inode, whiteout
from pmemfs.fuse.openfiles import OpenFiles
from pmemfs.fuse.patience import Patience
from pmemfs.fuse.privileges import Caller
from pmemfs.fuse.published import PublishedAttributes
from pmemfs.fuse.raw import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    Allocation,
    Answer,
    Handler,
    IoctlHandler,
    Request,
    allocation_of,
    copy_of,
    copying,
    ioctls,
)
from pmemfs.fuse.trimming import Trimmer
from pmemfs.units import MIB
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.names import RENAME_WHITEOUT

_COPY_STEP_BYTES = 4 * MIB
_FITRIM = 0xC0185879
# start, len, minlen: struct fstrim_range
_FSTRIM_RANGE = struct.Struct("<QQQ")


class RawFileSystem:
    """Answers for all files."""

    def __init__(
        self,
        fs: FileSystem,
        files: OpenFiles,
        published: PublishedAttributes,
        patience: Patience,
        trimmer: Trimmer,
    ) -> None:
        self._fs = fs
        self._patience = patience
        self._trimmer = trimmer
        self._files = files
        self._published = published

    def handlers(self) -> dict[int, Handler]:
        """The handlers by opcode."""
        handlers: dict[int, Handler] = {
            wire.LOOKUP: self._lookup,
            wire.FORGET: self._forget,
            wire.BATCH_FORGET: self._forget_many,
            wire.GETATTR: self._getattr,
            wire.SETATTR: self._setattr,
            wire.UNLINK: self._unlink,
            wire.RENAME: self._rename,
            wire.RENAME2: self._rename_with_flags,
            wire.OPEN: self._open,
            wire.CREATE: self._create,
            wire.READ: self._read,
            wire.WRITE: self._write,
            wire.RELEASE: self._release,
            wire.FSYNC: self._fsync,
            wire.FALLOCATE: self._fallocate,
            wire.LSEEK: self._lseek,
            wire.SYNCFS: self._syncfs,
            wire.TMPFILE: self._tmpfile,
            wire.STATX: self._statx,
            wire.IOCTL: ioctls(self._ioctls()),
            **copying(self._copy),
        }
        patience = self._patience
        return {opcode: patience.patient(handler) for opcode, handler in handlers.items()}

    def _ioctls(self) -> dict[int, IoctlHandler]:
        """The commands of ioctl(2) by number; the kernel answers some more by itself."""
        flags = FlagCommands(self._fs, self._files).by_number()
        return {**flags, _FITRIM: self._fitrim}

    # Names

    def _lookup(self, request: Request) -> Answer:
        ino = find(self._fs, request.inode, _name(request.operation))
        return wire.no_entry_out(CACHE_SECONDS) if ino is None else self._entry(ino)

    def _forget(self, request: Request) -> Answer:
        (count,) = wire.FORGET_IN.unpack_from(request.operation)
        let_go(self._fs, request.inode, count)
        return None

    def _forget_many(self, request: Request) -> Answer:
        count, _ = wire.BATCH_FORGET_IN.unpack_from(request.operation)
        start = wire.BATCH_FORGET_IN.size
        end = start + count * wire.FORGET_ONE.size
        for ino, times in wire.FORGET_ONE.iter_unpack(request.operation[start:end]):
            let_go(self._fs, ino, times)
        return None

    def _unlink(self, request: Request) -> Answer:
        self._fs.unlink(request.inode, _name(request.operation))
        self._publish_again(request.inode)
        return b""

    def _rename(self, request: Request) -> Answer:
        (target,) = wire.RENAME_IN.unpack_from(request.operation)
        old, new = _names(request.operation[wire.RENAME_IN.size :])
        return self._move(request, old, target, new, 0)

    def _rename_with_flags(self, request: Request) -> Answer:
        target, flags, _ = wire.RENAME2_IN.unpack_from(request.operation)
        old, new = _names(request.operation[wire.RENAME2_IN.size :])
        return self._move(request, old, target, new, flags)

    def _move(self, request: Request, old: bytes, target: int, new: bytes, flags: int) -> Answer:
        parent = request.inode
        left = None
        if flags & RENAME_WHITEOUT:
            left = whiteout(
                self._fs, parent, Maker(request.caller.uid, request.caller.gid, umask=0)
            )
        self._fs.rename(parent, old, target, new, flags, left)
        self._publish_again(parent)
        if target != parent:
            self._publish_again(target)
        return b""

    # Attributes

    def _getattr(self, request: Request) -> Answer:
        return self._attr_out(request.inode)

    def _setattr(self, request: Request) -> Answer:
        change = _change_of(request)
        attributes = change_inode(self._fs, self._files, request.inode, change, request.caller)
        return wire.attr_out(attributes, CACHE_SECONDS)

    def _statx(self, request: Request) -> Answer:
        return wire.statx_out(self._fs.attributes(request.inode), CACHE_SECONDS)

    # Open files

    def _open(self, request: Request) -> Answer:
        flags, open_flags = wire.OPEN_IN.unpack_from(request.operation)
        may_keep = not open_flags & wire.OPEN_KILL_SUIDGID
        handle = self._files.open(request.inode, flags, request.caller, may_keep=may_keep)
        return wire.open_out(handle, cached=self._files.is_cached(request.inode))

    def _create(self, request: Request) -> Answer:
        flags, mode, maker = _wanted(request)
        name = _name(request.operation[wire.CREATE_IN.size :])
        new = new_inode(self._fs, request.inode, maker, mode)
        ino = self._fs.make(request.inode, name, new)
        self._publish_again(request.inode)
        return self._made(ino, flags, request.caller)

    def _tmpfile(self, request: Request) -> Answer:
        flags, mode, maker = _wanted(request)
        new = new_inode(self._fs, request.inode, maker, mode)
        return self._made(self._fs.make_unnamed(request.inode, new), flags, request.caller)

    def _read(self, request: Request) -> Answer:
        handle, offset, size, *_ = wire.READ_IN.unpack_from(request.operation)
        return self._files.read(handle, offset, size)

    def _write(self, request: Request) -> Answer | Coroutine[None, None, bytes]:
        operation = wire.WRITE_IN.unpack_from(request.operation)
        handle, offset, size, write_flags, _, flags, _ = operation
        data = memoryview(request.operation)[wire.WRITE_IN.size :][:size]
        if len(data) < size:
            raise system_error(errno.EINVAL)
        loser = request.caller if write_flags & wire.WRITE_KILL_SUIDGID else None
        is_append = bool(flags & os.O_APPEND) and not write_flags & wire.WRITE_CACHE
        if flags & os.O_DSYNC:
            return self._write_through(handle, offset, data, loser, is_append=is_append)
        stored = self._files.store(handle, offset, data, loser, is_append=is_append)
        return wire.WRITE_OUT.pack(stored, 0)

    async def _write_through(
        self, handle: int, offset: int, data: memoryview, loser: Caller | None, *, is_append: bool
    ) -> bytes:
        stored = await self._files.write_through(handle, offset, data, loser, is_append=is_append)
        return wire.WRITE_OUT.pack(stored, 0)

    def _release(self, request: Request) -> Answer:
        handle, *_ = wire.RELEASE_IN.unpack_from(request.operation)
        self._files.close(handle)
        return b""

    async def _fsync(self, request: Request) -> bytes:
        handle, *_ = wire.FSYNC_IN.unpack_from(request.operation)
        await self._files.fsync(handle)
        return b""

    # Content

    def _fallocate(self, request: Request) -> Answer:
        wanted = allocation_of(request)
        self._take_privileges(request.inode, request.caller)
        try:
            self._allocate(request.inode, wanted)
        except Exception:
            self._files.note_failure(request.inode)
            raise
        self._files.note_change(request.inode)
        return b""

    def _allocate(self, ino: int, wanted: Allocation) -> None:
        fs, offset, length = self._fs, wanted.offset_bytes, wanted.length_bytes
        if wanted.kind == 0:
            fs.allocate(ino, offset, length, keep_size=wanted.keeps_size)
        elif wanted.mode == PUNCH_HOLE | KEEP_SIZE:
            fs.punch(ino, offset, length)
        elif wanted.kind == ZERO_RANGE:
            if fs.has_hole(ino, offset, length):
                # To map it would fill an image that is thin (mkfs zeroes a journal so), to leave it
                # would not be what zeroing promises. On tmpfs, too, the caller has to choose.
                raise OSError(errno.EOPNOTSUPP, "zeroing a hole")
            fs.zero(ino, offset, length, keep_size=wanted.keeps_size)
        elif wanted.mode == COLLAPSE_RANGE:
            fs.collapse(ino, offset, length)
        elif wanted.mode == INSERT_RANGE:
            fs.insert(ino, offset, length)
        else:
            raise OSError(errno.EOPNOTSUPP, "no such mode of fallocate")

    def _lseek(self, request: Request) -> Answer:
        _, offset, whence, _ = wire.LSEEK_IN.unpack_from(request.operation)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "seeking to neither data nor hole")
        if offset >= 1 << 63:
            raise OSError(errno.ENXIO, "beyond any file")
        found = self._fs.seek(request.inode, offset, for_data=whence == os.SEEK_DATA)
        return wire.LSEEK_OUT.pack(found)

    async def _fitrim(self, request: Request, argument: bytes) -> bytes:
        if request.caller.uid:
            raise system_error(errno.EPERM)
        start, length, least = _FSTRIM_RANGE.unpack(argument)
        trimmed = await self._trimmer.trim(start, length, least)
        return _FSTRIM_RANGE.pack(start, trimmed.given_back_bytes, least)

    async def _syncfs(self, request: Request) -> bytes:
        await self._files.sync_all()
        return b""

    async def _copy(self, request: Request) -> int:
        wanted = copy_of(request)
        length = wanted.length_bytes
        may_overwrite = self._files.may_overwrite(wanted.target_handle)
        done = 0
        self._take_privileges(wanted.target_inode, request.caller)
        self._files.note_copy(wanted.source_handle)
        while done < length:
            step = min(_COPY_STEP_BYTES, length - done)
            try:
                copied = self._fs.copy(
                    request.inode, wanted.source_bytes + done,
                    wanted.target_inode, wanted.target_bytes + done, step,
                    may_overwrite=may_overwrite,
                )  # fmt: skip
            except Exception as error:
                if done and isinstance(error, OSError):
                    break
                self._files.note_failure(wanted.target_inode)
                raise
            done += copied
            if copied < step:
                break
            await trio.lowlevel.checkpoint()
        self._files.note_change(wanted.target_inode)
        return done

    # What these have in common

    def _take_privileges(self, ino: int, caller: Caller) -> None:
        """Of what has no flag that would say whether the caller may keep them."""
        self._files.take_privileges(ino, None if caller.may_set_ids() else caller)

    def _publish_again(self, parent: int) -> None:
        """The kernel is about to ask what a directory is like that it has changed."""
        if self._published.is_wanted(parent):
            self._attr_out(parent)

    def _attr_out(self, ino: int) -> bytes:
        """What an inode is like; what a directory is, the data plane answers from now on."""
        attributes = self._fs.attributes(ino)
        answer = wire.attr_out(attributes, CACHE_SECONDS)
        if stat.S_ISDIR(attributes.mode):
            self._published.publish(ino, answer)
        return answer

    def _made(self, ino: int, flags: int, caller: Caller) -> bytes:
        """The answer to whoever makes a file and opens it: it is empty, whatever the flags say."""
        handle = self._files.open(ino, flags & ~os.O_TRUNC, caller)
        return self._entry(ino) + wire.open_out(handle, cached=self._files.is_cached(ino))

    def _entry(self, ino: int) -> bytes:
        """The answer to whoever looks an inode up, which the kernel holds from now on."""
        entry = wire.entry_out(self._fs.attributes(ino), CACHE_SECONDS)
        self._fs.hold(ino)
        return entry


def _wanted(request: Request) -> tuple[int, int, Maker]:
    """How a file is to be opened, its mode, and who makes it."""
    flags, mode, umask, _ = wire.CREATE_IN.unpack_from(request.operation)
    return flags, stat.S_IFREG | stat.S_IMODE(mode), _maker(request, umask)


def _maker(request: Request, umask: int) -> Maker:
    return Maker(request.caller.uid, request.caller.gid, umask)


def _change_of(request: Request) -> Change:
    """What SETATTR asks for."""
    (valid, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, uid,
     gid) = wire.SETATTR_IN.unpack_from(request.operation)  # fmt: skip

    def wanted(flag: int, value: int) -> int | None:
        return value if valid & flag else None

    both_now = wire.SETS_ATIME_NOW | wire.SETS_MTIME_NOW

    return Change(
        mode=wanted(wire.SETS_MODE, mode),
        uid=wanted(wire.SETS_UID, uid),
        gid=wanted(wire.SETS_GID, gid),
        size_bytes=wanted(wire.SETS_SIZE, size),
        atime_ns=wanted(wire.SETS_ATIME, atime * wire.NS + atime_ns),
        mtime_ns=wanted(wire.SETS_MTIME, mtime * wire.NS + mtime_ns),
        ctime_ns=wanted(wire.SETS_CTIME, ctime * wire.NS + ctime_ns),
        is_touch=valid & both_now == both_now,
        takes_privileges=bool(valid & wire.SETATTR_KILL_SUIDGID),
    )


def _name(raw: bytes) -> bytes:
    """The name at the start, which ends with a zero."""
    name, end, _ = raw.partition(b"\0")
    if not end:
        raise system_error(errno.EINVAL)
    return name


def _names(raw: bytes) -> tuple[bytes, bytes]:
    """Two names, one behind the other."""
    old, _, rest = raw.partition(b"\0")
    return old, _name(rest)
