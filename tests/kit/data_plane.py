"""A data plane without a kernel, for tests: a pool, the shared memory, and one worker."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from kit.pools import mapped_pool
from pmemfs.dataplane.held import OpenPlaces
from pmemfs.dataplane.layouts import Extent
from pmemfs.dataplane.native import Responder
from pmemfs.dataplane.tables import SharedMemory
from pmemfs.engine.base import Engine
from pmemfs.engine.native import PublishedDevice, SharedEngine
from pmemfs.engine.sharing import share_memmap, share_pool
from pmemfs.engine.statistics import EngineStatistics
from pmemfs.engine.trimming import Trimmer
from pmemfs.fuse.forwarded import ForwardedRequests
from pmemfs.fuse.handlers.handlers import Handlers
from pmemfs.fuse.handshake import Terms
from pmemfs.fuse.once import Once
from pmemfs.fuse.published import PublishedTables, Publisher
from pmemfs.fuse.unanswered import Unanswered
from pmemfs.fuse.wiredoor import WireDoor
from pmemfs.media.label import Scheme
from pmemfs.medium.base import Medium
from pmemfs.medium.mapped import MappedMedium
from pmemfs.memmap import Memmap
from pmemfs.pool import Pool
from pmemfs.units import KIB, MIB
from pmemfs.volume.base import Volume
from pmemfs.volume.block import BlockVolume
from pmemfs.volume.fs.filesystem import FileSystem
from pmemfs.volume.onefile import INODE

READ, WRITE, FSYNC, FLUSH, INTERRUPT, FALLOCATE, LSEEK, SYNCFS = 15, 16, 20, 25, 36, 43, 46, 50
IOCTL = 39
TMPFILE, STATX = 51, 52
MAX_WRITE = MIB
LONGEST = MAX_WRITE + 4096
ALL = (1 << 64) - 1
"""Opcodes that the control plane answers."""


def read_in(offset: int, size: int) -> bytes:
    """fuse_read_in."""
    return struct.pack("<QQIIQII", 1, offset, size, 0, 0, 0, 0)


def write_in(offset: int, size: int) -> bytes:
    """fuse_write_in."""
    return struct.pack("<QQIIQII", 1, offset, size, 0, 0, 0, 0)


def lseek_in(offset: int, whence: int) -> bytes:
    """fuse_lseek_in."""
    return struct.pack("<QQII", 1, offset, whence, 0)


class PythonEngine(Engine):
    """A device and its counts, as the handlers have them."""

    def __init__(self, medium: Medium, memmap: Memmap, volume: BlockVolume) -> None:
        super().__init__(medium, memmap)
        self.volume = volume

    def read(self, offset_bytes: int, length_bytes: int) -> bytes | memoryview:
        """READ."""
        data = self.volume.read(INODE, offset_bytes, length_bytes)
        self.count_read(len(data))
        return data

    def write(self, offset_bytes: int, data: bytes) -> int:
        """WRITE."""
        written = self.volume.write(INODE, offset_bytes, data)
        self.count_write(written)
        return written


class InProcess:
    """The native engine as a whole: a worker, and the control plane for what it forwards.

    Answers as `PythonEngine` does, so that one suite serves both.
    """

    def __init__(self, pool: Pool, medium: MappedMedium, *, points: bool = False) -> None:
        self.shared = share_pool(pool, worker_count=2)
        self.memmap: Memmap = share_memmap(pool, medium, self.shared)
        self.shared.set_header_word("answered", ALL)
        self.control = SharedEngine(pool, medium, self.memmap, self.shared)
        onlookers = PublishedDevice(self.control, medium)
        self.volume = BlockVolume(pool, self.memmap, onlookers=onlookers)
        self.worker = Responder(
            self.shared.fd, medium.fileno(), medium.map_flags, MAX_WRITE, points=points
        )
        self.forwarded = 0

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """As the kernel asks for it: no offset is negative, and none past what an off_t holds."""
        request = read_in(offset_bytes & (1 << 64) - 1, length_bytes)
        verdict, error, data = self.worker.answer(request, opcode=READ, inode=INODE)
        if verdict == "forward":
            self.forwarded += 1
            data = bytes(self.volume.read(INODE, offset_bytes, length_bytes))
            self.control.count_read(len(data))
            return data
        if error:
            raise OSError(error, "the data plane refused to read")
        return data

    def write(self, offset_bytes: int, data: bytes) -> int:
        """As `PythonEngine.write`."""
        request = write_in(offset_bytes & (1 << 64) - 1, len(data))
        verdict, error, reply = self.worker.answer(request, opcode=WRITE, inode=INODE, payload=data)
        if verdict == "forward":
            self.forwarded += 1
            written = self.volume.write(INODE, offset_bytes, data)
            self.control.count_write(written)
            return written
        if error:
            raise OSError(error, "the data plane refused to write")
        return int(struct.unpack_from("<I", reply)[0])

    async def fsync(self) -> None:
        """As `PythonEngine.fsync`; a msync is left to the control plane here."""
        verdict, error, _ = self.worker.answer(bytes(16), opcode=FSYNC, inode=INODE)
        if error:
            raise OSError(error, "the data plane refused to sync")
        if verdict == "sync":
            await self.control.make_durable()

    def punch(self, offset_bytes: int, length_bytes: int) -> None:
        """TRIM."""
        trio.run(self.volume.punch, INODE, offset_bytes, length_bytes)

    def statistics(self) -> EngineStatistics:
        """As `PythonEngine.statistics`."""
        return self.control.statistics()


@contextmanager
def in_process(
    directory: Path,
    scheme: Scheme = Scheme.PMEM,
    page_size_bytes: int = 4 * KIB,
    size_bytes: int = 16 * MIB,
) -> Iterator[tuple[Pool, InProcess]]:
    """A native engine over a new, sparse pool."""
    with mapped_pool(directory, scheme, page_size_bytes, size_bytes) as pool:
        assert isinstance(pool.medium, MappedMedium)
        yield pool, InProcess(pool, pool.medium)


@dataclass
class Tables:
    """Shared memory and workers, without page structures."""

    pool: Pool
    shared: SharedMemory
    fd: int
    map_flags: int

    def worker(self, number: int = 0) -> Responder:
        """One more worker."""
        return Responder(self.shared.fd, self.fd, self.map_flags, MAX_WRITE, number=number)


@contextmanager
def some_tables(
    directory: Path, worker_count: int = 2, *, has_files: bool = False
) -> Iterator[Tables]:
    """Tables over a new pool without page structures."""
    with mapped_pool(directory, Scheme.NONE, 4 * KIB, 16 * MIB) as pool:
        assert isinstance(pool.medium, MappedMedium)
        shared = share_pool(
            pool,
            worker_count=worker_count,
            has_files=has_files,
        )
        shared.set_header_word("answered", ALL)
        yield Tables(pool, shared, pool.medium.fileno(), pool.medium.map_flags)


def door_to(
    volume: Volume,
    engine: Engine,
    tables: PublishedTables | None = None,
    max_write: int = MAX_WRITE,
    shared: SharedMemory | None = None,
) -> tuple[Handlers, WireDoor]:
    """The handlers of a volume, and the wire door to them; over shared memory, if there is any,
    where they go on as whoever used it before."""
    fs = volume if isinstance(volume, FileSystem) else None
    pool = fs.store.pool if fs else volume._pool  # type: ignore[attr-defined]
    handlers = Handlers(
        volume,
        engine,
        Trimmer(pool, pool.medium, engine, fs),
        publisher=Publisher(fs, tables) if fs and tables else None,
        published=tables.attributes if tables else None,
        opens=OpenPlaces(shared.opens) if shared else None,
    )
    terms = Terms(max_write, 64, has_files=volume.has_files, over_uring=False)
    return handlers, WireDoor(handlers, terms, shared)


@dataclass
class SharedFiles:
    """A file system, and what it shares with a data plane."""

    pool: Pool
    medium: MappedMedium
    memmap: Memmap
    shared: SharedMemory
    tables: PublishedTables
    fs: FileSystem
    once: Once

    def again(self) -> SharedFiles:
        """The same, as another process finds it, once this one is not used any more."""
        return share_files(self.pool, SharedMemory(os.dup(self.shared.fd)))

    def engine(self) -> SharedEngine:
        """What the planes do together."""
        return SharedEngine(self.pool, self.medium, self.memmap, self.shared)

    def door(self) -> tuple[Handlers, WireDoor]:
        """The way into it."""
        return door_to(self.fs, self.engine(), self.tables, shared=self.shared)

    def forwarded(self) -> ForwardedRequests:
        """What answers the requests that a worker hands over; what an earlier process has not
        answered comes again."""
        handlers, door = self.door()
        opens = OpenPlaces(self.shared.opens)
        unanswered = Unanswered(self.once, handlers, opens, self.fs, self.tables)
        return ForwardedRequests(door, LONGEST, self.once, unanswered)

    def worker(self, *, forward_fd: int = -1) -> Responder:
        """A worker of the data plane."""
        return Responder(self.shared.fd, self.medium.fileno(), self.medium.map_flags, MAX_WRITE,
                         forward_fd=forward_fd)  # fmt: skip


@dataclass
class SharedDevice:
    """A device, and what it shares with a data plane."""

    pool: Pool
    shared: SharedMemory
    volume: BlockVolume
    engine: SharedEngine
    once: Once

    def forwarded(self) -> ForwardedRequests:
        """As of `SharedFiles`."""
        handlers, door = door_to(self.volume, self.engine, shared=self.shared)
        unanswered = Unanswered(self.once, handlers, OpenPlaces(self.shared.opens))
        return ForwardedRequests(door, LONGEST, self.once, unanswered)


def share_device(pool: Pool, shared: SharedMemory) -> SharedDevice:
    """The device of a pool over shared memory."""
    medium = pool.medium
    assert isinstance(medium, MappedMedium)
    memmap = share_memmap(pool, medium, shared)
    engine = SharedEngine(pool, medium, memmap, shared)
    volume = BlockVolume(pool, memmap, onlookers=PublishedDevice(engine, medium))
    return SharedDevice(pool, shared, volume, engine, Once(shared.answers))


@contextmanager
def shared_files(directory: Path, scheme: Scheme = Scheme.NONE) -> Iterator[SharedFiles]:
    """A new, empty file system of 64 MiB, and what a worker sees of it."""
    with mapped_pool(directory, scheme, 4 * KIB, 64 * MIB) as pool:
        FileSystem.format(pool)
        shared = share_pool(pool, worker_count=1, has_files=True)
        shared.set_header_word("answered", ALL)
        yield share_files(pool, shared)
        shared.close()


def share_files(pool: Pool, shared: SharedMemory) -> SharedFiles:
    """The file system of a pool over shared memory."""
    medium = pool.medium
    assert isinstance(medium, MappedMedium)
    tables = PublishedTables(shared)
    memmap = share_memmap(pool, medium, shared)
    once = Once(shared.answers)
    shared.take_back_holds()
    fs = FileSystem(pool, memmap, tables, shared.lookup_counts, once)
    return SharedFiles(pool, medium, memmap, shared, tables, fs, once)


def extent(index: int, pfn: int, frame_count: int) -> Extent:
    """A run of frames of a file."""
    return Extent(index, pfn, frame_count, 0)
