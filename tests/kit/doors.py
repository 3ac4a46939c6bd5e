"""Both ways into the handlers, given the same by name: what comes back can be compared."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Coroutine
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from pmemfs.fuse import pyfuse3door, wire
from pmemfs.fuse.failures import errno_of
from pmemfs.fuse.forwarded import ForwardedRequests
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.pyfuse3door import Pyfuse3Door
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Request, WireDoor

ROOT_CALLER = Caller(0, 0, 0)
NS = 10**9
CHANGES = {
    "mode": wire.SETS_MODE, "uid": wire.SETS_UID, "gid": wire.SETS_GID,
    "size": wire.SETS_SIZE, "atime": wire.SETS_ATIME, "mtime": wire.SETS_MTIME,
}  # fmt: skip


@dataclass(frozen=True)
class Failed:
    """An errno."""

    number: int


class WireWay:
    """Asks as the kernel asks a native mount."""

    def __init__(self, door: WireDoor) -> None:
        self.door = door

    def ask(self, opcode: int, ino: int, operation: bytes) -> bytes:
        """What follows the header. Raises as the door."""
        answer = self.door.answer(opcode, Request(ino, ROOT_CALLER, operation))
        if isinstance(answer, Coroutine):
            waited = answer

            async def wait() -> Any:
                return await waited

            answer = trio.run(wait)
        return b"" if answer is None else bytes(answer)

    def lookup(self, ino: int, name: bytes) -> object:
        return _entry(self.ask(Opcode.LOOKUP, ino, name + b"\0"))

    def getattr(self, ino: int) -> object:
        return _attr(self.ask(Opcode.GETATTR, ino, bytes(16))[16:])

    def setattr(self, ino: int, **changes: int) -> object:
        valid = sum(CHANGES[name] for name in changes)
        times = [divmod(changes.get(name, 0), NS) for name in ("atime", "mtime")]
        operation = wire.SETATTR_IN.pack(
            valid, 0, changes.get("size", 0), 0, times[0][0], times[1][0], 0,
            times[0][1], times[1][1], 0, changes.get("mode", 0), changes.get("uid", 0),
            changes.get("gid", 0),
        )  # fmt: skip
        return _attr(self.ask(Opcode.SETATTR, ino, operation)[16:])

    def mknod(self, ino: int, name: bytes, mode: int, rdev: int) -> object:
        head = wire.MKNOD_IN.pack(mode, rdev, 0o022)
        return _entry(self.ask(Opcode.MKNOD, ino, head + name + b"\0"))

    def mkdir(self, ino: int, name: bytes, mode: int) -> object:
        head = wire.MKDIR_IN.pack(mode, 0o022)
        return _entry(self.ask(Opcode.MKDIR, ino, head + name + b"\0"))

    def symlink(self, ino: int, name: bytes, target: bytes) -> object:
        return _entry(self.ask(Opcode.SYMLINK, ino, name + b"\0" + target + b"\0"))

    def link(self, ino: int, name: bytes, of: int) -> object:
        return _entry(self.ask(Opcode.LINK, ino, wire.LINK_IN.pack(of) + name + b"\0"))

    def unlink(self, ino: int, name: bytes) -> object:
        return self.ask(Opcode.UNLINK, ino, name + b"\0")

    def rmdir(self, ino: int, name: bytes) -> object:
        return self.ask(Opcode.RMDIR, ino, name + b"\0")

    def rename(self, ino: int, name: bytes, target: int, new: bytes, flags: int) -> object:
        head = wire.RENAME2_IN.pack(target, flags)
        return self.ask(Opcode.RENAME2, ino, head + name + b"\0" + new + b"\0")

    def readlink(self, ino: int) -> object:
        return self.ask(Opcode.READLINK, ino, b"")

    def statfs(self) -> object:
        return wire.STATFS_OUT.unpack(self.ask(Opcode.STATFS, 1, b""))

    def setxattr(self, ino: int, name: bytes, value: bytes) -> object:
        head = struct.pack("<II", len(value), 0)
        return self.ask(Opcode.SETXATTR, ino, head + name + b"\0" + value)

    def getxattr(self, ino: int, name: bytes) -> object:
        return self.ask(Opcode.GETXATTR, ino, wire.GETXATTR_IN.pack(65536) + name + b"\0")

    def listxattr(self, ino: int) -> object:
        return sorted(self.ask(Opcode.LISTXATTR, ino, wire.GETXATTR_IN.pack(65536)).split(b"\0"))

    def removexattr(self, ino: int, name: bytes) -> object:
        return self.ask(Opcode.REMOVEXATTR, ino, name + b"\0")

    def open(self, ino: int, flags: int) -> int:
        return int(wire.OPEN_OUT.unpack(self.ask(Opcode.OPEN, ino, wire.OPEN_IN.pack(flags, 0)))[0])

    def create(self, ino: int, name: bytes, mode: int, flags: int) -> object:
        head = wire.CREATE_IN.pack(flags, mode, 0o022, 0)
        made = self.ask(Opcode.CREATE, ino, head + name + b"\0")
        return _entry(made[:128]), int(wire.OPEN_OUT.unpack(made[128:])[0])

    def read(self, handle: int, offset: int, size: int) -> object:
        return self.ask(Opcode.READ, 0, wire.READ_IN.pack(handle, offset, size, 0, 0, 0))

    def write(self, handle: int, offset: int, data: bytes) -> object:
        head = wire.WRITE_IN.pack(handle, offset, len(data), 0, 0, 0)
        return wire.WRITE_OUT.unpack(self.ask(Opcode.WRITE, 0, head + data))[0]

    def fsync(self, handle: int) -> object:
        return self.ask(Opcode.FSYNC, 0, wire.FSYNC_IN.pack(handle, 0))

    def release(self, handle: int) -> object:
        return self.ask(Opcode.RELEASE, 0, wire.RELEASE_IN.pack(handle, 0, 0, 0))

    def forget(self, ino: int, count: int) -> object:
        return self.ask(Opcode.FORGET, ino, wire.FORGET_IN.pack(count))

    def listing(self, ino: int, room: int) -> object:
        """All names, in answers of so many entries at most."""
        opened = self.ask(Opcode.OPENDIR, ino, wire.OPEN_IN.pack(0, 0))
        (handle, _) = wire.OPEN_OUT.unpack(opened)
        found: list[object] = []
        position = 0
        try:
            while True:
                operation = wire.READ_IN.pack(handle, position, room * 200, 0, 0, 0)
                raw = self.ask(Opcode.READDIRPLUS, ino, operation)
                if not raw:
                    return found
                while raw:
                    number, position, length, kind = wire.DIRENT.unpack_from(raw, 128)
                    name = raw[152 : 152 + length]
                    is_dot = name in (b".", b"..")
                    found.append((name, number, kind, None if is_dot else _entry(raw[:128])))
                    raw = raw[152 + (length + 7) // 8 * 8 :]
        finally:
            self.ask(Opcode.RELEASEDIR, ino, wire.RELEASE_IN.pack(handle, 0, 0, 0))


class Pyfuse3Way:
    """Asks as pyfuse3 asks the python engine."""

    def __init__(self, handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
        self.door: Any = Pyfuse3Door(handlers)
        self.listed: list[tuple[Any, ...]] = []
        self.room = 0
        monkeypatch.setattr(pyfuse3door.pyfuse3, "readdir_reply", self._reply)
        self.context = SimpleNamespace(uid=0, gid=0, pid=0, umask=0o022)

    def ask(self, name: str, *request: Any) -> Any:
        """What pyfuse3 would be given. Raises OSError."""
        try:
            return trio.run(getattr(self.door, name), *request)
        except pyfuse3.FUSEError as error:
            raise OSError(error.errno, "refused") from error

    def _reply(self, token: object, name: bytes, attributes: Any, position: int) -> bool:
        if len(self.listed) == self.room:
            return False
        self.listed.append((name, attributes, position))
        return True

    def lookup(self, ino: int, name: bytes) -> object:
        return _known(self.ask("lookup", ino, name, self.context))

    def getattr(self, ino: int) -> object:
        return _known(self.ask("getattr", ino, self.context))

    def setattr(self, ino: int, **changes: int) -> object:
        fields = SimpleNamespace(
            **{f"update_{name}": name in changes for name in (*CHANGES, "ctime")}
        )
        attributes = SimpleNamespace(
            st_mode=changes.get("mode"), st_uid=changes.get("uid"), st_gid=changes.get("gid"),
            st_size=changes.get("size"), st_atime_ns=changes.get("atime"),
            st_mtime_ns=changes.get("mtime"), st_ctime_ns=None,
        )  # fmt: skip
        return _known(self.ask("setattr", ino, attributes, fields, None, self.context))

    def mknod(self, ino: int, name: bytes, mode: int, rdev: int) -> object:
        return _known(self.ask("mknod", ino, name, mode, rdev, self.context))

    def mkdir(self, ino: int, name: bytes, mode: int) -> object:
        return _known(self.ask("mkdir", ino, name, mode, self.context))

    def symlink(self, ino: int, name: bytes, target: bytes) -> object:
        return _known(self.ask("symlink", ino, name, target, self.context))

    def link(self, ino: int, name: bytes, of: int) -> object:
        return _known(self.ask("link", of, ino, name, self.context))

    def unlink(self, ino: int, name: bytes) -> object:
        return self.ask("unlink", ino, name, self.context) or b""

    def rmdir(self, ino: int, name: bytes) -> object:
        return self.ask("rmdir", ino, name, self.context) or b""

    def rename(self, ino: int, name: bytes, target: int, new: bytes, flags: int) -> object:
        return self.ask("rename", ino, name, target, new, flags, self.context) or b""

    def readlink(self, ino: int) -> object:
        return self.ask("readlink", ino, self.context)

    def statfs(self) -> object:
        room = self.ask("statfs", self.context)
        return (room.f_blocks, room.f_bfree, room.f_bavail, room.f_files, room.f_ffree,
                room.f_bsize, room.f_namemax, room.f_frsize)  # fmt: skip

    def setxattr(self, ino: int, name: bytes, value: bytes) -> object:
        return self.ask("setxattr", ino, name, value, self.context) or b""

    def getxattr(self, ino: int, name: bytes) -> object:
        return self.ask("getxattr", ino, name, self.context)

    def listxattr(self, ino: int) -> object:
        return sorted([*self.ask("listxattr", ino, self.context), b""])

    def removexattr(self, ino: int, name: bytes) -> object:
        return self.ask("removexattr", ino, name, self.context) or b""

    def open(self, ino: int, flags: int) -> int:
        return int(self.ask("open", ino, flags, self.context).fh)

    def create(self, ino: int, name: bytes, mode: int, flags: int) -> object:
        info, entry = self.ask("create", ino, name, mode, flags, self.context)
        return _known(entry), int(info.fh)

    def read(self, handle: int, offset: int, size: int) -> object:
        return bytes(self.ask("read", handle, offset, size))

    def write(self, handle: int, offset: int, data: bytes) -> object:
        return self.ask("write", handle, offset, data)

    def fsync(self, handle: int) -> object:
        return self.ask("fsync", handle, False) or b""

    def release(self, handle: int) -> object:
        return self.ask("release", handle) or b""

    def forget(self, ino: int, count: int) -> object:
        return self.ask("forget", [(ino, count)]) or b""

    def listing(self, ino: int, room: int) -> object:
        """As of `WireWay`."""
        handle = self.ask("opendir", ino, self.context)
        found: list[object] = []
        position = 0
        try:
            while True:
                self.listed, self.room = [], room
                self.ask("readdir", handle, position, pyfuse3.ReaddirToken())
                if not self.listed:
                    return found
                for name, attributes, position in self.listed:  # noqa: B007
                    is_dot = name in (b".", b"..")
                    kind = attributes.st_mode >> 12
                    entry = None if is_dot else _known(attributes)
                    found.append((name, attributes.st_ino, kind, entry))
        finally:
            self.ask("releasedir", handle)


def outcome(way: WireWay | Pyfuse3Way, call: str, arguments: tuple[Any, ...]) -> object:
    """What a call answers, or the errno."""
    try:
        *plain, last = arguments or (None,)
        if isinstance(last, dict):
            return getattr(way, call)(*plain, **last)
        return getattr(way, call)(*arguments)
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        return Failed(errno_of(error, call))


def _entry(raw: bytes) -> object:
    """Number, generation and attributes; without times, which two mounts never share."""
    ino, _, entry_valid, attr_valid, *_ = wire.ENTRY_OUT.unpack_from(raw)
    assert entry_valid == 3600
    assert attr_valid == (3600 if ino else 0)
    return _attr(raw[40:]) if ino else None


def _attr(raw: bytes) -> object:
    (ino, size, blocks, _, _, _, _, _, _, mode, nlink, uid, gid, rdev, blksize, flags) = (
        wire.ATTR.unpack(raw)
    )
    assert flags == 0
    return ino, size, blocks, mode, nlink, uid, gid, rdev, blksize


def _known(entry: Any) -> object:
    if not entry.st_ino:
        return None
    return (entry.st_ino, entry.st_size, entry.st_blocks, entry.st_mode, entry.st_nlink,
            entry.st_uid, entry.st_gid, entry.st_rdev, entry.st_blksize)  # fmt: skip


O_FLAGS = (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND)


def replies(requests: ForwardedRequests, *messages: bytes, longest_bytes: int) -> list[bytes]:
    """What comes back for the messages of a data plane, until all is answered."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, ours:
        for message in messages:
            theirs.send(message)
        theirs.shutdown(socket.SHUT_WR)
        trio.run(requests.serve, [ours])
        ours.shutdown(socket.SHUT_WR)
        return list(iter(lambda: theirs.recv(longest_bytes), b""))
