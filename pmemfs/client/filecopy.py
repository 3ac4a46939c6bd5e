"""Copies a file between a mount and what is outside of it, or another mount, as cp(1) and dd(1) do.

Invariants:
- a file that is made or replaced has no name until all of it is there and durable. So a copy that
  fails, or is killed, leaves nothing behind and the old file in its place;
- what can't be replaced is written in place: a device, and the file of a mount of mode `block`. It
  keeps its size, and what the copy doesn't reach;
- holes stay holes, except that a device reads as zeroes there afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from pmemfs.client.stretches import Stretch, data_of, holes_between, in_frames
from pmemfs.client.transfer import BLOCK_BYTES, End, Progress, Route, Transfer
from pmemfs.client.unnamed import UnnamedFile
from pmemfs.errors import BadUsage, CannotCopy, NoSpace, naming
from pmemfs.medium import writeback
from pmemfs.medium.source import check_device, check_link
from pmemfs.mountinfo import mount_of_device
from pmemfs.units import MIB, format_size

_PERMISSIONS = 0o777
_BLOCK_MODE_INODES = 2
"""Of a mount of mode `block`: its root and its device."""
_NO_PUNCH = (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL)
_ZEROES = bytes(MIB)


class Copied(NamedTuple):
    """What was copied, and how."""

    source: str
    target: str
    """The file that there is now."""
    path: str
    """`pages`, or `bounce`: through a buffer of ours, or of the kernel (its page cache)."""
    why: str
    """Why it was not `pages`; else empty."""
    size_bytes: int
    copied_bytes: int
    """Without holes."""
    seconds: float


class Manner(NamedTuple):
    """How to copy."""

    insists_on_pages: bool = False
    may_replace: bool = True
    is_forced: bool = False
    """Replace also what may not be written to."""


def copy_file(
    source: str,
    target: str,
    manner: Manner,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> Copied | None:
    """Copy a file; None if the target is there and `may_replace` is not set.

    `progress` is told how far it is, in bytes from the beginning of the source, and how far it has
    to go. Raises OSError, CannotCopy, NotDirect, BadUsage, NoSpace, DaemonGone.
    """
    begun = time.monotonic()
    route = Route(insists=manner.insists_on_pages)
    with _opened(source, os.O_RDONLY) as fd:
        with naming(source):
            found = os.fstat(fd)
        name = _name_of_target(source, target)
        old = _status_of(name)
        if old is not None:
            if not manner.may_replace:
                return None
            _check_old(source, found, name, old, manner)
        origin = End(source, fd, route)
        show = partial(_show, progress, origin.size_bytes)
        if old is not None and (stat.S_ISBLK(old.st_mode) or _is_pool_device(name, old)):
            size_bytes, moved_bytes = _written_in_place(origin, name, route, show)
        else:
            name = os.path.realpath(name)
            _check_directory(source, name)
            new = _made(name, found, old)
            try:
                size_bytes, moved_bytes = _filled(origin, new, route, show)
                new.appear(may_replace=manner.may_replace)
            except FileExistsError:
                return None
            finally:
                new.give_up()
    return Copied(source, name, "bounce" if route.why else "pages", route.why, size_bytes,
                  moved_bytes, time.monotonic() - begun)  # fmt: skip


def _show(progress: Callable[[int, int], object], total: int, done: int) -> None:
    progress(done, total)


# What is there


def _name_of_target(source: str, target: str) -> str:
    """The path of the file to make: below a directory it has the source's name. Raises OSError."""
    if os.path.isdir(target):
        return os.path.join(target, os.path.basename(os.path.realpath(source)))
    if target.endswith("/"):
        number = errno.ENOTDIR if os.path.exists(target[:-1]) else errno.ENOENT
        raise OSError(number, os.strerror(number), target)
    return target


