"""An oracle for file systems: the same steps on two directories must have the same results.

A `Step` is one call, as a user's program makes it, on a `Side`: a directory and the files that are
open in it. After each step three things are the same on both sides:

- what it answered: the value, the data, or the errno;
- the attributes of all that it named, before and after, and of the directories these are in;
- whose mtime and ctime it moved.

`tree` is the whole of what can be seen of a directory, to be compared now and then. What POSIX
leaves to each file system is left out here, with its reason beside it; nothing else is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.posix import next_tick
from kit.users import acting_as

SLOT_COUNT = 5
DAY_NS = 86_400 * 10**9
NO_OVERWRITE, EXCHANGE = 1, 2
KEEP_SIZE, PUNCH = 1, 2
ACCESS_ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"

_libc = ctypes.CDLL(None, use_errno=True)


Look = tuple[object, tuple[int, int, int] | None]
"""Attributes, or the errno; and which file it is, its mtime and ctime."""


@dataclass(frozen=True)
class Step:
    """A method of `Side` with its arguments, and the user who calls it."""

    name: str
    arguments: tuple[Any, ...] = ()
    uid: int = 0

    def __repr__(self) -> str:
        user = f", {self.uid}" if self.uid else ""
        arguments = ", ".join(shortened(argument) for argument in self.arguments)
        comma = "," if len(self.arguments) == 1 else ""
        return f"Step({self.name!r}, ({arguments}{comma}){user})"


def shortened(value: object) -> str:
    """How Python would write it, and a long row of one letter as a product."""
    if isinstance(value, str | bytes) and len(value) > 40 and len(set(value)) == 1:
        return f"{value[:1]!r} * {len(value)}"
    return repr(value)


@dataclass(frozen=True)
class Error:
    """A step that failed."""

    number: int

    def __repr__(self) -> str:
        return errno.errorcode.get(self.number, str(self.number))


@dataclass
class Side:
    """A directory and its open files. Paths are relative to it and may be as bad as you like."""

    root: Path
    slots: dict[int, int] = field(default_factory=dict)
    openers: dict[int, int] = field(default_factory=dict)
    """Who has opened what is open in a slot."""

    # -- open files ------------------------------------------------------------------------------

    def open(self, slot: int, path: str, flags: int, mode: int = 0o644) -> str:
        """Open into a slot; what was open there is closed then."""
        # A fifo must not stop the test.
        fd = os.open(self.path(path), flags | os.O_NONBLOCK, mode)
        self.close(slot)
        self.slots[slot] = fd
        self.openers[slot] = os.geteuid()
        return "open"

    def open_in(self, slot: int, directory: int, name: str, flags: int, mode: int = 0o644) -> str:
        """openat in a directory that is open."""
        where = self.fd(directory)
        fd = os.open(name, flags | os.O_NONBLOCK, mode, dir_fd=where)
        self.close(slot)
        self.slots[slot] = fd
        self.openers[slot] = os.geteuid()
        return "open"

    def make_unnamed(self, slot: int, path: str, mode: int, flags: int = 0) -> str:
        """O_TMPFILE."""
        return self.open(slot, path, os.O_TMPFILE | os.O_RDWR | flags, mode)

    def close(self, slot: int) -> str:
        """Close a slot; an empty one is no error."""
        if (fd := self.slots.pop(slot, None)) is not None:
            os.close(fd)
        return "closed"

    def close_all(self) -> None:
        """Close everything, though the mount may be dead."""
        for slot in list(self.slots):
            with suppress(OSError):
                self.close(slot)

    def read(self, slot: int, length: int) -> object:
        return summary(os.read(self.fd(slot), length))

    def pread(self, slot: int, length: int, offset: int) -> object:
        return summary(os.pread(self.fd(slot), length, offset))

    def write(self, slot: int, seed: int, length: int) -> object:
        """Not into a fifo, whose times the kernel moves on some file systems, but never on FUSE."""
        if stat.S_ISFIFO(os.fstat(self.fd(slot)).st_mode):
            return "a fifo"
        return os.write(self.fd(slot), pattern(seed, length)), self.position(slot)

    def pwrite(self, slot: int, seed: int, length: int, offset: int) -> object:
        return os.pwrite(self.fd(slot), pattern(seed, length), offset)

    def ftruncate(self, slot: int, size: int) -> object:
        return os.ftruncate(self.fd(slot), size)

    def fsync(self, slot: int, only_data: bool) -> object:
        return (os.fdatasync if only_data else os.fsync)(self.fd(slot))

    def lseek(self, slot: int, offset: int, whence: int) -> object:
        fd = self.fd(slot)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return "the position in a directory is its file system's own matter"
        return os.lseek(fd, offset, whence)

    def seek_data(self, slot: int, offset: int, for_data: bool) -> object:
        """SEEK_DATA and SEEK_HOLE. Where holes are is the file system's matter; that there are
        zeroes in them is not, nor which offsets are refused."""
        fd = self.fd(slot)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        before = os.lseek(fd, 0, os.SEEK_CUR)
        end = status.st_size
        try:
            found = os.lseek(fd, offset, os.SEEK_DATA if for_data else os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO or not for_data or not 0 <= offset < end:
                raise
            found = end
        assert os.lseek(fd, before, os.SEEK_SET) == before
        assert offset <= found <= end, f"{offset} leads to {found} of {end}"
        if for_data and (fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE) != os.O_WRONLY:
            assert not any(os.pread(fd, found - offset, offset)), "data before the data"
        return "legal"

    def fallocate(self, slot: int, mode: int, offset: int, length: int) -> object:
        if _libc.fallocate(
            self.fd(slot), mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)
        ):
            raise last_error()
        return "allocated"

    def copy_range(
        self, source: int, source_offset: int, target: int, target_offset: int, length: int
    ) -> object:
        """copy_file_range until it is done: it may do less at once."""
        from_fd, to_fd = self.fd(source), self.fd(target)
        done = 0
        while True:
            count = os.copy_file_range(
                from_fd, to_fd, length - done, source_offset + done, target_offset + done
            )
            done += count
            if not count or done == length:
                return done

    def flock(self, slot: int, operation: int) -> object:
        return fcntl.flock(self.fd(slot), operation | fcntl.LOCK_NB)

    def fchmod(self, slot: int, mode: int) -> object:
        return os.fchmod(self.fd(slot), mode)

    def fchown(self, slot: int, uid: int, gid: int) -> object:
        return os.fchown(self.fd(slot), uid, gid)

    def link_open(self, slot: int, path: str) -> object:
        """Give a name to an open file: what O_TMPFILE is for."""
        source, here, follow = f"/proc/self/fd/{self.fd(slot)}", -100, 0x400
        if _libc.linkat(here, os.fsencode(source), here, os.fsencode(self.path(path)), follow):
            raise last_error()
        return "linked"

    def mkdir_in(self, slot: int, name: str, mode: int) -> object:
        return os.mkdir(name, mode, dir_fd=self.fd(slot))

    def unlink_in(self, slot: int, name: str) -> object:
        return os.unlink(name, dir_fd=self.fd(slot))

    def list_open(self, slot: int) -> object:
        return sorted(os.listdir(self.fd(slot)))

    # -- names -----------------------------------------------------------------------------------

    def mkdir(self, path: str, mode: int) -> object:
        return os.mkdir(self.path(path), mode)

    def rmdir(self, path: str) -> object:
        return os.rmdir(self.path(path))

    def unlink(self, path: str) -> object:
        return os.unlink(self.path(path))

    def rename(self, path: str, new_path: str, flags: int) -> object:
        here = -100
        if _libc.renameat2(
            here, os.fsencode(self.path(path)), here, os.fsencode(self.path(new_path)), flags
        ):
            raise last_error()
        return "renamed"

    def link(self, path: str, new_path: str) -> object:
        return os.link(self.path(path), self.path(new_path), follow_symlinks=False)

    def symlink(self, target: str, path: str) -> object:
        return os.symlink(target, self.path(path))

    def readlink(self, path: str) -> object:
        return os.readlink(self.path(path))

    def mknod(self, path: str, mode: int, device: int) -> object:
        return os.mknod(self.path(path), mode, device)

    def listdir(self, path: str) -> object:
        """The order is the file system's own."""
        with os.scandir(self.path(path)) as entries:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)

    # -- attributes ------------------------------------------------------------------------------

    def truncate(self, path: str, size: int) -> object:
        """Not to the size that it has: POSIX lets that move the times or not (ftruncate does)."""
        whole = self.path(path)
        with suppress(OSError):
            if os.stat(whole).st_size == size:
                return "the same size"
        return os.truncate(whole, size)

    def chmod(self, path: str, mode: int) -> object:
        return os.chmod(self.path(path), mode)

    def chown(self, path: str, uid: int, gid: int, follow: bool) -> object:
        return os.chown(self.path(path), uid, gid, follow_symlinks=follow)

    def utimens(self, path: str, atime_ns: int, mtime_ns: int, follow: bool) -> object:
        whole = self.path(path)
        os.utime(whole, ns=(atime_ns, mtime_ns), follow_symlinks=follow)
        status = os.stat(whole, follow_symlinks=follow)
        return status.st_atime_ns, status.st_mtime_ns

    def touch(self, path: str) -> object:
        """Both times are now, which a writer may say and not only the owner."""
        return os.utime(self.path(path))

    def stat(self, path: str) -> object:
        return attributes(os.stat(self.path(path)))

    def access(self, path: str, mode: int) -> object:
        return os.access(self.path(path), mode, effective_ids=True)

    def setxattr(self, path: str, name: str, value: bytes, flags: int, follow: bool) -> object:
        return os.setxattr(self.path(path), name, value, flags, follow_symlinks=follow)

    def getxattr(self, path: str, name: str, follow: bool) -> object:
        return os.getxattr(self.path(path), name, follow_symlinks=follow)

    def removexattr(self, path: str, name: str, follow: bool) -> object:
        return os.removexattr(self.path(path), name, follow_symlinks=follow)

    def listxattr(self, path: str, follow: bool) -> object:
        return sorted(os.listxattr(self.path(path), follow_symlinks=follow))

    # -- what the steps are made with ------------------------------------------------------------

    def path(self, path: str) -> str:
        return f"{self.root}/{path}"

    def fd(self, slot: int) -> int:
        """What is open there; an empty slot is as good as a closed file."""
        if slot not in self.slots:
            raise OSError(errno.EBADF, "nothing is open there")
        return self.slots[slot]

    def position(self, slot: int) -> int:
        """The file position, which a write moves; -1 where there is none."""
        try:
            return os.lseek(self.fd(slot), 0, os.SEEK_CUR)
        except OSError:
            return -1

    def run(self, step: Step) -> object:
        """Make the call as its user; the answer."""
        method: Callable[..., object] = getattr(self, step.name)
        with acting_as(step.uid):
            try:
                return method(*step.arguments)
            except OSError as error:
                return Error(error.errno or 0)

    def look(self, step: Step) -> dict[str, Look]:
        """Attributes, and times, of all that a step names."""
        seen: dict[str, Look] = {}
        for argument in step.arguments:
            if isinstance(argument, str):
                for path in (argument, os.path.dirname(argument.rstrip("/")) or "."):
                    seen[path] = looked_at(self.path(path))
        for slot in sorted(self.slots):
            if slot in step.arguments:
                seen[f"slot {slot}"] = looked_at(self.slots[slot])
        return seen


