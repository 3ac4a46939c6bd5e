"""Mode `block` as a file system: a root directory with one file, which behaves like a device.

Like a device, it has one size: O_TRUNC and ftruncate succeed and change nothing (dd truncates what
it writes to), a write at the end answers ENOSPC, a read there is short. Nothing can be created,
renamed or removed. Owner, mode and times can be set and last as long as the mount, as in /dev.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress

import pyfuse3
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FlagT, FUSEError, InodeT

from pmemfs.clock import coarse_ns
from pmemfs.fuse.barrier import guarded
from pmemfs.fuse.engine import PythonEngine
from pmemfs.fuse.options import MountOptions
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.linear import INODE, LinearVolume

DEVICE_INODE = InodeT(INODE)
_DEVICE_HANDLE = FileHandleT(INODE)
_ROOT_HANDLE = FileHandleT(pyfuse3.ROOT_INODE)
_NAME_MAX_BYTES = 255
_CACHE_SECONDS = 3600
"""Names and attributes may be cached for long: nobody changes them but through the mount."""


@guarded
class BlockOperations(pyfuse3.Operations):
    """What the kernel asks of a mount in mode `block`."""

    def __init__(
        self, engine: PythonEngine, volume: LinearVolume, options: MountOptions, created_ns: int
    ) -> None:
        super().__init__()
        self._engine = engine
        self._volume = volume
        self._read_only = options.read_only
        self._name = FileNameT(os.fsencode(volume.name))
        self._root = _attributes(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755, options, created_ns)
        self._root.st_nlink = 2
        self._device = _attributes(DEVICE_INODE, stat.S_IFREG | options.mode, options, created_ns)
        self._set_size()

    def look_again(self) -> None:
        """The volume has grown: let the kernel forget the size that it has cached."""
        self._set_size()
        # The kernel may not have it, and then there is nothing to forget.
        with suppress(FileNotFoundError):
            pyfuse3.invalidate_inode(DEVICE_INODE, attr_only=True)

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        if parent_inode == pyfuse3.ROOT_INODE:
            if name == self._name:
                return self._device
            if name in (b".", b".."):
                return self._root
        raise FUSEError(errno.ENAMETOOLONG if len(name) > _NAME_MAX_BYTES else errno.ENOENT)

    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        return self._attributes_of(inode)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        kept = self._attributes_of(inode)
        if fields.update_mode:
            kept.st_mode = pyfuse3.ModeT(stat.S_IFMT(kept.st_mode) | stat.S_IMODE(attr.st_mode))
        if fields.update_uid:
            kept.st_uid = attr.st_uid
        if fields.update_gid:
            kept.st_gid = attr.st_gid
        if fields.update_atime:
            kept.st_atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            kept.st_mtime_ns = attr.st_mtime_ns
            if inode == DEVICE_INODE:
                self._engine.forget_last_write()
        kept.st_ctime_ns = coarse_ns()
        return kept

    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        if inode != DEVICE_INODE:
            raise FUSEError(errno.EISDIR)
        if self._read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        return FileInfo(fh=_DEVICE_HANDLE, direct_io=True)

    async def read(self, fh: FileHandleT, off: int, size: int) -> memoryview | bytes:  # type: ignore[override]
        return self._engine.read(off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        written = self._engine.write(off, buf)
        self._device.st_mtime_ns = self._device.st_ctime_ns = coarse_ns()
        return written

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._engine.fsync()

    async def release(self, fh: FileHandleT) -> None:
        """Nothing to do: a handle holds nothing."""

    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        if inode != pyfuse3.ROOT_INODE:
            raise FUSEError(errno.ENOTDIR)
        return _ROOT_HANDLE

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        entries = ((FileNameT(b"."), self._root), (FileNameT(b".."), self._root),
                   (self._name, self._device))  # fmt: skip
        for position, (name, attributes) in enumerate(entries[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, attributes, position):
                break

    async def releasedir(self, fh: FileHandleT) -> None:
        """Nothing to do: a handle holds nothing."""

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing to do: the directory never changes."""

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        status = pyfuse3.StatvfsData()
        status.f_bsize = status.f_frsize = FRAME_BYTES
        status.f_blocks = self._volume.size_bytes // FRAME_BYTES
        # The device takes all the room there is.
        status.f_bfree = status.f_bavail = 0
        status.f_files = 2
        status.f_ffree = status.f_favail = 0
        status.f_namemax = _NAME_MAX_BYTES
        return status

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Nothing to do: both inodes last as long as the mount."""

    async def create(self, *request: object) -> tuple[FileInfo, EntryAttributes]:
        raise FUSEError(errno.EPERM)

    async def mknod(self, *request: object) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def mkdir(self, *request: object) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def symlink(self, *request: object) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def link(self, *request: object) -> EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def rename(self, *request: object) -> None:
        raise FUSEError(errno.EPERM)

    async def unlink(self, *request: object) -> None:
        raise FUSEError(errno.EPERM)

    async def rmdir(self, *request: object) -> None:
        raise FUSEError(errno.EPERM)

    def _set_size(self) -> None:
        self._device.st_size = self._volume.size_bytes
        self._device.st_blocks = self._volume.size_bytes // 512

    def _attributes_of(self, inode: InodeT) -> EntryAttributes:
        if inode == DEVICE_INODE:
            if self._engine.last_write_ns >= self._device.st_ctime_ns:
                self._device.st_mtime_ns = self._device.st_ctime_ns = self._engine.last_write_ns
            return self._device
        if inode == pyfuse3.ROOT_INODE:
            return self._root
        raise FUSEError(errno.ENOENT)


def _attributes(
    inode: InodeT, mode: int, options: MountOptions, created_ns: int
) -> EntryAttributes:
    attributes = EntryAttributes()
    attributes.st_ino = inode
    attributes.st_mode = pyfuse3.ModeT(mode)
    attributes.st_nlink = 1
    attributes.st_uid = options.uid
    attributes.st_gid = options.gid
    attributes.st_blksize = FRAME_BYTES
    attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = created_ns
    attributes.entry_timeout = attributes.attr_timeout = _CACHE_SECONDS
    return attributes
