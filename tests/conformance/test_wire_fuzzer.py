"""The wire door under requests that nobody sane sends: mutated, cut off, of every opcode.

Each is answered with an errno that somebody foresaw, or with no more than the request has room for.
The suite's seeds are always the same. For a longer search: PMEMFS_FUZZ_REQUESTS=1000000, and
PMEMFS_FUZZ_SEED.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import stat
import struct
from collections.abc import Coroutine
from pathlib import Path

import pytest
import trio

from kit.volumes import MODES, Mode, mode
from pmemfs.fuse import wire
from pmemfs.fuse.failures import errno_of
from pmemfs.fuse.handlers.ioctls import FITRIM, GET_EXTENDED, GET_FLAGS, SET_FLAGS
from pmemfs.fuse.handlers.privileges import Caller
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import Request
from pmemfs.media.inode import ROOT

REQUESTS = int(os.environ.get("PMEMFS_FUZZ_REQUESTS", "0"))
FIRST_SEED = int(os.environ.get("PMEMFS_FUZZ_SEED", "1"))
A_ROUND = 2500
"""Requests to one volume; then there is a new one."""

WORDS = [0, 1, 2, 3, 7, 8, 255, 256, 4095, 4096, 65535, 1 << 20, (1 << 31) - 1, 1 << 31,
         (1 << 32) - 1, 1 << 32, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip
NAMES = [b"a", b"b", b"file", b".", b"..", b"", b"x" * 255, b"x" * 256, b"\xff\x01/"]
UNFORESEEN = {errno.EIO, errno.EROFS, errno.ENOSYS}
FIXED = {
    Opcode.INIT: 64, Opcode.STATFS: 80, Opcode.LOOKUP: 128, Opcode.MKNOD: 128, Opcode.MKDIR: 128,
    Opcode.SYMLINK: 128, Opcode.LINK: 128, Opcode.GETATTR: 104, Opcode.SETATTR: 104,
    Opcode.STATX: 288, Opcode.OPENDIR: 16, Opcode.OPEN: 16, Opcode.CREATE: 144,
    Opcode.TMPFILE: 144, Opcode.WRITE: 8, Opcode.LSEEK: 8, Opcode.COPY_FILE_RANGE: 8,
    Opcode.COPY_FILE_RANGE_64: 8, Opcode.READLINK: 4096,
}  # fmt: skip
"""The most that an answer may have behind its header; 0 where it isn't here, but for `room_of`."""


