"""Steps for `fs_oracle`, chosen at random: few names, so that they meet, and odd ones.

A `Chooser` looks at the reference to name what is there more often than what is not. So a sequence
is a list of steps by the time it has failed, and any part of it can be tried again: `smallest`.
"""

from __future__ import annotations

import fcntl
import os
import random
import stat
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kit.fs_oracle import (
    ACCESS_ACL,
    DEFAULT_ACL,
    EXCHANGE,
    KEEP_SIZE,
    NO_OVERWRITE,
    PUNCH,
    SLOT_COUNT,
    Side,
    Step,
)
from kit.users import NOBODY

T = TypeVar("T")

MIB = 1 << 20

# What a case may begin with, so that it needn't make all of it first.
PRELUDE = [
    Step("mkdir", ("a", 0o755)),
    Step("mkdir", ("a/b", 0o777)),
    Step("mkdir", ("b", 0o1777)),
    Step("open", (0, "a/f", os.O_RDWR | os.O_CREAT, 0o644)),
    Step("pwrite", (0, 1, 10_000, 0)),
    Step("open", (1, "f", os.O_RDWR | os.O_CREAT, 0o666)),
    Step("write", (1, 2, 100)),
    Step("symlink", ("a/f", "l")),
]

PLAIN = ["a", "b", "c", "d", "f", "l"]
ODD = ["x" * 255, "y" * 256, "é" * 127, "\udcff\udcfe", ".", "..", "a b\n", "f/", "f/g", ""]

MODES = [0o644, 0o755, 0o600, 0o777, 0o000, 0o4755, 0o2755, 0o6777, 0o1777, 0o2644, 0o666, 0o777]
EXTRA_FLAGS = [
    *[os.O_CREAT] * 4, 0, 0, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_CREAT | os.O_TRUNC,
    os.O_APPEND, os.O_CREAT | os.O_APPEND, os.O_DIRECTORY, os.O_NOFOLLOW, os.O_DSYNC,
    os.O_CREAT | os.O_NOFOLLOW, os.O_CREAT | os.O_EXCL | os.O_TRUNC,
]  # fmt: skip
KINDS = [
    (stat.S_IFIFO, 0), (stat.S_IFSOCK, 0), (stat.S_IFREG, 0), (stat.S_IFDIR, 0),
    (stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(259, 70_000)),
]  # fmt: skip
OWNERS = [(uid, gid) for uid in (-1, 0, NOBODY, 1000) for gid in (-1, 0, NOBODY, 1000)][1:]
"""Not (-1, -1): the kernel's FUSE asks for nothing then, whoever asks, where others say EPERM."""
TIMES_NS = [0, 1, 999_999_999, 10**18 + 123_456_789, -1, -1_500_000_000, 4 * 10**18]
XATTRS = ["user.a", "user.a", "user.b", "user." + "n" * 250, "trusted.a", "security.a", "user.",
          "bad.a", "user." + "n" * 251]  # fmt: skip
VALUES = [b"", b"v", b"w" * 100, b"x" * 3000, b"0123456789"]


def acl(*entries: tuple[int, int, int]) -> bytes:
    """An access-control list as the kernel stores it: (tag, permissions, id) each."""
    nobody_in_particular = 0xFFFFFFFF
    packed = [
        struct.pack("<HHI", tag, bits, nobody_in_particular if owner < 0 else owner)
        for tag, bits, owner in entries
    ]
    return struct.pack("<I", 2) + b"".join(packed)


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
ACLS = [
    acl((USER_OBJ, 6, -1), (GROUP_OBJ, 4, -1), (OTHER, 0, -1)),
    acl((USER_OBJ, 7, -1), (USER, 7, NOBODY), (GROUP_OBJ, 0, -1), (MASK, 7, -1), (OTHER, 0, -1)),
    acl((USER_OBJ, 7, -1), (USER, 6, NOBODY), (GROUP_OBJ, 7, -1), (GROUP, 4, 1000), (MASK, 4, -1),
        (OTHER, 5, -1)),
    acl((USER_OBJ, 7, -1), (GROUP_OBJ, 7, -1)),
    b"not a list",
]  # fmt: skip


REMOUNT, KILL_DAEMON, KILL_DATA_PLANE = (
    Step("remount"),
    Step("kill daemon"),
    Step("kill data plane"),
)
RESTARTS = [REMOUNT, KILL_DAEMON, KILL_DATA_PLANE]


