"""The device that transfers come from: a file on a disk, or what the user names; only read from.

It is opened with O_DIRECT, so the kernel's page cache has no part in a transfer: the bytes go from
the device to where the reader wants them.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pmemfs.errors import CannotTransfer, sentence_of
from pmemfs.mountinfo import mount_of_device
from pmemfs.units import MIB, format_size

DEFAULT_DIRECTORY = "/var/tmp"


class Device:
    """A file or device, open for direct reads of whole MiB."""

    def __init__(self, path: str, size_bytes: int, *, is_own: bool = False) -> None:
        """Open the first `size_bytes` of it. Raises CannotTransfer."""
        self.path = path
        self.size_bytes = size_bytes
        self._is_own = is_own
        self._fd = _opened_directly(path)
        try:
            # A device's end is where a seek to the end leads.
            self._check(os.lseek(self._fd, 0, os.SEEK_END))
        except BaseException:
            self.close()
            raise

    @property
    def description(self) -> str:
        """What it is, for a report."""
        mount = mount_of_device(os.fstat(self._fd).st_dev)
        where = f" on {mount.fs_type}" if mount else ""
        what = f"a file of {format_size(self.size_bytes)} in {os.path.dirname(self.path)}"
        return f"{what}{where}" if self._is_own else f"{self.path}{where}"

    def read_into(self, memory: memoryview, offset_bytes: int) -> None:
        """Fill memory from there. Raises OSError."""
        if os.preadv(self._fd, [memory], offset_bytes) != len(memory):
            raise OSError(errno.EIO, "a transfer ended early", self.path)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def _check(self, found_bytes: int) -> None:
        if found_bytes < self.size_bytes:
            why = f"it has {format_size(found_bytes)}, and {format_size(self.size_bytes)} are read"
            raise CannotTransfer(path=self.path, why=why)


@contextmanager
def opened_device(path: str | None, size_bytes: int) -> Iterator[Device]:
    """What is named, or a file of our own, which is gone afterwards. Raises CannotTransfer."""
    device = _own_device(size_bytes) if path is None else Device(path, size_bytes)
    try:
        yield device
    finally:
        device.close()


def _own_device(size_bytes: int) -> Device:
    try:
        fd, path = tempfile.mkstemp(prefix="pmemfs-compare-", dir=DEFAULT_DIRECTORY)
    except OSError as error:
        raise CannotTransfer(path=DEFAULT_DIRECTORY, why=sentence_of(error)) from None
    try:
        piece = os.urandom(MIB)
        for _ in range(size_bytes // MIB):
            os.write(fd, piece)
        os.fsync(fd)
        return Device(path, size_bytes, is_own=True)
    except OSError as error:
        raise CannotTransfer(path=path, why=sentence_of(error)) from None
    finally:
        os.close(fd)
        # It goes with its descriptor, however this program ends.
        os.unlink(path)


def _opened_directly(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        why = (error.strerror or "").lower()
        if error.errno == errno.EINVAL:
            why = "its file system has no direct I/O; name a device or another file by --device"
        raise CannotTransfer(path=path, why=why) from None