def looked_at(what: str | int) -> Look:
    """What an lstat or fstat says."""
    try:
        status = os.lstat(what) if isinstance(what, str) else os.fstat(what)
    except OSError as error:
        return Error(error.errno or 0), None
    return attributes(status), (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def attributes(status: os.stat_result) -> tuple[object, ...]:
    """What two file systems agree on.

    Not st_ino, st_dev, st_blksize and st_blocks, which are a file system's own; not the size of
    a directory, which has no meaning in POSIX; not atime, which depends on mount options. A
    directory's links are either 2 and one for each subdirectory, or 1, so this only says that
    it is not removed. Times of today are the clock's, others were set and are compared.
    """
    is_directory = stat.S_ISDIR(status.st_mode)
    return (
        oct(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_nlink > 0 if is_directory else status.st_nlink,
        None if is_directory else status.st_size,
        status.st_rdev,
        status.st_mtime_ns if abs(status.st_mtime_ns - time.time_ns()) > DAY_NS else "recent",
    )


def summary(data: bytes) -> object:
    """Data, short enough for a message."""
    return data if len(data) <= 48 else (data[:16], len(data), zlib.crc32(data))


def pattern(seed: int, length: int) -> bytes:
    """Bytes that say which write they are from, and where in it."""
    unit = bytes((seed * 37 + place * 11) % 255 + 1 for place in range(251))
    return (unit * (length // len(unit) + 1))[:length]


def last_error() -> OSError:
    """What a C function failed with."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def tree(root: Path) -> dict[str, object]:
    """All that can be seen below a directory, by path.

    Which names are the same file is said by the first of them in order.
    """
    seen: dict[str, object] = {}
    first: dict[int, str] = {}
    pending = ["."]
    while pending:
        path = pending.pop(0)
        whole = f"{root}/{path}"
        status = os.lstat(whole)
        first.setdefault(status.st_ino, path)
        seen[path] = (
            attributes(status),
            first[status.st_ino],
            content(whole, status),
            extras(whole),
        )
        if stat.S_ISDIR(status.st_mode):
            pending += children(root, path)
    return seen


def children(root: Path, path: str) -> list[str]:
    """Paths of a directory's entries in order; what the listing says of them must be true."""
    found = []
    with os.scandir(f"{root}/{path}") as entries:
        for entry in entries:
            status = os.lstat(entry.path)
            assert entry.inode() == status.st_ino, f"{entry.path} is listed as another file"
            assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(status.st_mode)
            assert entry.is_symlink() == stat.S_ISLNK(status.st_mode)
            found.append(f"{path}/{entry.name}")
    assert len(set(found)) == len(found), f"{path} lists a name twice: {sorted(found)}"
    return sorted(found)


def content(path: str, status: os.stat_result) -> object:
    """A file's bytes, a link's target, nothing of all others."""
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(status.st_mode):
        return None
    with open(path, "rb") as file:
        data = file.read()
    assert len(data) == status.st_size, f"{path} has {len(data)} bytes of {status.st_size}"
    return summary(data)


def extras(path: str) -> list[tuple[str, bytes]]:
    """Extended attributes, of which the order is the file system's own."""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]


@dataclass
class Comparison:
    """Two sides, step by step. `ours` is the one that is tested."""

    ours: Side
    reference: Side
    unsupported: frozenset[str] = frozenset()
    """Steps that ours may refuse with EOPNOTSUPP; they are not done on the reference then."""
    wait_every: int = 4
    """Before each n-th step the clock of both gets time to move on."""
    count: int = 0

    def run(self, step: Step) -> None:
        """Do a step on both; a difference is an AssertionError that says which.

        Which times a step moves is only known for sure after a tick of the kernel's coarse clock:
        two changes in one tick have the same time, unless tmpfs takes a finer one in between.
        """
        self.count += 1
        is_settled = self.count % self.wait_every == 0
        if is_settled:
            next_tick()
        before = self.ours.look(step), self.reference.look(step)
        assert_same("before", plain(before[0]), plain(before[1]))
        answer = self.ours.run(step)
        if step.name in self.unsupported and answer == Error(errno.EOPNOTSUPP):
            return
        expected = self.reference.run(step)
        assert_same(f"{step} answers", answer, expected)
        after = self.ours.look(step), self.reference.look(step)
        assert_same(f"after {step}", plain(after[0]), plain(after[1]))
        if is_settled and not is_free_to_mark(step, answer):
            ours, reference = moved(before[0], after[0]), moved(before[1], after[1])
            assert_same(f"times that {step} moves", ours, reference)

    def compare_trees(self) -> None:
        """Everything is the same."""
        assert_same("the tree", tree(self.ours.root), tree(self.reference.root))

    def close_all(self) -> None:
        self.ours.close_all()
        self.reference.close_all()


def is_free_to_mark(step: Step, answer: object) -> bool:
    """Whether POSIX leaves open whose times a step moves.

    A step that failed may have moved some: mknod of an existing name, for one. rename may mark
    the file that is renamed or not. chown and chmod that change nothing may be no change at all.
    What fallocate marks is not specified, nor is removing an access-control list that isn't there.
    """
    if step.name == "removexattr" and step.arguments[1] in (ACCESS_ACL, DEFAULT_ACL):
        return True
    return isinstance(answer, Error) or step.name in (
        "rename", "chmod", "fchmod", "chown", "fchown", "fallocate", "close", "touch"
    )  # fmt: skip


def plain(seen: dict[str, Look]) -> dict[str, object]:
    return {name: what for name, (what, _) in seen.items()}


def moved(before: dict[str, Look], after: dict[str, Look]) -> set[str]:
    """Times that are different now, of what is the same file before and after."""
    result = set()
    for name, (_, old) in before.items():
        new = after.get(name, (None, None))[1]
        if old is not None and new is not None and old[0] == new[0]:
            result |= {f"{name!r} mtime"} if old[1] != new[1] else set()
            result |= {f"{name!r} ctime"} if old[2] != new[2] else set()
    return result


def assert_same(what: str, ours: object, reference: object) -> None:
    """Say only what differs."""
    if ours == reference:
        return
    if isinstance(ours, dict) and isinstance(reference, dict):
        names = sorted({*ours, *reference})
        different = [name for name in names if ours.get(name) != reference.get(name)]
        lines = [f"  {n!r}: ours {ours.get(n)}, reference {reference.get(n)}" for n in different]
        raise AssertionError("\n".join([f"{what}:", *lines]))
    raise AssertionError(f"{what}: ours {ours}, reference {reference}")