def _status_of(path: str) -> os.stat_result | None:
    """What is at a path, behind links; None if nothing is. Raises NoSuchSource, and OSError."""
    check_link(path)
    check_device(path)
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _check_old(
    source: str, found: os.stat_result, target: str, old: os.stat_result, manner: Manner
) -> None:
    """Raise CannotCopy or OSError unless a target that is there may be replaced or written to."""
    is_same_device = stat.S_ISBLK(old.st_mode) and found.st_rdev == old.st_rdev
    if os.path.samestat(found, old) or is_same_device:
        raise CannotCopy(source=source, target=target, why="they are the same file")
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not (stat.S_ISREG(old.st_mode) or stat.S_ISBLK(old.st_mode)):
        why = f"{target} is neither a file nor a block device"
        raise CannotCopy(source=source, target=target, why=why)
    if stat.S_ISREG(old.st_mode) and not manner.is_forced:
        try:
            os.close(os.open(target, os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            # A program that runs keeps what it runs from, so it may be replaced.
            if error.errno != errno.ETXTBSY:
                raise


def _check_directory(source: str, target: str) -> None:
    """Raise CannotCopy if no file can be made where it is to be, and OSError."""
    directory = os.path.dirname(target)
    if _is_of_mode_block(directory, os.stat(directory)):
        (device,) = os.listdir(directory)
        why = f"{directory} is a mount of mode block, whose only file is {device}"
        raise CannotCopy(source=source, target=target, why=why)


def _is_pool_device(path: str, status: os.stat_result) -> bool:
    """Whether a file is that of a mount of mode `block`."""
    return stat.S_ISREG(status.st_mode) and _is_of_mode_block(path, status)


def _is_of_mode_block(path: str, status: os.stat_result) -> bool:
    mount = mount_of_device(status.st_dev)
    # The kernel tells, also of another user's mount, whose daemon would say nothing.
    return mount is not None and mount.is_ours and os.statvfs(path).f_files == _BLOCK_MODE_INODES


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    """A file or a block device. Raises OSError, CannotCopy, BadUsage."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        # A pipe would have to be waited for, and /dev/zero has no end.
        raise BadUsage(why=f"{path} is neither a file nor a block device; 'cp' and 'dd' read it")
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        yield fd
    finally:
        os.close(fd)


# What is made


def _made(name: str, found: os.stat_result, old: os.stat_result | None) -> UnnamedFile:
    """A new file, with the permissions that cp gives it. Raises OSError."""
    new = UnnamedFile(name, stat.S_IMODE(found.st_mode) & _PERMISSIONS)
    if old is None:
        return new
    try:
        # Who may not give files away keeps what is made: it is theirs.
        with contextlib.suppress(PermissionError):
            os.chown(new.fd, old.st_uid, old.st_gid)
        os.chmod(new.fd, stat.S_IMODE(old.st_mode) & _PERMISSIONS)
    except BaseException:
        new.give_up()
        raise
    return new


def _filled(
    source: End, new: UnnamedFile, route: Route, progress: Progress
) -> tuple[int, int]:  # fmt: skip
    """Copy into a new file; its size, and how much of it is no hole."""
    with naming(new.path):
        os.ftruncate(new.fd, source.size_bytes)
        target = End(new.path, new.fd, route)
        moved_bytes, end = _moved(source, target, _stretches(source), route, progress)
        if end is not None:
            os.ftruncate(new.fd, end)
    return source.size_bytes if end is None else end, moved_bytes


def _written_in_place(
    source: End, name: str, route: Route, progress: Progress
) -> tuple[int, int]:  # fmt: skip
    """Copy over a device; the size of the source, and how much of it is no hole."""
    is_block = stat.S_ISBLK(os.stat(name).st_mode)
    # The kernel refuses it for a device that is mounted, or has another exclusive user.
    with _opened(name, os.O_RDWR | (os.O_EXCL if is_block else 0)) as fd, naming(name):
        target = End(name, fd, route)
        if target.size_bytes < source.size_bytes:
            wanted = format_size(source.size_bytes)
            raise NoSpace(path=name, wanted=wanted, why=f"it has {format_size(target.size_bytes)}")
        stretches = list(_stretches(source))
        moved_bytes, end = _moved(source, target, stretches, route, progress)
        size_bytes = source.size_bytes if end is None else end
        for hole in holes_between(stretches, size_bytes):
            _zero(target, hole)
        os.fsync(fd)
    return size_bytes, moved_bytes


def _stretches(source: End) -> Iterator[Stretch]:
    with naming(source.path):
        yield from in_frames(data_of(source.fd, source.size_bytes), source.size_bytes)


def _moved(
    source: End, target: End, stretches: Iterator[Stretch] | Sequence[Stretch], route: Route,
    progress: Progress,
) -> tuple[int, int | None]:  # fmt: skip
    """Move stretches; how many bytes, and where the source ended if that was too early."""
    if not (source.is_in_pool or target.is_in_pool):
        why = "neither of them is in a mount of pmemfs; 'cp' and 'dd' copy between others"
        raise CannotCopy(source=source.path, target=target.path, why=why)
    transfer = Transfer(source, target, route, progress)
    end = transfer.move(stretches)
    if transfer.moved_bytes and not (source.was_direct or target.was_direct):
        route.bounce(source.path, f"it has no whole block of {format_size(BLOCK_BYTES)}")
    return transfer.moved_bytes, end


def _zero(target: End, hole: Stretch) -> None:
    """Have a device read as zeroes in a range. Raises OSError."""
    try:
        writeback.punch_hole(target.fd, *hole)
    except OSError as error:
        if error.errno not in _NO_PUNCH:
            raise
        for start in range(hole.start, hole.end, len(_ZEROES)):
            target.write(memoryview(_ZEROES)[: hole.end - start], start)
