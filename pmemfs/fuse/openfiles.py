"""The open files of a mount in mode `fs`: handles, and what goes through them.

Invariants:
- a handle holds its inode, which lasts while anybody has it open;
- with the last handle that could write, what was allocated ahead goes back, after the data plane
  has let go of the file.
"""

from __future__ import annotations

import errno
import itertools
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyfuse3
from pyfuse3 import FileHandleT, InodeT

from pmemfs.errors import system_error
from pmemfs.fuse.engine import Engine
from pmemfs.fuse.newinode import CACHED
from pmemfs.fuse.privileges import Caller, take_privileges
from pmemfs.fuse.published import Publisher
from pmemfs.volume.fs.filesystem import FileSystem

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(slots=True)
class _OpenFile:
    """What a handle stands for."""

    ino: int
    flags: int
    loser: Caller | None
    """Who has opened it, unless that is root, who may keep privileges."""

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def is_for_appending(self) -> bool:
        """Whether it was opened so, as one must that is append-only."""
        return bool(self.flags & os.O_APPEND)

    @property
    def is_synchronous(self) -> bool:
        """Whether each write is durable when it is answered."""
        return bool(self.flags & os.O_DSYNC)


@dataclass(slots=True)
class _Opens:
    """The handles of an inode."""

    count: int = 0
    was_writable: bool = False


