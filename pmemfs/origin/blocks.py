"""What the kernel and sysfs know of a file or block device, and calls that Python has no name for.

All of this blocks, so it is called in threads.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import subprocess
from pathlib import Path

from pmemfs.errors import system_error

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKDISCARD_RANGE = struct.Struct("=QQ")
_FLOCK = struct.Struct("=hhxxxxqqixxxx")
"""`struct flock` of 64-bit Linux: type, whence, start, length, pid."""

_NAMES_IN_SYSFS = ("wwid", "device/wwid", "nguid", "uuid", "device/serial", "serial", "dm/uuid",
                   "md/uuid", "device/uuid")  # fmt: skip
"""Where drivers put a name of a device that stays, the best one first."""

_libc = ctypes.CDLL(None, use_errno=True)


def allocate(fd: int, mode: int, offset_bytes: int, length_bytes: int) -> None:
    """fallocate(2). Raises OSError."""
    number = _libc.fallocate64(fd, mode, ctypes.c_int64(offset_bytes), ctypes.c_int64(length_bytes))
    if number:
        raise system_error(ctypes.get_errno())


def discard_blocks(fd: int, offset_bytes: int, length_bytes: int) -> None:
    """Discard a range of a block device. Raises OSError."""
    fcntl.ioctl(fd, _BLKDISCARD, _BLKDISCARD_RANGE.pack(offset_bytes, length_bytes))


def block_bytes_of(fd: int) -> int:
    """The smallest unit of I/O of a block device."""
    answer: bytes = fcntl.ioctl(fd, _BLKSSZGET, bytes(4))
    return int.from_bytes(answer, "little")


def is_read_only(fd: int) -> bool:
    """Whether the kernel lets nobody write to a block device. It may be opened for writing even
    so."""
    flag: bytes = fcntl.ioctl(fd, _BLKROGET, bytes(4))
    return any(flag)


def size_of(fd: int) -> int:
    """How many bytes a file or block device has."""
    return os.lseek(fd, 0, os.SEEK_END)


def lock_all(fd: int, *, exclusive: bool) -> None:
    """Lock a file both as programs with flock(2) do and as those with fcntl(2) do, qemu among them.

    Raises BlockingIOError where somebody else has such a lock.
    """
    fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        fcntl.flock(fd, fcntl.LOCK_UN)
        if error.errno == errno.EACCES:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        raise


def loop_devices_over(status: os.stat_result) -> list[str]:
    """The loop devices that have this file behind them."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            behind = os.stat(backing.read_text().removesuffix("\n"))
        except OSError:
            continue
        if os.path.samestat(behind, status):
            found.append(f"/dev/{backing.parts[3]}")
    return found


def can_discard(status: os.stat_result) -> bool:
    """Whether a block device takes discards."""
    queue = _sysfs(status.st_rdev) / "queue"
    if not queue.exists():
        # A partition; the disk has the queue.
        queue = _sysfs(status.st_rdev).resolve().parent / "queue"
    return _text(queue / "discard_max_bytes") not in ("", "0")


def lasting_name(fd: int) -> str:
    """The name of a file or device that stays when the machine is started anew, if it has one."""
    status = os.fstat(fd)
    if not stat.S_ISBLK(status.st_mode):
        return f"{os.fstatvfs(fd).f_fsid:x}/{status.st_ino}"
    device = _sysfs(status.st_rdev).resolve()
    part = _text(device / "partition")
    if part:
        whole = _name_of_device(device.parent) or device.parent.name
        return f"{whole}/part{part}@{_text(device / 'start')}"
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return _name_of_device(device) or number


def _name_of_device(device: Path) -> str:
    for name in _NAMES_IN_SYSFS:
        if text := _text(device / name):
            return text
    if backing := _text(device / "loop/backing_file"):
        # Numbers of loop devices are given out anew each time.
        try:
            file = os.stat(backing)
        except OSError:
            return ""
        return f"loop/{file.st_dev}/{file.st_ino}@{_text(device / 'loop/offset')}"
    return ""


def found_by_blkid(path: str) -> bytes:
    """What blkid(8) finds on a device, empty where that is nothing or there is no blkid."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    words = ("blkid", "--probe", "--output", "export", path)
    try:
        done = subprocess.run(words, capture_output=True, check=False, timeout=10,
                              env={"PATH": search, "LC_ALL": "C"})  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return b"".join(
        line for line in done.stdout.splitlines(True) if not line.startswith(b"DEVNAME")
    )


def _sysfs(device_number: int) -> Path:
    return Path(f"/sys/dev/block/{os.major(device_number)}:{os.minor(device_number)}")


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