class Chooser:
    """Random steps for what is in a directory now."""

    def __init__(self, chance: random.Random, side: Side) -> None:
        self.chance = chance
        self.side = side

    def step(self) -> Step:
        """The next step."""
        kinds: list[Callable[[], Step]] = self.chance.choices(
            [self.of_names, self.of_attributes, self.of_data], [4, 3, 4]
        )
        return kinds[0]()

    def of_names(self) -> Step:
        """Directories and what is in them."""
        flags = [0, 0, 0, 0, NO_OVERWRITE, EXCHANGE, EXCHANGE, NO_OVERWRITE | EXCHANGE, 64]
        kind, device = self.one(KINDS)
        return self.choose({
            "mkdir": (2, lambda: (self.new(), self.mode())),
            "rmdir": (2, lambda: (self.old(),)),
            "unlink": (3, lambda: (self.old(),)),
            "rename": (5, lambda: (self.old(), self.any_path(), self.one(flags))),
            "link": (2, lambda: (self.old(), self.any_path())),
            "symlink": (2, lambda: (self.target(), self.new())),
            "readlink": (1, lambda: (self.old(),)),
            "mknod": (2, lambda: (self.new(), kind | self.mode(), device)),
            "listdir": (1, lambda: (self.old(),)),
            "mkdir_in": (1, lambda: (self.place(), self.name(), self.mode())),
            "unlink_in": (1, lambda: (self.place(), self.name())),
            "list_open": (1, lambda: (self.place(),)),
            "link_open": (1, lambda: (self.slot(), self.any_path())),
        })  # fmt: skip

    def of_attributes(self) -> Step:
        """Modes, owners, times, extended attributes, access-control lists."""
        flags = [0, 0, os.XATTR_CREATE, os.XATTR_REPLACE]
        return self.choose({
            "truncate": (2, lambda: (self.old(), self.size())),
            "chmod": (2, lambda: (self.old(), self.mode())),
            "fchmod": (1, lambda: (self.slot(), self.mode())),
            "chown": (2, lambda: (self.old(), *self.one(OWNERS), self.flag())),
            "fchown": (1, lambda: (self.slot(), *self.one(OWNERS))),
            "utimens": (2, lambda: (self.old(), self.time(), self.time(), self.flag())),
            "touch": (1, lambda: (self.old(),)),
            "stat": (1, lambda: (self.old(),)),
            "access": (1, lambda: (self.old(), self.chance.randint(0, 7))),
            "setxattr": (3, lambda: (self.old(), *self.extra(), self.one(flags), self.flag())),
            "getxattr": (1, lambda: (self.old(), self.extra()[0], self.flag())),
            "removexattr": (1, lambda: (self.old(), self.extra()[0], self.flag())),
            "listxattr": (1, lambda: (self.old(), self.flag())),
        })  # fmt: skip

    def of_data(self) -> Step:
        """Open files."""
        modes = [0, 0, KEEP_SIZE, PUNCH | KEEP_SIZE, PUNCH | KEEP_SIZE, PUNCH]
        whence = [os.SEEK_SET, os.SEEK_CUR, os.SEEK_END]
        locks = [fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN]
        return self.choose({
            "open": (5, lambda: (self.any_slot(), *self.opened(), self.mode())),
            "open_in": (1, lambda: (self.any_slot(), self.place(), self.name(), self.flags(),
                                    self.mode())),
            "make_unnamed": (1, lambda: (self.any_slot(), self.old(), self.mode(),
                                         self.one([0, 0, os.O_EXCL]))),
            "close": (1, lambda: (self.slot(),)),
            "read": (1, lambda: (self.slot(), self.length())),
            "pread": (2, lambda: (self.slot(), self.length(), self.offset())),
            "write": (3, lambda: (self.slot(), self.seed(), self.length())),
            "pwrite": (4, lambda: (self.slot(), self.seed(), self.length(), self.offset())),
            "ftruncate": (2, lambda: (self.slot(), self.size())),
            "fsync": (1, lambda: (self.slot(), self.flag())),
            "lseek": (1, lambda: (self.slot(), self.offset(), self.one(whence))),
            "seek_data": (1, lambda: (self.slot(), self.offset(), self.flag())),
            "fallocate": (2, lambda: (self.slot(), self.one(modes), self.offset(), self.length())),
            "copy_range": (1, lambda: (self.slot(), self.offset(), self.slot(), self.offset(),
                                       self.length())),
            "flock": (1, lambda: (self.slot(), self.one(locks))),
        })  # fmt: skip

    def choose(self, kinds: dict[str, tuple[int, Callable[[], tuple[Any, ...]]]]) -> Step:
        """One of them, by weight; now and then by a user who may do little."""
        weights = [weight for weight, _ in kinds.values()]
        name = self.chance.choices(list(kinds), weights)[0]
        # Whether others see the names of trusted.* is each file system's own matter; linkat of
        # what is in /proc is root's.
        is_for_root = name in ("listxattr", "link_open", "make_unnamed")
        uid = NOBODY if not is_for_root and self.chance.random() < 0.2 else 0
        arguments = kinds[name][1]()
        if name in ("write", "pwrite", "ftruncate", "fallocate", "copy_range"):
            # What a write takes away from a set-user-ID file goes by who has opened it: docs.
            uid = self.side.openers.get(arguments[2 if name == "copy_range" else 0], 0)
        if name == "removexattr" and arguments[1] in (ACCESS_ACL, DEFAULT_ACL):
            # Taking a list away clears set-group-ID on some file systems; the kernel's FUSE doesn't
            # ask for it. Root keeps it everywhere.
            uid = 0
        return Step(name, arguments, uid)

    def one(self, values: Sequence[T]) -> T:
        return self.chance.choice(values)

    def flag(self) -> bool:
        return self.chance.random() < 0.5

    def name(self) -> str:
        return self.one(ODD) if self.chance.random() < 0.06 else self.one(PLAIN)

    def directory(self) -> str:
        """A directory that is there, mostly, with its slash; the top is ``""``."""
        if self.chance.random() < 0.1:
            return self.one(["a/", "l/", "f/", "a/../", "b/c/", "./"])
        found = [f"{path}/" for path in self.paths() if os.path.isdir(self.side.path(path))]
        return self.one(["", "", *found])

    def any_path(self) -> str:
        return self.new() if self.flag() else self.old()

    def new(self) -> str:
        """A path that may be there or not, in a directory that mostly is."""
        return self.directory() + self.name()

    def old(self) -> str:
        """A path that is there, mostly."""
        found = self.paths()
        return self.one(found) if found and self.chance.random() < 0.85 else self.new()

    def paths(self) -> list[str]:
        """What is there, as deep as names stay short."""
        found: list[str] = []
        for path, directories, files in os.walk(self.side.root):
            inner = os.path.relpath(path, self.side.root)
            found += [os.path.normpath(f"{inner}/{name}") for name in (*directories, *files)]
        return sorted(path for path in found if len(os.fsencode(path)) < 1000)

    def target(self) -> str:
        """What a symbolic link says. A target that is empty is refused."""
        odd = [".", "..", "nowhere", "t" * 4095, "t" * 4096, "t" * 255, ""]
        return self.one(odd) if self.chance.random() < 0.2 else self.any_path()

    def any_slot(self) -> int:
        return self.chance.randrange(SLOT_COUNT)

    def slot(self) -> int:
        """A slot where something is open, mostly."""
        used = sorted(self.side.slots)
        return self.one(used) if used and self.chance.random() < 0.95 else self.any_slot()

    def place(self) -> int:
        """A slot with a directory, if there is one."""
        slots = [slot for slot, fd in self.side.slots.items() if stat.S_ISDIR(os.fstat(fd).st_mode)]
        return self.one(sorted(slots)) if slots else self.slot()

    def opened(self) -> tuple[str, int]:
        """What to open, and how."""
        if self.chance.random() < 0.25:
            return self.directory().rstrip("/") or ".", os.O_RDONLY | os.O_DIRECTORY
        return self.any_path(), self.flags()

    def mode(self) -> int:
        return self.one(MODES)

    def flags(self) -> int:
        return self.one([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR]) | self.one(EXTRA_FLAGS)

    def offset(self) -> int:
        near = self.one([0, 4096, 8192, 65536, 2 * MIB]) + self.chance.randint(-5, 5)
        return self.one([max(0, near), self.chance.randrange(20_000), 4096, 0])

    def length(self) -> int:
        odd = [0, 1, 4096, 8192, 12_288, 70_000, 300_000]
        return self.one(odd) if self.flag() else self.chance.randrange(9000)

    def size(self) -> int:
        return -1 if self.chance.random() < 0.05 else self.offset()

    def seed(self) -> int:
        return self.chance.randrange(200)

    def time(self) -> int:
        return self.one(TIMES_NS) if self.flag() else self.chance.randint(-(10**18), 10**18)

    def extra(self) -> tuple[str, bytes]:
        """An extended attribute, which may be an access-control list."""
        if self.chance.random() < 0.3:
            return self.one([ACCESS_ACL, DEFAULT_ACL]), self.one(ACLS)
        return self.one(XATTRS), self.one(VALUES)


def smallest(
    steps: list[Step], fails: Callable[[list[Step]], bool], seconds: float = 90
) -> list[Step]:
    """The steps of a failed case without which it does not fail, by leaving out ever smaller
    parts, for a while."""
    part = max(1, len(steps) // 2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        is_smaller = False
        start = 0
        while start < len(steps) and time.monotonic() < end:
            fewer = steps[:start] + steps[start + part :]
            if fails(fewer):
                steps, is_smaller = fewer, True
            else:
                start += part
        if part == 1 and not is_smaller:
            break
        part = max(1, part // 2)
    return steps