class Fuzzer:
    """Makes requests that are nearly right for one volume."""

    def __init__(self, served: Mode, chance: random.Random) -> None:
        self.chance = chance
        self.served = served
        self.inos = [ROOT, served.ino]
        self.handles = [1]

    def word(self) -> int:
        return self.chance.choice(WORDS)

    def sound(self, opcode: int) -> bytes:
        """A request as the kernel might send it."""
        chance = self.chance
        handle, size = chance.choice(self.handles), chance.choice([0, 1, 100, 4096, 65536])
        name = chance.choice([*NAMES[:3], self.served.name]) + b"\0"
        ino, offset = chance.choice(self.inos), chance.choice([0, 1, 4096, 1 << 20])
        data = bytes(chance.choice([0, 1, 100, 5000]))
        xattr = chance.choice([b"user.a", b"system.posix_acl_access", b"trusted.x"]) + b"\0"
        command = chance.choice([GET_FLAGS, SET_FLAGS, GET_EXTENDED, FITRIM, 0x5401])
        reading = wire.READ_IN.pack(handle, chance.choice([0, 1, 2, offset]), size, 0, 0, 0)
        creating = wire.CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o644, 0o022, 0) + name
        copying = wire.COPY_IN.pack(handle, offset, ino, handle, 3 * offset, size, 0)
        made = {
            Opcode.INIT: wire.INIT_IN.pack(7, 45, 65536, (1 << 32) - 1, (1 << 32) - 1),
            Opcode.FORGET: wire.FORGET_IN.pack(1),
            Opcode.BATCH_FORGET: wire.BATCH_FORGET_IN.pack(1) + wire.FORGET_ONE.pack(ino, 1),
            Opcode.SETATTR: wire.SETATTR_IN.pack(
                chance.getrandbits(12), handle, offset, 0, 5, 6, 7, 1, 2, 3,
                chance.getrandbits(12), chance.choice([0, 5]), 6,
            ),
            Opcode.SYMLINK: name + b"target\0",
            Opcode.MKNOD: wire.MKNOD_IN.pack(stat.S_IFIFO | 0o644, 0, 0) + name,
            Opcode.MKDIR: wire.MKDIR_IN.pack(0o755, 0) + name,
            Opcode.RENAME: wire.RENAME_IN.pack(ino) + name + b"b\0",
            Opcode.RENAME2: wire.RENAME2_IN.pack(ino, chance.choice([0, 1, 2, 4])) + name + b"a\0",
            Opcode.LINK: wire.LINK_IN.pack(ino) + name,
            Opcode.OPEN: wire.OPEN_IN.pack(chance.choice([0, 1, 2, os.O_TRUNC | 1]), 1),
            Opcode.OPENDIR: wire.OPEN_IN.pack(0, 0),
            Opcode.READ: reading,
            Opcode.READDIR: reading,
            Opcode.READDIRPLUS: reading,
            Opcode.WRITE: wire.WRITE_IN.pack(handle, offset, len(data), 4, 0, 0) + data,
            Opcode.RELEASE: wire.RELEASE_IN.pack(handle, 0, 0, 0),
            Opcode.RELEASEDIR: wire.RELEASE_IN.pack(handle, 0, 0, 0),
            Opcode.FSYNC: wire.FSYNC_IN.pack(handle, 0),
            Opcode.SETXATTR: struct.pack("<II", len(data), 0) + xattr + data,
            Opcode.GETXATTR: wire.GETXATTR_IN.pack(size) + xattr,
            Opcode.LISTXATTR: wire.GETXATTR_IN.pack(size),
            Opcode.REMOVEXATTR: xattr,
            Opcode.CREATE: creating,
            Opcode.TMPFILE: creating,
            Opcode.IOCTL: wire.IOCTL_IN.pack(handle, 0, command, 0, 24, 28) + bytes(24),
            Opcode.FALLOCATE: wire.FALLOCATE_IN.pack(
                handle, offset, size, chance.choice([0, 1, 3, 8, 16, 17, 32])
            ),
            Opcode.LSEEK: wire.LSEEK_IN.pack(handle, offset, chance.choice([3, 4])),
            Opcode.COPY_FILE_RANGE: copying,
            Opcode.COPY_FILE_RANGE_64: copying,
            Opcode.STATX: wire.STATX_IN.pack(0, 0, 0, 0xFFF),
        }  # fmt: skip
        if opcode in (Opcode.LOOKUP, Opcode.UNLINK, Opcode.RMDIR):
            return name
        return made.get(Opcode(opcode), bytes(16))

    def mutated(self, operation: bytes) -> bytes:
        """Something of a request is other than it was."""
        chance, changed = self.chance, bytearray(operation)
        for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
            kind = chance.randrange(6)
            at = chance.randrange(len(changed) + 1)
            if kind == 0 and changed:
                changed[at - 1] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del changed[at:]
            elif kind == 2:
                changed[at:at] = chance.randbytes(chance.choice([1, 8, 40]))
            elif kind == 3 and len(changed) >= 4:
                at = chance.randrange(len(changed) // 4) * 4
                changed[at : at + 4] = (self.word() & 0xFFFFFFFF).to_bytes(4, "little")
            elif kind == 4 and len(changed) >= 8:
                at = chance.randrange(len(changed) // 8) * 8
                changed[at : at + 8] = self.word().to_bytes(8, "little")
            else:
                changed += chance.choice(NAMES) + b"\0"
        return bytes(changed)

    def ino(self) -> int:
        return self.chance.choice([*self.inos, *self.inos, self.served.ino, self.word()])


def room_of(opcode: int, operation: bytes) -> int:
    """The most that may be answered to what was asked, behind the header."""
    head = operation.ljust(64, b"\0")
    if opcode in (Opcode.READ, Opcode.READDIR, Opcode.READDIRPLUS):
        return int(wire.READ_IN.unpack_from(head)[2])
    if opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
        (room,) = wire.GETXATTR_IN.unpack_from(head)
        return room or wire.GETXATTR_OUT.size
    if opcode == Opcode.IOCTL:
        return 16 + int(wire.IOCTL_IN.unpack_from(head)[5])
    return FIXED.get(Opcode(opcode), 0)


async def fuzz(served: Mode, chance: random.Random, count: int) -> None:
    fuzzer = Fuzzer(served, chance)
    for _ in range(count):
        opcode = chance.choice(list(served.door.answered))
        operation = fuzzer.mutated(fuzzer.sound(opcode))
        caller = Caller(chance.choice([0, 0, 1000]), 0, 0)
        request = Request(fuzzer.ino(), caller, operation)
        described = f"{Opcode(opcode).name} of {request.inode}: {operation[:300]!r}"
        try:
            answer = served.door.answer(opcode, request)
            if isinstance(answer, Coroutine):
                with trio.fail_after(60):
                    answer = await answer
        except Exception as error:
            number = errno_of(error, "request")
            allowed = number == errno.ENOSYS and not served.volume.has_files
            assert number not in UNFORESEEN or allowed, f"{described}: {number}"
            continue
        if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            assert answer is None
            continue
        assert answer is not None
        assert len(answer) <= room_of(opcode, operation), described
        note(fuzzer, opcode, bytes(answer[:144]))


def note(fuzzer: Fuzzer, opcode: int, answer: bytes) -> None:
    """What an answer lets one ask for next."""
    if opcode in (Opcode.LOOKUP, Opcode.MKDIR, Opcode.CREATE, Opcode.TMPFILE, Opcode.SYMLINK):
        ino = int.from_bytes(answer[:8], "little")
        fuzzer.inos = [*fuzzer.inos, ino][-12:] if ino else fuzzer.inos
    if opcode in (Opcode.OPEN, Opcode.OPENDIR):
        fuzzer.handles = [*fuzzer.handles, int.from_bytes(answer[:8], "little")][-12:]
    if opcode in (Opcode.CREATE, Opcode.TMPFILE):
        fuzzer.handles = [*fuzzer.handles, int.from_bytes(answer[128:136], "little")][-12:]


def rounds(kind: str) -> list[int]:
    """The seeds of a mode."""
    count = REQUESTS // (A_ROUND * len(MODES)) if REQUESTS else 3 if kind == "fs" else 2
    return list(range(FIRST_SEED, FIRST_SEED + count))


@pytest.mark.timeout(300 + REQUESTS // 50)
@pytest.mark.parametrize("kind", MODES)
def test_whatever_is_sent_is_answered_as_somebody_foresaw(
    shm: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in rounds(kind):
        with mode(kind, shm / str(seed)) as served, caplog.at_level(logging.ERROR):
            trio.run(fuzz, served, random.Random(seed), A_ROUND)
            said = [record for record in caplog.records if "let go" not in record.getMessage()]
            assert said == [], f"seed {seed}"
            assert not getattr(served.volume, "damage", "")
        for path in (shm / str(seed)).iterdir():
            path.unlink()
        caplog.clear()
