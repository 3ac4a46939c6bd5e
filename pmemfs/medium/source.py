"""What a path is as a source of memory: its kind, its size, and how its bytes become durable.

| kind            | size from                | durable by       |
| tmpfs file      | stat                     | nothing          |
| DAX file        | stat                     | cache lines      |
| DAX device      | sysfs                    | cache lines      |
| block device    | its end                  | msync            |
| any other file  | stat                     | msync (warned)   |
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from pmemfs.errors import NoSpace, NoSuchSource, UnusableSource
from pmemfs.mountinfo import mount_of_device
from pmemfs.pfn import FRAME_BYTES
from pmemfs.reach import check_answers
from pmemfs.units import format_size

MAP_SHARED_VALIDATE = 0x03
MAP_SYNC = 0x80000

_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


class SourceKind(enum.Enum):
    """The kinds of sources."""

    TMPFS_FILE = "tmpfs file"
    DAX_FILE = "DAX file"
    DAX_DEVICE = "DAX device"
    BLOCK_DEVICE = "block device"
    FILE = "ordinary file"

    @property
    def is_device(self) -> bool:
        """Whether the size is given and pmemfs can't make such a source."""
        return self in (SourceKind.DAX_DEVICE, SourceKind.BLOCK_DEVICE)


class Source(NamedTuple):
    """A path that can hold a pool."""

    path: str
    kind: SourceKind
    size_bytes: int
    """In whole frames of 4 KiB; for a DAX device, in whole units of its alignment."""
    warning: str = ""
    """What a user should know before relying on this source; empty if pmemfs is made for it."""


def check_path(path: str) -> None:
    """Raise NoSuchSource for an empty path, which most likely is a variable that is not set, and
    Silent for a path on a mount that does not answer."""
    if not path:
        raise NoSuchSource(path="''", why="the path is empty; give the path of a pool")
    check_answers(path)


def check_device(path: str) -> None:
    """Raise NoSuchSource for a path below /dev (but not /dev/shm) where there is no device.

    A file that is made there lies in the kernel's memory, takes the name of a device that comes
    later, and is gone at the next boot.
    """
    parent = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    is_for_devices = _is_below(parent, "/dev") and not _is_below(parent, "/dev/shm")
    if is_for_devices and not os.path.exists(path):
        raise NoSuchSource(path=path, why="there is no such device; 'ls /dev/pmem* /dev/dax*' "
                           "shows those of persistent memory")  # fmt: skip


def check_link(path: str) -> None:
    """Raise NoSuchSource for a symbolic link that leads to no file, or in a circle."""
    if os.path.islink(path) and not os.path.exists(path):
        raise NoSuchSource(path=path, why="it is a symbolic link that leads to no file; name the "
                           "file itself, or remove the link")  # fmt: skip


def identify(path: str) -> Source:
    """What `path` is. Raises NoSuchSource, Silent and UnusableSource."""
    check_path(path)
    try:
        status = os.stat(path)
    except OSError as error:
        check_link(path)
        advice = ""
        if error.errno == errno.ENOENT:
            check_device(path)
            advice = "; 'pmemfs create' makes a pool"
        raise NoSuchSource(path=path, why=f"{_lower(error.strerror)}{advice}") from None
    if stat.S_ISREG(status.st_mode):
        return _identify_file(path, status)
    if stat.S_ISBLK(status.st_mode):
        return _identify_block_device(path, status)
    if stat.S_ISCHR(status.st_mode):
        return identify_dax_device(path, status)
    if stat.S_ISDIR(status.st_mode):
        why = "it is a directory, and a pool is a file or a device"
    else:
        why = "it is neither a file nor a device"
    raise UnusableSource(path=path, why=why)


def make_empty(path: str) -> None:
    """Make an empty file at a path that does not exist. Raises NoSuchSource and UnusableSource."""
    with _opened_for_making(path, os.O_EXCL):
        pass


def make_file(path: str, size_bytes: int, *, sparse: bool) -> None:
    """Make `path` that large, with memory behind every byte unless `sparse`.

    If that fails, a new file is removed and an old file keeps its size. Raises NoSpace,
    NoSuchSource or UnusableSource.
    """
    existed = os.path.exists(path)
    with _opened_for_making(path) as fd:
        old_size_bytes = os.fstat(fd).st_size
        try:
            os.truncate(fd, max(size_bytes, old_size_bytes))
            if not sparse:
                os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            os.truncate(fd, old_size_bytes)
            if not existed:
                os.unlink(path)
            raise NoSpace(
                path=path, wanted=format_size(size_bytes), why=_no_room(path, error)
            ) from None