class OpenFiles:
    """All open files. `publisher` is for a data plane, where there is one."""

    def __init__(
        self,
        fs: FileSystem,
        engine: Engine,
        publisher: Publisher | None,
        *,
        cached: bool = False,
    ) -> None:
        self._cached = cached
        self._fs = fs
        self._engine = engine
        self._publisher = publisher
        self._handles: dict[int, _OpenFile] = {}
        self._opens: dict[int, _Opens] = {}
        self._numbers = itertools.count(1)

    def open(
        self, ino: int, flags: int, caller: Caller, *, may_keep: bool | None = None
    ) -> FileHandleT:
        """A new handle, the file emptied if the flags say so. Raises OSError.

        `may_keep` says whether the caller may then keep the file's set-user-ID and set-group-ID
        bits; where nobody knows, root may.
        """
        # Before anything is changed, since it may have to be read; see `patience`.
        self._fs.check_open(ino, flags)
        self._fs.hold(ino)
        file = _OpenFile(ino, flags, loser=None if caller.uid == 0 else caller)
        number = FileHandleT(next(self._numbers))
        self._handles[number] = file
        opens = self._opens.setdefault(ino, _Opens())
        opens.count += 1
        opens.was_writable |= file.is_writable
        if self._publisher:
            self._publisher.opened(ino)
        if flags & os.O_TRUNC:
            try:
                loser = file.loser if may_keep is None else None if may_keep else caller
                self.take_privileges(ino, loser)
                self._fs.set_attributes(ino, size_bytes=0)
            except OSError:
                self.close(number)
                raise
        return number

    def is_cached(self, ino: int) -> bool:
        """Whether a file is opened for the page cache; see docs/mmap.md."""
        return self._cached or self._fs.find_xattr(ino, CACHED) not in (None, b"0")

    def close(self, number: int) -> None:
        """Give a handle back. Raises OSError; it is gone nevertheless."""
        ino = self._file(number).ino
        opens = self._opens[ino]
        may_have_more = opens.was_writable or ino in self._fs.untrimmed
        gives_back = opens.count == 1 and may_have_more and not self._fs.read_only
        if gives_back:
            with suppress(OSError):
                # As in `open`. Where it can't be read, `trim_ahead` says so.
                self._fs.inode(ino)
        del self._handles[number]
        opens.count -= 1
        if self._publisher:
            self._publisher.closed(ino)
        try:
            if not opens.count:
                del self._opens[ino]
                if gives_back:
                    self._fs.trim_ahead(ino)
        finally:
            self._fs.drop(ino, 1)

    def read(self, number: int, offset_bytes: int, length_bytes: int) -> bytes | memoryview:
        """The bytes of a range, as far as the file goes. Raises OSError."""
        file = self._file(number)
        data = self._fs.read(file.ino, offset_bytes, length_bytes)
        self._engine.count_read(len(data))
        self._note_read(file)
        if self._publisher:
            self._publisher.was_read(file.ino, offset_bytes + length_bytes)
        return data

    def note_copy(self, number: int) -> None:
        """A file is copied from through this handle. Raises OSError."""
        file = self._file(number)
        if self._note_read(file):
            # Of a read the kernel knows that it changes the time of access.
            self._invalidate(file.ino)

    def _note_read(self, file: _OpenFile) -> bool:
        return not file.flags & os.O_NOATIME and self._fs.note_read(file.ino)

    def store(
        self,
        number: int,
        offset_bytes: int,
        data: Buffer,
        loser: Caller | None,
        *,
        is_append: bool = False,
    ) -> int:
        """Store bytes; how many. Raises OSError.

        `loser` is the writer, who may not keep the file's set-user-ID and set-group-ID bits; None:
        who may. `is_append` says that the kernel has chosen the place, which was the end then:
        several parts of one large write may come in any order.
        """
        file = self._file(number)
        may_overwrite = is_append or self.may_overwrite(number)
        self.take_privileges(file.ino, loser)
        try:
            written = self._fs.write(file.ino, offset_bytes, data, may_overwrite=may_overwrite)
        except Exception:
            self.note_failure(file.ino)
            raise
        self._engine.count_write(written)
        if self._publisher:
            self._publisher.was_written(file.ino, written)
        return written

    async def write_through(
        self,
        number: int,
        offset_bytes: int,
        data: Buffer,
        loser: Caller | None,
        *,
        is_append: bool = False,
    ) -> int:
        """As `store`, and make it durable. Raises OSError."""
        written = self.store(number, offset_bytes, data, loser, is_append=is_append)
        self._fs.write_back(self._file(number).ino)
        await self._engine.make_durable()
        return written

    async def write(self, number: int, offset_bytes: int, data: Buffer) -> int:
        """Store bytes as the file's flags want it; how many. Raises OSError.

        For who knows nothing of the writer: who opened the file counts.
        """
        file = self._file(number)
        if file.is_synchronous:
            return await self.write_through(number, offset_bytes, data, file.loser)
        return self.store(number, offset_bytes, data, file.loser)

    def may_overwrite(self, number: int) -> bool:
        """Whether a handle is older than its file is append-only, if it is. Raises OSError.

        After that the kernel opens it for appending only. But fcntl(2) can take O_APPEND away, and
        a mapping stores anywhere, since the kernel knows nothing of the flag.
        """
        return not self._file(number).is_for_appending

    async def fsync(self, number: int) -> None:
        """Make a file durable. Raises OSError."""
        ino = self._file(number).ino
        self._fs.write_back(ino)
        await self._engine.fsync()
        if self._publisher:
            self._publisher.was_synced(ino)

    async def sync_all(self) -> None:
        """Make everything durable. Raises OSError."""
        # What is not open has been written back.
        for ino in list(self._opens):
            self._fs.write_back(ino)
        await self._engine.make_durable()

    def _file(self, number: int) -> _OpenFile:
        file = self._handles.get(number)
        if file is None:
            raise system_error(errno.EBADF)
        return file

    def take_privileges(self, ino: int, loser: Caller | None) -> None:
        """As `privileges.take_privileges`, and let the kernel know. Raises OSError."""
        if take_privileges(self._fs, ino, loser):
            # The kernel does not know, and would go on giving them to who executes the file.
            self._invalidate(ino)

    def _invalidate(self, ino: int) -> None:
        """Let the kernel ask again what a file is like."""
        with suppress(OSError):
            pyfuse3.invalidate_inode(InodeT(ino), attr_only=True)

    def note_failure(self, ino: int) -> None:
        """A change of a file's content failed, perhaps after it had done a part."""
        if self._publisher:
            self._publisher.has_failed(ino)

    def note_change(self, ino: int) -> None:
        """Something happened to an inode that may have changed its extents, size or mode."""
        if self._publisher:
            self._publisher.was_changed(ino)
