"""The pyfuse3 door: converts between pyfuse3's types and the handlers. The python engine's way in.

The handlers decide what an operation does. docs/design.md has a table of what pyfuse3 lacks.
Invariant: only FUSEError leaves a method. Any other exception would end the session, and every user
of the mount would get ENOTCONN.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import ParamSpec, TypeVar

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
from pmemfs.fuse.handlers.openfiles import Opened
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.media.log import NAME_MAX_BYTES
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.base import Attributes, Later

P = ParamSpec("P")
T = TypeVar("T")


class Pyfuse3Door(pyfuse3.Operations):
    """The way in for one mount."""

    def __init__(self, handlers: Handlers) -> None:
        super().__init__()
        self._handlers = handlers
        self.supports_dot_lookup = self.enable_acl = handlers.volume.has_files

    async def _ask(
        self, what: str, handler: Callable[P, Later[T]], *request: P.args, **more: P.kwargs
    ) -> T:
        """What a handler answers. Raises FUSEError."""
        try:
            answer = self._handlers.patience.begin(handler, *request, **more)
            return await answer if isinstance(answer, Coroutine) else answer
        except Exception as error:
            raise FUSEError(errno_of(error, what, *request)) from error

    # Names

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        found = await self._ask("lookup", self._handlers.names.lookup, parent_inode, name)
        if found is not None:
            return entry_of(found)
        # The number 0 means that there is no such name, and that the kernel may remember that.
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
        return entry_of(await self._ask(
            "mknod", self._handlers.names.make, caller_of(ctx), parent_inode, name, mode,
            umask=ctx.umask, rdev=rdev,
        ))  # fmt: skip

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return entry_of(await self._ask(
            "mkdir", self._handlers.names.make, caller_of(ctx), parent_inode, name,
            stat.S_IFDIR | mode, umask=ctx.umask,
        ))  # fmt: skip

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        make = self._handlers.names.symlink
        return entry_of(
            await self._ask("symlink", make, caller_of(ctx), parent_inode, name, target)
        )

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        link = self._handlers.names.link
        return entry_of(await self._ask("link", link, inode, new_parent_inode, new_name))

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._ask("unlink", self._handlers.names.unlink, parent_inode, name)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._ask("rmdir", self._handlers.names.rmdir, parent_inode, name)

    async def rename(
        self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT,
        name_new: FileNameT, flags: FlagT, ctx: RequestContext,
    ) -> None:  # fmt: skip
        await self._ask(
            "rename", self._handlers.names.rename, caller_of(ctx), parent_inode_old, name_old,
            parent_inode_new, name_new, flags,
        )  # fmt: skip

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(await self._ask("readlink", self._handlers.names.readlink, inode))

    # Attributes

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return entry_of(await self._ask("getattr", self._handlers.attributes.get, inode))

    async def setattr(
        self, inode: InodeT, attr: EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None, ctx: RequestContext,
    ) -> EntryAttributes:  # fmt: skip
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
        attributes = self._handlers.attributes
        return entry_of(
            await self._ask("setattr", attributes.change, caller_of(ctx), inode, change)
        )

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """Allow it: the kernel has checked, because the mount has default_permissions."""
        return True

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        room = await self._ask("statfs", self._handlers.attributes.room)
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
        await self._ask("setxattr", self._handlers.xattrs.set, caller_of(ctx), inode, name, value)

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        return await self._ask("getxattr", self._handlers.xattrs.get, inode, name)

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        names = await self._ask("listxattr", self._handlers.xattrs.names, caller_of(ctx), inode)
        return [XAttrNameT(name) for name in names]

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        await self._ask("removexattr", self._handlers.xattrs.remove, inode, name)

    # Open files

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        files = self._handlers.files
        return _file_info(await self._ask("open", files.open, caller_of(ctx), inode, flags))

    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        made, opened = await self._ask(
            "create", self._handlers.files.create, caller_of(ctx), parent_inode, name, mode, flags,
            umask=ctx.umask,
        )  # fmt: skip
        return _file_info(opened), entry_of(made)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        return await self._ask("read", self._handlers.files.read, fh, off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._ask("write", self._handlers.files.write, None, fh, off, buf)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        fsync: Callable[[int], Later[None]] = self._handlers.files.fsync
        await self._ask("fsync", fsync, fh)

    async def release(self, fh: FileHandleT) -> None:
        await self._ask("release", self._handlers.files.release, fh)

    # Directories

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        # pyfuse3 does not pass O_NOATIME on.
        return FileHandleT(
            await self._ask("opendir", self._handlers.directories.open, caller_of(ctx), inode)
        )

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        def take(listed: Listed) -> bool:
            entry = _dot(listed) if listed.attributes is None else entry_of(listed.attributes)
            return pyfuse3.readdir_reply(token, FileNameT(listed.name), entry, listed.position)

        listing = self._handlers.directories.listing
        await self._ask("readdir", listing, fh, start_id, take, with_attributes=True)

    async def releasedir(self, fh: FileHandleT) -> None:
        await self._ask("releasedir", self._handlers.directories.close, fh)

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing to do: a change of a directory is durable when it is answered."""


def caller_of(ctx: RequestContext) -> Caller:
    """The caller of a request that came through pyfuse3."""
    return Caller(ctx.uid, ctx.gid, ctx.pid)


def entry_of(attributes: Attributes) -> EntryAttributes:
    """Attributes as pyfuse3 wants them; the kernel may keep them for long."""
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
    """One of the dots. The kernel takes its number and type."""
    entry = EntryAttributes()
    entry.st_ino = InodeT(listed.ino)
    entry.st_mode = ModeT(listed.type << 12)
    return entry


def _file_info(opened: Opened) -> FileInfo:
    return FileInfo(fh=FileHandleT(opened.handle), direct_io=not opened.is_cached,
                    keep_cache=opened.is_cached)  # fmt: skip