def _no_room(path: str, error: OSError) -> str:
    """Why there is no room, and how much there is."""
    if error.errno != errno.ENOSPC:
        return _lower(error.strerror)
    room = os.statvfs(os.path.dirname(os.path.abspath(path)))
    free = format_size(room.f_bavail * room.f_frsize)
    return f"no space left on device, which has {free} free; ask for less, or make room"


def known_content(path: str) -> str:
    """What blkid(8) finds on a file or block device, such as "ext4 (filesystem)"; or ""."""
    # Only what makes a pool asks this.
    import subprocess

    try:
        probe = subprocess.run(
            ["blkid", "--probe", "--output", "export", "--", path],
            capture_output=True,
            check=False,
        )
    except OSError:
        return ""
    lines = os.fsdecode(probe.stdout).splitlines()
    facts = dict(line.split("=", 1) for line in lines if "=" in line)
    if "TYPE" in facts:
        return f"{facts['TYPE']} ({facts.get('USAGE', 'content')})"
    return f"a {facts['PTTYPE']} partition table" if "PTTYPE" in facts else ""


def grants_map_sync(fd: int, *, writable: bool) -> bool:
    """Whether a MAP_SYNC mapping is possible; found by trying, as mmap(2) advises."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        mapping = mmap.mmap(fd, FRAME_BYTES, flags=MAP_SHARED_VALIDATE | MAP_SYNC, prot=protection)
    except (OSError, ValueError):
        return False
    mapping.close()
    return True


def _identify_file(path: str, status: os.stat_result) -> Source:
    size_bytes = status.st_size & -FRAME_BYTES
    mount = mount_of_device(status.st_dev)
    fs_type = mount.fs_type if mount else "unknown"
    if fs_type in _MEMORY_FILE_SYSTEMS:
        return Source(path, SourceKind.TMPFS_FILE, size_bytes)
    with _opened(path, os.O_RDONLY) as fd:
        if size_bytes and grants_map_sync(fd, writable=False):
            return Source(path, SourceKind.DAX_FILE, size_bytes)
    warning = (
        f"{path} is an ordinary file on {fs_type}: it goes through the page cache, and what is "
        "written survives a power failure only after fsync"
    )
    return Source(path, SourceKind.FILE, size_bytes, warning)


def _identify_block_device(path: str, status: os.stat_result) -> Source:
    with _opened(path, os.O_RDONLY) as fd:
        size_bytes = os.lseek(fd, 0, os.SEEK_END) & -FRAME_BYTES
    device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    warning = ""
    if _read_sysfs(f"/sys/dev/block/{device}/queue/dax") != "1":
        warning = (
            f"{path} is not persistent memory: it goes through the page cache, and what is "
            "written survives a power failure only after fsync"
        )
    return Source(path, SourceKind.BLOCK_DEVICE, size_bytes, warning)


def identify_dax_device(path: str, status: os.stat_result) -> Source:
    """What a character device is, without opening it. Raises UnusableSource."""
    device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    sysfs = f"/sys/dev/char/{device}"
    size_text = _read_sysfs(f"{sysfs}/size")
    if not size_text or os.path.basename(os.path.realpath(f"{sysfs}/subsystem")) != "dax":
        raise UnusableSource(path=path, why="it is a character device, but not a DAX device")
    alignment_bytes = int(_read_sysfs(f"{sysfs}/align") or FRAME_BYTES)
    size_bytes = int(size_text) & -alignment_bytes
    return Source(path, SourceKind.DAX_DEVICE, size_bytes)


def alignment_of(source: Source) -> int:
    """In units of how many bytes a source can be mapped: the alignment of a DAX device, else 1."""
    if source.kind is not SourceKind.DAX_DEVICE:
        return 1
    number = os.stat(source.path).st_rdev
    device = f"{os.major(number)}:{os.minor(number)}"
    return int(_read_sysfs(f"/sys/dev/char/{device}/align") or FRAME_BYTES)


def _read_sysfs(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _is_below(path: str, directory: str) -> bool:
    return os.path.commonpath((path, directory)) == directory


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    try:
        # What became a pipe since it was looked at must not be waited for.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise UnusableSource(path=path, why=_lower(error.strerror)) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _opened_for_making(path: str, flags: int = 0) -> AbstractContextManager[int]:
    parent = os.path.dirname(path) or "."
    try:
        is_directory = stat.S_ISDIR(os.stat(parent).st_mode)
    except FileNotFoundError:
        is_directory = False
    except OSError as error:
        raise UnusableSource(path=path, why=_lower(error.strerror)) from None
    if not is_directory:
        raise NoSuchSource(path=path, why=f"there is no directory {parent}; make it first")
    return _opened(path, os.O_RDWR | os.O_CREAT | flags)


def _lower(sentence: str | None) -> str:
    """An error text of the C library, as a part of a sentence here."""
    return sentence[:1].lower() + sentence[1:] if sentence else "unknown error"
