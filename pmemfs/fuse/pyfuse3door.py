"""The pyfuse3 door: pyfuse3's types, for the handlers and back. The python engine's only way in.

What an operation does is decided by the handlers. What pyfuse3 lacks, the table in docs/design.md
says. Invariant: no exception but FUSEError leaves a method, since that would end the session, and
every user of the mount would get ENOTCONN.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    RequestContext,
    XAttrNameT,
)

from pmemfs.fuse.encode import CACHE_SECONDS
from pmemfs.fuse.failures import errno_of
from pmemfs.fuse.handlers.attributes import Change
from pmemfs.fuse.handlers.directories import Listed
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.handlers.notifications import later
from pmemfs.fuse.handlers.openfiles import Opened
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.media.log import NAME_MAX_BYTES
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.base import Attributes, Later

T = TypeVar("T")


class Pyfuse3Door(pyfuse3.Operations):
    """The way in for one mount."""

    def __init__(self, handlers: Handlers) -> None:
        super().__init__()
        self._handlers = handlers
        self.supports_dot_lookup = self.enable_acl = handlers.volume.has_files

    async def _ask(self, step: Callable[[], Later[T]], what: str, *request: object) -> T:
        """What the handlers answer. Raises FUSEError."""
        try:
            answer = self._handlers.patience.begin(step)
            return await answer if isinstance(answer, Coroutine) else answer
        except Exception as error:
            raise FUSEError(errno_of(error, what, *request)) from error

    # Names

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        names = self._handlers.names
        found = await self._ask(lambda: names.lookup(parent_inode, name), "lookup",
                                parent_inode, name)  # fmt: skip
        if found is not None:
            return entry_of(found)
        # The number 0: there is no such name, and the kernel may remember that.
        missing = EntryAttributes()
        missing.st_ino = InodeT(0)
        missing.entry_timeout = CACHE_SECONDS
        return missing

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, count in inode_list:
            self._handlers.names.forget(ino, count)

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._make("mknod", parent_inode, name, mode, ctx, rdev)

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return await self._make("mkdir", parent_inode, name, stat.S_IFDIR | mode, ctx, 0)

    async def _make(
        self, what: str, parent: int, name: bytes, mode: int, ctx: RequestContext, rdev: int
    ) -> EntryAttributes:
        names, caller = self._handlers.names, caller_of(ctx)
        made = await self._ask(
            lambda: names.make(caller, parent, name, mode, umask=ctx.umask, rdev=rdev),
            what, parent, name, mode, rdev,
        )  # fmt: skip
        return entry_of(made)

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        names, caller = self._handlers.names, caller_of(ctx)
        made = await self._ask(lambda: names.symlink(caller, parent_inode, name, target),
                               "symlink", parent_inode, name, target)  # fmt: skip
        return entry_of(made)

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        names = self._handlers.names
        made = await self._ask(lambda: names.link(inode, new_parent_inode, new_name), "link",
                               inode, new_parent_inode, new_name)  # fmt: skip
        return entry_of(made)

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        names = self._handlers.names
        await self._ask(lambda: names.unlink(parent_inode, name), "unlink", parent_inode, name)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        names = self._handlers.names
        await self._ask(lambda: names.rmdir(parent_inode, name), "rmdir", parent_inode, name)

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        names, caller = self._handlers.names, caller_of(ctx)
        what = (parent_inode_old, name_old, parent_inode_new, name_new, flags)
        await self._ask(lambda: names.rename(caller, *what), "rename", *what)

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        names = self._handlers.names
        return FileNameT(await self._ask(lambda: names.readlink(inode), "readlink", inode))

    # Attributes

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        attributes = self._handlers.attributes
        return entry_of(await self._ask(lambda: attributes.get(inode), "getattr", inode))

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        attributes, caller = self._handlers.attributes, caller_of(ctx)
        change = Change(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size_bytes=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
            takes_privileges=fields.update_size and ctx.uid != 0,
        )
        changed = await self._ask(lambda: attributes.change(caller, inode, change), "setattr",
                                  inode, change)  # fmt: skip
        return entry_of(changed)

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """The kernel has checked it: the mount has default_permissions."""
        return True

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        room = await self._ask(self._handlers.attributes.room, "statfs")
        status = pyfuse3.StatvfsData()
        status.f_bsize = status.f_frsize = FRAME_BYTES
        status.f_blocks = room.total_frames
        status.f_bfree = room.free_frames
        status.f_bavail = room.free_frames - room.reserved_frames
        status.f_files = room.file_count
        status.f_ffree = status.f_favail = 0
        status.f_namemax = NAME_MAX_BYTES
        return status

    # Extended attributes

    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        xattrs, caller = self._handlers.xattrs, caller_of(ctx)
        await self._ask(lambda: xattrs.set(caller, inode, name, value), "setxattr",
                        inode, name, value)  # fmt: skip

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        xattrs = self._handlers.xattrs
        return await self._ask(lambda: xattrs.get(inode, name), "getxattr", inode, name)

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        xattrs, caller = self._handlers.xattrs, caller_of(ctx)
        names = await self._ask(lambda: xattrs.names(caller, inode), "listxattr", inode)
        return [XAttrNameT(name) for name in names]

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        xattrs = self._handlers.xattrs
        await self._ask(lambda: xattrs.remove(inode, name), "removexattr", inode, name)

    # Open files

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        files, caller = self._handlers.files, caller_of(ctx)
        opened = await self._ask(lambda: files.open(caller, inode, flags), "open", inode, flags)
        return _file_info(opened)

    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        files, caller = self._handlers.files, caller_of(ctx)
        made, opened = await self._ask(
            lambda: files.create(caller, parent_inode, name, mode, flags, umask=ctx.umask),
            "create", parent_inode, name, mode, flags,
        )  # fmt: skip
        return _file_info(opened), entry_of(made)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        files = self._handlers.files
        return await self._ask(lambda: files.read(fh, off, size), "read", fh, off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        files = self._handlers.files
        return await self._ask(lambda: files.write(None, fh, off, buf), "write", fh, off, buf)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._ask(lambda: later(self._handlers.files.fsync(fh), bool), "fsync", fh)

    async def release(self, fh: FileHandleT) -> None:
        await self._ask(lambda: self._handlers.files.close(fh), "release", fh)

    # Directories

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        # pyfuse3 does not tell of O_NOATIME.
        directories = self._handlers.directories
        return FileHandleT(await self._ask(lambda: directories.open(inode), "opendir", inode))

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directories = self._handlers.directories

        def take(listed: Listed) -> bool:
            entry = _dot(listed) if listed.attributes is None else entry_of(listed.attributes)
            return pyfuse3.readdir_reply(token, FileNameT(listed.name), entry, listed.position)

        await self._ask(
            lambda: directories.listing(fh, start_id, take, with_attributes=True), "readdir",
            fh, start_id,
        )  # fmt: skip

    async def releasedir(self, fh: FileHandleT) -> None:
        await self._ask(lambda: self._handlers.directories.close(fh), "releasedir", fh)

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing to do: what changes a directory is durable when it is answered."""


