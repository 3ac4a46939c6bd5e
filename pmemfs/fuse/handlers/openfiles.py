"""The open files of a mount: handles, and what goes through them.

Invariants:
- a handle holds its inode, so the inode lives while any program has it open;
- each handle stands in `OpenPlaces` as long as the kernel may use it, and everything else follows
  from that. So a daemon that takes over finds all handles there, and what a worker has opened is
  known here as soon as a request comes for it;
- with the last handle that could write, frames that were mapped ahead go back, but only after the
  data plane has let go of the file: a worker may still be appending into them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import HandleKind
from pmemfs.engine.base import Engine
from pmemfs.errors import system_error
from pmemfs.fuse.handlers.names import NameHandlers
from pmemfs.fuse.handlers.newinode import CACHED
from pmemfs.fuse.handlers.notifications import Notifier, after, after_failing
from pmemfs.fuse.handlers.privileges import Caller, take_privileges
from pmemfs.fuse.published import Publisher
from pmemfs.volume.base import Attributes, Later, Volume
from pmemfs.volume.coming import Coming

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

_FILE = int(HandleKind.FILE)


@dataclass(slots=True)
class _OpenFile:
    """What a handle stands for."""

    ino: int
    flags: int
    loser: Caller | None
    """The user who has opened it and may not keep privileges; None for root, who may."""

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def is_for_appending(self) -> bool:
        """Whether it was opened for appending, as an append-only file must be."""
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


@dataclass(frozen=True, slots=True)
class Opened:
    """A new handle, and whether it uses the page cache; see docs/mmap.md."""

    handle: int
    is_cached: bool


class OpenFiles:
    """All open files, beginning with those in `opens`. `publisher` is for a data plane, if there is
    one."""

    def __init__(
        self, volume: Volume, engine: Engine, publisher: Publisher | None, names: NameHandlers,
        notifier: Notifier, opens: OpenPlaces, *, cached: bool = False,
    ) -> None:  # fmt: skip
        self._cached = cached
        self._fs = volume
        self._engine = engine
        self._publisher = publisher
        self._names = names
        self._notifier = notifier
        self._places = opens
        self._handles: dict[int, _OpenFile] = {}
        self._opens: dict[int, _Opens] = {}
        self.is_synchronous = False
        """Whether each write is durable when it is answered, however the file was opened."""
        for place in opens:
            if place.kind == _FILE and not place.owner:
                caller = Caller(place.uid, place.gid, place.pid)
                self._note(place.handle, caller, place.inode, place.flags)
                # The handle that could write may be closed already. Then trimming finds nothing.
                self._opens[place.inode].was_writable = True

    def open(
        self, caller: Caller, ino: int, flags: int, *, may_keep: bool | None = None
    ) -> Later[Opened]:
        """A new handle; the file is emptied if the flags say so. Raises OSError.

        `may_keep` says whether the caller may keep the file's set-user-ID and set-group-ID bits
        then. If the request does not say that, root may.
        """
        # Before anything changes, because the inode may have to be read in steps; see `patience`.
        self._fs.check_open(ino, flags)
        opened = self._new_handle(caller, ino, flags)
        told = None
        if flags & os.O_TRUNC:
            loser = self._handles[opened.handle].loser
            if may_keep is not None:
                loser = None if may_keep else caller
            try:
                told = self._take_privileges(ino, loser)
                self._fs.set_attributes(ino, size_bytes=0)
            except OSError as error:
                self.close(opened.handle)
                return after_failing(told, error)
        return after(told, opened)

    def create(
        self, caller: Caller, parent: int, name: bytes | None, mode: int, flags: int, *, umask: int
    ) -> tuple[Attributes, Opened]:
        """Make a file and open it; with `name` None it has no name. It is empty, whatever the flags
        say. Raises OSError; ESTALE lets the kernel look the name up again, and open what is there.
        """
        mode = stat.S_IFREG | stat.S_IMODE(mode)
        self._places.check_room()
        if name is None:
            made = self._names.make_unnamed(caller, parent, mode, umask=umask)
        else:
            try:
                made = self._names.make(caller, parent, name, mode, umask=umask)
            except FileExistsError as error:
                if flags & os.O_EXCL:
                    raise
                # The name was unlocked since the kernel looked it up. To open the file here would
                # be wrong, because the kernel checks no permissions of what it has created.
                raise system_error(errno.ESTALE) from error
        return made, self._new_handle(caller, made.ino, flags & ~os.O_TRUNC)

    def _new_handle(self, caller: Caller, ino: int, flags: int) -> Opened:
        # The hold comes first, so that nothing is open and not held; `dataplane/holdnotes` has what
        # becomes of it if this process dies in between.
        self._fs.hold(ino)
        try:
            number = self._places.take(_FILE, ino, flags, *caller)
        except OSError:
            self._fs.drop(ino, 1)
            raise
        self._note(number, caller, ino, flags)
        is_cached = self._cached or self._fs.find_xattr(ino, CACHED) not in (None, b"0")
        return Opened(number, is_cached)

    def _note(self, number: int, caller: Caller, ino: int, flags: int) -> None:
        """Note a handle, and all that follows from it."""
        self._handles[number] = _OpenFile(ino, flags, None if caller.uid == 0 else caller)
        opens = self._opens.get(ino)
        if opens is None:
            opens = self._opens[ino] = _Opens()
        opens.count += 1
        if flags & os.O_ACCMODE:
            opens.was_writable = True
        if self._publisher:
            self._publisher.opened(ino)

    def release(self, number: int) -> Later[None]:
        """Do as `close`, for the kernel, which asks when the last descriptor is closed."""
        ino = self._file(number).ino
        # No program waits for this, so one may just have asked how much room the file takes.
        return after(self._notifier.tell(ino), None) if self.close(number) else None

    def close(self, number: int) -> bool:
        """Close a handle; whether the file takes less room then. Raises OSError, but the handle is
        gone in any case."""
        ino = self._file(number).ino
        opens = self._opens[ino]
        may_have_more = opens.was_writable or self._fs.may_have_ahead(ino)
        gives_back = opens.count == 1 and may_have_more and not self._fs.read_only
        if gives_back:
            with suppress(OSError):
                # To read it now, as in `open`. If it can't be read, `trim_ahead` says so.
                self._fs.attributes(ino)
        del self._handles[number]
        opens.count -= 1
        if self._publisher:
            self._publisher.closed(ino)
        # From here on both the handle and its hold go, whatever becomes of this process.
        self._places.will_close(number)
        self._fs.will_drop(ino)
        # After `closed`: with the last handle the file is withdrawn, see `Publisher`.
        self._places.give_back(number)
        has_shrunk = False
        try:
            if not opens.count:
                del self._opens[ino]
                if gives_back:
                    has_shrunk = self._trim_ahead(ino)
        finally:
            self._fs.drop(ino, 1)
        return has_shrunk

    def _trim_ahead(self, ino: int) -> bool:
        try:
            return self._fs.trim_ahead(ino)
        except OSError as error:
            # The next close gives it back, or the end of the mount. The handle is gone, so this
            # must not be asked again.
            if error.errno != errno.ENOSPC:
                raise
            return False

    def read(self, number: int, offset_bytes: int, length_bytes: int) -> Later[bytes | memoryview]:
        """The bytes of a range, as far as the file goes. Raises OSError."""
        file = self._file(number)
        data = self._fs.read(file.ino, offset_bytes, length_bytes)
        # Asked this way round, because asking an ABC such as Coroutine takes several calls.
        if isinstance(data, (bytes, memoryview)):
            return self._was_read(file, offset_bytes + length_bytes, data)
        if isinstance(data, Coming):
            return data.then(partial(self._was_read, file, offset_bytes + length_bytes))
        return self._read_later(file, offset_bytes + length_bytes, data)

    async def _read_later(
        self, file: _OpenFile, end_bytes: int, reading: Coroutine[Any, Any, bytes | memoryview]
    ) -> bytes | memoryview:
        return self._was_read(file, end_bytes, await reading)

    def _was_read(
        self, file: _OpenFile, end_bytes: int, data: bytes | memoryview
    ) -> bytes | memoryview:
        self._engine.count_read(len(data))
        self._note_read(file)
        if self._publisher:
            self._publisher.was_read(file.ino, end_bytes)
        return data

    def note_copy(self, number: int) -> Awaitable[None] | None:
        """A file is copied from through this handle; what to await then. Raises OSError."""
        file = self._file(number)
        # The kernel knows that a read changes the time of access, but not that a copy does.
        return self._notifier.tell(file.ino) if self._note_read(file) else None

    def _note_read(self, file: _OpenFile) -> bool:
        return not file.flags & os.O_NOATIME and self._fs.note_read(file.ino)

    def write(
        self, caller: Caller | None, number: int, offset_bytes: int, data: Buffer, *,
        may_keep: bool | None = None, is_append: bool = False, is_synchronous: bool | None = None,
    ) -> Later[int]:  # fmt: skip
        """Store bytes, and make them durable if asked for; how many. Raises OSError.

        `may_keep` says whether the writer may keep the file's set-user-ID and set-group-ID bits,
        and `is_synchronous` whether the bytes must be durable. If the request does not say, it
        counts who has opened the file, and with which flags. `is_append` says that the kernel has
        chosen the place, which was the end at that time: the parts of one large write may come in
        any order.
        """
        file = self._file(number)
        loser = file.loser if may_keep is None else None if may_keep else caller
        told = self._take_privileges(file.ino, loser)
        may_overwrite = is_append or self.may_overwrite(number)
        try:
            written = self._fs.write(file.ino, offset_bytes, data, may_overwrite=may_overwrite)
        except Exception as error:
            self._note_failure(file.ino)
            return after_failing(told, error)
        if is_synchronous is None:
            is_synchronous = self.is_synchronous or file.is_synchronous
        if not isinstance(written, int):
            return self._write_later(file.ino, told, written, is_synchronous=is_synchronous)
        self._was_written(file.ino, written)
        if is_synchronous:
            return self._through(file.ino, told, written)
        return after(told, written)

    async def _write_later(
        self, ino: int, told: Awaitable[None] | None, writing: Coroutine[Any, Any, int], *,
        is_synchronous: bool,
    ) -> int:  # fmt: skip
        try:
            written = await writing
            self._was_written(ino, written)
            if is_synchronous:
                await self._make_durable(ino)
        except Exception:
            self._note_failure(ino)
            raise
        finally:
            if told is not None:
                await told
        return written

    def _was_written(self, ino: int, written: int) -> None:
        self._engine.count_write(written)
        if self._publisher:
            self._publisher.was_written(ino, written)

    async def _through(self, ino: int, told: Awaitable[None] | None, written: int) -> int:
        try:
            await self._make_durable(ino)
        finally:
            if told is not None:
                await told
        return written

    async def _make_durable(self, ino: int) -> None:
        await self._write_back(ino)
        await self._engine.make_durable()

    async def _write_back(self, ino: int) -> None:
        writing = self._fs.write_back(ino)
        if writing is not None:
            await writing

    def may_overwrite(self, number: int) -> bool:
        """Whether a handle is older than the append-only flag of its file. Raises OSError.

        After the flag is set, the kernel opens the file only for appending. But fcntl(2) can take
        O_APPEND away, and a mapping stores anywhere, because the kernel does not know the flag.
        """
        return not self._file(number).is_for_appending

    async def fsync(self, number: int) -> None:
        """Make a file durable. Raises OSError."""
        ino = self._file(number).ino
        await self._write_back(ino)
        await self._engine.fsync()
        if self._publisher:
            self._publisher.was_synced(ino)

    def openers(self) -> Iterator[tuple[int, int]]:
        """The inode of each open file, and the process that has opened it."""
        return ((place.inode, place.pid) for place in self._places if place.kind == _FILE)

    @property
    def has_writers(self) -> bool:
        """Whether any file is open for writing."""
        self._adopt_all()
        return any(file.is_writable for file in self._handles.values())

    async def sync_all(self) -> None:
        """Make everything durable. Raises OSError."""
        self._adopt_all()
        # Other files that are not open were written back when they were closed.
        for ino in {*self._opens, *self._fs.never_closed}:
            await self._write_back(ino)
        await self._engine.make_durable()

    def _file(self, number: int) -> _OpenFile:
        file = self._handles.get(number) or self._adopt(number)
        if file is None:
            raise system_error(errno.EBADF)
        return file

    def _adopt(self, number: int) -> _OpenFile | None:
        """What a worker has opened with a handle; from now on as if it had been opened here."""
        place = self._places.adopt(number, _FILE)
        if place is None:
            return None
        self._note(number, Caller(place.uid, place.gid, place.pid), place.inode, place.flags)
        return self._handles[number]

    def _adopt_all(self) -> None:
        for number in self._places.files_of_workers():
            self._adopt(number)

    async def change(self, caller: Caller, ino: int, change: Callable[[], Later[T]]) -> T:
        """Change a file's content in another way than by a write. Raises OSError.

        The flags of such a request do not say whether the caller may keep privileges.
        """
        told = self._take_privileges(ino, None if caller.may_set_ids() else caller)
        try:
            changing = change()
            changed = await changing if isinstance(changing, Coroutine) else changing
            self.note_change(ino)
        except Exception:
            self._note_failure(ino)
            raise
        finally:
            if told is not None:
                await told
        return changed

    def _take_privileges(self, ino: int, loser: Caller | None) -> Awaitable[None] | None:
        """As `privileges.take_privileges`; what to await then. Raises OSError."""
        # The kernel does not know, and would go on giving them to users who execute the file.
        return self.tell(ino) if take_privileges(self._fs, ino, loser) else None

    def tell(self, ino: int) -> Awaitable[None] | None:
        """As `Notifier.tell`."""
        return self._notifier.tell(ino)

    def _note_failure(self, ino: int) -> None:
        """A change of a file's content has failed, perhaps after a part of it was done."""
        if self._publisher:
            self._publisher.has_failed(ino)

    def note_change(self, ino: int) -> None:
        """Something has happened to an inode that may have changed extents, size or mode."""
        if self._publisher:
            self._publisher.was_changed(ino)
