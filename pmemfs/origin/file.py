"""A file or a block device before which a cache stands.

Invariants:
- transfers go around the kernel's page cache (O_DIRECT) wherever the file system allows it. The
  pool is the cache, and a second copy in DRAM would be what nobody needs;
- the size is a multiple of `block_bytes`, because direct I/O can't reach what is behind the last
  one. A file of any other size is refused rather than served without its end;
- a flush that has failed counts as a loss: the kernel reports a lost write once, and nobody can
  tell what is missing. A later flush succeeds only for who knows of that, and has written anew;
- a file that was removed, or whose name another one has got, takes writes and is gone when it is
  closed. So no flush of it succeeds, and what is dirty stays dirty.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from pmemfs.errors import OriginBusy, UnusableOrigin, system_error
from pmemfs.medium.holders import holders_of, named
from pmemfs.mountinfo import mounts
from pmemfs.origin import blocks
from pmemfs.origin.base import Identity, Left, Origin, say_nothing
from pmemfs.origin.carriers import Carrier, open_carrier
from pmemfs.origin.marks import ends_of, mark_of
from pmemfs.origin.naming import FileName
from pmemfs.origin.vectors import Vectors
from pmemfs.reach import check_answers

SECTOR_BYTES = 512
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)


class FileOrigin(Origin):
    """A file or block device that is open."""

    can_cut = False
    can_fence = True

    def __init__(self, name: FileName, fd: int, carrier: Carrier, *, read_only: bool) -> None:
        """Take a descriptor over; `open` finds out what is to be known of it."""
        self.name = name.text
        self.read_only = read_only
        self._fd = fd
        self._carrier = carrier
        self._is_held = False
        """Whether a device is ours by O_EXCL."""
        status = os.fstat(fd)
        self._is_device = stat.S_ISBLK(status.st_mode)
        self._has_name = stat.S_ISREG(status.st_mode) and status.st_nlink > 0
        self.block_bytes, self.is_direct = _find_unit(name.path, fd)
        self.size_bytes = blocks.size_of(fd)
        self.can_discard = not self._is_device or blocks.can_discard(status)
        self.zeroes_on_discard = not self._is_device
        if self._is_device and not read_only and blocks.is_read_only(fd):
            raise UnusableOrigin(name=self.name, why="the device is read-only")
        if not self.size_bytes:
            raise UnusableOrigin(name=self.name, why="it is empty")
        if self.size_bytes % self.block_bytes:
            raise UnusableOrigin(name=self.name, why=f"its size of {self.size_bytes} bytes is "
                                 f"not a multiple of {self.block_bytes}")  # fmt: skip

    @classmethod
    async def open(
        cls, name: FileName, *, read_only: bool = False, carrier: Carrier | None = None,
        left_fd: int | None = None,
    ) -> FileOrigin:  # fmt: skip
        """Open a path; `carrier` carries out what is asked, or the best that the kernel allows.
        `left_fd` is what a dead process had open as this path, with its locks.

        Raises UnusableOrigin, and OriginBusy for what is mounted.
        """
        if left_fd is not None:
            fd = os.dup(left_fd)
        else:
            fd = await trio.to_thread.run_sync(_open, name.path, read_only)
        try:
            carrier = carrier or open_carrier(fd)
            origin = cls(name, fd, carrier, read_only=read_only)
            origin._is_held = left_fd is not None
            return origin
        except BaseException:
            os.close(fd)
            if carrier is not None:
                await carrier.close()
            raise

    @property
    def carried_by(self) -> str:
        """`io_uring` or `threads`."""
        return self._carrier.word

    async def identity(self) -> Identity:
        kind = "device" if self._is_device else "file"
        text = await trio.to_thread.run_sync(blocks.lasting_name, self._fd)
        return Identity(kind, text, self.size_bytes)

    async def mark(self) -> bytes:
        if self._is_device:
            found = await trio.to_thread.run_sync(blocks.found_by_blkid, self.name)
            return mark_of(await ends_of(self), found)
        status = os.fstat(self._fd)
        return mark_of(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    async def read(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        if offset_bytes % self.block_bytes:
            raise system_error(errno.EINVAL)
        await self._carrier.read(self._fd, offset_bytes, views, self.block_bytes)

    def begin_reads(self, reads: Sequence[tuple[int, Vectors]]) -> int:
        return self._carrier.begin_reads(self._fd, reads)

    async def write(self, offset_bytes: int, views: Sequence[memoryview]) -> None:
        self._check_change(offset_bytes, 0)
        if offset_bytes + sum(map(len, views)) > self.size_bytes:
            # A file would become longer.
            raise system_error(errno.EINVAL)
        await self._carrier.write(self._fd, offset_bytes, views, self.block_bytes)

    async def flush(self, losses: int | None = None) -> None:
        expected = losses or 0
        try:
            await self._carrier.sync(self._fd)
        except OSError:
            self.losses += 1
            raise
        if self.losses != expected:
            raise system_error(errno.EIO)
        if self._has_name and not os.fstat(self._fd).st_nlink:
            # Nobody will find again what it was given.
            raise OSError(errno.ESTALE, "its file was removed")

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self._check_change(offset_bytes, length_bytes)
        if not self.can_discard or not length_bytes:
            return
        if self._is_device:
            await trio.to_thread.run_sync(
                blocks.discard_blocks, self._fd, offset_bytes, length_bytes
            )
            return
        mode = blocks.FALLOC_PUNCH_HOLE | blocks.FALLOC_KEEP_SIZE
        try:
            await self._allocate(mode, offset_bytes, length_bytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            self.can_discard = False
            self.zeroes_on_discard = False

    async def write_zeroes(self, offset_bytes: int, length_bytes: int, *, may_trim: bool) -> None:
        self._check_change(offset_bytes, length_bytes)
        kinds = [blocks.FALLOC_PUNCH_HOLE] if may_trim else []
        for kind in (*kinds, blocks.FALLOC_ZERO_RANGE) if length_bytes else ():
            try:
                await self._allocate(kind | blocks.FALLOC_KEEP_SIZE, offset_bytes, length_bytes)
            except OSError as error:
                if error.errno not in _CANNOT:
                    raise
            else:
                return
        await self._store_zeroes(offset_bytes, length_bytes)

    async def fence(self, say: Callable[[str], None] = say_nothing) -> None:
        await trio.to_thread.run_sync(self._take)

    async def resize_seen(self) -> int:
        self.size_bytes = blocks.size_of(self._fd) & -self.block_bytes
        return self.size_bytes

    async def cut(self) -> None:
        await trio.lowlevel.checkpoint()

    def hold(self, *fds: int) -> None:
        self._carrier.hold(*fds)

    def left(self) -> Left:
        return Left((self._fd,))

    async def close(self) -> None:
        await self._carrier.close()
        os.close(self._fd)

    def _check_change(self, offset_bytes: int, length_bytes: int) -> None:
        if self.read_only:
            raise system_error(errno.EROFS)
        if (offset_bytes | length_bytes) % self.block_bytes:
            raise system_error(errno.EINVAL)
        if length_bytes and offset_bytes + length_bytes > self.size_bytes:
            raise system_error(errno.EINVAL)

    async def _allocate(self, mode: int, offset_bytes: int, length_bytes: int) -> None:
        await trio.to_thread.run_sync(blocks.allocate, self._fd, mode, offset_bytes, length_bytes)

    def _take(self) -> None:
        """Hold a device as mount(2) does, and a file by both kinds of locks."""
        if self._is_held:
            # A second holder would be refused, although the first one is dead.
            pass
        elif self._is_device:
            # The kernel lets one holder in, and a mount, a RAID, a swap area are holders.
            fd = _open(self.name, self.read_only, os.O_EXCL)
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)
        elif devices := blocks.loop_devices_over(os.fstat(self._fd)):
            raise OriginBusy(name=self.name, why=f"{devices[0]} has it behind it; "
                             f"'losetup --detach {devices[0]}' lets it go")  # fmt: skip
        try:
            blocks.lock_all(self._fd, exclusive=not self.read_only)
        except BlockingIOError:
            raise OriginBusy(name=self.name, why=_holder(self.name)) from None


def _open(path: str, read_only: bool, more_flags: int = 0) -> int:
    """Open what can be an origin, around the page cache if that can be. Raises UnusableOrigin and
    OriginBusy."""
    check_answers(path)
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | more_flags
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UnusableOrigin(name=path, why="it is a directory")
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise UnusableOrigin(name=path, why="it is neither a file nor a block device")
        try:
            return os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise OriginBusy(name=path, why=_holder(path)) from None
        why = os.strerror(error.errno or errno.EIO).lower()
        raise UnusableOrigin(name=path, why=why) from None


def _holder(path: str) -> str:
    """Who has a file or device, as far as mountinfo and /proc tell."""
    status, real = os.stat(path), os.path.realpath(path)
    places = [
        mount.mountpoint
        for mount in mounts()
        if mount.source == real or mount.number == status.st_rdev != 0
    ]
    if places:
        return f"it is mounted on {' and '.join(places)}; unmount it first"
    pids = holders_of(path)
    if pids:
        return f"{named(pids)} {'has' if len(pids) == 1 else 'have'} it open"
    return "the kernel or another process holds it"


def _find_unit(path: str, fd: int) -> tuple[int, bool]:
    """The smallest unit of I/O, and whether it goes around the page cache.

    A file whose file system wants larger units than its size is a multiple of is opened anew
    without direct I/O, on the same descriptor.
    """
    is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return max(blocks.block_bytes_of(fd), SECTOR_BYTES), is_direct
    if not is_direct:
        return SECTOR_BYTES, False
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as page:
        for unit in (SECTOR_BYTES, mmap.PAGESIZE):
            with suppress(OSError), page[:unit] as view:
                os.preadv(fd, [view], unit)
                if blocks.size_of(fd) % unit == 0:
                    return unit, True
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return SECTOR_BYTES, False
