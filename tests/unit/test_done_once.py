"""A daemon dies at any line of what it does for a request; the next one is asked the same again.

The caller gets the answer that it would have got without the death, and the mount becomes what it
would have become: the request was carried out once. PMEMFS_DEATHS in the environment says how many
lines of each request are tried.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from kit.data_plane import SharedDevice, SharedFiles, door_to
from kit.doors import WireWay
from kit.dying import NEVER, Message, Reply, State, Template, die_at
from pmemfs.fuse import wire
from pmemfs.fuse.handlers.ioctls import GET_FLAGS, SET_FLAGS
from pmemfs.fuse.handlers.ranges import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
)
from pmemfs.fuse.once import RECORDED, RESENT
from pmemfs.fuse.wire import Opcode
from pmemfs.media.inode import ROOT
from pmemfs.units import MIB
from pmemfs.volume.onefile import INODE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FRAME = 4096
NUMBER = 1000
POINTS = int(os.environ.get("PMEMFS_DEATHS", "10"))
"""So many lines are tried in the second half of each request."""
O_RDWR, O_TRUNC, O_DSYNC = os.O_RDWR, os.O_TRUNC, os.O_DSYNC


class Case(NamedTuple):
    """A request. Inodes and handles are given by name, and so is the errno that is due."""

    opcode: Opcode
    ino: str
    operation: object
    error: int = 0
    uid: int = 0


def prepare(files: SharedFiles) -> SimpleNamespace:
    """What there is before the request: names, open files, what the kernel has looked up."""
    way = WireWay(files.door()[1])
    known = {"root": ROOT}
    for name, mode in (("d", 0o755), ("e", 0o755), ("full", 0o755)):
        way.mkdir(ROOT, name.encode(), mode)
    for name in ("f", "g", "s", "hidden", "acl"):
        _, handle = way.create(ROOT, name.encode(), 0o644, O_RDWR)
        known[f"h{name}"] = handle
        way.write(handle, 0, b"".join(bytes([65 + n]) * FRAME for n in range(6)))
    for name in ("d", "e", "full", "f", "g", "s", "hidden", "acl"):
        ino = known[name] = files.fs.lookup(ROOT, name.encode())
        way.lookup(ROOT, name.encode())
    for name in (b"x", b"y"):
        way.mknod(known["full"], name, stat.S_IFREG | 0o600, 0)
    way.symlink(ROOT, b"link", b"target")
    known["link"] = files.fs.lookup(ROOT, b"link")
    way.link(known["d"], b"second", known["g"])
    way.unlink(ROOT, b"hidden")
    way.setxattr(known["f"], b"user.a", b"1")
    way.setattr(known["s"], mode=0o4777)
    way.setxattr(known["s"], b"security.capability", b"c")
    way.release(known.pop("hacl"))
    users = struct.pack("<I" + "HHI" * 5, 2, 1, 6, 0xFFFFFFFF, 2, 7, 1, 4, 4, 0xFFFFFFFF,
                        16, 7, 0xFFFFFFFF, 32, 4, 0xFFFFFFFF)  # fmt: skip
    way.setxattr(known["acl"], b"system.posix_acl_access", users)
    opened = way.ask(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0))
    (known["hroot"], _) = wire.OPEN_OUT.unpack(opened)
    del ino
    return SimpleNamespace(**known)


def setattr_in(valid: int, **fields: int) -> bytes:
    names = ("valid", "fh", "size", "lock_owner", "atime", "mtime", "ctime", "atimensec",
             "mtimensec", "ctimensec", "mode", "uid", "gid")  # fmt: skip
    return wire.SETATTR_IN.pack(*({"valid": valid, **fields}.get(name, 0) for name in names))


def fallocate_in(mode: int, offset: int, length: int) -> bytes:
    return wire.FALLOCATE_IN.pack(0, offset, length, mode)


def copy_in(known: SimpleNamespace) -> bytes:
    return wire.COPY_IN.pack(known.hf, FRAME, known.g, known.hg, 3 * FRAME, 2 * FRAME, 0)


def write_in(known: SimpleNamespace, handle: str, offset: int, length: int, flags: int = 0,
             write_flags: int = 0) -> bytes:  # fmt: skip
    number = getattr(known, handle)
    return wire.WRITE_IN.pack(number, offset, length, write_flags, 0, flags) + b"w" * length


def create_in(name: bytes, flags: int) -> bytes:
    return wire.CREATE_IN.pack(flags, stat.S_IFREG | 0o640, 0o022, 0) + name + b"\0"


def rename_in(target: int, old: bytes, new: bytes, flags: int = 0) -> bytes:
    return wire.RENAME2_IN.pack(target, flags) + old + b"\0" + new + b"\0"


def xattr_in(name: bytes, value: bytes, flags: int) -> bytes:
    return struct.pack("<II", len(value), flags) + name + b"\0" + value


def ioctl_in(command: int, argument: bytes, out_bytes: int = 0) -> bytes:
    return wire.IOCTL_IN.pack(0, 0, command, 0, len(argument), out_bytes) + argument


CASES = {
    "lookup": Case(Opcode.LOOKUP, "root", b"f\0"),
    "lookup of nothing": Case(Opcode.LOOKUP, "root", b"none\0"),
    "mknod": Case(Opcode.MKNOD, "d", wire.MKNOD_IN.pack(stat.S_IFIFO | 0o600, 0, 0) + b"n\0"),
    "mkdir": Case(Opcode.MKDIR, "d", wire.MKDIR_IN.pack(0o750, 0o022) + b"n\0"),
    "mkdir of what is there": Case(
        Opcode.MKDIR, "root", wire.MKDIR_IN.pack(0o750, 0o022) + b"d\0", errno.EEXIST
    ),
    "symlink": Case(Opcode.SYMLINK, "d", b"n\0elsewhere\0"),
    "long symlink": Case(Opcode.SYMLINK, "d", b"n\0" + b"e" * 3000 + b"\0"),
    "link": Case(Opcode.LINK, "d", lambda k: wire.LINK_IN.pack(k.f) + b"n\0"),
    "unlink": Case(Opcode.UNLINK, "root", b"f\0"),
    "unlink of nothing": Case(Opcode.UNLINK, "root", b"none\0", errno.ENOENT),
    "unlink of what nobody holds": Case(Opcode.UNLINK, "full", b"x\0"),
    "unlink of one of two names": Case(Opcode.UNLINK, "d", b"second\0"),
    "rmdir": Case(Opcode.RMDIR, "root", b"e\0"),
    "rmdir of what is not empty": Case(Opcode.RMDIR, "root", b"full\0", errno.ENOTEMPTY),
    "rename": Case(Opcode.RENAME2, "root", lambda k: rename_in(k.d, b"f", b"moved")),
    "old rename": Case(Opcode.RENAME, "root", lambda k: wire.RENAME_IN.pack(k.d) + b"f\0moved\0"),
    "rename over another": Case(Opcode.RENAME2, "root", lambda k: rename_in(ROOT, b"f", b"g")),
    "rename of a directory": Case(Opcode.RENAME2, "root", lambda k: rename_in(k.d, b"e", b"e")),
    "exchange": Case(Opcode.RENAME2, "root", lambda k: rename_in(k.d, b"f", b"second", 2)),
    "rename, no replacing": Case(
        Opcode.RENAME2, "root", lambda k: rename_in(k.d, b"f", b"second", 1), errno.EEXIST
    ),
    "rename with whiteout": Case(Opcode.RENAME2, "root", lambda k: rename_in(k.d, b"f", b"n", 4)),
    "create": Case(Opcode.CREATE, "d", create_in(b"n", O_RDWR | O_TRUNC)),
    "exclusive create": Case(Opcode.CREATE, "d", create_in(b"n", O_RDWR | os.O_EXCL)),
    "create of what is there": Case(
        Opcode.CREATE, "root", create_in(b"f", O_RDWR | os.O_EXCL), errno.EEXIST
    ),
    "tmpfile": Case(Opcode.TMPFILE, "d", create_in(b"", O_RDWR)),
    "open": Case(Opcode.OPEN, "f", wire.OPEN_IN.pack(O_RDWR, 0)),
    "open, emptied": Case(Opcode.OPEN, "f", wire.OPEN_IN.pack(O_RDWR | O_TRUNC, 0)),
    "open, emptied, privileges": Case(
        Opcode.OPEN, "s", wire.OPEN_IN.pack(O_RDWR | O_TRUNC, wire.OPEN_KILL_SUIDGID), uid=5
    ),
    "opendir": Case(Opcode.OPENDIR, "d", wire.OPEN_IN.pack(0, 0)),
    "release": Case(Opcode.RELEASE, "f", lambda k: wire.RELEASE_IN.pack(k.hf, 0, 0, 0)),
    "last release": Case(
        Opcode.RELEASE, "hidden", lambda k: wire.RELEASE_IN.pack(k.hhidden, 0, 0, 0)
    ),
    "releasedir": Case(Opcode.RELEASEDIR, "root", lambda k: wire.RELEASE_IN.pack(k.hroot, 0, 0, 0)),
    "chmod": Case(Opcode.SETATTR, "f", setattr_in(wire.SETS_MODE, mode=0o600)),
    "chmod with a list": Case(Opcode.SETATTR, "acl", setattr_in(wire.SETS_MODE, mode=0o600)),
    "chown": Case(
        Opcode.SETATTR,
        "s",
        setattr_in(wire.SETS_UID | wire.SETS_GID | wire.SETATTR_KILL_SUIDGID, uid=3, gid=4),
    ),
    "truncate": Case(Opcode.SETATTR, "f", setattr_in(wire.SETS_SIZE, size=FRAME + 100)),
    "longer": Case(Opcode.SETATTR, "f", setattr_in(wire.SETS_SIZE, size=9 * FRAME + 1)),
    "truncate, privileges": Case(
        Opcode.SETATTR, "s", setattr_in(wire.SETS_SIZE | wire.SETATTR_KILL_SUIDGID, size=5), uid=5
    ),
    "utimes": Case(
        Opcode.SETATTR,
        "f",
        setattr_in(wire.SETS_ATIME | wire.SETS_MTIME, atime=7, mtime=8, mtimensec=9),
    ),
    "setxattr": Case(Opcode.SETXATTR, "f", xattr_in(b"user.b", b"2", 1)),
    "setxattr of what is there": Case(
        Opcode.SETXATTR, "f", xattr_in(b"user.a", b"2", 1), errno.EEXIST
    ),
    "long setxattr": Case(Opcode.SETXATTR, "f", xattr_in(b"user.b", b"2" * 9000, 0)),
    "removexattr": Case(Opcode.REMOVEXATTR, "f", b"user.a\0"),
    "removexattr of nothing": Case(Opcode.REMOVEXATTR, "f", b"user.none\0", errno.ENODATA),
    "write": Case(Opcode.WRITE, "f", lambda k: write_in(k, "hf", 100, 5000)),
    "append": Case(Opcode.WRITE, "f", lambda k: write_in(k, "hf", 6 * FRAME, 5000)),
    "write behind a gap": Case(Opcode.WRITE, "f", lambda k: write_in(k, "hf", 9 * FRAME, 50)),
    "synchronous write": Case(
        Opcode.WRITE, "f", lambda k: write_in(k, "hf", 6 * FRAME, 5000, O_DSYNC)
    ),
    "write, privileges": Case(
        Opcode.WRITE, "s", lambda k: write_in(k, "hs", 0, 9, 0, wire.WRITE_KILL_SUIDGID), uid=5
    ),
    "allocate": Case(Opcode.FALLOCATE, "f", fallocate_in(0, 7 * FRAME, 3 * FRAME)),
    "allocate ahead": Case(Opcode.FALLOCATE, "f", fallocate_in(KEEP_SIZE, 7 * FRAME, FRAME)),
    "punch": Case(Opcode.FALLOCATE, "f", fallocate_in(PUNCH_HOLE | KEEP_SIZE, 100, 3 * FRAME)),
    "zero": Case(Opcode.FALLOCATE, "f", fallocate_in(ZERO_RANGE, 100, 3 * FRAME)),
    "collapse": Case(Opcode.FALLOCATE, "f", fallocate_in(COLLAPSE_RANGE, FRAME, 2 * FRAME)),
    "insert": Case(Opcode.FALLOCATE, "f", fallocate_in(INSERT_RANGE, FRAME, 2 * FRAME)),
    "insert, privileges": Case(
        Opcode.FALLOCATE, "s", fallocate_in(INSERT_RANGE, FRAME, 2 * FRAME), uid=5
    ),
    "insert nowhere": Case(
        Opcode.FALLOCATE, "f", fallocate_in(INSERT_RANGE, 99, FRAME), errno.EINVAL
    ),
    "copy": Case(Opcode.COPY_FILE_RANGE, "f", copy_in),
    "long copy": Case(Opcode.COPY_FILE_RANGE_64, "f", copy_in),
    "set flags": Case(Opcode.IOCTL, "f", ioctl_in(SET_FLAGS, struct.pack("<I", 0x90))),
    "get flags": Case(Opcode.IOCTL, "f", ioctl_in(GET_FLAGS, b"", 4)),
    "getattr": Case(Opcode.GETATTR, "f", bytes(16)),
    "statx": Case(Opcode.STATX, "f", bytes(24)),
    "readlink": Case(Opcode.READLINK, "link", b""),
    "statfs": Case(Opcode.STATFS, "root", b""),
    "read": Case(Opcode.READ, "f", lambda k: wire.READ_IN.pack(k.hf, 5, 9000, 0, 0, 0)),
    "lseek": Case(Opcode.LSEEK, "f", wire.LSEEK_IN.pack(0, 0, os.SEEK_HOLE)),
    "access": Case(Opcode.ACCESS, "f", bytes(8)),
    "getxattr": Case(Opcode.GETXATTR, "f", wire.GETXATTR_IN.pack(99) + b"user.a\0"),
    "listxattr": Case(Opcode.LISTXATTR, "f", wire.GETXATTR_IN.pack(99)),
    "readdir": Case(Opcode.READDIR, "root", lambda k: wire.READ_IN.pack(k.hroot, 0, 4096, 0, 0, 0)),
    "readdirplus": Case(
        Opcode.READDIRPLUS, "root", lambda k: wire.READ_IN.pack(k.hroot, 0, 4096, 0, 0, 0)
    ),
    "flush": Case(Opcode.FLUSH, "f", bytes(24)),
    "fsync": Case(Opcode.FSYNC, "f", lambda k: wire.FSYNC_IN.pack(k.hf, 0)),
    "fsyncdir": Case(Opcode.FSYNCDIR, "root", bytes(16)),
    "syncfs": Case(Opcode.SYNCFS, "root", bytes(8)),
    "destroy": Case(Opcode.DESTROY, "root", b""),
    "init": Case(Opcode.INIT, "root", wire.INIT_IN.pack(7, 45, 65536, 0, 0)),
}
NO_REPLY = {Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}


@pytest.fixture(scope="module")
def mount() -> Iterator[tuple[Template, SimpleNamespace]]:
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm"))
    yield Template.made(directory, prepare)
    shutil.rmtree(directory)


def test_every_operation_is_tried(shm: Path) -> None:
    template, _ = Template.made(shm, lambda files: None)
    opcodes = template.copied().open().door()[1].answered.keys()
    assert {case.opcode for case in CASES.values()} | NO_REPLY == set(opcodes)
    assert {int(case.opcode) for case in CASES.values()} >= {
        opcode for opcode in range(64) if RECORDED >> opcode & 1
    }


def plain(case: Case, reply: Reply) -> tuple[int, bytes]:
    """An answer without what differs from one time to the next: times, and numbers of handles."""
    if case.opcode in (Opcode.RELEASE, Opcode.RELEASEDIR) and reply.error == errno.EBADF:
        # It is closed already, and the kernel does not look at this answer.
        return 0, b""
    data = bytearray(reply.data)
    if case.opcode in (Opcode.LOOKUP, Opcode.MKNOD, Opcode.MKDIR, Opcode.SYMLINK, Opcode.LINK,
                       Opcode.CREATE, Opcode.TMPFILE, Opcode.SETATTR, Opcode.GETATTR):  # fmt: skip
        start = 16 if case.opcode in (Opcode.SETATTR, Opcode.GETATTR) else 40
        if data:
            data[start + 24 : start + 60] = bytes(36)
        if start == 40:
            # A slot that was written and never counted goes to the next generation.
            data[8:16] = bytes(8)
    if case.opcode in (Opcode.CREATE, Opcode.TMPFILE):
        data[128:136] = bytes(8)
    elif case.opcode in (Opcode.OPEN, Opcode.OPENDIR):
        data[0:8] = bytes(8)
    elif case.opcode == Opcode.STATFS:
        data[:40] = bytes(40)
    elif case.opcode in (Opcode.STATX, Opcode.READDIRPLUS):
        data.clear()
    return reply.error, bytes(data)


def check_state(found: State, expected: State) -> None:
    assert found.tree == expected.tree
    assert found.opened == expected.opened
    assert found.holds == expected.holds


def points(lines: int, name: str) -> list[int]:
    """The lines to die at. The later ones change something: before, inodes are read."""
    rng = random.Random(name)
    half = lines // 2
    early = rng.sample(range(1, half), min(POINTS // 5, half - 1))
    return sorted(early + rng.sample(range(half, lines), min(POINTS, lines - half)))


@pytest.mark.parametrize("name", CASES)
def test_a_request_is_carried_out_once_wherever_the_daemon_dies(
    mount: tuple[Template, SimpleNamespace], name: str
) -> None:
    check(*mount, CASES[name], name)


def prepare_full(files: SharedFiles) -> SimpleNamespace:
    """As `prepare`, but only two frames are left."""
    known = prepare(files)
    way = WireWay(files.door()[1])
    _, handle = way.create(ROOT, b"large", 0o600, O_RDWR)
    ino, size = files.fs.lookup(ROOT, b"large"), 0
    with suppress(OSError):
        while True:
            size += way.write(handle, size, bytes(FRAME))
    way.setattr(ino, size=size - 2 * FRAME)
    way.release(handle)
    while files.fs.tidy() or files.fs.go_on():
        pass
    return known


FULL_CASES = {
    "last frames": Case(Opcode.WRITE, "f", lambda k: write_in(k, "hf", 6 * FRAME, 2 * FRAME)),
    "a frame too many": Case(
        Opcode.WRITE, "f", lambda k: write_in(k, "hf", 6 * FRAME, 3 * FRAME), errno.ENOSPC
    ),
    "allocate": Case(Opcode.FALLOCATE, "f", fallocate_in(0, 6 * FRAME, 2 * FRAME)),
    "allocate too much": Case(
        Opcode.FALLOCATE, "f", fallocate_in(0, 6 * FRAME, 3 * FRAME), errno.ENOSPC
    ),
    "symlink": Case(Opcode.SYMLINK, "d", b"n\0" + b"e" * 3000 + b"\0"),
    "long setxattr": Case(Opcode.SETXATTR, "f", xattr_in(b"user.b", b"2" * 6000, 0)),
    "setxattr, too long": Case(
        Opcode.SETXATTR, "f", xattr_in(b"user.b", b"2" * 30000, 0), errno.ENOSPC
    ),
    "unlink": Case(Opcode.UNLINK, "root", b"f\0"),
    "mkdir": Case(Opcode.MKDIR, "d", wire.MKDIR_IN.pack(0o750, 0o022) + b"n\0"),
}


@pytest.fixture(scope="module")
def full_mount() -> Iterator[tuple[Template, SimpleNamespace]]:
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm"))
    yield Template.made(directory, prepare_full, size_bytes=8 * MIB)
    shutil.rmtree(directory)


@pytest.mark.parametrize("name", FULL_CASES)
def test_a_request_to_a_full_pool_is_carried_out_once(
    full_mount: tuple[Template, SimpleNamespace], name: str
) -> None:
    check(*full_mount, FULL_CASES[name], name)


def prepare_device(device: SharedDevice) -> SimpleNamespace:
    handlers, door = door_to(device.volume, device.engine, shared=device.shared)
    del handlers
    way = WireWay(door)
    handle = way.open(INODE, O_RDWR)
    way.write(handle, 0, b"".join(bytes([65 + n]) * FRAME for n in range(6)))
    opened = way.ask(Opcode.OPENDIR, ROOT, wire.OPEN_IN.pack(0, 0))
    return SimpleNamespace(
        f=INODE,
        g=INODE,
        d=ROOT,
        root=ROOT,
        hf=handle,
        hg=handle,
        hroot=wire.OPEN_OUT.unpack(opened)[0],
    )


DEVICE_CASES = {
    name: CASES[name]
    for name in (
        "chmod", "write", "append", "synchronous write", "punch", "zero", "copy", "open",
        "release", "opendir", "releasedir", "fsync",
    )
} | {
    "chown": Case(Opcode.SETATTR, "f", setattr_in(wire.SETS_UID | wire.SETS_GID, uid=3, gid=4)),
    "utimes": Case(Opcode.SETATTR, "f", setattr_in(wire.SETS_MTIME, mtime=8)),
    "no mkdir": Case(
        Opcode.MKDIR, "root", wire.MKDIR_IN.pack(0o750, 0o022) + b"n\0", errno.EPERM
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def device_mount() -> Iterator[tuple[Template, SimpleNamespace]]:
    directory = Path(tempfile.mkdtemp(prefix="pmemfs-test-", dir="/dev/shm"))
    yield Template.made(directory, prepare_device, size_bytes=16 * MIB, has_files=False)
    shutil.rmtree(directory)


@pytest.mark.parametrize("name", DEVICE_CASES)
def test_a_request_to_a_device_is_carried_out_once(
    device_mount: tuple[Template, SimpleNamespace], name: str
) -> None:
    check(*device_mount, DEVICE_CASES[name], name)


def forget(known: SimpleNamespace) -> tuple[Opcode, int, bytes]:
    return Opcode.FORGET, known.hidden, wire.FORGET_IN.pack(2)


def forget_many(known: SimpleNamespace) -> tuple[Opcode, int, bytes]:
    pairs = [(known.f, 1), (known.g, 3), (known.hidden, 2), (known.d, 1), (known.f, 1)]
    packed = b"".join(wire.FORGET_ONE.pack(*pair) for pair in pairs)
    return Opcode.BATCH_FORGET, 0, wire.BATCH_FORGET_IN.pack(len(pairs)) + packed


@pytest.mark.parametrize("ask", [forget, forget_many])
def test_what_the_kernel_forgets_is_never_taken_twice_and_once_queued_never_lost(
    mount: tuple[Template, SimpleNamespace],
    ask: Callable[[SimpleNamespace], tuple[Opcode, int, bytes]],
) -> None:
    template, known = mount
    opcode, ino, operation = ask(known)
    message = Message(NUMBER, opcode, ino, operation)
    # The next one is in the socket while the daemon dies at the first one.
    queued = Message(NUMBER + 2, Opcode.FORGET, known.s, wire.FORGET_IN.pack(1))
    before = die_at(template, None, None, NEVER).state.holds
    whole = die_at(template, message, queued, NEVER)
    assert whole.state.holds[known.s] == before[known.s] - 1
    assert whole.state.holds[known.hidden] == before[known.hidden] - 2
    for line in points(whole.lines, opcode.name):
        found = die_at(template, message, queued, line)
        assert found.verdict == "", line
        assert found.state.holds[known.s] == before[known.s] - 1
        assert all(
            whole.state.holds.get(number, 0) <= count <= before[number]
            for number, count in found.state.holds.items()
        )


def check(template: Template, known: SimpleNamespace, case: Case, name: str) -> None:
    operation = case.operation(known) if callable(case.operation) else case.operation
    message = Message(NUMBER, case.opcode, getattr(known, case.ino), operation, case.uid)
    whole = die_at(template, message, None, NEVER)
    assert whole.first is not None
    assert whole.first.error == case.error
    assert whole.verdict == ""
    # Also, it is asked again after it was answered.
    for turn, line in enumerate([NEVER, *points(whole.lines, name)]):
        again = message._replace(unique=NUMBER | (RESENT if turn % 2 else 0))
        found = die_at(template, message, again, line)
        where = f"line {line} of {whole.lines}"
        assert found.reply is not None
        assert found.reply.unique == again.unique
        assert plain(case, found.reply) == plain(case, whole.first), where
        assert found.verdict == "", where
        check_state(found.state, whole.state)
