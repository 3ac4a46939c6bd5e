"""What a dead daemon has left of requests that it has not answered; each of them comes again.

Invariants:
- a handle that was made for such a request is closed before the request is carried out, because
  nobody has been told of it;
- an operation that was carried out is answered with what it has led to as that is now. Others may
  have changed it since, as they might have between an operation and its answer;
- an inode that was made is held before anything else can happen to it. Otherwise it might be gone,
  and its number be another one's, before its maker is told of it;
- nothing stays published that a commit may have made untrue, since the dead daemon may not have
  come to withdrawing it;
- the kernel asks again for the attributes of each file that could be written to. The dead daemon
  may have taken privileges from it, and not have come to saying so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from pmemfs.dataplane.layouts import HandleKind, OpenPlace
from pmemfs.fuse import wire
from pmemfs.fuse.encode import attr_out, entry_out, open_out
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.handlers.notifications import after, later
from pmemfs.fuse.handlers.openfiles import Opened
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.once import Once
from pmemfs.fuse.published import PublishedTables
from pmemfs.fuse.sharednames import SharedNames
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Answer, Request, change_of
from pmemfs.media.inode import TAIL_WORD_AT
from pmemfs.volume.base import Later
from pmemfs.volume.fs.filesystem import FileSystem

log = logging.getLogger(__name__)

_MAKES = (
    Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.CREATE, Opcode.TMPFILE,
)  # fmt: skip
"""The word that decides these is the tail of the new inode."""


class Unanswered:
    """What was left. `opens` are all open files and directories, `fs` is given in mode `fs`."""

    def __init__(
        self, once: Once, handlers: Handlers, opens: Iterable[OpenPlace],
        fs: FileSystem | None = None, tables: PublishedTables | None = None,
        names: SharedNames | None = None,
    ) -> None:  # fmt: skip
        """Find it, before anything in the pool is changed. `names` knows what workers have left."""
        self._handlers = handlers
        self.listed: dict[int, list[int]] = names.listed if names else {}
        self._fs = fs
        self.handles: dict[int, tuple[int, int]] = {}
        """The handles of requests without an answer, by the numbers of these. Requests whose
        answers are no longer kept are among them; they don't come again."""
        self._answers: dict[int, Callable[[Request, int], Later[Answer]]] = {
            Opcode.MKNOD: self._made,
            Opcode.MKDIR: self._made,
            Opcode.SYMLINK: self._made,
            Opcode.LINK: self._linked,
            Opcode.CREATE: self._created,
            Opcode.TMPFILE: self._created,
            Opcode.OPEN: self._emptied,
            Opcode.SETATTR: self._attributes,
            Opcode.FALLOCATE: self._changed,
        }
        self._writable: set[int] = set()
        for place in opens:
            if place.number and place.number not in once.answered:
                self.handles[place.number] = place.handle, place.kind
            if place.kind == HandleKind.FILE and place.flags & os.O_ACCMODE:
                self._writable.add(place.inode)
        if fs is not None:
            self._settle(once, fs)
        if tables is not None:
            tables.withdraw_all()
            tables.attributes.withdraw_all()

    def tell_kernel(self) -> None:
        """Let the kernel ask for attributes that have changed without its knowing it."""
        for ino in self._writable:
            self._handlers.notifier.tell(ino)
        self._writable.clear()

    def answer(self, offset: int, opcode: int, request: Request) -> Later[Answer]:
        """Answer a request that was carried out by a word at this offset. Raises OSError."""
        handler = self._answers.get(opcode)
        if handler is None:
            return b""
        return self._handlers.patience.begin(handler, request, offset)

    def take_back(self, number: int) -> None:
        """A listing comes again, so the kernel was not told of what it had counted."""
        for inode in self.listed.pop(number):
            with suppress(OSError):
                self._handlers.volume.drop(inode, 1)

    def close_handle(self, number: int) -> None:
        """Close the handle that was made for a request which comes again."""
        handle, kind = self.handles.pop(number)
        with suppress(OSError):
            if kind == HandleKind.FILE:
                self._handlers.files.close(handle)
            else:
                self._handlers.directories.close(handle)

    def _settle(self, once: Once, fs: FileSystem) -> None:
        for record in once.settle(fs.medium):
            log.info("an operation (opcode %d) was carried out and not answered", record.opcode)
            if record.opcode in _MAKES:
                ino = self._inode_at(record.offset)
                if not fs.store.is_held(ino):
                    fs.hold(ino)

    def _inode_at(self, offset: int) -> int:
        assert self._fs is not None
        return self._fs.store.table.number_at(offset - TAIL_WORD_AT)

    def _made(self, request: Request, offset: int) -> Answer:
        return entry_out(self._handlers.volume.attributes(self._inode_at(offset)))

    def _linked(self, request: Request, offset: int) -> Answer:
        (ino,) = wire.LINK_IN.unpack_from(request.operation)
        return entry_out(self._handlers.names.entry(ino))

    def _created(self, request: Request, offset: int) -> Answer:
        flags, *_ = wire.CREATE_IN.unpack_from(request.operation)
        ino = self._inode_at(offset)
        attributes = self._handlers.volume.attributes(ino)
        return entry_out(attributes) + self._open(request.caller, ino, flags)

    def _emptied(self, request: Request, offset: int) -> Later[Answer]:
        flags, _ = wire.OPEN_IN.unpack_from(request.operation)
        opened = self._open(request.caller, request.inode, flags)
        return later(self._changed(request, offset), lambda _: opened)

    def _open(self, caller: Caller, ino: int, flags: int) -> bytes:
        """Open a file that is new, or has been emptied already."""
        opened = self._handlers.files.open(caller, ino, flags & ~os.O_TRUNC)
        assert isinstance(opened, Opened)
        return open_out(opened.handle, cached=opened.is_cached)

    def _attributes(self, request: Request, offset: int) -> Answer:
        assert self._fs is not None
        change = change_of(wire.SETATTR_IN.unpack_from(request.operation))
        self._fs.times_were_set(request.inode, atime_ns=change.atime_ns, mtime_ns=change.mtime_ns)
        self._handlers.files.note_change(request.inode)
        return attr_out(self._handlers.volume.attributes(request.inode))

    def _changed(self, request: Request, offset: int) -> Later[Answer]:
        files = self._handlers.files
        files.note_change(request.inode)
        # The kernel may not know yet what this has taken from the file's mode.
        return after(files.tell(request.inode), b"")
