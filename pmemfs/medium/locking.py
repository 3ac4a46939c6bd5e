"""Who may have a source open at the same time, and who has it.

Invariants:
- at most one process has a writable medium of a source (by flock, and by O_EXCL on block devices;
  the kernel releases both when the process dies). Two writers would destroy each other's metadata;
- a program that has got pages from a mount keeps others from a writable medium, although the mount
  may have ended. If it may write, it has the mount's own descriptor, and shares its flock. If it
  only reads, it has one that can't write, and that has a lock of the other kind: an open file
  description lock, which no flock stands in the way of.
Source: flock(2), fcntl_locking(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from pmemfs.errors import SourceBusy, UnusableSource
from pmemfs.medium.holders import holders_of, named
from pmemfs.medium.source import Source, SourceKind
from pmemfs.mountinfo import mounts_of

_FLOCK = "hhqqi4x"
"""`struct flock`: type, whence, start, length and process. All zero means all of the file."""


def open_locked(source: Source, *, read_only: bool = False) -> int:
    """A descriptor whose lock keeps other writers out; with `read_only` it lets other readers in.

    Raises UnusableSource and SourceBusy.
    """
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    if source.kind is SourceKind.BLOCK_DEVICE and not read_only:
        flags |= os.O_EXCL
    try:
        fd = os.open(source.path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            why = _mounted(source.path)
            if not why and (pids := holders_of(source.path)):
                why = f"{named(pids)} {'has' if len(pids) == 1 else 'have'} it open"
            why = why or "the kernel has it mounted or open"
            raise SourceBusy(path=source.path, why=why) from None
        texts = {
            errno.EACCES: "permission denied",
            errno.EROFS: "its file system is read-only; a pool there can be mounted with -o ro",
        }
        text = texts.get(error.errno or 0, os.strerror(error.errno or 0).lower())
        raise UnusableSource(path=source.path, why=f"it can't be opened: {text}") from None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        why = _holder(fd, source.path)
        os.close(fd)
        raise SourceBusy(path=source.path, why=why) from None
    if not read_only and _has_readers(fd):
        os.close(fd)
        raise SourceBusy(path=source.path, why=_of_ended_mount(holders_of(source.path)))
    return fd


def open_for_readers(fd: int) -> int:
    """A descriptor of the same source that can't write, but keeps writers out after `fd` is closed.

    `fd` is of `open_locked`, not read-only. Raises OSError.
    """
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock_description(reading, fcntl.F_RDLCK)
    except BaseException:
        os.close(reading)
        raise
    return reading


def unlock(fd: int) -> None:
    """Let others in, although other processes may have the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    # What has no such locks has none to give back.
    with contextlib.suppress(OSError):
        _lock_description(fd, fcntl.F_UNLCK)


def _has_readers(fd: int) -> bool:
    """Whether programs read pages of a mount that has ended. The caller has the flock."""
    try:
        _lock_description(fd, fcntl.F_WRLCK)
    except OSError as error:
        # A file system without such locks has passed no descriptor that relies on them.
        return error.errno in (errno.EAGAIN, errno.EACCES)
    _lock_description(fd, fcntl.F_UNLCK)
    return False


def _lock_description(fd: int, kind: int) -> None:
    """Raises OSError."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))


def _holder(fd: int, path: str) -> str:
    """Who has a source open, as far as mountinfo and /proc/locks tell."""
    where, pid = _mounted(path), _lock_holder(fd)
    if where:
        return where + (f" by process {pid}" if pid else "") + "; unmount it first"
    pids = holders_of(path)
    if not pids:
        # /proc shows neither what another user nor what another pid namespace has.
        return f"{f'process {pid}' if pid else 'another process'} has it open"
    if pid and int(pid) not in pids:
        # Who took the lock is gone, and has passed it on: it was the daemon of a mount.
        return _of_ended_mount(pids)
    return f"{named(pids)} {'has' if len(pids) == 1 else 'have'} it open"


def _of_ended_mount(pids: list[int]) -> str:
    who = named(pids) if pids else "another process"
    have = "have" if len(pids) > 1 else "has"
    return (
        f"{who} still {have} pages of it, although its mount has ended; it is free when they have "
        "closed them"
    )


def _mounted(path: str) -> str:
    owners = {0, os.geteuid(), os.stat(path).st_uid}
    places = [mount.mountpoint for mount in mounts_of(os.path.realpath(path), owners)]
    return f"mounted on {' and '.join(places)}" if places else ""


def _lock_holder(fd: int) -> str:
    """Which process holds the lock, as far as /proc/locks says."""
    status = os.fstat(fd)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with open("/proc/locks") as locks:
        for fields in map(str.split, locks):
            if "FLOCK" in fields and inode in fields:
                return fields[fields.index(inode) - 1]
    return ""
