"""What pyfuse3 lacks, for mode `fs`: fallocate, copies, holes, unnamed files, times of birth."""

from __future__ import annotations

import errno
import os
import stat
import struct

import trio

from pmemfs.fuse.extra import (
    COLLAPSE_RANGE,
    FALLOCATE,
    INSERT_RANGE,
    KEEP_SIZE,
    LSEEK,
    PUNCH_HOLE,
    STATX,
    SYNCFS,
    TMPFILE,
    ZERO_RANGE,
    Handler,
    Request,
    allocation_of,
    copy_of,
    copying,
)
from pmemfs.fuse.filesystem import CACHE_SECONDS
from pmemfs.fuse.newinode import Maker, new_inode
from pmemfs.fuse.openfiles import OpenFiles
from pmemfs.pfn import FRAME_BYTES
from pmemfs.units import MIB
from pmemfs.volume.filesystem.attributes import Attributes
from pmemfs.volume.filesystem.filesystem import FileSystem

_COPY_STEP_BYTES = 4 * MIB
_COPY_AT_ONCE_BYTES = 128 * MIB
"""copy_file_range(2) may copy less than it is asked for, so one request need not last for long."""

# fh, offset, whence, padding
_LSEEK_IN = struct.Struct("<QQII")
# flags, mode, umask, open_flags; the name follows
_CREATE_IN = struct.Struct("<IIII")
# nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
_ENTRY_OUT = struct.Struct("<QQQQII")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize,
# flags
_ATTR = struct.Struct("<QQQqqqIIIIIIIIII")
# fh, open_flags, backing_id
_OPEN_OUT = struct.Struct("<QIi")
_FOPEN_DIRECT_IO = 1 << 0
_FOPEN_KEEP_CACHE = 1 << 1
# attr_valid, attr_valid_nsec, flags, spare
_STATX_OUT = struct.Struct("<QII16x")
# mask, blksize, attributes, nlink, uid, gid, mode, spare, ino, size, blocks, attributes_mask
_STATX_HEAD = struct.Struct("<IIQIIIHHQQQQ")
# seconds, nanoseconds, reserved
_STATX_TIME = struct.Struct("<qIi")
# rdev, dev, spare
_STATX_TAIL = struct.Struct("<IIII112x")
_STATX_BASIC_AND_BIRTH = 0x7FF | 0x800
_NS = 1_000_000_000


class FileSystemExtra:
    """Answers for all files."""

    def __init__(self, fs: FileSystem, files: OpenFiles, *, cached: bool) -> None:
        self._fs = fs
        self._files = files
        self._cached = cached

    def handlers(self) -> dict[int, Handler]:
        """The handlers by opcode."""
        return {
            FALLOCATE: self._fallocate,
            LSEEK: self._lseek,
            SYNCFS: self._syncfs,
            TMPFILE: self._tmpfile,
            STATX: self._statx,
            **copying(self._copy),
        }

    async def _fallocate(self, request: Request) -> bytes:
        wanted = allocation_of(request)
        fs, ino = self._fs, request.inode
        offset, length = wanted.offset_bytes, wanted.length_bytes
        if wanted.kind == 0:
            fs.allocate(ino, offset, length, keep_size=wanted.keeps_size)
        elif wanted.mode == PUNCH_HOLE | KEEP_SIZE:
            fs.punch(ino, offset, length)
        elif wanted.kind == ZERO_RANGE:
            fs.zero(ino, offset, length, keep_size=wanted.keeps_size)
        elif wanted.mode == COLLAPSE_RANGE:
            fs.collapse(ino, offset, length)
        elif wanted.mode == INSERT_RANGE:
            fs.insert(ino, offset, length)
        else:
            raise OSError(errno.EOPNOTSUPP, "no such mode of fallocate")
        self._files.note_change(ino)
        return b""

    async def _lseek(self, request: Request) -> bytes:
        _, offset, whence, _ = _LSEEK_IN.unpack_from(request.operation)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "seeking to neither data nor hole")
        if offset >= 1 << 63:
            raise OSError(errno.ENXIO, "beyond any file")
        found = self._fs.seek(request.inode, offset, for_data=whence == os.SEEK_DATA)
        return struct.pack("<Q", found)

    async def _syncfs(self, request: Request) -> bytes:
        await self._files.sync_all()
        return b""

    async def _copy(self, request: Request) -> int:
        wanted = copy_of(request)
        length = min(wanted.length_bytes, _COPY_AT_ONCE_BYTES)
        done = 0
        while done < length:
            step = min(_COPY_STEP_BYTES, length - done)
            try:
                copied = self._fs.copy(
                    request.inode, wanted.source_bytes + done,
                    wanted.target_inode, wanted.target_bytes + done, step,
                )  # fmt: skip
            except OSError:
                if done:
                    break
                raise
            done += copied
            if copied < step:
                break
            await trio.lowlevel.checkpoint()
        self._files.note_change(wanted.target_inode)
        return done

    async def _tmpfile(self, request: Request) -> bytes:
        flags, mode, umask, _ = _CREATE_IN.unpack_from(request.operation)
        maker = Maker(request.uid, request.gid, umask)
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        ino = self._fs.make_unnamed(new_inode(self._fs, request.inode, maker, mode))
        # Once for the handle, and once for the kernel, which looked it up by this.
        fh = self._files.open(ino, flags, request.uid)
        self._fs.hold(ino)
        open_flags = _FOPEN_KEEP_CACHE if self._cached else _FOPEN_DIRECT_IO
        return _entry_out(self._fs.attributes(ino)) + _OPEN_OUT.pack(fh, open_flags, 0)

    async def _statx(self, request: Request) -> bytes:
        return _statx_out(self._fs.attributes(request.inode))


def _entry_out(attributes: Attributes) -> bytes:
    """The answer to whoever makes something: struct fuse_entry_out."""
    head = _ENTRY_OUT.pack(
        attributes.ino, attributes.generation, CACHE_SECONDS, CACHE_SECONDS, 0, 0
    )
    times = (attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns)
    return head + _ATTR.pack(
        attributes.ino, attributes.size_bytes, attributes.block_count,
        *(time // _NS for time in times), *(time % _NS for time in times),
        attributes.mode, attributes.nlink, attributes.uid, attributes.gid,
        attributes.rdev, FRAME_BYTES, 0,
    )  # fmt: skip


def _statx_out(attributes: Attributes) -> bytes:
    """All that is known of an inode: struct fuse_statx_out."""
    head = _STATX_HEAD.pack(
        _STATX_BASIC_AND_BIRTH, FRAME_BYTES, 0, attributes.nlink, attributes.uid,
        attributes.gid, attributes.mode, 0, attributes.ino, attributes.size_bytes,
        attributes.block_count, 0,
    )  # fmt: skip
    times = (attributes.atime_ns, attributes.birth_ns, attributes.ctime_ns, attributes.mtime_ns)
    return (
        _STATX_OUT.pack(CACHE_SECONDS, 0, 0)
        + head
        + b"".join(_STATX_TIME.pack(time // _NS, time % _NS, 0) for time in times)
        + _STATX_TAIL.pack(os.major(attributes.rdev), os.minor(attributes.rdev), 0, 0)
    )
