"""Mode `fs` as the kernel sees it: names, attributes, extended attributes, open files.

The kernel checks permissions (default_permissions) and keeps what it has learnt for an hour, names
that do not exist included: nobody changes a pool but through its one mount. Invariants:
- each entry that is answered holds its inode once, until the kernel forgets it;
- nothing is awaited between looking and answering, so no other request comes between; what has to
  be read for long is read before, see `patience`;
- reading an attribute or a name stores nothing; reading a directory, a link or a file at most when
  it was accessed.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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

from pmemfs.errors import system_error
from pmemfs.fuse import acl
from pmemfs.fuse.barrier import guarded
from pmemfs.fuse.changes import Change, change_inode
from pmemfs.fuse.newinode import Maker, check_cached, new_inode, whiteout
from pmemfs.fuse.openfiles import OpenFiles
from pmemfs.fuse.patience import Patience, patient
from pmemfs.fuse.privileges import CAPABILITIES, Caller
from pmemfs.pfn import FRAME_BYTES
from pmemfs.volume.fs.attributes import Attributes
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.fs.names import RENAME_WHITEOUT

log = logging.getLogger(__name__)

CACHE_SECONDS = 3600
NAME_MAX_BYTES = 255
_XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.")
_ACLS = (acl.ACCESS, acl.DEFAULT)


@dataclass(slots=True)
class _OpenDirectory:
    """A directory that is being listed; `names` are what it had when the listing began."""

    ino: int
    names: list[bytes] | None = None


@guarded
@patient
class FileSystemOperations(pyfuse3.Operations):
    """What the kernel asks of a mount in mode `fs`."""

    supports_dot_lookup = True
    enable_acl = True

    def __init__(self, fs: FileSystem, files: OpenFiles, patience: Patience) -> None:
        super().__init__()
        self._patience = patience
        self._fs = fs
        self._files = files
        self._directories: dict[int, _OpenDirectory] = {}
        self._numbers = itertools.count(1)

    # Names

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        ino = find(self._fs, parent_inode, name)
        if ino is not None:
            return self._entry(ino)
        # The number 0: there is no such name, and the kernel may remember that.
        missing = EntryAttributes()
        missing.st_ino = InodeT(0)
        missing.entry_timeout = CACHE_SECONDS
        return missing

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for ino, count in inode_list:
            let_go(self._fs, ino, count)

    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._make(parent_inode, name, mode, ctx, rdev=rdev))

    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._make(parent_inode, name, stat.S_IFDIR | mode, ctx))

    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target=target))

    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        self._fs.link(inode, new_parent_inode, new_name)
        return self._entry(inode)

    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        self._fs.unlink(parent_inode, name)

    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        self._fs.rmdir(parent_inode, name)

    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        left = None
        if flags & RENAME_WHITEOUT:
            left = whiteout(self._fs, parent_inode_old, Maker(ctx.uid, ctx.gid, umask=0))
        self._fs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, left)

    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        target = FileNameT(bytes(self._fs.target(inode)))
        self._fs.note_read(inode)
        return target

    # Attributes

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return entry_of(self._fs.attributes(inode))

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
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
        return entry_of(change_inode(self._fs, self._files, inode, change, caller_of(ctx)))

    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """The kernel has checked it: the mount has default_permissions."""
        return True

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        room = self._fs.room()
        status = pyfuse3.StatvfsData()
        status.f_bsize = status.f_frsize = FRAME_BYTES
        status.f_blocks = room.total_frames
        status.f_bfree = room.free_frames
        status.f_bavail = room.free_frames - room.reserved_frames
        # As many files as there is room for, and nobody counts them.
        status.f_files = status.f_ffree = status.f_favail = 0
        status.f_namemax = NAME_MAX_BYTES
        return status

    # Extended attributes

    async def setxattr(
        self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext
    ) -> None:
        if name in _ACLS:
            self._set_list(inode, name, value, ctx)
        else:
            _check_namespace(name)
            check_cached(name, value)
            self._fs.set_xattr(inode, name, value)
            if name == CAPABILITIES:
                self._files.note_change(inode)

    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        if name not in _ACLS:
            _check_namespace(name)
        return bytes(self._fs.get_xattr(inode, name))

    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        names = self._fs.list_xattrs(inode)
        if ctx.uid != 0:
            names = [name for name in names if not name.startswith(b"trusted.")]
        return [XAttrNameT(name) for name in names]

    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        if name in _ACLS:
            if self._list(inode, name):
                self._fs.set_xattrs_and_mode(inode, {name: None}, None)
            return
        _check_namespace(name)
        self._fs.remove_xattr(inode, name)

    # Open files

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        return self._opened(self._files.open(inode, flags, caller_of(ctx)), inode)

    async def create(
        self,
        parent_inode: InodeT,
        name: FileNameT,
        mode: ModeT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> tuple[FileInfo, EntryAttributes]:
        ino = self._make(parent_inode, name, stat.S_IFREG | stat.S_IMODE(mode), ctx)
        fh = self._files.open(ino, flags & ~os.O_TRUNC, caller_of(ctx))
        return self._opened(fh, ino), self._entry(ino)

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        return self._files.read(fh, off, size)

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._files.write(fh, off, buf)

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._files.fsync(fh)

    async def release(self, fh: FileHandleT) -> None:
        self._files.close(fh)

    # Directories

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        number = FileHandleT(next(self._numbers))
        self._directories[number] = _OpenDirectory(inode)
        return number

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._directories[fh]
        ino, look = directory.ino, self._patience.look
        if start_id == 0 or directory.names is None:
            directory.names = await look(lambda: self._fs.names(ino))
        # pyfuse3 does not tell of O_NOATIME.
        self._fs.note_read(ino)
        names = directory.names
        dots = ((b".", ino), (b"..", await look(lambda: self._fs.parent(ino))))
        for position, (name, to) in enumerate(dots[start_id:], start_id + 1):
            attributes = await look(partial(self._fs.attributes, to))
            if not _reply(token, name, attributes, position):
                return
        for position in range(max(start_id, len(dots)), len(names) + len(dots)):
            name = names[position - len(dots)]
            if not await self._list_one(token, ino, name, position + 1):
                return

    async def _list_one(
        self, token: pyfuse3.ReaddirToken, directory: int, name: bytes, position: int
    ) -> bool:
        """List an entry, unless it has gone meanwhile; False where the answer is full."""
        to = await self._patience.look(lambda: self._fs.has_entry(directory, name))
        if to is None:
            return True
        if not _reply(token, name, self._fs.attributes(to), position):
            return False
        # An entry but the dots counts as looked up.
        self._fs.hold(to)
        return True

    async def releasedir(self, fh: FileHandleT) -> None:
        del self._directories[fh]

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Nothing to do: what changes a directory is durable when it is answered."""

    # Parts of the above

    def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        ctx: RequestContext,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> int:
        maker = Maker(ctx.uid, ctx.gid, ctx.umask)
        new = new_inode(self._fs, parent, maker, mode, rdev=rdev, target=target)
        return self._fs.make(parent, name, new)

    def _entry(self, ino: int) -> EntryAttributes:
        """The answer to whoever looks an inode up, which the kernel holds from now on."""
        entry = entry_of(self._fs.attributes(ino))
        self._fs.hold(ino)
        return entry

    def _opened(self, fh: FileHandleT, ino: int) -> FileInfo:
        is_cached = self._files.is_cached(ino)
        return FileInfo(fh=fh, direct_io=not is_cached, keep_cache=is_cached)

    def _list(self, ino: int, name: bytes) -> bytes:
        """An access control list as it is stored; empty where there is none."""
        return self._fs.find_xattr(ino, name) or b""

    def _set_list(self, ino: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        entries = acl.parse(value)
        attributes = self._fs.attributes(ino)
        if name == acl.DEFAULT:
            if not stat.S_ISDIR(attributes.mode):
                raise FUSEError(errno.EACCES)
            self._fs.set_xattrs_and_mode(ino, {name: value if entries else None}, None)
            return
        mode = acl.mode_of(entries, attributes.mode) if entries else attributes.mode
        # The kernel leaves this to us, with a flag (FUSE_SETXATTR_ACL_KILL_SGID) that libfuse does
        # not ask for.
        if mode & stat.S_ISGID and ctx.uid != 0 and not caller_of(ctx).is_member(attributes.gid):
            mode &= ~stat.S_ISGID
        stored = acl.pack(entries) if acl.says_more_than_a_mode(entries) else None
        self._fs.set_xattrs_and_mode(ino, {name: stored}, stat.S_IMODE(mode))
        self._files.note_change(ino)


def find(fs: FileSystem, parent: int, name: bytes) -> int | None:
    """The inode of a name, `.` and `..` among them; None if there is none. Raises OSError."""
    if name == b".":
        # So the kernel asks for what somebody kept a handle of, if it does not know it. What was
        # removed is not to be found, though the kernel's FORGET of it may still be on the way.
        if not fs.attributes(parent).nlink:
            raise system_error(errno.ESTALE)
        return parent
    if name == b"..":
        return fs.parent(parent)
    try:
        return fs.lookup(parent, name)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
    return None


def let_go(fs: FileSystem, ino: int, count: int) -> None:
    """The kernel does not hold an inode so many times any more. Raises nothing: it doesn't ask."""
    try:
        fs.drop(ino, count)
    except Exception:
        log.exception("inode %d could not be let go", ino)


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


def _reply(token: pyfuse3.ReaddirToken, name: bytes, attributes: Attributes, position: int) -> bool:
    return pyfuse3.readdir_reply(token, FileNameT(name), entry_of(attributes), position)


def _check_namespace(name: bytes) -> None:
    """Raise FUSEError for an attribute that no file system has, as tmpfs and ext4 do."""
    if not name.startswith(_XATTR_NAMESPACES):
        raise FUSEError(errno.EOPNOTSUPP)
    if name in _XATTR_NAMESPACES:
        raise FUSEError(errno.EINVAL)


def caller_of(ctx: RequestContext) -> Caller:
    """Who asks pyfuse3."""
    return Caller(ctx.uid, ctx.gid, ctx.pid)
