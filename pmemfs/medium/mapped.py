"""A medium that is a mapping of a file or device.

Invariants:
- at most one process has a writable medium of a source (`locking`);
- a sparse file is never touched through the mapping where it may have a hole: a store into a hole
  of a full file system is a SIGBUS, while pwrite answers ENOSPC;
- nothing makes a file longer that somebody has cut off, because the lost bytes would read as
  zeroes then instead of failing;
- on cache lines one thread does both `flush` and `fence`, because a store fence orders only the
  write-backs of its own processor.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import itertools
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pmemfs.errors import (
    MemoryFault,
    NoSpace,
    ReadOnlyMedium,
    UnusableSource,
    sentence_of,
)
from pmemfs.medium import writeback
from pmemfs.medium.base import Durability, Medium
from pmemfs.medium.fiemap import has_blocks_everywhere
from pmemfs.medium.locking import open_for_readers, open_locked, unlock
from pmemfs.medium.mapping import GuardedMapping, has_faulted, take_fault
from pmemfs.medium.source import (
    MAP_SHARED_VALIDATE,
    MAP_SYNC,
    Source,
    SourceKind,
    grants_map_sync,
    identify,
)
from pmemfs.medium.sparse import data_ranges
from pmemfs.pfn import FRAME_BYTES, PAGE_SHIFT
from pmemfs.units import TIB, align_up, format_size

if TYPE_CHECKING:
    from typing_extensions import Buffer

_owners = itertools.count(1)
"""A number for each medium of the process, which says what mappings belong to it."""

_LEAST_REACH_BYTES = TIB
_MOST_REACH_BYTES = 32 * TIB
"""A quarter of the addresses that a process has; a mount needs them in two processes."""
_REACH = 4
"""A pool may grow to so many times its size while it is open, within these limits."""

_SHARE_OF_ALLOWED = 8
"""Of the addresses that a process may have (ulimit -v), growth gets one in so many."""

_POPULATE_BYTES = 16 << 20

_VOLATILE, _CACHE_LINES, _MSYNC = Durability
"""Python 3.11 looks a member of an enum up by a call, and every flush and fence needs one."""

_SYNC_CHUNK_SHIFT = 21
"""Ranges to msync are remembered in chunks of 2 MiB, so that any workload has few of them."""


class Advice(enum.IntEnum):
    """Advice about a mapping, see madvise(2)."""

    HUGE_PAGES = 14
    POPULATE_READ = 22
    POPULATE_WRITE = 23


class Before(NamedTuple):
    """What the process that has opened a medium found, and others rely on since."""

    durability: Durability
    was_reserved: bool


class MappedMedium(Medium):
    """The memory behind a path, mapped whole."""

    def __init__(
        self,
        source: Source,
        *,
        read_only: bool = False,
        locked_fd: int | None = None,
        before: Before | None = None,
    ) -> None:
        """Open, lock and map. Or map what `open_locked` has opened, and close that in the end; it
        goes on as it was `before`, if that is given.

        Raises UnusableSource and SourceBusy.
        """
        if source.size_bytes == 0:
            raise UnusableSource(path=source.path, why="it is smaller than 4 KiB")
        self.source = source
        self.name = source.path
        self.size_bytes = source.size_bytes
        self.read_only = read_only
        self.keeps_lock = False
        """Whether other processes share the descriptor, and its lock shall last as long as they."""
        self._owner = next(_owners)
        self._fd = open_locked(source, read_only=read_only) if locked_fd is None else locked_fd
        self._reading_fd = -1
        """As `_fd`, but open for reading only, for other processes; -1 until one needs it."""
        try:
            may_be_reserved = before is None or before.was_reserved
            self.reserved = source.kind.is_device or (
                may_be_reserved and _has_memory_everywhere(self._fd, self.size_bytes)
            )
            self.durability = before.durability if before else self._find_durability()
            self._mapping = self._map(self.size_bytes)
        except BaseException:
            os.close(self._fd)
            raise
        self._memory = memoryview(self._mapping)
        self.was_reserved = before.was_reserved if before else self.reserved
        """Whether it was `reserved` when it was opened; added memory should be reserved as well."""
        self._unsynced_chunks: set[int] = set()
        self._chunks_lock = threading.Lock()
        self._fence_lock = threading.Lock()
        self._lost: OSError | None = None
        self.when_lost: Callable[[OSError], None] = lambda error: None
        """Is told of the first msync that fails."""

    @classmethod
    def open(cls, path: str, *, read_only: bool = False) -> MappedMedium:
        """Identify and open a path."""
        return cls(identify(path), read_only=read_only)

    @classmethod
    def adopt(cls, path: str, fd: int, before: Before, *, read_only: bool) -> MappedMedium:
        """Go on with what another process has opened as `path`, and locked. That may have another
        path by now, or none. `close` closes the descriptor."""
        source = identify(f"/proc/self/fd/{fd}")._replace(path=path)
        return cls(source, read_only=read_only, locked_fd=fd, before=before)

    def close(self) -> None:
        """Unlock and unmap. Views that are still held stay valid until they are released."""
        self._memory.release()
        # A held view keeps its mapping, the mapping keeps a duplicate of the descriptor, and that
        # would keep the lock. So the lock is given back by hand.
        self._mapping.close()
        for fd in (self._fd, self._reading_fd):
            if fd >= 0:
                if not self.keeps_lock:
                    unlock(fd)
                os.close(fd)

    def read(self, offset_bytes: int, length_bytes: int) -> memoryview | bytes:
        if not self.reserved:
            return self._pread(offset_bytes, length_bytes)
        data = self._mapping.load(offset_bytes, length_bytes)
        if data is None:
            raise self._fault(offset_bytes)
        return data

    def view(self, offset_bytes: int, length_bytes: int) -> memoryview:
        return self._memory[offset_bytes : offset_bytes + length_bytes]

    @property
    def sparse_fd(self) -> int:
        return -1 if self.reserved else self._fd

    def has_faulted(self) -> bool:
        return has_faulted(self._owner)

    def check_touched(self) -> None:
        if has_faulted(self._owner):
            raise self._fault(0)

    def store(self, offset_bytes: int, data: Buffer) -> None:
        if self.read_only:
            raise ReadOnlyMedium(path=self.name)
        if not self.reserved:
            view = memoryview(data).cast("B")
            if self.durability is not _CACHE_LINES:
                self._pwrite(offset_bytes, view)
                return
            # A block that pwrite allocates is in the file after a crash only if a sync follows. A
            # block that is touched through the mapping is in it because of MAP_SYNC.
            self.reserve(offset_bytes, len(view))
        if not self._mapping.store(offset_bytes, data):
            raise self._fault(offset_bytes)

    def put(self, offset_bytes: int, data: bytes) -> None:
        # Mostly a record or a word of a file system is put, in a reserved pool: the short way.
        if self.reserved and not self.read_only:
            if not self._mapping.store(offset_bytes, data):
                raise self._fault(offset_bytes)
        else:
            self.store(offset_bytes, data)
        if self.durability is not _VOLATILE:
            self.flush(offset_bytes, len(data))

    def flush(self, offset_bytes: int, length_bytes: int) -> None:
        if self.durability is _CACHE_LINES:
            if not self._mapping.flush_lines(offset_bytes, length_bytes):
                raise self._fault(offset_bytes)
        elif self.durability is _MSYNC:
            first = offset_bytes >> _SYNC_CHUNK_SHIFT
            last = (offset_bytes + length_bytes - 1) >> _SYNC_CHUNK_SHIFT
            with self._chunks_lock:
                self._unsynced_chunks.update(range(first, last + 1))

    def fence(self) -> None:
        if self.durability is _CACHE_LINES:
            writeback.fence()
        elif self.durability is _MSYNC:
            # One at a time. A second fence would find no chunks left to sync and return before the
            # first one has made them durable.
            with self._fence_lock:
                self._msync()

    def reserve(self, offset_bytes: int, length_bytes: int) -> None:
        if not self.reserved:
            self._check_length(offset_bytes, length_bytes)
            try:
                os.posix_fallocate(self._fd, offset_bytes, length_bytes)
            except OSError as error:
                self.note_shortage(error.errno)
                raise

    def clear(self, offset_bytes: int, length_bytes: int) -> None:
        # A device that can make zeroes itself is faster than stores from here.
        may_punch = not self.was_reserved or self.source.kind is SourceKind.BLOCK_DEVICE
        if length_bytes and may_punch and not self.read_only:
            self._check_length(offset_bytes, length_bytes)
            try:
                writeback.punch_hole(self._fd, offset_bytes, length_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL):
                    raise
            else:
                self.persist(offset_bytes, length_bytes)
                return
        super().clear(offset_bytes, length_bytes)

    @property
    def reach_bytes(self) -> int:  # type: ignore[override]
        if self.source.kind is SourceKind.DAX_DEVICE:
            # It changes its size only while it is not open.
            return self.size_bytes
        wanted = min(max(_REACH * self.size_bytes, _LEAST_REACH_BYTES), _MOST_REACH_BYTES)
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            wanted = min(wanted, allowed // _SHARE_OF_ALLOWED)
        return max(self.size_bytes, wanted & -FRAME_BYTES)

    def extend(self, size_bytes: int) -> int:
        """Grow to a size; the size that the file had, for `give_back`.

        A file is made that large, with memory behind all of it if it had that before. A device must
        be that large already. Held views stay as they were. Raises NoSpace, UnusableSource, and
        MemoryFault if the file was cut off; after an error all is as it was.
        """
        if self.source.kind.is_device:
            old_bytes = self.size_bytes
            self._remap(size_bytes)
            return old_bytes
        old_bytes = os.fstat(self._fd).st_size
        if size_bytes == self.size_bytes:
            return old_bytes
        self._check_length(0, self.size_bytes)
        try:
            if self.was_reserved:
                # This makes the file longer only once there is memory for all of it.
                os.posix_fallocate(self._fd, self.size_bytes, size_bytes - self.size_bytes)
            elif size_bytes > old_bytes:
                os.ftruncate(self._fd, size_bytes)
            self._remap(size_bytes)
        except (OSError, UnusableSource) as error:
            os.ftruncate(self._fd, old_bytes)
            if isinstance(error, UnusableSource):
                raise
            why = os.strerror(error.errno or 0).lower()
            raise NoSpace(path=self.name, wanted=format_size(size_bytes), why=why) from None
        return old_bytes

    def give_back(self, old_bytes: int) -> None:
        """Undo `extend`, which has returned `old_bytes`. The added part must not be in use."""
        self._remap(old_bytes & -FRAME_BYTES)
        if not self.source.kind.is_device:
            os.ftruncate(self._fd, old_bytes)

    def is_hole(self, offset_bytes: int, length_bytes: int) -> bool:
        if self.reserved:
            return False
        try:
            return os.lseek(self._fd, offset_bytes, os.SEEK_DATA) >= offset_bytes + length_bytes
        except OSError as error:
            # Behind the end of a file that was cut off, bytes are lost: that is not a hole.
            return error.errno == errno.ENXIO and not self._is_cut(offset_bytes + length_bytes)

    def with_memory(self, offset_bytes: int, length_bytes: int) -> Iterator[tuple[int, int]]:
        done, end_bytes = offset_bytes, offset_bytes + length_bytes
        self._check_length(offset_bytes, length_bytes)
        for data, hole in data_ranges(self._fd, offset_bytes, end_bytes):
            # A file system may have smaller blocks than a frame, and two parts in one frame.
            start = max(data & -FRAME_BYTES, done)
            done = max(done, min(align_up(hole, FRAME_BYTES), end_bytes))
            if start < done:
                yield start, done - start

    def advise(self, advice: Advice, offset_bytes: int, length_bytes: int) -> bool:
        """Advise the kernel about a range; whether it took the advice."""
        start = offset_bytes & -FRAME_BYTES
        try:
            self._mapping.madvise(advice, start, offset_bytes + length_bytes - start)
        except OSError:
            return False
        return True

    def populate(self, offset_bytes: int, length_bytes: int) -> None:
        # In steps, because no other task of this process runs during one.
        end_bytes = offset_bytes + length_bytes
        for start in range(offset_bytes, end_bytes, _POPULATE_BYTES):
            self.advise(Advice.POPULATE_WRITE, start, min(_POPULATE_BYTES, end_bytes - start))

    def fileno(self) -> int:
        """The descriptor of the source, for the data plane, which maps it as well."""
        return self._fd

    def shared_fd(self, *, writable: bool) -> int:
        """A descriptor for another process, the caller's. As long as it is open there, nobody else
        has a writable medium of this source. Raises OSError.
        """
        # Only the descriptor that is open with O_EXCL keeps the kernel from mounting a device.
        is_exclusive = self.source.kind is SourceKind.BLOCK_DEVICE
        if not (writable or self.read_only or is_exclusive) and self._reading_fd < 0:
            # Without a lock of its own (NFS makes one kind of the two) it would be no use.
            with contextlib.suppress(OSError):
                self._reading_fd = open_for_readers(self._fd)
        return os.dup(self._fd if writable or self._reading_fd < 0 else self._reading_fd)

    def punch_hole(self, offset_bytes: int, length_bytes: int) -> None:
        """Give whole frames back to the file system or device: they read as zeroes from now on.

        The mapping must not be in use there. Raises ReadOnlyMedium, and OSError (EOPNOTSUPP) if the
        source can't give memory back.
        """
        if self.read_only:
            raise ReadOnlyMedium(path=self.name)
        if self.source.kind is SourceKind.DAX_DEVICE:
            raise OSError(errno.EOPNOTSUPP, "a DAX device cannot give memory back")
        writeback.punch_hole(self._fd, offset_bytes, length_bytes)
        # A device has memory everywhere, whatever it does with a punched range.
        self.reserved = self.source.kind.is_device

    def sync_all(self) -> None:
        """msync everything, also what the data plane has stored by its own mapping.

        Raises OSError.
        """
        with self._fence_lock:
            writeback.msync(self._memory)

    def _pread(self, offset_bytes: int, length_bytes: int) -> bytes:
        """A range of a sparse file, as far as the medium has it."""
        wanted_bytes = max(0, min(length_bytes, self.size_bytes - offset_bytes))
        try:
            data = os.pread(self._fd, wanted_bytes, offset_bytes)
        except OSError as error:
            raise self._translated(error, offset_bytes) from None
        if len(data) < wanted_bytes:
            raise self._fault(offset_bytes + len(data))
        return data

    def _pwrite(self, offset_bytes: int, view: memoryview) -> None:
        self._check_length(offset_bytes, len(view))
        try:
            while view:
                written = os.pwrite(self._fd, view, offset_bytes)
                view = view[written:]
                offset_bytes += written
        except OSError as error:
            self.note_shortage(error.errno)
            raise self._translated(error, offset_bytes) from None

    def _fault(self, offset_bytes: int) -> MemoryFault:
        """The fault that this thread has just met in a range, with the real pages put back."""
        met = take_fault(self._owner)
        self.fault_count += 1
        return MemoryFault(pfn=(offset_bytes if met < 0 else met) >> PAGE_SHIFT, path=self.name)

    def _translated(self, error: OSError, offset_bytes: int) -> OSError:
        """The error of a system call, which stands for a fault if it met bad memory."""
        is_fault = error.errno in (errno.EIO, errno.EFAULT)
        return self._fault(offset_bytes) if is_fault else error

    def _is_cut(self, end_bytes: int) -> bool:
        """Whether a file ends before a place up to which the pool should go."""
        return not self.source.kind.is_device and os.fstat(self._fd).st_size < end_bytes

    def _check_length(self, offset_bytes: int, length_bytes: int) -> None:
        """Raise MemoryFault if a part of a range was cut off the file."""
        if self._is_cut(offset_bytes + length_bytes):
            raise self._fault(max(offset_bytes, os.fstat(self._fd).st_size))

    def lose(self, error: OSError) -> None:
        """An msync has failed, here or in another process: no fence succeeds any more."""
        self._lost = error
        self.when_lost(error)

    def _msync(self) -> None:
        # The kernel reports a lost write once. A later msync would succeed and call durable what is
        # not, so after one failure no fence succeeds.
        if self._lost:
            raise OSError(self._lost.errno, "an earlier msync failed")
        with self._chunks_lock:
            chunks, self._unsynced_chunks = self._unsynced_chunks, set()
        try:
            for first, last in _runs(chunks):
                end_bytes = min((last + 1) << _SYNC_CHUNK_SHIFT, self.size_bytes)
                writeback.msync(self._memory[first << _SYNC_CHUNK_SHIFT : end_bytes])
        except OSError as error:
            self.lose(error)
            raise

    def _find_durability(self) -> Durability:
        match self.source.kind:
            case SourceKind.TMPFS_FILE:
                return Durability.VOLATILE
            case SourceKind.DAX_DEVICE:
                return Durability.CACHE_LINES
            # MAP_SYNC does not cover blocks that pwrite allocates in a sparse file. Only the file
            # system's own sync makes sure that they belong to the file.
            case SourceKind.DAX_FILE if self.reserved:
                granted = grants_map_sync(self._fd, writable=not self.read_only)
                return Durability.CACHE_LINES if granted else Durability.MSYNC
            case _:
                return Durability.MSYNC

    @property
    def map_flags(self) -> int:
        """The flags of mmap(2) for mapping this source."""
        if self.source.kind is SourceKind.DAX_FILE and self.durability is Durability.CACHE_LINES:
            return MAP_SHARED_VALIDATE | MAP_SYNC
        return mmap.MAP_SHARED

    def _remap(self, size_bytes: int) -> None:
        """Map another size. The old mapping lasts while views of it are held."""
        self._mapping = self._map(size_bytes)
        self._memory = memoryview(self._mapping)
        self.source = self.source._replace(size_bytes=size_bytes)
        self.size_bytes = size_bytes

    def _map(self, size_bytes: int) -> GuardedMapping:
        flags = self.map_flags
        protection = mmap.PROT_READ | (0 if self.read_only else mmap.PROT_WRITE)
        if self._is_cut(size_bytes):
            raise UnusableSource(path=self.name, why="it can't be mapped: it has become smaller")
        try:
            return GuardedMapping(
                self._fd, size_bytes, flags=flags, prot=protection, owner=self._owner
            )
        except (OSError, ValueError, OverflowError) as error:
            raise UnusableSource(
                path=self.name, why=f"it can't be mapped: {sentence_of(error)}"
            ) from None


def _has_memory_everywhere(fd: int, size_bytes: int) -> bool:
    """Whether a file has no hole, as its file system says, or else by the blocks that it counts.

    A tmpfs has no FIEMAP, but its count of blocks is exact: it counts only content.
    """
    try:
        return has_blocks_everywhere(fd, size_bytes)
    except OSError:
        status = os.fstat(fd)
        return status.st_blocks * 512 >= status.st_size


def _runs(chunks: set[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last), so that one msync covers many chunks."""
    runs: list[tuple[int, int]] = []
    for chunk in sorted(chunks):
        if runs and chunk == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], chunk)
        else:
            runs.append((chunk, chunk))
    return runs