def caller_of(ctx: RequestContext) -> Caller:
    """Who asks pyfuse3."""
    return Caller(ctx.uid, ctx.gid, ctx.pid)


def entry_of(attributes: Attributes) -> EntryAttributes:
    """Attributes as pyfuse3 wants them, to be kept by the kernel for long."""
    entry = EntryAttributes()
    entry.st_ino = InodeT(attributes.ino)
    entry.generation = attributes.generation
    entry.st_mode = ModeT(attributes.mode)
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = attributes.rdev
    entry.st_size = attributes.size_bytes
    entry.st_blksize = FRAME_BYTES
    entry.st_blocks = attributes.block_count
    entry.st_atime_ns = attributes.atime_ns
    entry.st_mtime_ns = attributes.mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    entry.entry_timeout = entry.attr_timeout = CACHE_SECONDS
    return entry


def _dot(listed: Listed) -> EntryAttributes:
    """One of the dots, of which the kernel takes the number and the type."""
    entry = EntryAttributes()
    entry.st_ino = InodeT(listed.ino)
    entry.st_mode = ModeT(listed.type << 12)
    return entry


def _file_info(opened: Opened) -> FileInfo:
    return FileInfo(fh=FileHandleT(opened.handle), direct_io=not opened.is_cached,
                    keep_cache=opened.is_cached)  # fmt: skip
